"""What is saved is a stock model and its report, on disk and on the Hub, or nothing is saved."""

import copy
import json
import os
import pickle
import resource
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments

from hf_guide import FromTeacherMixin, InitializationReport, OptionError, from_teacher
from hf_guide.hub.metadata import RECORD_NAME, DistillationRecord, load_record
from hf_guide.hub.model_card import PLOT_NAME, TRAINING_PLOT_NAME, write_model_card
from hf_guide.hub.push import attach_record, attach_report
from hf_guide.initialization.report import REPORT_NAME, format_count
from tests.fake_hub import FakeHub, fake_hub
from tests.tiny import KINDS, Kind, inputs, logits, run_python, same_bits

LLAMA = KINDS["llama"]
STOCK = {"config.json", "generation_config.json", "model.safetensors"}


def llama_student(**options) -> LlamaForCausalLM:
    return from_teacher(LLAMA.teacher(), show_progress=False, **LLAMA.smaller, **options)


class MyStudent(FromTeacherMixin, LlamaForCausalLM):
    """A user's class with a method of its own."""

    def loudest(self, **tokens: torch.Tensor) -> torch.Tensor:
        return self(**tokens).logits.argmax(-1)


LOAD = """
    import importlib.abc, json, sys
    from pathlib import Path

    class NoHfGuide(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "hf_guide":
                raise ModuleNotFoundError(name)

    sys.meta_path.insert(0, NoHfGuide())
    import torch, transformers
    from safetensors.torch import load_file, save_file

    for folder in map(Path, sys.argv[1:]):
        about = json.loads((folder / "about.json").read_text())
        model = getattr(transformers, about["auto"]).from_pretrained(folder / "student")
        stock = getattr(transformers, about["auto"]).from_config(model.config)
        shapes = {name: list(tensor.shape) for name, tensor in stock.state_dict().items()}
        assert shapes == {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == about["shapes"]
        assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in stock.parameters())
        assert type(model) is type(stock) and type(model).__name__ == about["class"]
        with torch.no_grad():
            logits = model(**load_file(folder / "inputs.safetensors")).logits
        save_file({"logits": logits} | {n: p.clone() for n, p in model.named_parameters()}, folder / "found.safetensors")
    assert not any(name.partition(".")[0] == "hf_guide" for name in sys.modules)
"""


def test_saved_students_load_stock_in_a_process_that_cannot_have_hf_guide(tmp_path: Path) -> None:
    students = {name: from_teacher(k.teacher(), show_progress=False, **k.smaller) for name, k in KINDS.items()}
    students["llama, own class"] = MyStudent.from_teacher(LLAMA.teacher(), show_progress=False, **LLAMA.smaller)
    kinds = KINDS | {"llama, own class": LLAMA}
    for name, student in students.items():
        folder = tmp_path / name
        student.save_pretrained(folder / "student")
        shapes = {key: list(tensor.shape) for key, tensor in student.state_dict().items()}
        about = {"auto": kinds[name].auto_class, "class": kinds[name].model_class, "shapes": shapes}
        (folder / "about.json").write_text(json.dumps(about))
        save_file(inputs(kinds[name]), folder / "inputs.safetensors")
    run_python(LOAD, *(tmp_path / name for name in students), flags=("-I",))
    for name, student in students.items():
        results = load_file(tmp_path / name / "found.safetensors")
        torch.testing.assert_close(results.pop("logits"), logits(student, kinds[name]))
        expected = dict(student.named_parameters())
        assert results.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in results.items())


