"""Checkpoints are whole or not there, and a resumed run ends as one that was never interrupted."""

import errno
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from hf_guide import DistillationTrainer, OptionError
from hf_guide.distillation import checkpoints
from tests.distillation.small import collate, examples_for, llama
from tests.distillation.test_trainer import arguments

VARYING = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "eval_runtime"}
DISK_FULL = OSError(28, "No space left on device")


def trainer(folder: Path, **changes: Any) -> DistillationTrainer:
    """Return a trainer with dropout, momentum and a schedule, whose student is wider than its teacher: it learns maps, too."""
    plain: dict[str, Any] = {
        "losses": {"ce": 0.5, "kd": 0.5, "hidden_states": 0.1},
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 3,
        "logging_steps": 2,
        "optim": "adamw_torch",
        "learning_rate": 0.01,
        "lr_scheduler_type": "linear",
        "per_device_train_batch_size": 4,
    }
    return DistillationTrainer(
        llama(1, attention_dropout=0.1),
        arguments(folder, **(plain | changes)),
        collate,
        examples_for("causal-lm", 18),
        teacher=llama(2, width=48),
    )


def curve(done: DistillationTrainer) -> list[dict[str, float]]:
    """Return what was logged, without how long it took."""
    return [{key: value for key, value in entry.items() if key not in VARYING} for entry in done.state.log_history]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, float]]]:
    folder = tmp_path_factory.mktemp("whole")
    done = trainer(folder)
    done.train()
    assert [path.name for path in checkpoints.list_checkpoints(folder)] == [
        "checkpoint-8",
        "checkpoint-6",
        "checkpoint-3",
    ]
    return folder, curve(done)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """Change a byte of the first tensor, which no reader of torch's notices."""
    import zipfile

    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    data = bytearray(path.read_bytes())
    data[largest.header_offset + 200] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "no state": lambda folder: (folder / "trainer_state.json").unlink(),
    "state cut": lambda folder: cut(folder / "trainer_state.json"),
    "state empty": lambda folder: (folder / "trainer_state.json").write_text(""),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "weights cut": lambda folder: cut(folder / "model.safetensors"),
    "weights empty": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "no optimizer": lambda folder: (folder / "optimizer.pt").unlink(),
    "optimizer cut": lambda folder: cut(folder / "optimizer.pt"),
    "optimizer flipped": lambda folder: flip(folder / "optimizer.pt"),
    "no schedule": lambda folder: (folder / "scheduler.pt").unlink(),
    "no random state": lambda folder: (folder / "rng_state.pth").unlink(),
    "no projections": lambda folder: (folder / "distillation_projections.safetensors").unlink(),
    "config cut": lambda folder: cut(folder / "config.json"),
    "empty": lambda folder: [path.unlink() for path in folder.iterdir()],
    "sentinel": lambda folder: (folder / "checkpoint-is-incomplete.txt").write_text("in progress"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_damage_is_seen(damage: str, whole: tuple[Path, list[dict[str, float]]], tmp_path: Path) -> None:
    folder = shutil.copytree(whole[0], tmp_path / "run")
    assert checkpoints.last_complete_checkpoint(folder) == folder / "checkpoint-8"
    DAMAGE[damage](folder / "checkpoint-8")
    assert checkpoints.last_complete_checkpoint(folder) == folder / "checkpoint-6"


@pytest.mark.sampled(1)
@pytest.mark.parametrize("damage", ["no state", "weights cut", "optimizer flipped"])
def test_an_incomplete_or_damaged_checkpoint_is_skipped_and_the_curve_is_unchanged(
    damage: str, whole: tuple[Path, list[dict[str, float]]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    DAMAGE[damage](folder / "checkpoint-8")
    DAMAGE[damage](folder / "checkpoint-6")
    again = trainer(folder)
    with caplog.at_level(logging.WARNING):
        again.train(resume_from_checkpoint=True)
    for text in ("checkpoint-8 is incomplete or damaged and is skipped", "resumes from", "checkpoint-3, the last"):
        assert text in caplog.text
    assert curve(again) == whole[1]
    for name in ("checkpoint-6", "checkpoint-8"):
        assert (
            same(weights(folder / name), weights(whole[0] / name))
            and checkpoints.checkpoint_defect(folder / name) is None
        )


def test_a_named_checkpoint_that_is_incomplete_is_an_error_that_names_a_complete_one(
    whole: tuple[Path, list[dict[str, float]]], tmp_path: Path
) -> None:
    folder = shutil.copytree(whole[0], tmp_path / "run")
    (folder / "checkpoint-8" / "trainer_state.json").unlink()
    with pytest.raises(
        OptionError, match="no trainer_state.json, which is written last.*last complete one .*checkpoint-6"
    ):
        trainer(folder).train(resume_from_checkpoint=str(folder / "checkpoint-8"))
    for name in ("checkpoint-6", "checkpoint-3"):
        (folder / name / "optimizer.pt").unlink()
    with pytest.raises(OptionError, match="optimizer.pt is missing.*no complete one"):
        trainer(folder).train(resume_from_checkpoint=str(folder / "checkpoint-6"))
    with pytest.raises(OptionError, match="no such folder"):
        trainer(folder).train(resume_from_checkpoint=str(folder / "checkpoint-9"))


def test_without_a_complete_checkpoint_training_starts_from_the_beginning_with_a_warning(
    whole: tuple[Path, list[dict[str, float]]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    again = trainer(tmp_path)
    with caplog.at_level(logging.WARNING):
        again.train(resume_from_checkpoint=True)
    assert "is complete: training starts from the beginning" in caplog.text and curve(again) == whole[1]
    with pytest.raises(
        ValueError, match="No valid checkpoint found"
    ):  # no trace of a run: a wrong folder, as for Trainer
        trainer(tmp_path / "elsewhere").train(resume_from_checkpoint=True)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("by", ["max_steps", "num_train_epochs", "part of an epoch", "fewer steps"])
def test_a_finished_run_that_is_resumed_trains_no_further(by: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "max_steps": {"max_steps": 8},
        "num_train_epochs": {"max_steps": -1, "num_train_epochs": 2},
        "part of an epoch": {"max_steps": -1, "num_train_epochs": 1.3},
        "fewer steps": {"max_steps": 4},
    }[by]
    done = trainer(tmp_path, **changes)
    first = done.train()
    again = trainer(tmp_path, **(changes | ({"max_steps": 2} if by == "fewer steps" else {})))
    second = again.train(resume_from_checkpoint=True)
    assert second.global_step == first.global_step == again.state.global_step
    assert second.training_loss == pytest.approx(first.training_loss) == second.metrics["train_loss"]
    one, other = done.model.state_dict(), again.model.state_dict()
    assert same(one, other) and [entry for entry in curve(again) if "loss" in entry] == [
        entry for entry in curve(done) if "loss" in entry
    ]


@pytest.mark.extended
def test_a_write_that_fails_at_any_file_leaves_only_complete_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place of the disk each part of a checkpoint's writing fails in turn, as the disk does or as an interruption."""
    for number, name in enumerate(
        ("save_model", "_save_optimizer_and_scheduler", "_save_rng_state", "_finalize_checkpoint", "sync_to_disk")
    ):
        for error in (DISK_FULL, KeyboardInterrupt()) if name == "_save_rng_state" else (DISK_FULL,):
            folder = tmp_path / f"{number}{type(error).__name__}"
            broken = trainer(folder, max_steps=6)
            home: Any = checkpoints if name in ("_finalize_checkpoint", "sync_to_disk") else broken
            original, calls = getattr(home, name), []

            def failing(*given: Any, original=original, calls=calls, error=error, **named: Any) -> Any:
                calls.append(1)
                if len(calls) == 2:
                    raise error
                return original(*given, **named)

            with monkeypatch.context() as patched, pytest.raises(type(error)) as raised:
                patched.setattr(home, name, failing)
                broken.train()
            assert (
                os.listdir(folder) == ["checkpoint-3"]
                and checkpoints.checkpoint_defect(folder / "checkpoint-3") is None
            )
            if error is DISK_FULL:
                assert "The checkpoint of step 6" in str(raised.value) and "MiB free" in str(raised.value)
                assert f"complete checkpoint is {folder / 'checkpoint-3'}" in str(raised.value)


@pytest.mark.parametrize(
    ("error", "advice", "counts_space"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "Free space on that disk", True),
        (OSError(errno.EFBIG, "File too large"), "`ulimit -f`", False),
        (SafetensorError(f"I/O error: File too large (os error {errno.EFBIG})"), "`ulimit -f`", False),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "Raise the disk quota", False),
    ],
)
def test_free_space_is_only_stated_where_it_helps(
    error: Exception, advice: str, counts_space: bool, tmp_path: Path
) -> None:
    with pytest.raises(OSError, match="The student could not be written") as raised:
        with checkpoints.explain_write_errors("The student", tmp_path):
            raise error
    message = str(raised.value)
    assert advice in message and ("MiB free" in message) == ("Free space" in message) == counts_space


def test_the_limit_counts_complete_checkpoints(tmp_path: Path) -> None:
    """An unfinished one of a later step neither protects itself nor costs a whole one its place."""
    first = trainer(tmp_path, max_steps=3)
    first.train()
    unfinished = shutil.copytree(tmp_path / "checkpoint-3", tmp_path / "checkpoint-7")
    (unfinished / "trainer_state.json").unlink()
    again = trainer(tmp_path, max_steps=6, save_total_limit=1)
    again.train(resume_from_checkpoint=True)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-6"]


def test_the_best_checkpoint_is_known_by_the_name_it_has_at_the_end(tmp_path: Path) -> None:
    best = DistillationTrainer(
        llama(1),
        arguments(
            tmp_path,
            max_steps=4,
            save_strategy="steps",
            eval_strategy="steps",
            save_steps=2,
            eval_steps=2,
            load_best_model_at_end=True,
        ),
        collate,
        examples_for("causal-lm", 18),
        examples_for("causal-lm", 4),
        teacher=llama(2),
    )
    best.train()
    assert best.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best.state.best_global_step}")
    loaded = weights(Path(best.state.best_model_checkpoint))
    assert all(torch.equal(tensor, best.model.state_dict()[name]) for name, tensor in loaded.items())


def test_a_checkpoint_of_a_stock_trainer_is_resumed(tmp_path: Path) -> None:
    from transformers import Trainer

    args = arguments(tmp_path, losses="ce", max_steps=2, save_strategy="steps", save_steps=2)
    Trainer(llama(1), args, collate, examples_for("causal-lm", 18)).train()
    assert not (tmp_path / "checkpoint-2" / checkpoints.PROGRESS_NAME).exists()
    again = trainer(tmp_path, losses="ce", max_steps=4, optim="sgd")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4 and (tmp_path / "checkpoint-4" / checkpoints.PROGRESS_NAME).exists()


def test_what_was_summed_before_a_checkpoint_is_logged_after_it(
    whole: tuple[Path, list[dict[str, float]]], tmp_path: Path
) -> None:
    """The third step stands between two logs: the loss and every term of step 4 are means over both."""
    folder = shutil.copytree(whole[0], tmp_path / "run")
    for name in ("checkpoint-6", "checkpoint-8"):
        shutil.rmtree(folder / name)
    (state,) = checkpoints.read_progress(folder / "checkpoint-3")
    assert state["last_logged"] == 2 and set(state["terms"]) == {"ce", "kd", "hidden_states"}
    again = trainer(folder)
    again.train(resume_from_checkpoint=True)
    assert curve(again) == whole[1]
    logged = json.loads((folder / "checkpoint-8" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in logged] == [2, 4, 6, 8]


def test_a_checkpoint_without_the_optimizer_is_resumed_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer(tmp_path, max_steps=3, save_only_model=True).train()
    again = trainer(tmp_path, max_steps=4)
    with caplog.at_level(logging.WARNING):
        again.train(resume_from_checkpoint=True)
    assert (
        "saved with save_only_model: the optimizer and the learning rate schedule start from the beginning"
        in caplog.text
    )
    assert again.state.global_step == 4


def test_a_checkpoint_on_sigterm_is_complete(tmp_path: Path) -> None:
    """`Trainer` marks its folder as incomplete, under its name, before it saves."""
    from transformers.trainer_jit_checkpoint import CheckpointManager

    done = trainer(tmp_path, max_steps=3)
    done.train()
    done.state.global_step = 7
    CheckpointManager(done).execute_jit_checkpoint()
    assert checkpoints.last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-7"
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-3", "checkpoint-7"]


@pytest.mark.extended
def test_a_run_does_not_go_on_from_an_earlier_one_in_its_folder(
    whole: tuple[Path, list[dict[str, float]]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The earlier run has later steps; resumed, the second ends as if it had a folder of its own."""
    shutil.copytree(whole[0], tmp_path / "shared")
    for folder in ("own", "shared"):
        begun = trainer(tmp_path / folder, learning_rate=0.05, max_steps=3, lr_scheduler_type="constant")
        begun.train()
    assert "has checkpoints of an earlier run, up to checkpoint-8" in caplog.text
    ends = []
    for folder in ("own", "shared"):
        done = trainer(tmp_path / folder, learning_rate=0.05, lr_scheduler_type="constant")
        done.train(resume_from_checkpoint=True)
        ends.append(curve(done))
    assert ends[0] == ends[1]
    assert "checkpoint-8 belongs to an earlier run in the same output_dir and is skipped" in caplog.text
    assert (
        checkpoints.last_complete_checkpoint(tmp_path / "shared") == tmp_path / "shared" / "checkpoint-8"
    )  # it is the second's now
