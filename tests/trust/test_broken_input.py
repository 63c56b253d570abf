"""Every command ends on broken input with one paragraph that names what is broken, and never with a traceback."""

import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from examples.quickstart import run as quickstart_script
from hf_guide import fit_subclasses
from hf_guide.cli import main as cli
from tests.tiny import KINDS
from tests.trust import damage
from tests.trust.artefacts import make_tokenizer, texts_file
from tests.trust.damage import cut, entries, text

Broken = dict[str, damage.Damage]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a classifier with a projector, a student, and texts."""
    place = tmp_path_factory.mktemp("home")
    for kind, name in (("llama", "teacher"), ("bert classifier", "classifier")):
        KINDS[kind].teacher().save_pretrained(place / name)
        make_tokenizer().save_pretrained(place / name)
    rows = [{"input_ids": [3 + number % 80, 4, 5, 6 + number % 70], "labels": number % 3} for number in range(60)]
    options: dict[str, Any] = {"processing_class": make_tokenizer(), "show_progress": False}
    projector = fit_subclasses(KINDS["bert classifier"].teacher(), rows, 2, **options)
    projector.save_pretrained(place / "projector")
    names = ["good", "bad", "neither"]
    lines = [json.dumps({"text": f"w{n} w1 w2 w{n % 7}", "label": names[n % 3]}) for n in range(60)]
    (place / "rows.jsonl").write_text("\n".join(lines))
    (place / "texts").mkdir()
    for number in range(100):
        rng = random.Random(number)
        words = " ".join(f"w{rng.randrange(93)}" for _ in range(60))
        (place / "texts" / f"{number}.txt").write_text(words)
    texts_file(place)
    student = ["init", place / "teacher", "-o", place / "student", "--hidden-size", "24", "--no-progress"]
    assert cli.main([str(word) for word in student]) == 0
    return place


def settings(home: Path, scratch: Path, **changes: Any) -> Path:
    config = {
        "teacher": str(home / "teacher"),
        "model_name_or_path": str(home / "teacher"),
        "data_files": str(home / "texts.txt"),
        "max_length": 16,
        "output_dir": str(scratch / "out"),
        "max_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
    }
    path = scratch / "settings.yaml"
    path.write_text(json.dumps({key: value for key, value in (config | changes).items() if value is not None}))
    return path


def init(home: Path, scratch: Path, broken: Path) -> list[object]:
    return ["init", broken, "-o", scratch / "out", "--hidden-size", "24", "--no-progress"]


def inspect(home: Path, scratch: Path, broken: Path) -> list[object]:
    return ["inspect", broken]


def capture(home: Path, scratch: Path, broken: Path) -> list[object]:
    data = ["--data-files", home / "texts.txt", "--max-length", 16, "--top-k", 4]
    return ["capture", broken, "-o", scratch / "out", *data, "--no-progress"]


def distill(home: Path, scratch: Path, broken: Path) -> list[object]:
    return ["distill", settings(home, scratch, teacher=str(broken))]


def distill_from(home: Path, scratch: Path, broken: Path) -> list[object]:
    student = {"hidden_size": 24}
    return [
        "distill",
        settings(home, scratch, teacher=str(broken), model_name_or_path=None, student_init_kwargs=student),
    ]


def distill_into(home: Path, scratch: Path, broken: Path) -> list[object]:
    return ["distill", settings(home, scratch, model_name_or_path=str(broken))]


def quickstart(home: Path, scratch: Path, broken: Path) -> list[object]:
    little = ["--steps", 1, "--sequence-length", 8, "--held-out-blocks", 1]
    return [
        "quickstart",
        "--teacher_model",
        broken,
        "--text",
        home / "texts",
        *little,
        "--output_dir",
        scratch / "out",
    ]


def subclasses(home: Path, scratch: Path, broken: Path) -> list[object]:
    page = ["-o", scratch / "page.html", "--no-probe", "--no-progress"]
    return ["analyze-subclasses", home / "projector", home / "rows.jsonl", "--teacher", broken, *page]


def subclasses_of(home: Path, scratch: Path, broken: Path) -> list[object]:
    page = ["-o", scratch / "page.html", "--no-probe", "--no-progress"]
    return ["analyze-subclasses", broken, home / "rows.jsonl", "--teacher", home / "classifier", *page]


def card(home: Path, scratch: Path, broken: Path) -> list[object]:
    return ["card", broken]


TEACHER: Broken = {**damage.FOLDER, **damage.CONFIG, **damage.WEIGHT_FILES, **damage.TOKENIZER}
# Transformers reads these all the same, or the command does not read the file.
HARMLESS = {
    "init": {"unknown architecture", "architecture no model", "tokenizer of nothing"},
    "inspect": {"unknown architecture", "architecture no model", *damage.TOKENIZER},
    "capture": {"quantized by nobody"},
    "distill": {"unknown architecture", "architecture no model", "quantized by nobody"},
    "quickstart": {"unknown architecture", "architecture no model"},
    "distill_from": {"unknown architecture", "architecture no model"},
    "distill_into": {"unknown architecture", "architecture no model", "quantized by nobody"},
    "subclasses": {"quantized by nobody"},
}
ANYWHERE = {"auto_map of numbers", "tokenizer missing", "tokenizer class unknown", "tokenizer in remote code"}

PROJECTOR: Broken = {
    **damage.FOLDER,
    "cut": cut("subclass_projector.json"),
    "a list": text("subclass_projector.json", "[]"),
    "not UTF-8": text("subclass_projector.json", b"\xff\xfe"),
    "weights cut": cut("subclass_projector.safetensors"),
    "weights empty": text("subclass_projector.safetensors", b""),
    "no number": entries("subclass_projector.json", num_subclasses="x"),
    "no labels": entries("subclass_projector.json", id2label=3),
    "another form": entries("subclass_projector.json", form="no-such-form"),
}
RECORD = "distillation.json"
SCRIPTS = {"quickstart": quickstart_script.main}
STUDENT: Broken = {
    **damage.FOLDER,
    "card not UTF-8": text("README.md", b"\xff\xfe"),
    "card of no YAML": text("README.md", "---\n[\n---\n"),
    "card of a list": text("README.md", "---\n- 1\n---\n"),
    "licence a mapping": text("README.md", "---\nlicense: {a: 1}\n---\n# x\n"),
    "licences of mappings": text("README.md", "---\nlicense: [{a: 1}]\n---\n# x\n"),
    "tags a mapping": text("README.md", "---\ntags: {a: 1}\n---\n# x\n"),
    "tags of lists": text("README.md", "---\ntags: [[1]]\n---\n# x\n"),
    "datasets a mapping": text("README.md", "---\ndatasets: {a: 1}\n---\n# x\n"),
    "language a mapping": text("README.md", "---\nlanguage: {a: 1}\n---\n# x\n"),
    "report cut": cut("initialization_report.json"),
    "report a list": text("initialization_report.json", "[]"),
    "report not UTF-8": text("initialization_report.json", b"\xff\xfe"),
    "report of texts": entries("initialization_report.json", student_parameters="x"),
    "report of a revision": entries("initialization_report.json", revision=3),
    "report of blocks": entries("initialization_report.json", blocks={"a": "x"}),
    "report of widths": entries("initialization_report.json", sizes={"a": 3}),
    "report of options": entries("initialization_report.json", options=[]),
    "config cut": cut("config.json"),
    "config a list": text("config.json", "[]"),
    "config not UTF-8": text("config.json", b"\xff"),
    "adapter a list": text("adapter_config.json", "[]"),
    "record empty": text(RECORD, "{}"),
    "record a list": text(RECORD, "[]"),
    "record cut": text(RECORD, "{"),
    "record not UTF-8": text(RECORD, b"\xff\xfe"),
    "record of teachers": text(RECORD, json.dumps({"teachers": [{"name": 3}]})),
    "record of losses": text(RECORD, json.dumps({"teachers": [], "losses": 3})),
    "record of metrics": text(RECORD, json.dumps({"teachers": [], "metrics": [1]})),
    "record of history": text(RECORD, json.dumps({"teachers": [], "history": [{"step": "x", "loss": "y"}]})),
    "record of steps": text(RECORD, json.dumps({"teachers": [], "steps": "x"})),
    "record of datasets": text(RECORD, json.dumps({"teachers": [], "datasets": 3})),
}


def error_of(argv: list[object], captured: pytest.CaptureFixture[str]) -> str:
    """Assert that a command ends with one paragraph; return it."""
    captured.readouterr()
    command, *words = map(str, argv)
    code = SCRIPTS[command](words) if command in SCRIPTS else cli.main([command, *words])
    error = captured.readouterr().err.partition("error: ")[2].strip()
    assert code in (1, 2), argv
    assert error and "\n\n" not in error and "Traceback" not in error
    assert not re.fullmatch(r"['\"]?\w+['\"]?", error), f"{error!r} does not state what is wrong"
    return error


@pytest.fixture(autouse=True)
def in_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a pickle would make its folder."""
    monkeypatch.chdir(tmp_path)


