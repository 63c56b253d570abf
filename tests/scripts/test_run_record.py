"""A resumed run has the options that it was begun with: the card and the record of its weights would have others."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from hf_guide import OptionError
from hf_guide.scripts.distill import distill, read_config
from hf_guide.scripts.run_record import RECORD_NAME
from tests.examples.local import QUICK, make_model, write_text

START: dict[str, Any] = {"num_hidden_layers": 1, "method": "uniform"}
SAVED: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_length": 32}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two teachers of one shape, and two files of texts."""
    folder = tmp_path_factory.mktemp("files")
    for number in range(2):
        (folder / str(number)).mkdir()
        make_model(folder / str(number) / "teacher", "llama", "ForCausalLM", seed=number)
        write_text(folder / str(number) / "text.txt", seed=number)
    make_model(folder / "existing", "llama", "ForCausalLM", blocks=1)
    return folder


def run(at: Path, files: Path, *words: str, **options: Any) -> None:
    """Distill in `at / "student"`; a name of a file is that of one of `files`."""
    entries = QUICK | SAVED | {"teacher": "0/teacher", "data_files": "0/text.txt", "output_dir": str(at / "student")}
    entries |= {"student_init_kwargs": START} | options
    for name in ("teacher", "data_files", "model_name_or_path"):
        if entries.get(name) is not None:
            entries[name] = str(files / entries[name])
    (at / "run.yaml").write_text(yaml.safe_dump({key: each for key, each in entries.items() if each is not None}))
    distill(read_config(at / "run.yaml", words))


def steps(at: Path) -> int:
    return int(json.loads((at / "student" / "trainer_state.json").read_text())["global_step"])


