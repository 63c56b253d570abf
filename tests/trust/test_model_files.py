"""A teacher's folder is untrusted: only files inside it are read or copied, and its code runs only with permission."""

import json
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_guide import DistillationArguments, DistillationTrainer, TeacherError, from_teacher
from hf_guide.cli import main as cli
from hf_guide.hub.saved_model import copy_tokenizer_files
from hf_guide.models.model_files import check_model_folder, is_outside_folder
from hf_guide.models.pretrained import load_config
from hf_guide.tasks import Task
from hf_guide.teachers.checkpoint import open_teacher
from hf_guide.teachers.loading import load_teacher, load_teachers
from tests.tiny import KINDS
from tests.trust.artefacts import change_json, make_tokenizer, save_teacher

COMPANIONS = [
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    KINDS["llama"].teacher().save_pretrained(tmp_path / "teacher", max_shard_size="30KB")
    make_tokenizer().save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


# Links


def hub_cache(folder: Path, home: Path) -> Path:
    """Return a snapshot of the Hub's cache with the files of `folder`: links to the repository's blobs."""
    repository = home / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / ("0123456789" * 4)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(repository / "blobs" / f"{number:064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064x}")
    return snapshot


@pytest.mark.parametrize("name", COMPANIONS)
def test_a_link_out_of_the_teachers_folder_is_not_copied(
    folder: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "private").write_text("my private text")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "private")
    (tmp_path / "student").mkdir()
    copy_tokenizer_files(str(folder), tmp_path / "student")
    assert not (tmp_path / "student" / name).exists()
    assert f"{folder / name} is a link to {tmp_path / 'private'}" in caplog.text
    others = {"tokenizer.json", "tokenizer_config.json"} - {name}
    assert others <= set(os.listdir(tmp_path / "student"))


def test_links_of_the_hubs_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(folder, tmp_path)
    assert cli.main(["init", str(snapshot), "-o", str(tmp_path / "s"), "--hidden-size", "24", "--no-progress"]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "s").get_vocab() == make_tokenizer().get_vocab()
    report = json.loads((tmp_path / "s" / "initialization_report.json").read_text())
    assert (report["teacher"], report["revision"]) == ("org/name", "0123456789" * 4)
    assert "huggingface.co/org/name" in (tmp_path / "s" / "README.md").read_text()


def test_a_link_to_another_repositorys_blobs_is_an_error(folder: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(folder, tmp_path)
    other = tmp_path / "hub" / "models--me--private" / "blobs" / "0"
    other.parent.mkdir(parents=True)
    other.write_text("{}")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(other)
    assert is_outside_folder(snapshot / "config.json", snapshot)
    with pytest.raises(TeacherError, match="config.json is a link to"):
        from_teacher(snapshot)


def test_links_within_a_folder_and_to_a_folder_are_followed(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "real.json")
    (folder / "tokenizer.json").symlink_to("real.json")
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "student").mkdir()
    copy_tokenizer_files(str(tmp_path / "link"), tmp_path / "student")
    assert (tmp_path / "student" / "tokenizer.json").read_bytes() == (folder / "real.json").read_bytes()
    assert not (tmp_path / "student" / "tokenizer.json").is_symlink()
    check_model_folder(tmp_path / "link")