@pytest.mark.sampled(8)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("method", ["guide", "uniform", "random"])
def test_the_report_lists_every_parameter_and_is_saved_with_the_weights(
    kind: Kind, method: str, tmp_path: Path
) -> None:
    teacher = kind.teacher()
    student = from_teacher(teacher, method=method, show_progress=False, **kind.smaller)
    report = student.initialization_report
    assert {r.name: r.shape for r in report.parameters} == {n: list(p.shape) for n, p in student.named_parameters()}
    assert len(report.parameters) == len(list(student.parameters()))
    sources = {name: list(tensor.shape) for name, tensor in teacher.state_dict().items()}
    for record in report.parameters:
        if record.source is None:
            assert record.name in report.randomly_initialized or record.steps
        else:
            assert record.source_shape == sources[record.source] and len(record.maps) == len(record.shape)
            assert record.name not in report.randomly_initialized
    assert (report.teacher_class, report.student_class) == (type(teacher).__name__, type(student).__name__)
    assert report.teacher_parameters == teacher.num_parameters()
    assert report.student_parameters == student.num_parameters()
    assert report.options["method"] == method
    student.save_pretrained(tmp_path)
    assert InitializationReport.load(tmp_path) == report
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    files = set(os.listdir(tmp_path))
    assert files - {"generation_config.json"} == {"config.json", "model.safetensors", REPORT_NAME}


def test_a_copied_or_pickled_student_saves_its_own_weights_and_report(tmp_path: Path) -> None:
    student = llama_student()
    copies = {"deep": copy.deepcopy(student), "pickled": pickle.loads(pickle.dumps(student))}
    with torch.no_grad():
        student.model.norm.weight.fill_(5.0)
    for name, copied in copies.items():
        assert type(copied) is LlamaForCausalLM and copied.initialization_report == student.initialization_report
        copied.model.norm.weight.data.fill_(3.0)
        copied.save_pretrained(tmp_path / name)
        assert InitializationReport.load(tmp_path / name) == student.initialization_report
        saved = load_file(tmp_path / name / "model.safetensors")
        assert torch.equal(saved["model.norm.weight"], torch.full((24,), 3.0))
    assert torch.equal(student.model.norm.weight, torch.full((24,), 5.0))


def test_an_untrained_student_does_not_keep_the_record_of_the_one_that_it_replaces(tmp_path: Path) -> None:
    trained = llama_student()
    attach_record(trained, DistillationRecord(steps=7))
    trained.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    attach_report(loaded, trained.initialization_report)
    for student in (loaded, MyStudent.from_pretrained(tmp_path), trained):
        student.save_pretrained(tmp_path)
        assert load_record(tmp_path).steps == 7
    llama_student().save_pretrained(tmp_path)
    assert set(os.listdir(tmp_path)) == STOCK | {REPORT_NAME}, "its report is the same, and it was not trained"


def save_in_worker(_: int, student: LlamaForCausalLM, folder: str) -> None:
    student.save_pretrained(folder)
    with torch.no_grad():
        student.model.norm.weight.fill_(9.0)


@pytest.mark.extended
def test_a_student_goes_to_another_process_and_saves_there(tmp_path: Path) -> None:
    student = llama_student().share_memory()
    arguments = (student, str(tmp_path / "student"))
    torch.multiprocessing.start_processes(save_in_worker, arguments, nprocs=1, start_method="spawn")
    assert InitializationReport.load(tmp_path / "student") == student.initialization_report
    assert torch.equal(student.model.norm.weight, torch.full((24,), 9.0))  # memory was shared, not copied


def test_saving_takes_what_the_stock_method_takes(tmp_path: Path) -> None:
    student = llama_student()
    student.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert same_bits(AutoModelForCausalLM.from_pretrained(tmp_path / "shards"), student)
    half = {name: tensor.half() for name, tensor in student.state_dict().items()}
    student.save_pretrained(tmp_path / "half", state_dict=half, safe_serialization=True)
    assert load_file(tmp_path / "half" / "model.safetensors")["model.norm.weight"].dtype == torch.float16
    for number, other in enumerate(({"is_main_process": False}, None)):
        folder = tmp_path / f"other process {number}"
        student.save_pretrained(folder, **other) if other else student.save_pretrained(folder, False)
        assert not list(folder.iterdir())
    student.save_pretrained(tmp_path / "shards")  # over an earlier one, whose shards go
    assert set(os.listdir(tmp_path / "shards")) - {"model.safetensors.index.json"} == STOCK | {REPORT_NAME}


