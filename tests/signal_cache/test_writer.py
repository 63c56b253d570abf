"""A capture is written once, atomically, and resumed after a kill; what cannot be captured is an error before work is lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertForNextSentencePrediction, LlamaConfig, LlamaForCausalLM

from hf_guide.errors import CaptureError, HfGuideError, OptionError, TaskError, TeacherError
from hf_guide.signal_cache import writer as capture_run
from hf_guide.signal_cache.config import CaptureConfig
from hf_guide.signal_cache.reader import Capture, CaptureDataCollator
from hf_guide.signal_cache.writer import capture_teacher
from hf_guide.utils.checksums import read_json, write_json
from hf_guide.utils.fingerprint import SAMPLES_PER_TENSOR, weights_fingerprint
from tests.signal_cache.tiny_teachers import TEACHERS, VOCABULARY, Examples, Pad, count_forwards, examples_for
from tests.tiny import run_python

CONFIG = {"top_k": 8, "shard_size": 5, "batch_size": 2}
KIND = TEACHERS["causal-lm"]


def capture(folder, *, teacher=None, dataset=None, collator=None, options=None, **config):
    return capture_teacher(
        teacher or KIND.teacher(),
        examples_for("causal-lm") if dataset is None else dataset,
        folder,
        data_collator=collator or Pad(),
        config={**CONFIG, **config},
        show_progress=False,
        **(options or {}),
    )


def assert_raises(error, message, folder, **given):
    """Assert that a capture raises an error whose message matches."""
    with pytest.raises(error, match=message):
        capture(folder, **given)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_at_most_300_bytes_a_token_with_64_of_a_quarter_million_tokens(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=262144, num_key_value_heads=1, **sizes))
    dataset = Examples({"input_ids": list(range(number, number + 64))} for number in range(4))
    made = capture(tmp_path, teacher=model, dataset=dataset, top_k=64, temperatures=[2.0], shard_size=4)
    for bits, vocabulary in ((0, 60000), (1, 131072)):
        capture(tmp_path / str(bits), teacher=model, dataset=dataset, top_k=64, vocabulary_size=vocabulary)
    size = sum(path.stat().st_size for path in tmp_path.iterdir() if path.is_file() and path.suffix == ".arrow")
    assert 64 * 4 < size / (4 * 64) < 300
    assert made.manifest.example_bytes(64) == 16 + 64 * (64 * 4 + 16 + 8)
    with torch.no_grad():
        expected = model(torch.tensor([dataset[1]["input_ids"]])).logits
    batch = CaptureDataCollator(Pad(), made)([dataset[1]])
    assert batch["teacher_topk_indices"].max() > 2**17
    assert torch.equal(batch["teacher_topk_indices"], expected.topk(64).indices)
    batch = CaptureDataCollator(Pad(), Capture.open(tmp_path / "1"))([dataset[1]])
    cut = expected[..., :131072]
    assert torch.equal(batch["teacher_topk_indices"], cut.topk(64).indices)
    best = cut.log_softmax(-1).topk(64).values
    torch.testing.assert_close(batch["teacher_topk_log_probs"], best, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("workers", [0, 1])
def test_workers_make_the_same_batches(tmp_path, workers):
    capture(tmp_path / "made", options={"dataloader_num_workers": workers})
    capture(tmp_path / "expected")
    assert contents(tmp_path / "made") == contents(tmp_path / "expected")


def test_a_capture_in_a_folder_that_is_not_writable_is_read_if_complete_and_not_continued(tmp_path, monkeypatch):
    capture(tmp_path)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and not mode & os.W_OK)  # as for no root
    capture(tmp_path)
    next(tmp_path.glob("*.arrow")).unlink()
    with pytest.raises(PermissionError, match=f"{tmp_path} is not writable. Make it writable"):
        capture(tmp_path)


@pytest.mark.extended
def test_a_killed_capture_is_resumed(tmp_path):
    script = """
    import sys, time
    from hf_guide.signal_cache.writer import capture_teacher
    from tests.signal_cache.tiny_teachers import Pad, TEACHERS, examples_for

    class Slow(Pad):
        def __call__(self, features):
            time.sleep(0.05)
            return super().__call__(features)

    capture_teacher(TEACHERS["causal-lm"].teacher(), examples_for("causal-lm", 60), sys.argv[1], data_collator=Slow(),
                    config={"top_k": 8, "shard_size": 5, "batch_size": 2}, show_progress=False)
    """
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    dataset = examples_for("causal-lm", 60)
    capture(whole, dataset=dataset)
    running = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(folder)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while len(list(folder.glob("shard-*"))) < 3:
            assert running.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        os.kill(running.pid, signal.SIGKILL)
        running.wait()
    kept = {path.name: path.stat().st_ino for path in folder.glob("shard-*")}
    assert 3 <= len(kept) < 12
    with pytest.raises(CaptureError, match=f"is not complete: {len(kept)} of 12 shards"):
        Capture.open(folder)
    model, forwards = KIND.teacher(), []
    count_forwards(model, forwards)
    capture(folder, teacher=model, dataset=dataset)
    num_forwards = sum(forwards)
    assert {name: (folder / name).stat().st_ino for name in kept} == kept
    assert contents(folder) == contents(whole)
    forwards.clear()
    capture(folder, teacher=model, dataset=dataset)  # runs what shows the shapes, and no more
    assert num_forwards == 60 - 5 * len(kept) + sum(forwards)


@pytest.mark.slow
def test_a_capture_killed_before_or_after_any_rename_is_resumed(tmp_path):
    script = """
    import os, signal, sys
    from pathlib import Path
    from hf_guide.utils import files
    from hf_guide.signal_cache.writer import capture_teacher
    from tests.signal_cache.tiny_teachers import TEACHERS, Pad, examples_for

    sync_and_rename = files.sync_and_rename

    def capture(folder):
        capture_teacher(TEACHERS["causal-lm"].teacher(), examples_for("causal-lm", 12), folder, data_collator=Pad(),
                        config={"top_k": 8, "shard_size": 5, "batch_size": 2}, show_progress=False)

    def capture_and_die(folder, moment):
        named = 0
        def dying(partial, path):
            nonlocal named
            if named == moment // 2:
                if moment % 2:
                    sync_and_rename(partial, path)
                os.kill(os.getpid(), signal.SIGKILL)
            named += 1
            sync_and_rename(partial, path)
        files.sync_and_rename = dying
        capture(folder)

    def apart(work, *given):
        child = os.fork()
        if child == 0:
            try:
                work(*given)
                os._exit(0)
            finally:
                os._exit(1)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def contents(folder):
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}

    capture(sys.argv[1] + "/whole")  # here, so that the children need not import anything
    expected, moment = contents(sys.argv[1] + "/whole"), 0
    while (code := apart(capture_and_die, f"{sys.argv[1]}/{moment}", moment)) == -signal.SIGKILL:
        assert apart(capture, f"{sys.argv[1]}/{moment}") == 0
        assert contents(f"{sys.argv[1]}/{moment}") == expected, moment
        moment += 1
    print(code, moment)
    """
    found = run_python(textwrap.dedent(script), tmp_path, OMP_NUM_THREADS="1").split()
    assert found == [
        "0",
        "18",
    ]  # the manifest, three shards and checksums, the index, the manifest: before and after each


def test_a_finished_capture_is_opened_again_without_running_over_the_dataset(tmp_path):
    capture(tmp_path)
    before, forwards, model = contents(tmp_path), [], KIND.teacher()
    count_forwards(model, forwards)
    assert len(capture(tmp_path, teacher=model, batch_size=7)) == 23
    assert sum(forwards) < 23 and contents(tmp_path) == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"top_k": 9}, "top_k is 8 there and 9 here"),
        ({"temperatures": [2.0]}, r"temperatures is \[1.0\] there and \[1.0, 2.0\] here"),
        ({"hidden_layers": [1]}, r"hidden_layers is \[\] there and \[1\] here"),
        ({"teacher": lambda: KIND.teacher(num_hidden_layers=3)}, "weights is '.*' there and '.*' here"),
        ({"teacher": lambda: KIND.teacher().bfloat16()}, "teacher_dtype is 'float32' there and 'bfloat16' here"),
        ({"dataset": lambda: examples_for("causal-lm", 24)}, "examples is 23 there and 24 here"),
        (
            {"dataset": lambda: Examples(reversed(examples_for("causal-lm")))},
            "another dataset: example .* is another one",
        ),
    ],
)
def test_resuming_with_other_settings_names_what_differs(tmp_path, changed, message):
    capture(tmp_path)
    before = contents(tmp_path)
    given = {name: value() if callable(value) else value for name, value in changed.items()}
    assert_raises(CaptureError, message, tmp_path, **given)
    assert contents(tmp_path) == before


def test_an_interrupted_capture_is_not_continued_with_an_edited_teacher(tmp_path):
    teacher = KIND.teacher()
    weight, name = teacher.get_input_embeddings().weight, "shard-000002.arrow"
    capture(tmp_path, teacher=teacher)
    before, weights = contents(tmp_path), weights_fingerprint(teacher)
    (tmp_path / name).unlink()
    sampled = torch.linspace(0, weight.numel() - 1, SAMPLES_PER_TENSOR, dtype=torch.float64).long()
    with torch.no_grad():
        weight.view(-1)[sampled[30] + 1 : sampled[31]] *= 1.25
    assert weights_fingerprint(teacher) == weights, "no sampled value is of the edit"
    assert_raises(
        CaptureError, "another teacher: teacher_values is '.*' there and '.*' here", tmp_path, teacher=teacher
    )
    capture(tmp_path)
    assert contents(tmp_path) == before


def test_a_capture_of_an_earlier_version_is_continued(tmp_path):
    capture(tmp_path)
    manifest, _ = read_json(tmp_path / "capture.json")
    del manifest["teacher_values"]
    write_json(tmp_path / "capture.json", manifest)
    (tmp_path / "shard-000002.arrow").unlink()
    assert len(capture(tmp_path)) == 23


def test_a_missing_or_truncated_shard_is_named_and_written_again_alone(tmp_path):
    capture(tmp_path)
    before = contents(tmp_path)
    shard, other = tmp_path / "shard-000001.arrow", tmp_path / "shard-000003.arrow"
    shard.unlink()
    with pytest.raises(CaptureError, match="shard-000001.arrow is missing. Run the same capture again"):
        Capture.open(tmp_path)
    other.write_bytes(before[other.name][:-40])
    kept = (tmp_path / "shard-000000.arrow").stat().st_ino
    capture(tmp_path)
    assert contents(tmp_path) == before and (tmp_path / "shard-000000.arrow").stat().st_ino == kept
    shard.write_bytes(before[shard.name][:100])
    with pytest.raises(CaptureError, match="shard-000001.arrow has 100 bytes and should have .* truncated"):
        Capture.open(tmp_path)
    shard.write_bytes(bytes(len(before[shard.name])))
    made, collate = Capture.open(tmp_path), Pad()
    with pytest.raises(CaptureError, match="shard-000001.arrow is damaged: its checksum must be"):
        CaptureDataCollator(collate, made)(examples_for("causal-lm")[5:7])
    shard.write_bytes(before[shard.name])
    (tmp_path / "index.arrow").unlink()
    with pytest.raises(CaptureError, match="index.arrow is missing or damaged"):
        Capture.open(tmp_path)
    capture(tmp_path)
    assert contents(tmp_path) == before


def test_a_folder_without_a_capture_or_with_a_damaged_manifest_is_named(tmp_path):
    with pytest.raises(CaptureError, match="holds no capture: it has no capture.json"):
        Capture.open(tmp_path)
    capture(tmp_path / "made")
    manifest = tmp_path / "made" / "capture.json"
    whole, _ = read_json(manifest)
    for entries, message in (
        (whole | {"format": 4}, "has format 4; this version of hf_guide reads formats 1 to 3"),
        ({name: value for name, value in whole.items() if name != "classes"}, r"\['classes'\] are missing"),
    ):
        write_json(manifest, entries)
        with pytest.raises(CaptureError, match=message):
            Capture.open(tmp_path / "made")
    for text in ("{", json.dumps(whole)):
        manifest.write_text(text)
        with pytest.raises(CaptureError, match="is damaged"):
            Capture.open(tmp_path / "made")


def test_an_output_that_holds_something_else_is_an_error_before_the_teacher_is_loaded(tmp_path):
    (tmp_path / "model.safetensors").write_text("a model")
    assert_raises(CaptureError, "holds something else: model.safetensors", tmp_path, teacher="no/such-teacher")
    assert_raises(CaptureError, "is a file", tmp_path / "model.safetensors", teacher="no/such-teacher")
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_an_output_that_is_not_finite_names_the_example(tmp_path):
    model, dataset = KIND.teacher(), examples_for("causal-lm")
    token = next(token for token in dataset[13]["input_ids"] if all(token not in e["input_ids"] for e in dataset[:13]))
    place = dataset[13]["input_ids"].index(token)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
    assert_raises(
        CaptureError, f"logits of example 13 are not finite at position {place}", tmp_path / "lm", teacher=model
    )
    finished = sorted(path.name for path in (tmp_path / "lm").iterdir() if not path.name.endswith(".arrow.json"))
    assert finished == ["capture.json", "shard-000000.arrow", "shard-000001.arrow"]  # nothing half-written
    kind = TEACHERS["image-classification"]
    images = examples_for("image-classification")
    images[4]["pixel_values"][0, 0, 0] = float("inf")
    with pytest.raises(CaptureError, match="logits of example 4 are not finite"):
        capture_teacher(kind.teacher(), images, tmp_path / "image", data_collator=Pad(), show_progress=False)


def test_hidden_states_beyond_float16_are_an_error_that_names_the_option(tmp_path):
    model = KIND.teacher()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1e6)
    message = "hidden_0 of example 0 are not finite in float16: pass hidden_dtype='float32'"
    assert_raises(CaptureError, message, tmp_path, teacher=model, hidden_layers=[0])
    assert len(capture(tmp_path, teacher=model, hidden_layers=[0], hidden_dtype="float32")) == 23


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"top_k": VOCABULARY + 1},
            f"top_k is {VOCABULARY + 1}; it must be at most {VOCABULARY}, the rows of the vocabulary",
        ),
        ({"vocabulary_size": VOCABULARY + 1}, f"vocabulary_size is {VOCABULARY + 1}; it must be at most {VOCABULARY}"),
        ({"vocabulary_size": 7}, "top_k is 8; it must be at most 7"),
        ({"hidden_layers": [5]}, "hidden_layers has layer 5; this teacher has layers 0 to 4"),
        ({"top_k": 0}, "top_k must be a whole number of at least 1; found 0"),
        ({"temperatures": [0.0]}, "temperatures must be a number from 0.001 to 1000; found 0.0"),
        ({"log_prob_dtype": "float8"}, "expected one of .*float16"),
        ({"topk": 4}, "has no 'topk'; .* Did you mean 'top_k'"),
        ({"hidden_layers": "last"}, "hidden_layers must be a list of layer numbers"),
        ({"save_penultimate": "yes"}, "save_penultimate must be True or False"),
    ],
)
def test_options_out_of_range_are_errors_before_anything_is_written(tmp_path, config, message):
    assert_raises(OptionError, message, tmp_path / "out", **config)
    assert not (tmp_path / "out").exists()


def test_datasets_and_teachers_that_cannot_be_captured_are_errors(tmp_path):
    class Stream:
        def __iter__(self):
            return iter(())

    assert_raises(
        OptionError, "must have a length and an index, so that .* found a Stream", tmp_path, dataset=Stream()
    )
    assert_raises(OptionError, "The dataset is empty", tmp_path, dataset=Examples())
    assert_raises(TeacherError, "no-such-folder", tmp_path, teacher=str(tmp_path / "no-such-folder"))
    assert_raises(OptionError, "this one is loaded already", tmp_path, options={"dtype": "float16"})
    assert_raises(
        OptionError, "A teacher must be a Hub id, a folder or a PreTrainedModel; found int 3", tmp_path, teacher=3
    )
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    assert_raises(
        TaskError,
        "BertForNextSentencePrediction is for a task that cannot",
        tmp_path,
        teacher=BertForNextSentencePrediction(config),
    )
    text = Dataset.from_dict({"text": ["some", "words"]})
    assert_raises(CaptureError, r"The teacher takes none of the dataset's columns \['text'\]", tmp_path, dataset=text)
    merging = lambda features: {name: value[:1] for name, value in Pad()(features).items()}  # noqa: E731
    assert_raises(CaptureError, "The collator made 1 rows of 2 examples", tmp_path, collator=merging)


def test_a_disk_that_is_too_small_is_an_error_before_it_is_written_to(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(capture_run.shutil, "disk_usage", lambda folder: usage._replace(free=2000))
    assert_raises(CaptureError, "takes about .* MiB and .* has 0 MiB free", tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["capture.json"]


def test_the_estimate_of_the_space_is_near_what_is_written(tmp_path):
    made = capture(tmp_path, hidden_layers=[1], save_penultimate=True, temperatures=[2.0], shard_size=23)
    estimated = sum(made.manifest.example_bytes(len(example["input_ids"])) for example in examples_for("causal-lm"))
    written = (tmp_path / "shard-000000.arrow").stat().st_size
    assert 0.7 * written < estimated < written


@pytest.mark.parametrize("task", ["causal-lm", "token-classification"])
def test_a_dataset_with_labels_and_other_columns_needs_no_collator(task, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCABULARY)})), pad_token="w0"
    )
    examples = examples_for(task)
    rows = [{**each, "labels": each["input_ids"], "text": "words", "number": 3} for each in examples]
    config = {"shard_size": 5, "batch_size": 4} | ({"top_k": 8} if task == "causal-lm" else {})
    made = capture_teacher(
        TEACHERS[task].teacher(),
        Dataset.from_list(rows),
        tmp_path,
        processing_class=tokenizer,
        config=config,
        show_progress=False,
    )
    assert len(made) == len(CaptureDataCollator(Pad(), made)(examples)["input_ids"])
    made.check(processing_class=tokenizer)
    tokenizer.add_tokens(["another"])
    with pytest.raises(CaptureError, match="captured with another tokenizer or processor than this"):
        Capture.open(tmp_path, processing_class=tokenizer)


def test_a_teachers_folder_is_known_again_and_another_is_named(tmp_path):
    KIND.teacher().save_pretrained(tmp_path / "teacher")
    made = capture(tmp_path / "made", teacher=str(tmp_path / "teacher"))
    assert made.manifest.teacher == "teacher" and made.manifest.files
    made.check(teacher=str(tmp_path / "teacher"), dataset=examples_for("causal-lm"))
    KIND.teacher().save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    made.check(teacher=tmp_path / "sharded")
    made.check(teacher=KIND.teacher())
    other = KIND.teacher()
    with torch.no_grad():
        other.model.layers[2].mlp.up_proj.weight.mul_(1.1)
    other.save_pretrained(tmp_path / "other")
    for teacher in (other, tmp_path / "other"):
        with pytest.raises(CaptureError, match="another teacher, .*: the shapes agree, the weights differ"):
            made.check(teacher=teacher)
    with pytest.raises(CaptureError, match="num_hidden_layers is 4 there and 2 here"):
        Capture.open(tmp_path / "made", teacher=KIND.teacher(num_hidden_layers=2))
    with pytest.raises(CaptureError, match="holds 23 examples and the dataset has 24"):
        made.check(dataset=examples_for("causal-lm", 24))
    with pytest.raises(OptionError, match="found int 3"):
        made.check(teacher=3)


def test_a_checkpoint_without_all_of_the_teacher_is_an_error(tmp_path):
    KIND.teacher().model.save_pretrained(tmp_path / "teacher")
    config = json.loads((tmp_path / "teacher" / "config.json").read_text())
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    assert_raises(
        TeacherError,
        "1 parameters are not in the checkpoint .* lm_head",
        tmp_path / "out",
        teacher=tmp_path / "teacher",
    )


def test_the_teacher_is_left_as_it_was(tmp_path):
    model = KIND.teacher().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    capture(tmp_path, teacher=model, save_penultimate=True)
    assert model.training and all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("task", TEACHERS)
def test_the_teachers_config_is_there_without_the_teacher(task, tmp_path):
    model = TEACHERS[task].teacher()
    made = capture_teacher(
        model, examples_for(task), tmp_path, data_collator=Pad(), config={"top_k": 8}, show_progress=False
    )
    config = made.manifest.teacher_config_object()
    assert type(config) is type(model.config) and config.id2label == model.config.id2label
    assert config.to_diff_dict().keys() == model.config.to_diff_dict().keys()
    assert f"23 examples of {type(model).__name__}" in made.summary()


def test_the_config_is_copied_and_its_values_normalised(tmp_path):
    config = CaptureConfig(temperatures=2, hidden_layers=(1, 1, -1))
    assert config.temperatures == [1.0, 2.0] and config.hidden_layers == [1, -1]
    made = capture_teacher(
        KIND.teacher(), examples_for("causal-lm"), tmp_path, data_collator=Pad(), config=config, show_progress=False
    )
    assert made.manifest.config.hidden_layers == [1, 4] and config.hidden_layers == [1, -1]
    assert made.manifest.temperatures == [1.0, 2.0] and issubclass(CaptureError, HfGuideError)
