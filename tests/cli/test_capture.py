"""`hf-guide capture` keeps what a distillation of the same data looks up."""

import argparse
import dataclasses
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_guide.cli import capture as capture_command
from hf_guide.cli.main import main
from hf_guide.data.arguments import DataArguments
from hf_guide.data.loading import load_splits
from hf_guide.data.preprocessing import preprocess
from hf_guide.errors import CaptureError, OptionError, TeacherError
from hf_guide.signal_cache.config import CaptureConfig
from hf_guide.signal_cache.reader import Capture, CaptureDataCollator
from hf_guide.tasks import Task
from tests.signal_cache.tiny_teachers import TEACHERS, VOCABULARY


def parser() -> argparse.ArgumentParser:
    processed = argparse.ArgumentParser()
    capture_command.add_arguments(processed)
    return processed


def run(*words: object) -> int:
    return capture_command.run(parser().parse_args([*map(str, words), "--no-progress"]))


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    words = {f"w{number}": number for number in range(VOCABULARY - 1)} | {"[MASK]": VOCABULARY - 1}
    backend = Tokenizer(models.WordLevel(words, unk_token="w1"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="w0", unk_token="w1", eos_token="w2", mask_token="[MASK]"
    )
    for task in ("causal-lm", "masked-lm", "sequence-classification"):
        TEACHERS[task].teacher().save_pretrained(tmp_path / task)
        tokenizer.save_pretrained(tmp_path / task)
    return tmp_path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        {"text": " ".join(f"w{3 + (7 * row + place) % 90}" for place in range(5 + row % 4)), "label": row % 3}
        for row in range(40)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "data.jsonl"


def training(task: Task, folder: Path, **options):
    """Return the datasets and the collator that a distillation of the same data would use."""
    from transformers import AutoConfig, AutoTokenizer

    chosen = DataArguments(**options)
    train, held_out = load_splits(chosen)
    tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    return preprocess(task, train, held_out, tokenizer, chosen, static_masking=True, config=config)


@pytest.mark.parametrize("task", ["causal-lm", "masked-lm", "sequence-classification"])
def test_what_is_captured_is_what_a_distillation_of_the_same_data_looks_up(task, teacher, data, capsys):
    flags = (
        [] if task == "sequence-classification" else ["--top-k", 8, "--temperatures", 2, 4, "--hidden-layers", 0, -1]
    )
    output = teacher / "captured"
    words = [
        teacher / task,
        "-o",
        output,
        "--data-files",
        data,
        "--max-length",
        16,
        "--validation-split-percentage",
        20,
    ]
    assert run(*words, *flags, "--save-penultimate", "--shard-size", 4) == 0
    printed = capsys.readouterr().out
    assert f"{len(Capture.open(output))} examples" in printed and f"teacher_cache: {output}" in printed
    same = training(Task(task), teacher / task, data_files=str(data), max_length=16, validation_split_percentage=20)
    processed = Capture.open(output)
    assert len(processed) == len(same.train) + len(same.eval)
    for split in (same.train, same.eval):
        batch = CaptureDataCollator(same.collator, processed)([split[number] for number in (0, 1)])
        assert "teacher_features" in batch and ("teacher_hidden_4" in batch) == bool(flags)
    assert run(*words, *flags, "--save-penultimate", "--shard-size", 4) == 0  # finished already
    with pytest.raises(CaptureError, match="shard_size is 4 there and 5 here"):
        run(*words, *flags, "--save-penultimate", "--shard-size", 5)


def test_where_no_length_is_asked_for_a_capture_has_that_of_a_distillation(teacher, data):
    words = [
        teacher / "causal-lm",
        "-o",
        teacher / "captured",
        "--data-files",
        data,
        "--validation-split-percentage",
        20,
    ]
    assert run(*words, "--top-k", 4) == 0
    same = training(Task.CAUSAL_LM, teacher / "causal-lm", data_files=str(data), validation_split_percentage=20)
    results = CaptureDataCollator(same.collator, Capture.open(teacher / "captured"))(list(same.train))
    assert results["teacher_topk_indices"].shape[:2] == results["input_ids"].shape


def test_an_old_flag_is_taken_with_a_warning_that_names_the_new_one(teacher, data):
    words = [teacher / "causal-lm", "-o", teacher / "captured", "--data-files", data, "--top-k", 4, "--max-length", 8]
    with pytest.warns(FutureWarning, match="'--examples-per-shard' is deprecated; use '--shard-size'"):
        assert main(["capture", *map(str, words), "--examples-per-shard", "3", "--no-progress"]) == 0
    assert Capture.open(teacher / "captured").manifest.config.shard_size == 3


def test_the_config_of_a_distillation_gives_teacher_and_data(teacher, data):
    config = {"teacher": str(teacher / "causal-lm"), "data_files": str(data), "max_length": 12, "learning_rate": 1e-3}
    (teacher / "distill.yaml").write_text(json.dumps(config))
    words = ["-o", teacher / "captured", "--config", teacher / "distill.yaml", "--top-k", 4]
    assert run(*words, "--train-only") == 0
    same = training(Task.CAUSAL_LM, teacher / "causal-lm", data_files=str(data), max_length=12)
    assert len(Capture.open(teacher / "captured")) == len(same.train)
    asking = config | {"temperature": 3.0, "losses": {"hidden_states": 1, "features": 1}}
    (teacher / "distill.yaml").write_text(json.dumps(asking))
    with pytest.raises(OptionError, match="set layer_mapping there, or pass --hidden-layers"):
        run(*words)
    (teacher / "distill.yaml").write_text(json.dumps(asking | {"layer_mapping": {"1": 2, "2": 4}}))
    words[1] = teacher / "asked"
    assert run(*words) == 0
    processed = Capture.open(teacher / "asked").manifest
    assert processed.temperatures == [1.0, 3.0] and set(processed.shapes) == {"hidden_2", "hidden_4", "features"}
    (teacher / "distill.yaml").write_text(json.dumps(config | {"max_lenght": 3}))
    with pytest.raises(OptionError, match="has an unknown key 'max_lenght'. Did you mean 'max_length'"):
        run(*words)
    (teacher / "distill.yaml").write_text("[1, 2]")
    with pytest.raises(OptionError, match="must be a mapping of options to values; found list"):
        run(*words)


def test_wrong_usage_is_an_error_before_any_work(teacher, data):
    with pytest.raises(OptionError, match="No teacher is given"):
        run("-o", teacher / "captured", "--data-files", data)
    with pytest.raises(OptionError, match="No dataset is given"):
        run(teacher / "causal-lm", "-o", teacher / "captured")
    with pytest.raises(CaptureError, match="holds something else: config.json"):
        run(teacher / "causal-lm", "-o", teacher / "masked-lm", "--data-files", data)
    with pytest.raises(TeacherError, match="nowhere cannot be loaded"):
        run(teacher / "nowhere", "-o", teacher / "captured", "--data-files", data)
    assert not (teacher / "captured").exists()


def test_every_option_is_a_flag_that_shows_its_help():
    shown = parser().format_help().split()
    for kind in (CaptureConfig, DataArguments):
        for field in dataclasses.fields(kind):
            if field.name != "remove_unused_columns":
                assert "--" + field.name.replace("_", "-") in " ".join(shown).replace(",", " ").split(), field.name


def test_options_of_chat_data_are_flags() -> None:
    words = [
        "teacher",
        "-o",
        "out",
        "--assistant-only-loss",
        "--no-completion-only-loss",
        "--chat-template-path",
        "a.jinja",
    ]
    args = parser().parse_args(words)
    assert (args.assistant_only_loss, args.completion_only_loss, args.chat_template_path) == (True, False, "a.jinja")
    assert parser().parse_args(["teacher", "-o", "out"]).completion_only_loss is None
