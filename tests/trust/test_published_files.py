"""No file that hf_guide writes contains a path, user or token, or refers to code outside its folder."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from examples.quickstart.run import QuickstartArguments, ResultRow, save
from hf_guide import Capture, CaptureError, SubclassProjector, from_teacher
from hf_guide.hub.metadata import DistillationRecord
from hf_guide.models.code_references import CONFIG_FILES, has_code_references
from hf_guide.utils.public_names import public_name
from tests.fake_hub import FakeHub, fake_hub
from tests.hub.test_push import run_with_hub
from tests.trust.artefacts import (
    SECRET,
    TOKEN,
    change_json,
    classifiers,
    distil,
    files_with,
    language_models,
    save_teacher,
)

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own call

FOLDERS = [
    *(
        "init",
        "saved",
        "distilled",
        "adapter",
        "capture",
        "from capture",
        "calibration",
        "calibrated",
        "merged",
        "run",
    ),
    *("projector", "embeddings", "targets", "remote_code", "subclass_head", "refit_head", "page"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp(SECRET) / SECRET
    place.mkdir()
    return place


@pytest.fixture(scope="module")
def folders(home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = language_models(home, tmp_path_factory.mktemp(SECRET))
    return found | classifiers(home, tmp_path_factory.mktemp(SECRET))


@pytest.mark.parametrize("kind", FOLDERS)
def test_no_file_holds_a_path_or_a_token(folders: dict[str, Path], kind: str) -> None:
    assert files_with(folders[kind], SECRET, TOKEN) == []


@pytest.mark.parametrize("kind", sorted({*FOLDERS} - {"page", "capture", "calibration", "embeddings", "targets"}))
def test_no_config_refers_to_code_that_is_not_next_to_it(folders: dict[str, Path], kind: str) -> None:
    for name in CONFIG_FILES:
        for path in folders[kind].rglob(name):
            values = json.loads(path.read_text())
            if kind == "remote_code" and name == "config.json":
                references = values["auto_map"]
                assert references.keys() == {"AutoConfig", "AutoModelForSequenceClassification"}
                assert all((path.parent / f"{each.split('.')[0]}.py").is_file() for each in references.values())
                assert not has_code_references(values["student"])
            else:
                assert not has_code_references(values), path
    for card in folders[kind].rglob("README.md"):
        assert ("trust_remote_code" in card.read_text()) is (kind == "remote_code")
        assert ("Its code is in this repository" in card.read_text()) is (kind == "remote_code")


def test_every_kind_of_folder_is_looked_at(folders: dict[str, Path]) -> None:
    assert sorted(folders) == sorted(FOLDERS)
    assert (folders["distilled"] / "checkpoint-1" / "training_args.bin").is_file()
    assert (folders["adapter"] / "checkpoint-2" / "adapter_config.json").is_file()


def test_an_adapters_base_is_no_name_that_the_hub_could_have(folders: dict[str, Path]) -> None:
    found = [json.loads(path.read_text()) for path in folders["adapter"].rglob("adapter_config.json")]
    assert len(found) > 1 and {each["base_model_name_or_path"] for each in found} == {"./teacher"}


PUSH = """
    import sys
    from pathlib import Path
    from hf_guide import from_teacher
    from tests.trust.artefacts import TOKEN, distil, save_teacher, texts_file

    home = Path(sys.argv[1])
    teacher = save_teacher("llama", home / "teacher")
    from_teacher(teacher, hidden_size=24, show_progress=False).push_to_hub("me/student", token=TOKEN)
    texts_file(home)
    pushed = {"push_to_hub": True, "hub_model_id": "me/distilled", "hub_strategy": "all_checkpoints"}
    distil(home, home / "out", model_name_or_path=str(teacher), teacher=str(teacher), **pushed)
