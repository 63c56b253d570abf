"""Losses are registered from outside, with options of their own, and named in arguments, files and on the command line."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_guide import DistillationTrainer, LossConfig, OptionError, TaskError, register_loss, register_term
from hf_guide.distillation.losses.registry import _LOSSES, parse_losses
from hf_guide.scripts.distill import read_config
from tests.distillation.small import collate, examples_for, llama, model_for
from tests.distillation.test_trainer import arguments


@dataclass(frozen=True)
class PowerConfig(LossConfig):
    power: float = field(default=2.0, metadata={"help": "Exponent of the difference."})


@pytest.fixture(autouse=True)
def power_loss() -> Iterator[None]:
    before = dict(_LOSSES)

    @register_loss("power", requires="logits", tasks=("causal-lm",), config=PowerConfig)
    def power(student: Any, teacher: Any, labels: Any, config: PowerConfig) -> torch.Tensor:
        """Return the difference of the logits to a power."""
        return ((student - teacher.logits) / config.temperature).abs().pow(config.power).mean(-1)

    yield
    _LOSSES.clear()
    _LOSSES.update(before)


def logged(args: Any) -> dict[str, float]:
    """Train one step and return what was logged."""
    trainer = DistillationTrainer(llama(1), args, collate, examples_for("causal-lm"), teacher=llama(2))
    trainer.train()
    return dict(trainer.state.log_history[0])


def test_a_loss_from_outside_is_trained_with_its_own_option_and_the_shared_temperature(tmp_path: Path) -> None:
    def value(**options: Any) -> float:
        return logged(arguments(tmp_path, losses={"ce": 0.5, "power": 0.5}, **options))["power"]

    by_default, linear = value(), value(loss_options={"power": {"power": 1.0}})
    assert by_default != pytest.approx(linear, rel=0.1)
    halved = value(loss_options={"power": {"power": 1.0}}, temperature=2.0)
    assert halved == pytest.approx(linear / 2, rel=1e-5)


def test_a_file_and_the_command_line_set_its_option(tmp_path: Path) -> None:
    path = tmp_path / "distill.yaml"
    path.write_text(
        "teacher: some/teacher\nstudent_init_kwargs: {hidden_size: 16}\ndata_files: a.txt\n"
        f"output_dir: {tmp_path / 'out'}\nlosses: {{ce: 0.5, power: 0.5}}\nloss_options: {{power: {{power: 3.0}}}}\n"
    )
    assert read_config(path).training.loss_configs["power"].power == 3.0
    words = ["--losses", "power", "--loss_options", json.dumps({"power": {"power": 1.5}})]
    args = read_config(path, words).training
    assert args.losses == {"power": 1.0} and args.loss_configs["power"].power == 1.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"power": {"powr": 1.0}}, "the loss 'power' has no option 'powr'.*Did you mean 'power'"),
        ({"powr": {"power": 1.0}}, "options of 'powr', which is not among the losses.*Did you mean 'power'"),
        ({"power": {"power": "2"}}, "power in loss_options.*must be float; found '2'"),
        ({"power": {"temperature": 2.0}}, r"set once for all losses: pass DistillationArguments\(temperature=...\)"),
        ({"power": 2.0}, "must be a mapping"),
        ("{", "loss_options must be a mapping.*not JSON"),
    ],
)
def test_an_option_that_a_loss_does_not_declare_is_an_error(options: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=words):
        arguments(tmp_path, losses={"power": 1.0}, loss_options=options)


def test_options_of_built_in_losses_are_checked(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="dkd's beta must be a number above 0"):
        arguments(tmp_path, losses="dkd", loss_options={"dkd": {"beta": -1.0}})
    with pytest.raises(OptionError, match="distance='cosin' is not known.*Did you mean 'cosine'"):
        arguments(tmp_path, losses="features", loss_options={"features": {"distance": "cosin"}})
    with pytest.raises(OptionError, match=r"pass DistillationArguments\(kd_loss_type=...\)"):
        arguments(tmp_path, losses="kd", loss_options={"kd": {"kind": "jsd"}})


def test_a_loss_of_another_task_is_an_error(tmp_path: Path) -> None:
    task = "sequence-classification"
    with pytest.raises(TaskError, match="'power' is for causal-lm, not for sequence-classification"):
        DistillationTrainer(
            model_for(task, 1),
            arguments(tmp_path, losses="power"),
            collate,
            examples_for(task),
            teacher=model_for(task, 2),
        )


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"requires": "logit"}, "requires='logit' is not known.*Did you mean 'logits'"),
        ({"tasks": ["causal"]}, "tasks='causal' is not known.*'causal-lm'"),
        ({"config": dict}, "must be a dataclass derived from LossConfig"),
    ],
)
def test_a_registration_that_cannot_be_is_an_error(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        register_loss("another", **wrong)


def test_old_names_of_losses_are_accepted_with_a_warning(tmp_path: Path) -> None:
    with pytest.warns(FutureWarning, match="losses: 'hidden' is deprecated; use 'hidden_states'"):
        assert parse_losses({"hidden": 1.0, "ce": 0.5}) == {"hidden_states": 1.0, "ce": 0.5}
    with pytest.warns(FutureWarning, match="losses: 'embedding' is deprecated; use 'features'"):
        assert arguments(tmp_path, losses="embedding").loss_weights == {"features": 1.0}
    with pytest.raises(OptionError, match="both 'features' and its deprecated name 'embedding'"):
        parse_losses({"features": 1.0, "embedding": 1.0})


def test_register_term_still_registers_a_function_of_the_arguments(tmp_path: Path) -> None:
    with pytest.warns(FutureWarning, match="register_loss"):

        @register_term("old", needs="logits", task_only=("causal-lm",))
        def old(student: Any, teacher: Any, labels: Any, args: Any) -> torch.Tensor:
            return (student - teacher.logits).square().mean(-1) * args.learning_rate

    assert logged(arguments(tmp_path, losses="old"))["old"] > 0
    with pytest.raises(OptionError, match="declares no options"):
        arguments(tmp_path, losses="old", loss_options={"old": {"a": 1}})