def check(home: Path, scratch: Path, command: Any, source: str, broken: Broken, captured: Any) -> None:
    """Break a folder in every way, and run a command on it; report all ways in which it does not end as it should."""
    wrong = []
    for number, (name, damaged) in enumerate(broken.items()):
        place = scratch / str(number)
        folder = Path(shutil.copytree(home / source, place / "broken"))
        damaged(folder)
        argv = command(home, place, folder)
        if name in ANYWHERE | HARMLESS.get(command.__name__, set()) and command is not subclasses_of:
            continue
        try:
            error = error_of(argv, captured)
            assert str(folder) in error or folder.name in error, f"{error!r} names no file"
        except Exception as raised:  # reported below: whatever is raised is what this test is about
            wrong.append(f"{name}: {type(raised).__name__} {str(raised)[:300]}")
        assert not (place / "out" / "model.safetensors").exists(), f"{name}: a student was left"
    assert not Path("unpickled").exists(), "a pickle ran its code"
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("command", [init, inspect, capture], ids=lambda each: each.__name__)
def test_a_broken_teacher(home: Path, tmp_path: Path, command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    reads = damage.GENERATION if command in (init, distill_from) else {}  # the others do not use it
    check(home, tmp_path, command, "teacher", {**TEACHER, **reads}, capsys)


@pytest.mark.extended
@pytest.mark.parametrize(
    "command",
    [distill, *(pytest.param(each, marks=pytest.mark.slow) for each in (distill_from, distill_into))],
    ids=lambda each: each.__name__,
)
def test_a_broken_teacher_or_student_of_a_distillation(
    home: Path, tmp_path: Path, command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    reads = damage.GENERATION if command in (init, distill_from) else {}  # the others do not use it
    check(home, tmp_path, command, "teacher", {**TEACHER, **reads}, capsys)


@pytest.mark.parametrize(
    ("command", "source"),
    [
        (quickstart, "teacher"),
        (subclasses, "classifier"),
    ],
    ids=["quickstart", "subclasses"],
)
def test_a_broken_teacher_of_the_other_commands(
    home: Path, tmp_path: Path, command: Any, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    check(home, tmp_path, command, source, TEACHER, capsys)


def test_a_broken_projector(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(home, tmp_path, subclasses_of, "projector", PROJECTOR, capsys)


def test_a_broken_student(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(home, tmp_path, card, "student", STUDENT, capsys)


SETTINGS = {
    "cut": b"{a: [1",
    "a list": b"- 1",
    "not UTF-8": b"\xff\xfe\x00a",
    "empty": b"",
    "control characters": b"a: \x00",
    "tabs": b"a:\n\tb: 1",
    "an unknown alias": b"a: *x",
    "code": b"a: !!python/object/apply:os.mkdir ['unpickled']",
    "a number for a key": b"3: 4",
    "a list for a key": b"[1, 2]: 4",
}
VALUES: list[dict[str, Any]] = [
    *({"learning_rate": value} for value in ("x", [1], "2020-01-01")),
    *({"teacher": value} for value in (3, ["a"])),
    *({"student_init_kwargs": value, "model_name_or_path": None} for value in ("x", {"hiden": 1}, [1])),
    *({"losses": value} for value in ({"zz": 1}, 3)),
    *({"peft_config": value} for value in ({"peft_type": "zz"}, "x")),
    *({"teacher_init_kwargs": value} for value in ({"dtype": "zz"}, {"zzz": 1}, [1])),
    *({"output_dir": value} for value in (3,)),
    *({"data_files": value} for value in ("none.txt", [], 3)),
    *({"processing_class_name_or_path": value} for value in ("/no/such/folder", 3)),
    *(
        {name: "zz"}
        for name in ("optim", "lr_scheduler_type", "save_strategy", "report_to", "task", "dataset_train_split")
    ),
    {"dataset_name": 3},
    {"dataset_name": "no/such-dataset", "data_files": None},
    {"teacher_cache": "/no/such/folder", "teacher": None},
    {"model_name_or_path": 3},
    {"lr_scheduler_kwargs": "x"},
    {"text_column": "zz"},
    {"bf16": "maybe"},
    {"no_such_option": 1},
]


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_are_no_settings(
    home: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "settings.yaml"
    path.write_bytes(SETTINGS[name])
    assert str(path) in error_of(["distill", path], capsys)
    assert str(path) in error_of(["capture", "-o", tmp_path / "out", "--config", path], capsys) or name == "empty"
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("changes", VALUES, ids=str)
def test_settings_of_the_wrong_kind(
    home: Path, tmp_path: Path, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    error = error_of(["distill", settings(home, tmp_path, **changes)], capsys)
    assert any(word in error for name, value in changes.items() for word in (name, *re.findall(r"\w+", str(value)))), (
        error
    )


TEXTS = {
    "not UTF-8": b"\xff\xfe\x00",
    "bytes": bytes(range(256)),
    "empty": b"",
    "a cut line": b'{"text": "a',
    "lists": b"[1, 2]\n",
    "another label": b'{"text": "w1", "label": "none of them"}\n',
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_that_cannot_be_read(home: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(TEXTS[name])
    page = ["-o", tmp_path / "page.html", "--no-probe", "--no-progress"]
    error_of(["analyze-subclasses", home / "projector", path, "--teacher", home / "classifier", *page], capsys)
    if name in ("not UTF-8", "bytes", "empty"):
        calibrated = ["--method", "calibrated", "--calibration-dataset", path, "--hidden-size", 24, "--no-progress"]
        error_of(["init", home / "teacher", "-o", tmp_path / "student", *calibrated], capsys)


@pytest.mark.parametrize("output", ["a file", "under a file"])
def test_outputs_that_cannot_be_written(
    home: Path, tmp_path: Path, output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    path = tmp_path / "file" if output == "a file" else tmp_path / "file" / "x"
    teacher, data = home / "teacher", ["--data-files", home / "texts.txt", "--top-k", 4]
    error_of(["init", teacher, "-o", path, "--no-progress"], capsys)
    error_of(["capture", teacher, "-o", path, *data, "--no-progress"], capsys)
    error_of(["distill", settings(home, tmp_path, output_dir=str(path))], capsys)
    error_of(["quickstart", "--teacher_model", teacher, "--text", home / "texts", "--output_dir", path], capsys)
    page = ["--teacher", home / "classifier", "--no-probe", "--no-progress"]
    error_of(["analyze-subclasses", home / "projector", home / "rows.jsonl", *page, "-o", path / "page.html"], capsys)
    error_of(["inspect", teacher, "--plot", path / "plot.png"], capsys)
    error_of(["card", path], capsys)
    assert (tmp_path / "file").read_text() == "mine"


def test_words_that_are_no_options(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = home / "teacher"
    assert "zzz" in error_of(["inspect", teacher, "--plot", tmp_path / "plot.zzz"], capsys)
    assert "png" in error_of(["inspect", teacher, "--plot", tmp_path / "plot.zzz"], capsys)
    error_of(["families", "no-such-family"], capsys)
    error_of(["init", teacher, "-o", tmp_path / "out", "--config", "x"], capsys)
    (home / "teacher" / "bad.gguf").write_bytes(b"GGUFxxxxx")
    for name in ("none.gguf", "bad.gguf"):
        error_of(["init", teacher, "-o", tmp_path / "out", "--gguf-file", name], capsys)
    (home / "teacher" / "bad.gguf").unlink()
    for name in ("a\0b", "x" * 300, "", "a b/../c"):
        error_of(["init", name, "-o", tmp_path / "out"], capsys)
        error_of(["inspect", name], capsys)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_files_that_may_not_be_read(home: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(home / "teacher", tmp_path / "broken"))
    (folder / name).chmod(0)
    for command in (init, capture, distill):
        assert "ermission" in error_of(command(home, tmp_path, folder), capsys)


def test_a_pickled_checkpoint_of_tensors_is_read(home: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    folder = Path(shutil.copytree(home / "teacher", tmp_path / "teacher"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert cli.main([str(word) for word in init(home, tmp_path, folder)]) == 0


def test_a_pickle_that_would_run_code_is_an_error_with_a_remedy(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(home / "teacher", tmp_path / "broken"))
    damage.WEIGHT_FILES["pickle that runs code"](folder)
    error = error_of(init(home, tmp_path, folder), capsys)
    assert "Convert it to safetensors" in error