def test_a_class_of_ones_own_keeps_its_methods_and_saves_as_the_stock_class(tmp_path: Path) -> None:
    student = MyStudent.from_teacher(LLAMA.teacher(), show_progress=False, **LLAMA.smaller)
    assert type(student) is MyStudent
    tokens = inputs(LLAMA)
    assert same_bits(student, llama_student())
    student.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert InitializationReport.load(tmp_path).student_class == "MyStudent"
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(stock) is LlamaForCausalLM and same_bits(stock, student)
    again = MyStudent.from_pretrained(tmp_path)
    assert type(again) is MyStudent and same_bits(again, student) and again.initialization_report is None
    assert torch.equal(again.loudest(**tokens), student.loudest(**tokens))
    again.save_pretrained(tmp_path / "again")
    assert set(os.listdir(tmp_path / "again")) == STOCK
    assert json.loads((tmp_path / "again" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    copied = pickle.loads(pickle.dumps(copy.deepcopy(student)))
    assert copied.initialization_report == student.initialization_report
    with pytest.raises(OptionError, match="MyStudent"):
        MyStudent.from_teacher(LLAMA.teacher(), model_class=LlamaForCausalLM)


PUSH = """
    import sys
    from tests.hub.test_push import LLAMA, MyStudent, llama_student
    student = llama_student()
    student.push_to_hub("me/student")
    student.save_pretrained(sys.argv[1] + "/saved", push_to_hub=True, commit_message="with a word")
    student.save_pretrained(sys.argv[1] + "/elsewhere", push_to_hub=True, repo_id="me/named", private=True)
    own = MyStudent.from_teacher(LLAMA.teacher(), show_progress=False, **LLAMA.smaller)
    own.push_to_hub("me/own")
    own.save_pretrained(sys.argv[1] + "/own", push_to_hub=True, repo_id="me/own-saved")

    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    try:
        student.push_to_hub("me/shut")
    except (HfHubHTTPError, LocalEntryNotFoundError):
        pass
    else:
        raise AssertionError("pushed over a card that was not seen")
"""


def run_with_hub(script: str, hub: FakeHub, folder: Path) -> None:
    """Run a script that uses the fake Hub, with caches of its own."""
    there = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_none", "NO_PROXY": "*"}
    run_python(script, folder, HF_HOME=str(folder / "hf_home"), **there)


def pull(hub: FakeHub, name: str, folder: Path) -> Path:
    """Write a repository's files into a folder."""
    for file, content in hub.repositories[name].items():
        (folder / name / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / name / file).write_bytes(content)
    return folder / name


@pytest.mark.extended
def test_what_is_pushed_is_the_stock_files_the_report_and_its_card(tmp_path: Path) -> None:
    with fake_hub() as hub:
        hub.repositories["me/shut"] = {"README.md": b"mine"}
        hub.refuses.add("/me/shut/resolve/main/README.md")
        run_with_hub(PUSH, hub, tmp_path)
    assert hub.repositories.pop("me/shut") == {"README.md": b"mine"}, "a card that cannot be seen is not pushed over"
    assert set(hub.repositories) == {"me/student", "me/saved", "me/named", "me/own", "me/own-saved"}
    expected = llama_student()
    for name, files in hub.repositories.items():
        assert set(files) == STOCK | {REPORT_NAME, "README.md", PLOT_NAME}, name
        folder = pull(hub, name, tmp_path / "pulled")
        assert json.loads(files["config.json"])["architectures"] == ["LlamaForCausalLM"]
        assert same_bits(AutoModelForCausalLM.from_pretrained(folder), expected)
        assert InitializationReport.load(folder).parameters == expected.initialization_report.parameters
        card = ModelCard.load(folder / "README.md")
        assert card.data.tags == ["hf_guide", "guide"] and f'LlamaForCausalLM.from_pretrained("{name}")' in card.text
        assert all(line in card.text for line in InitializationReport.load(folder).summary().splitlines())
    assert ("me/saved", "with a word") in hub.commits and len(hub.commits) == len(hub.repositories)
    assert ("me/student", "Upload LlamaForCausalLM") in hub.commits
    assert hub.private == {"me/named"}


PUSH_OTHER_WEIGHTS = """
    import sys
    from tests.hub.test_push import LLAMA, MyStudent, llama_student
    own = MyStudent.from_teacher(LLAMA.teacher(), show_progress=False, **LLAMA.smaller)
    for name, student in (("plain", llama_student()), ("own", own)):
        averaged = {key: tensor + 1 for key, tensor in student.state_dict().items()}
        student.save_pretrained(f"{sys.argv[1]}/saved/{name}", state_dict=averaged, push_to_hub=True, variant="ema")
"""


@pytest.mark.extended
def test_what_is_pushed_has_the_weights_that_were_saved(tmp_path: Path) -> None:
    with fake_hub() as hub:
        run_with_hub(PUSH_OTHER_WEIGHTS, hub, tmp_path)
    for name in ("plain", "own"):
        assert not any(file.startswith("model.s") for file in hub.repositories[f"me/{name}"])
        pushed = load_file(pull(hub, f"me/{name}", tmp_path / "pulled") / "model.ema.safetensors")
        expected = {key: tensor + 1 for key, tensor in llama_student().state_dict().items()}
        saved = load_file(tmp_path / "saved" / name / "model.ema.safetensors")
        assert pushed.keys() == saved.keys()
        assert all(torch.equal(pushed[key], expected[key]) and torch.equal(saved[key], expected[key]) for key in saved)


PUSH_AGAIN = """
    import sys
    from transformers import PreTrainedTokenizerFast
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from hf_guide import from_teacher
    from hf_guide.hub.metadata import DistillationRecord, teacher_record
    from hf_guide.hub.push import attach_record
    from tests.tiny import KINDS
    kind = KINDS["llama"]
    kind.teacher().save_pretrained(sys.argv[1] + "/teacher")
    with open(sys.argv[1] + "/teacher/README.md", "w") as file:
        file.write("---\\nlicense: mit\\n---\\n")
    student = from_teacher(sys.argv[1] + "/teacher", show_progress=False, **kind.smaller)
    student.add_model_tags(["tiny"])
    student.push_to_hub("me/mine", private=True, tags=["extra"], commit_description="at length")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a"))).push_to_hub("me/mine")
    teachers = [teacher_record("someone/teacher", revision="main")]
    assert (teachers[0].license, teachers[0].languages) == ("apache-2.0", ["en"])
    attach_record(student, DistillationRecord(teachers, losses={"kd": 1.0}, steps=7, metrics={"eval_loss": 1.5}))
    student.push_to_hub("me/mine")
    student.push_to_hub("me/mine", revision="trial")
    student.push_to_hub("me/mine", create_pr=True)
"""


@pytest.mark.extended
def test_a_card_on_the_hub_keeps_its_own_words(tmp_path: Path) -> None:
    """Pushed, its card edited by hand, its tokenizer added, pushed again after training, to a branch, and as a proposal."""
    with fake_hub() as hub:
        hub.repositories["me/mine"] = {
            "README.md": b"---\nthumbnail: a.png\ntags:\n- mine\n---\n\n# Mine\n\nMy own words.\n"
        }
        hub.repositories["someone/teacher"] = {"README.md": b"---\nlicense: apache-2.0\nlanguage: en\n---\n"}
        run_with_hub(PUSH_AGAIN, hub, tmp_path)
    files = hub.repositories["me/mine"]
    assert set(files) >= STOCK | {REPORT_NAME, RECORD_NAME, "README.md", "tokenizer.json", "tokenizer_config.json"}
    assert hub.private == {"me/mine"} and len(hub.commits) == 5 and hub.proposals == ["me/mine"]
    assert hub.branches["me/mine", "trial"].keys() == files.keys()
    folder = pull(hub, "me/mine", tmp_path)
    card = ModelCard.load(folder / "README.md")
    assert card.text.startswith("\n# Mine\n\nMy own words.\n\n<!-- hf_guide:begin -->")
    assert card.text.count("hf_guide:begin") == 1 and "1 x `kd`" in card.text and "7 steps" in card.text
    assert card.data.to_dict()["thumbnail"] == "a.png"
    assert (card.data.license, card.data.base_model) == ("mit", "someone/teacher"), "what was known stays known"
    assert card.data.tags == ["mine", "hf_guide", "guide", "tiny", "extra", "distillation"]
    assert load_record(folder).steps == 7
    assert InitializationReport.load(folder).teacher == "teacher"
    assert not any(str(tmp_path).encode() in content for content in files.values()), (
        "no file holds a path of this machine"
    )
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in files)
    script = """
        import sys
        from transformers import AutoModelForCausalLM, AutoTokenizer
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
        AutoTokenizer.from_pretrained(sys.argv[1])
        assert type(model).__name__ == "LlamaForCausalLM"
        assert "hf_guide" not in sys.modules
    """
    run_python(script, folder)


def test_a_file_where_the_folder_should_be_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "student").write_text("mine")
    with pytest.raises(NotADirectoryError, match="student is a file; save_directory must be a folder"):
        llama_student().save_pretrained(tmp_path / "student")
    assert (tmp_path / "student").read_text() == "mine" and os.listdir(tmp_path) == ["student"]


