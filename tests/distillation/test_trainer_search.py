"""Laws of a search for hyper-parameters: each trial is a run of its own, by its own arguments and its own student.

Trials are begun as `hyperparameter_search` begins them in every process but the first, without the libraries that choose
them.
"""

from pathlib import Path
from typing import Any

import pytest
from transformers.trainer_utils import HPSearchBackend

from hf_guide import DistillationTrainer, capture_teacher
from hf_guide.errors import CaptureError, OptionError
from tests.distillation.small import collate, examples_for, llama
from tests.distillation.test_trainer import arguments


def trainer_of(
    folder: Path, *, teacher: Any = None, shape: dict[str, int] | None = None, **changes: Any
) -> DistillationTrainer:
    """A trainer that can be searched with; `shape` of its students may be changed between runs."""
    return DistillationTrainer(
        args=arguments(folder, **({"learning_rate": 0.05, "max_steps": 3} | changes)),
        data_collator=collate,
        train_dataset=examples_for("causal-lm"),
        model_init=lambda: llama(1, **(shape or {})),
        teacher=llama(2, width=48, blocks=4) if teacher is None else teacher,
    )


def curve(trainer: DistillationTrainer, trial: dict[str, Any] | None = None) -> list[dict[str, float]]:
    if trial is not None:
        trainer.hp_search_backend = HPSearchBackend.WANDB  # the one that takes a trial as plain arguments
        trainer._hp_search_setup(trial)
        trainer.hp_search_backend = None
    trainer.train()
    names = {"loss", "ce", "kd", "hidden_states"}
    return [
        {name: entry[name] for name in sorted(names & entry.keys())}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "chosen", [{"losses": {"kd": 1.0}}, {"temperature": 3.0}, {"losses": {"hidden_states": 0.5, "ce": 0.5}}], ids=str
)
def test_a_trial_learns_by_its_own_arguments(chosen: dict[str, Any], tmp_path: Path) -> None:
    objective = {"ce": 0.5, "kd": 0.5}
    alone = curve(trainer_of(tmp_path, **({"losses": objective} | chosen)))
    searched = trainer_of(tmp_path, losses=objective)
    assert curve(searched, dict(chosen)) == alone != curve(trainer_of(tmp_path, losses=objective))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("chosen", [{"width": 16}, {"blocks": 4}], ids=str)
def test_a_trial_learns_with_its_own_student(chosen: dict[str, int], tmp_path: Path) -> None:
    shape: dict[str, int] = {"width": 32}
    searched = trainer_of(tmp_path, losses="hidden_states", shape=shape)
    curve(searched)
    shape |= chosen
    found = curve(searched)
    other = trainer_of(tmp_path, losses="hidden_states", shape=chosen)
    assert found == curve(other) and searched.distillation_objective.layers == other.distillation_objective.layers


def test_projections_are_initialized_again_with_their_student(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, losses="hidden_states")
    first = curve(trainer)
    assert curve(trainer) == first
    assert sum("ProjectionGradSyncCallback" in type(each).__name__ for each in trainer.callback_handler.callbacks) == 1


def test_a_trial_from_a_capture_is_fed_the_tail_of_its_own_temperature(tmp_path: Path) -> None:
    examples = examples_for("causal-lm")
    options = {"top_k": 4, "temperatures": [1.0, 2.0]}
    capture = capture_teacher(
        llama(2), examples, tmp_path / "capture", data_collator=collate, config=options, show_progress=False
    )
    alone = curve(trainer_of(tmp_path, teacher=capture, losses="kd", temperature=2.0))
    assert curve(trainer_of(tmp_path, teacher=capture, losses="kd"), {"temperature": 2.0}) == alone
    with pytest.raises(CaptureError, match="temperature=3.0 was not captured"):
        curve(trainer_of(tmp_path, teacher=capture, losses="kd"), {"temperature": 3.0})
    changed = trainer_of(tmp_path, teacher=capture, losses="kd")
    changed.args.temperature = 2.0  # as a callback might
    with pytest.raises(CaptureError, match="temperature=1.0, and the loss has temperature=2.0"):
        changed.model_init = None
        changed.train()


def test_invalid_arguments_of_a_trial_are_an_error_before_its_first_step(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, losses="kd")
    with pytest.raises(OptionError, match="temperature must be a number"):
        curve(trainer, {"temperature": 0.0})
    with pytest.raises(OptionError, match="'kdd'.*Did you mean 'kd'"):
        curve(trainer_of(tmp_path, losses="kd"), {"losses": {"kdd": 1.0}})
    assert trainer.state.global_step == 0
