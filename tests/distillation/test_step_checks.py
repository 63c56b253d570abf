"""What is NaN or infinite ends the run at its step, with a name; it is never saved."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from hf_guide import DistillationTrainer, from_teacher
from hf_guide.cli.main import main
from hf_guide.errors import NotFiniteError, TeacherError
from hf_guide.utils.finite import all_finite, check_weights_finite, non_finite_names
from tests.distillation.small import TASKS, collate, examples_for, llama, model_for
from tests.distillation.test_trainer import arguments


class Spoil(TrainerCallback):
    """Makes something not finite at one step."""

    def __init__(self, step: int, what: Any):
        self.step, self.what = step, what

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step + 1 == self.step:
            self.what(given["model"])


def spoil_weight(model: torch.nn.Module) -> None:
    with torch.no_grad():
        list(model.parameters())[2].view(-1)[1] = math.inf


def spoil_gradient(model: torch.nn.Module) -> None:
    parameter = list(model.parameters())[3]
    parameter.register_hook(lambda gradient: gradient * math.nan)


def trainer_of(folder: Path, task: str = "causal-lm", **changes: Any) -> DistillationTrainer:
    given = {name: changes.pop(name) for name in ("compute_loss_func", "callbacks", "teacher") if name in changes}
    student = changes.pop("model", None) or model_for(task, 1)
    common = {
        "losses": {"ce": 0.5, "kd": 0.5},
        "max_steps": 4,
        "learning_rate": 0.01,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    return DistillationTrainer(
        student,
        arguments(folder, **(common | changes)),
        collate,
        examples_for(task, 64),
        **({"teacher": model_for(task, 2)} | given),
    )


def check_ended(trainer: DistillationTrainer, folder: Path, step: int, words: list[str]) -> None:
    """Check that training ends at `step`, that the weights before it are whole and so is the last checkpoint."""
    with pytest.raises(NotFiniteError) as caught:
        trainer.train()
    message = str(caught.value)
    assert all(word in message for word in [f"step {step}", *words]), message
    saved = sorted(path.name for path in folder.glob("checkpoint-*"))
    assert saved == [f"checkpoint-{number}" for number in range(1, step)]
    if saved:
        assert saved[-1] in message
        kept = type(trainer.model).from_pretrained(folder / saved[-1])
        assert all_finite(kept.parameters())


@pytest.mark.sampled(3)
@pytest.mark.parametrize("norm", [0.0, 1.0])
@pytest.mark.parametrize("task", TASKS)
def test_a_gradient_is_named_before_the_optimizer_uses_it(task: str, norm: float, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, task, callbacks=[Spoil(3, spoil_gradient)], max_grad_norm=norm)
    name = list(dict(trainer.model.named_parameters()))[3]
    check_ended(trainer, tmp_path, 3, [f"the gradient of {name} ", "learning_rate"])
    assert all_finite(trainer.model.parameters())


def test_a_weight_is_named_rather_than_the_loss_that_it_spoils(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, callbacks=[Spoil(2, spoil_weight)])
    name = list(dict(trainer.model.named_parameters()))[2]
    check_ended(trainer, tmp_path, 2, [f"the student's weight {name} has NaN or infinity"])


def test_a_weight_that_the_optimizer_spoils_is_named_at_that_step(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, learning_rate=3e38, max_steps=1, losses="ce")
    with pytest.raises(NotFiniteError, match=r"After step 1 the weight model\.\S+ has NaN or infinity"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_term_is_named(accumulation: int, tmp_path: Path) -> None:
    calls = []

    def own(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        calls.append(1)
        loss = outputs["logits"].square().mean()
        return loss * (math.inf if len(calls) > accumulation else 1.0)

    trainer = trainer_of(tmp_path, compute_loss_func=own, gradient_accumulation_steps=accumulation)
    check_ended(trainer, tmp_path, 2, ["the loss 'ce' is inf", "checkpoint-1"])
    assert all_finite(trainer.model.parameters())


def test_maps_between_widths_are_checked_too(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, losses="hidden_states", teacher=llama(2, width=48))
    parameter = next(trainer.distillation_objective.projections.parameters())
    parameter.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(NotFiniteError, match=r"step 1,.* the gradient of projections\.maps"):
        trainer.train()


def test_a_teacher_is_named_before_its_student(tmp_path: Path) -> None:
    teacher = llama(2)
    with torch.no_grad():
        teacher.lm_head.weight[3] = math.nan
    with pytest.raises(TeacherError, match="Teacher 0 gives NaN"):
        trainer_of(tmp_path, teacher=teacher).train()


def test_weights_that_are_not_finite_are_saved_by_nobody(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "run")
    spoil_weight(trainer.model)
    name = list(dict(trainer.model.named_parameters()))[2]
    with pytest.raises(NotFiniteError, match=f"its weight {name} has NaN or infinity, as 1 of"):
        trainer.save_model(str(tmp_path / "saved"))
    student = from_teacher(llama(2), num_hidden_layers=1, show_progress=False)
    spoil_weight(student)
    with pytest.raises(NotFiniteError, match="was not saved"):
        student.save_pretrained(tmp_path / "student")
    assert not (tmp_path / "saved").exists() and not (tmp_path / "student").exists()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own call
def test_a_merged_adapter_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    trainer = trainer_of(tmp_path, model=get_peft_model(llama(1), LoraConfig(r=2, target_modules=["q_proj"])))
    with torch.no_grad():
        next(each for each in trainer.model.parameters() if each.requires_grad).fill_(math.nan)
    with pytest.raises(NotFiniteError, match="The merged student was not saved"):
        trainer.save_merged_model(tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_distill_ends_with_an_error_and_leaves_no_student(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A learning rate so large that the weights overflow."""
    from tests.examples.local import make_model, write_text
    from tests.scripts.test_distill import written

    teacher = make_model(tmp_path / "teacher", "llama", "ForCausalLM")
    options = {
        "student_init_kwargs": {"num_hidden_layers": 1},
        "data_files": write_text(tmp_path / "text.txt"),
        "teacher": teacher,
    }
    settings = written(tmp_path, **options, learning_rate=3e38, optim="sgd", max_grad_norm=0.0)
    assert main(["distill", str(settings)]) != 0
    assert "Lower learning_rate, set max_grad_norm" in capsys.readouterr().err
    assert not list((tmp_path / "student").glob("**/*.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_each_value_is_found_in_each_dtype(dtype: torch.dtype, value: float) -> None:
    large = torch.full((70, 70), torch.finfo(dtype).max, dtype=dtype)
    wrong = copy.deepcopy(large)
    wrong[3, 5] = value
    other = [torch.zeros(0, dtype=dtype), torch.ones(3, dtype=torch.int64), torch.ones(2, device="meta")]
    assert all_finite([large, *other]) and not all_finite([large, wrong, *other])
    assert non_finite_names([("a", large), ("b", wrong), ("c", wrong)]) == ["b", "c"]
    with pytest.raises(NotFiniteError, match="its weight b has NaN or infinity, as 2 of 3 weights do"):
        check_weights_finite({"a": large, "b": wrong, "c": wrong, "extra": 3})