@pytest.mark.parametrize("limit", [500, 20_000])
def test_a_disk_that_runs_full_leaves_what_was_there_before(tmp_path: Path, limit: int) -> None:
    """A limit on the length of files stands in for the full disk: the writing of the config fails, or of the weights."""
    student = llama_student()
    (tmp_path / "mine").write_text("mine")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    folders = [tmp_path, tmp_path / "new" / "student"]
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        for folder in folders:
            with pytest.raises(OSError) as failed:
                student.save_pretrained(folder)
            assert "write" in str(failed.value).lower() or "large" in str(failed.value).lower()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == ["mine"]
    student.save_pretrained(tmp_path)
    assert same_bits(AutoModelForCausalLM.from_pretrained(tmp_path), student)


def test_a_student_larger_than_the_free_disk_is_an_error_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = llama_student()
    monkeypatch.setattr(type(student), "get_memory_footprint", lambda self: 2**60)
    with pytest.raises(OSError, match=r"takes 1099511627776\.0 MiB, but .* has only .* MiB free. Free some space"):
        student.save_pretrained(tmp_path / "new" / "student")
    assert not os.listdir(tmp_path)


def test_a_trainer_saves_the_report_too(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path / "run"), report_to=[], use_cpu=True)
    student = llama_student()
    Trainer(model=student, args=arguments).save_model(str(tmp_path / "saved"))
    assert InitializationReport.load(tmp_path / "saved") == student.initialization_report
    assert same_bits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), student)