EXISTING = {"student_init_kwargs": None, "model_name_or_path": "existing"}
CHANGES: dict[str, tuple[Mapping[str, Any], str]] = {
    "method": ({"student_init_kwargs": START | {"method": "random"}}, "kwargs.method was 'uniform' and is 'random'"),
    "size": (
        {"student_init_kwargs": START | {"hidden_size": 16}},
        "student_init_kwargs.hidden_size was None and is 16",
    ),
    "weight": ({"losses": {"ce": 0.5, "kd": 0.9}}, "losses.kd was 0.5 and is 0.9"),
    "loss": ({"losses": "kd"}, r"losses.ce was 0.5 and is None, and \['losses.kd'\] differ too"),
    "temperature": ({"temperature": 2.0}, "temperature was 1.0 and is 2.0"),
    "optimizer": ({"learning_rate": 1e-4}, "learning_rate was 0.001 and is 0.0001"),
    "data": ({"data_files": "1/text.txt"}, "data_files was 'text.txt .*' and is 'text.txt"),
    "examples": ({"max_train_samples": 16}, "max_train_samples was None and is 16"),
    "length": ({"max_length": 16}, "max_length was 32 and is 16"),
    "teacher": ({"teacher": "1/teacher"}, "teacher was .'teacher .*'. and is .'teacher "),
    "student": (EXISTING, "model_name_or_path was None and is 'existing "),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("what", CHANGES)
def test_a_run_is_not_resumed_with_other_options(what: str, files: Path, tmp_path: Path) -> None:
    changes, message = CHANGES[what]
    run(tmp_path, files, max_steps=2)
    weights = (tmp_path / "student" / "model.safetensors").read_bytes()
    with pytest.raises(OptionError, match=f"begun with other options: .*{message}.*Restore them, or train anew"):
        run(tmp_path, files, "--resume_from_checkpoint", "true", **changes)
    checkpoint = str(tmp_path / "student" / "checkpoint-1")
    with pytest.raises(OptionError, match=message):
        run(
            tmp_path, files, "--resume_from_checkpoint", checkpoint, "--output_dir", str(tmp_path / "other"), **changes
        )
    assert (tmp_path / "student" / "model.safetensors").read_bytes() == weights
    run(tmp_path, files, "--resume_from_checkpoint", "true")
    assert steps(tmp_path) == 3


@pytest.mark.extended
@pytest.mark.parametrize("what", [name for name in CHANGES if name != "student"])  # a stage's is made of a teacher
def test_an_unfinished_stage_is_not_resumed_with_other_options(what: str, files: Path, tmp_path: Path) -> None:
    changes, message = CHANGES[what]
    stages = [{"student_init_kwargs": {"intermediate_size": 48}, "max_steps": 1}, {"max_steps": 2}]
    run(tmp_path, files, stages=stages)
    with pytest.raises(OptionError, match=message):
        run(tmp_path, files, "--resume_from_checkpoint", "true", stages=stages, **changes)
    (tmp_path / "student" / "_stages" / "stage-1.json").unlink()
    with pytest.raises(OptionError, match=f"stage-1 was begun with other options: .*{message}"):
        run(tmp_path, files, "--resume_from_checkpoint", "true", stages=stages, **changes)
    run(tmp_path, files, "--resume_from_checkpoint", "true", stages=[stages[0], {"max_steps": 3}])
    assert steps(tmp_path) == 3


def test_the_last_stage_is_compared_before_the_first_one_runs(files: Path, tmp_path: Path) -> None:
    stages = [{"student_init_kwargs": {"intermediate_size": 48}, "max_steps": 1}, {"max_steps": 1}]
    run(tmp_path, files, stages=stages)
    changed = [stages[0], {"max_steps": 1, "student_init_kwargs": {"hidden_size": 16}}]
    with pytest.raises(OptionError, match="student was begun with other options: .*hidden_size was None and is 16"):
        run(tmp_path, files, "--resume_from_checkpoint", "true", stages=changed)
    with pytest.raises(OptionError, match="student_init_kwargs.teacher was 'stage-1' and is None"):
        run(tmp_path, files, "--resume_from_checkpoint", "true")
    (tmp_path / "student" / RECORD_NAME).unlink()  # as if only the first stage had begun
    with pytest.raises(OptionError, match="was begun with several stages, and the options have no stages"):
        run(tmp_path, files, "--resume_from_checkpoint", "true")


def test_what_changes_neither_start_nor_data_nor_objective_may_be_changed(files: Path, tmp_path: Path) -> None:
    run(tmp_path, files, max_steps=1)
    moved = tmp_path / "moved"
    shutil.copytree(files, moved)
    run(
        tmp_path,
        moved,
        *("--resume_from_checkpoint", "true"),
        max_steps=4,
        lr_scheduler_type="constant",
        save_steps=2,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        max_eval_samples=5,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        preprocessing_num_workers=1,
        hub_model_id="someone/student",
        student_init_kwargs=START | {"cache_dir": str(tmp_path / "hub"), "show_progress": False},
    )
    assert steps(tmp_path) == 4


def test_a_folder_without_a_record_is_resumed_and_a_new_run_replaces_it(files: Path, tmp_path: Path) -> None:
    record = tmp_path / "student" / RECORD_NAME
    run(tmp_path, files, max_steps=1)
    assert str(tmp_path) not in record.read_text() and str(files) not in record.read_text()
    record.unlink()
    run(tmp_path, files, "--resume_from_checkpoint", "true", max_steps=2, temperature=2.0)
    assert json.loads(record.read_text())["temperature"] == 2.0 and json.loads(record.read_text())["earlier"] == []
    with pytest.raises(OptionError, match="temperature was 2.0 and is 1.0"):
        run(tmp_path, files, "--resume_from_checkpoint", "true")
    shutil.rmtree(tmp_path / "student" / "checkpoint-1")
    record.write_text("damaged")
    run(tmp_path, files, max_steps=1)
    assert json.loads(record.read_text())["temperature"] == 1.0


def test_of_several_runs_in_one_folder_the_one_that_is_resumed_is_compared(files: Path, tmp_path: Path) -> None:
    run(tmp_path, files, max_steps=2)
    run(tmp_path, files, max_steps=1, save_strategy="no", temperature=2.0)  # saves none, the first run's stay
    with pytest.raises(OptionError, match="temperature was 1.0 and is 2.0"):
        run(tmp_path, files, "--resume_from_checkpoint", "true", temperature=2.0)
    run(tmp_path, files, "--resume_from_checkpoint", "true", max_steps=3)
    assert steps(tmp_path) == 3
    run(tmp_path, files, max_steps=1, temperature=2.0)  # has written the last one
    with pytest.raises(OptionError, match="temperature was 2.0 and is 1.0"):
        run(tmp_path, files, "--resume_from_checkpoint", "true")
    run(tmp_path, files, "--resume_from_checkpoint", "true", max_steps=2, temperature=2.0)
    with pytest.raises(OptionError, match="temperature was 1.0 and is 2.0"):
        checkpoint = str(tmp_path / "student" / "checkpoint-3")
        run(tmp_path, files, "--resume_from_checkpoint", checkpoint, temperature=2.0)


def test_a_saved_dataset_is_the_same_after_it_was_mapped_and_another_is_not(files: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    texts = (files / "0" / "text.txt").read_text().splitlines()
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(saved)
    options = {"data_files": None, "dataset_name": str(saved)}
    run(tmp_path, files, max_steps=1, **options)
    run(tmp_path, files, "--resume_from_checkpoint", "true", max_steps=2, **options)
    assert steps(tmp_path) == 2
    shutil.rmtree(saved)
    datasets.Dataset.from_dict({"text": texts[::-1]}).save_to_disk(saved)
    with pytest.raises(OptionError, match="dataset_name was 'saved .*' and is 'saved "):
        run(tmp_path, files, "--resume_from_checkpoint", "true", **options)