@pytest.mark.parametrize("kind", ["fifo", "folder", "socket", "dangling", "loop"])
def test_what_is_no_regular_file_is_not_copied(
    folder: Path, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "vocab.txt"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        monkeypatch.chdir(folder)  # a socket's path must be short
        socket.socket(socket.AF_UNIX).bind(path.name)
    else:
        path.symlink_to(path.name if kind == "loop" else "nowhere")
    (tmp_path / "student").mkdir()
    copy_tokenizer_files(str(folder), tmp_path / "student")
    assert str(path) in caplog.text and not os.path.lexists(tmp_path / "student" / "vocab.txt")


def test_code_and_pickles_are_not_taken_for_a_tokenizers_files(folder: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.py", "tokenizer.pkl", "vocab.bin"):
        (folder / name).write_text("x")
    (tmp_path / "student").mkdir()
    copy_tokenizer_files(str(folder), tmp_path / "student")
    assert sorted(os.listdir(tmp_path / "student")) == ["tokenizer.json", "tokenizer_config.json"]


def loads_from(name: str, folder: Path) -> None:
    """Load a teacher as one of the ways in does."""
    if name == "from_teacher":
        from_teacher(folder, hidden_size=24, show_progress=False)
    elif name == "capture":
        load_teacher(folder)
    elif name == "trainer":
        load_teachers(str(folder), Task.CAUSAL_LM)


WAYS_IN = ["from_teacher", "capture", "trainer"]


@pytest.mark.parametrize("way", WAYS_IN)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model-00001-of-*.safetensors"])
def test_a_model_that_is_linked_out_of_its_folder_is_an_error(
    folder: Path, tmp_path: Path, name: str, way: str
) -> None:
    path = next(folder.glob(name))
    path.rename(tmp_path / path.name)
    path.symlink_to(tmp_path / path.name)
    with pytest.raises(TeacherError, match=f"{path.name} is a link to .*outside of its folder"):
        loads_from(way, folder)


@pytest.mark.parametrize("way", WAYS_IN)
@pytest.mark.parametrize(
    "shard", ["../outside.safetensors", "/outside.safetensors", "a/../../x", "..\\x", "C:\\x", ""]
)
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_that_names_files_elsewhere_is_an_error(folder: Path, index: str, shard: str, way: str) -> None:
    values = json.loads((folder / "model.safetensors.index.json").read_text())
    values["weight_map"] = dict.fromkeys(values["weight_map"], shard)
    (folder / index).write_text(json.dumps(values))
    with pytest.raises(TeacherError, match="which is not in its folder"):
        loads_from(way, folder)


# Code


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
from .more_code import answer

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def answer(self):
        return answer
"""
TOKENIZER_CODE = """
from transformers import PreTrainedTokenizerFast

class OwnTokenizer(PreTrainedTokenizerFast):
    def answer(self):
        return 42
"""


@pytest.fixture
def custom(folder: Path) -> Path:
    """A teacher whose model and tokenizer are in code of their own."""
    (folder / "own_code.py").write_text(CODE)
    (folder / "more_code.py").write_text("answer = 42\n")
    (folder / "own_tokenizer.py").write_text(TOKENIZER_CODE)
    auto = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnForCausalLM"}
    change_json(folder / "config.json", model_type="own", architectures=["OwnForCausalLM"], auto_map=auto)
    tokenizer = {"AutoTokenizer": ["own_tokenizer.OwnTokenizer", None]}
    change_json(folder / "tokenizer_config.json", auto_map=tokenizer, tokenizer_class="OwnTokenizer")
    return folder


def test_a_student_of_trusted_code_is_saved_with_it(
    custom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["init", custom, "-o", tmp_path / "student", "--method", "random", "--trust-remote-code", "--no-progress"]
    assert cli.main([str(word) for word in words]) == 0
    custom.rename(tmp_path / "gone")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student", trust_remote_code=True)
    assert student.answer() == 42 and type(student).__name__ == "OwnForCausalLM"
    assert AutoTokenizer.from_pretrained(tmp_path / "student", trust_remote_code=True).answer() == 42
    card = (tmp_path / "student" / "README.md").read_text()
    assert 'AutoModelForCausalLM.from_pretrained("student", trust_remote_code=True)' in card
    assert "Its code is in this repository." in card
    assert "--" not in json.dumps(json.loads((tmp_path / "student" / "config.json").read_text())["auto_map"])


def test_a_stock_model_keeps_no_code_of_its_tokenizer_without_permission(
    custom: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change_json(custom / "config.json", model_type="llama", architectures=["LlamaForCausalLM"])
    words = ["init", custom, "-o", tmp_path / "student", "--method", "random", "--no-progress"]
    assert cli.main([str(word) for word in words]) == 0
    assert not list((tmp_path / "student").glob("*.py"))
    assert "auto_map" not in (tmp_path / "student" / "tokenizer_config.json").read_text()
    assert "tokenizer_config.json" in caplog.text and "trust_remote_code=True" in caplog.text


def test_a_card_names_code_only_where_its_file_is_next_to_the_weights(custom: Path, tmp_path: Path) -> None:
    from_teacher(custom, method="random", trust_remote_code=True, show_progress=False).save_pretrained(tmp_path / "s")
    from hf_guide.hub.model_card import write_model_card

    assert "trust_remote_code=True" in write_model_card(tmp_path / "s").read_text()
    (tmp_path / "s" / "own_code.py").unlink()
    assert "trust_remote_code" not in write_model_card(tmp_path / "s").read_text()


def test_a_stock_students_tokenizer_loses_its_reference_in_a_checkpoint_too(tmp_path: Path) -> None:
    teacher = save_teacher("llama", tmp_path / "teacher")
    tokenizer: Any = AutoTokenizer.from_pretrained(teacher)
    args = DistillationArguments(str(tmp_path / "out"), losses="ce", report_to="none", max_steps=1)
    data = [{"input_ids": [3, 4], "labels": [3, 4]}]
    trainer = DistillationTrainer(
        AutoModelForCausalLM.from_pretrained(teacher), args, train_dataset=data, processing_class=tokenizer
    )
    trainer.save_model()
    tokenizer.save_pretrained(tmp_path / "again")
    for folder in ("out", "again"):
        assert "auto_map" not in json.loads((tmp_path / folder / "tokenizer_config.json").read_text())


@pytest.mark.parametrize(
    "words", [["init", "~/teacher", "-o", "out"], ["inspect", "~/teacher"], ["capture", "~/teacher", "-o", "out"]]
)
def test_a_command_names_the_folder_in_the_home_that_does_not_exist(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data-files", "a.txt"] if words[0] == "capture" else []
    assert cli.main(words + data) == 1
    assert re.search(
        f"{Path.home() / 'teacher'} cannot be (read|loaded): there is no such folder", capsys.readouterr().err
    )


def test_a_home_that_no_shell_expanded_is_named() -> None:
    with pytest.raises(TeacherError, match="'~' is expanded by a shell only. Write the whole path"):
        open_teacher("~/teacher")


def test_an_adapter_whose_base_is_missing_is_an_error_with_a_remedy(folder: Path, tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "base_model_name_or_path": "teacher-of-mine"}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(TeacherError, match="holds an adapter of 'teacher-of-mine'.*in the directory of that folder"):
        load_config(str(tmp_path / "adapter"))