VISION_LANGUAGE = """
    import sys
    from pathlib import Path

    from hf_guide import DistillationArguments, DistillationTrainer
    from hf_guide.data.image_text import ImageTextCollator
    from tests.small_image_text import FAMILIES, rows

    folder = Path(sys.argv[1])
    FAMILIES["llava"].save(folder / "teacher")
    processor = FAMILIES["llava"].build()[1]
    args = DistillationArguments(
        str(folder / "student"), losses={"ce": 0.5, "kd": 0.5}, max_steps=1, hub_model_id="me/vlm", report_to="none",
        use_cpu=True, remove_unused_columns=False,
    )
    trainer = DistillationTrainer(
        {"text_config": {"num_hidden_layers": 2}}, teacher=str(folder / "teacher"), args=args, train_dataset=rows(3),
        processing_class=processor, data_collator=ImageTextCollator(processor),
    )
    trainer.train()
    trainer.push_to_hub()
"""


@pytest.mark.extended
def test_a_vision_language_student_is_pushed_with_its_processor(tmp_path: Path) -> None:
    with fake_hub() as hub:
        run_with_hub(VISION_LANGUAGE, hub, tmp_path)
        pulled = pull(hub, "me/vlm", tmp_path / "pulled")
    processor = transformers.AutoProcessor.from_pretrained(pulled)
    assert type(processor).__name__ == "LlavaProcessor" and processor.chat_template
    student = transformers.AutoModelForImageTextToText.from_pretrained(pulled)
    assert (
        type(student).__name__ == "LlavaForConditionalGeneration" and student.config.text_config.num_hidden_layers == 2
    )
    card = ModelCard.load(pulled / "README.md")
    assert card.data.pipeline_tag == "image-text-to-text" and "AutoProcessor.from_pretrained(" in card.text