"""


@pytest.mark.slow
def test_what_is_pushed_holds_no_path_and_refers_to_no_code(tmp_path: Path) -> None:
    (tmp_path / SECRET).mkdir()
    with fake_hub() as hub:
        run_with_hub(PUSH, hub, tmp_path / SECRET)
    assert "checkpoint-1/trainer_state.json" in hub.repositories["me/distilled"]
    for repository in ("me/student", "me/distilled"):
        _check_pushed(hub, repository)


def _check_pushed(hub: FakeHub, repository: str) -> None:
    files = hub.repositories[repository]
    assert "config.json" in files and "README.md" in files
    for name, content in files.items():
        assert SECRET.encode() not in content and TOKEN.encode() not in content, name
        if Path(name).name in CONFIG_FILES:
            assert not has_code_references(json.loads(content)), name
    assert b"trust_remote_code" not in files["README.md"]


def test_the_quickstarts_table_holds_no_path(tmp_path: Path) -> None:
    teacher = save_teacher("llama", tmp_path / SECRET / "teacher")
    student = from_teacher(teacher, hidden_size=24, show_progress=False)
    text = tmp_path / SECRET / "texts"
    text.mkdir()
    output = tmp_path / "student"
    args = QuickstartArguments(
        str(output), teacher_model=str(teacher), text=[str(text)], cache_dir=str(tmp_path / SECRET)
    )
    record = DistillationRecord(losses={"ce": 1.0})
    save(student, record, str(teacher), [ResultRow("guide", 1, 2.0, 1.0, 0.5, 1.0)], args, output)
    assert files_with(output, SECRET, str(tmp_path)) == []
    assert json.loads((output / "quickstart.json").read_text())["options"]["text"] == ["texts"]
    assert not has_code_references(json.loads((output / "tokenizer_config.json").read_text()))


# What is named without its path is found again by its fingerprint


def test_a_capture_finds_its_teacher_by_name_and_weights(
    folders: dict[str, Path], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = Capture.open(folders["capture"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CaptureError, match=r"does not hold its path.*processing_class_name_or_path"):
        capture.teacher_source()
    save_teacher("gpt2", tmp_path / "teacher")  # the name alone is not enough
    with pytest.raises(CaptureError, match="same weights"):
        capture.teacher_source()
    monkeypatch.chdir(home)
    assert Path(capture.teacher_source()).samefile(home / "teacher")
    (home / "models").mkdir()
    (home / "teacher").rename(home / "models" / "teacher")
    assert Path(capture.teacher_source()).samefile(home / "models" / "teacher")
    (home / "models" / "teacher").rename(home / "teacher")
    capture.check(teacher=home / "teacher")


def test_a_capture_names_a_teacher_from_the_hub_by_its_id(folders: dict[str, Path]) -> None:
    capture = Capture.open(folders["capture"])
    capture.manifest.teacher, capture.manifest.files = "org/teacher", None
    assert capture.teacher_source() == "org/teacher"


def test_a_report_names_its_teacher_by_name_and_fingerprint(folders: dict[str, Path]) -> None:
    report = json.loads((folders["init"] / "initialization_report.json").read_text())
    manifest = json.loads((folders["capture"] / "capture.json").read_text())
    assert report["teacher"] == manifest["teacher"] == "teacher" and report["revision"] is None
    assert report["teacher_fingerprint"] == manifest["files"]
    random = from_teacher(save_teacher("bert", folders["init"].parent / "x" / "bert"), method="random", hidden_size=24)
    assert random.initialization_report.teacher_fingerprint != report["teacher_fingerprint"]


def test_a_projector_still_knows_its_teacher(folders: dict[str, Path], home: Path) -> None:
    projector = SubclassProjector.from_pretrained(folders["projector"])
    assert projector.teacher == "classifier" and projector.teacher_fingerprint


@pytest.mark.extended
def test_a_resumed_run_finds_its_best_checkpoint(home: Path, tmp_path: Path) -> None:
    """By its step: the state that is saved does not hold the path."""
    teacher = save_teacher("llama", tmp_path / "teacher")
    same = {"model_name_or_path": str(teacher), "teacher": str(teacher), "learning_rate": 0.1}
    distil(home, tmp_path / "out", **same)
    state = json.loads((tmp_path / "out" / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] is None and state["best_global_step"] == 1
    # A metric that no later step reaches: the first checkpoint stays the best.
    for path in (tmp_path / "out").glob("checkpoint-*/trainer_state.json"):
        change_json(path, best_metric=-1.0, best_global_step=1)
    distil(home, tmp_path / "out", **same, max_steps=3, resume_from_checkpoint=True)
    best = (tmp_path / "out" / "checkpoint-1" / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == best


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/name", "org/name"),
        ("gpt2", "gpt2"),
        ("/home/me/models/big", "big"),
        ("/home/me/models/big/", "big"),
        ("~/models/big", "big"),
        ("./models/big", "big"),
        ("../big", "big"),
        ("/", "model"),
        ("/home/me/.cache/huggingface/hub/models--org--name/snapshots/0123abc", "org/name"),
        ("/home/me/.cache/huggingface/hub/models--gpt2/snapshots/0123abc", "gpt2"),
        ("x" * 5000, "x" * 5000),
    ],
)
def test_a_public_name_has_no_path(name: str, expected: str) -> None:
    assert public_name(name) == expected


def test_nested_configs_lose_their_references_too(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from tests.tiny import SIZES

    vision: dict[str, Any] = {**SIZES, "model_type": "clip_vision_model", "image_size": 16, "patch_size": 8}
    text = LlamaConfig(**{**SIZES, "auto_map": {"AutoModel": "o.O"}})
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=95)
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "teacher")
    assert has_code_references(json.loads((tmp_path / "teacher" / "config.json").read_text()))
    student = from_teacher(tmp_path / "teacher", method="random", show_progress=False)
    student.save_pretrained(tmp_path / "student")
    assert not has_code_references(json.loads((tmp_path / "student" / "config.json").read_text()))
    assert AutoConfig.from_pretrained(tmp_path / "student").text_config.hidden_size == SIZES["hidden_size"]