def test_a_card_claims_nothing_of_training_that_is_not_recorded(tmp_path: Path) -> None:
    """Trained by a stock `Trainer`, a student has no record of it; neither has one that is made of it."""
    student = llama_student()
    args = TrainingArguments(str(tmp_path / "run"), max_steps=1, report_to=[], save_strategy="no", use_cpu=True)
    Trainer(student, args, train_dataset=[{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}]).train()
    student.save_pretrained(tmp_path / "trained")
    text = write_model_card(tmp_path / "trained").read_text()
    assert "No evaluation and no training by `hf_guide` is recorded." in text and "not been trained" not in text
    last = from_teacher(str(tmp_path / "trained"), num_hidden_layers=1, show_progress=False)
    text = write_model_card(tmp_path / "last", last.initialization_report).read_text()
    rows = [line for line in text.splitlines() if line.startswith(("| 1 |", "| 2 |"))]
    assert len(rows) == 2 and all(row.endswith("| not recorded |") for row in rows)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_shard_size", ["50GB", "10KB"])
def test_a_card_counts_the_parameters_that_were_saved(tmp_path: Path, tied: bool, max_shard_size: str) -> None:
    config = copy.deepcopy(LLAMA.teacher().config)
    config.tie_word_embeddings = tied
    student = from_teacher(LlamaForCausalLM(config), show_progress=False, **LLAMA.smaller)
    before = student.num_parameters()
    student.resize_token_embeddings(student.config.vocab_size + 1000, mean_resizing=False)
    student.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    text = write_model_card(tmp_path).read_text()
    assert format_count(student.num_parameters()) != format_count(before)
    assert f"A `LlamaForCausalLM` with {format_count(student.num_parameters())} parameters" in text


def test_the_card_of_weights_that_are_not_there_counts_those_of_the_report(tmp_path: Path) -> None:
    student = llama_student()
    student.save_pretrained(tmp_path)
    first = write_model_card(tmp_path).read_text()
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert write_model_card(tmp_path).read_text() == first


REPLACE = """
    from hf_guide import from_teacher
    from hf_guide.hub.metadata import DistillationRecord
    from hf_guide.hub.push import attach_record
    from tests.hub.test_push import LLAMA, llama_student

    metrics, history = {"eval_loss": 1.5}, [{"step": 7, "eval_loss": 1.5}]
    data = {"task": "text-generation", "datasets": ["someone/text"]}
    trained = llama_student()
    attach_record(trained, DistillationRecord(steps=7, metrics=metrics, history=history, **data))
    trained.push_to_hub("me/student")
    llama_student(method="random").push_to_hub("me/student")
"""


@pytest.mark.extended
def test_a_student_that_replaces_another_has_none_of_its_results(tmp_path: Path) -> None:
    with fake_hub() as hub:
        run_with_hub(REPLACE, hub, tmp_path)
    files = hub.repositories["me/student"]
    assert RECORD_NAME not in files and TRAINING_PLOT_NAME not in files and REPORT_NAME in files
    card = files["README.md"].decode()
    assert "model-index" not in card and "1.5" not in card and len(hub.commits) == 2
