"""Trainers that users derive from ours use the teacher, whatever the order of their bases, or raise with a reason."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

from hf_guide import (
    DistillationArguments,
    DistillationMixin,
    DistillationTrainer,
    Seq2SeqDistillationArguments,
    Seq2SeqDistillationTrainer,
)
from hf_guide.distillation.loss_scaling import LossScalingTrainer
from hf_guide.errors import OptionError
from tests.distillation.small import collate, examples_for, llama, model_for
from tests.distillation.test_trainer import arguments


class OwnLoss(Trainer):
    """A trainer of another library: an `__init__` of its own, and a loss that it computes alone."""

    def __init__(
        self,
        model: Any,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_loss_func: Any = None,
        compute_metrics: Any = None,
        callbacks: Any = None,
        optimizers: Any = (None, None),
        optimizer_cls_and_kwargs: Any = None,
        preprocess_logits_for_metrics: Any = None,
        peft_config: Any = None,
    ):
        super().__init__(
            model=model, args=args, data_collator=data_collator, train_dataset=train_dataset, eval_dataset=eval_dataset
        )

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class Passes(Trainer):
    """One whose loss builds on that of the next class."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)


def given(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "args": arguments(folder, **({"losses": {"ce": 0.5, "kd": 0.5}} | changes)),
        "data_collator": collate,
        "train_dataset": examples_for("causal-lm"),
        "eval_dataset": examples_for("causal-lm", 4),
    }


def saved_teacher(folder: Path) -> str:
    llama(2).save_pretrained(folder / "teacher")
    return str(folder / "teacher")


def test_an_override_without_super_is_an_error_when_the_trainer_is_created(tmp_path: Path) -> None:
    class Alone(DistillationTrainer):
        compute_loss = OwnLoss.compute_loss  # type: ignore[assignment]

    with pytest.raises(OptionError, match=r"Alone takes compute_loss from Alone, .*Call super\(\).compute_loss"):
        Alone(llama(1), **given(tmp_path), teacher=llama(2))
    # An objective without a teacher needs none.
    Alone(llama(1), **given(tmp_path, losses="ce")).train()


def test_a_trainer_that_takes_no_teacher_and_builds_on_ours_is_an_error(tmp_path: Path) -> None:
    class TakesNoTeacher(Trainer):
        def __init__(self, model: Any, args: Any, data_collator: Any, train_dataset: Any, eval_dataset: Any):
            super().__init__(model, args, data_collator, train_dataset, eval_dataset)

        def compute_loss(self, *args: Any, **keywords: Any) -> Any:
            return super().compute_loss(*args, **keywords)

    first = type("First", (TakesNoTeacher, DistillationTrainer), {})
    with pytest.raises(
        OptionError,
        match=r"TakesNoTeacher.__init__ takes no teacher.*class First\(DistillationTrainer, TakesNoTeacher\)",
    ):
        first(llama(1), **given(tmp_path), teacher=llama(2))
    trainer = first(llama(1), **given(tmp_path, teacher=saved_teacher(tmp_path)))
    trainer.train()
    assert trainer.state.log_history[0]["kd"] > 0


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "bases",
    [
        (DistillationTrainer, OwnLoss),
        (OwnLoss, DistillationTrainer),
        (Passes, DistillationTrainer),
        (DistillationTrainer, Passes),
    ],
)
def test_a_loss_that_ours_is_part_of_trains_with_the_teacher(bases: Any, tmp_path: Path) -> None:
    plain = DistillationTrainer(llama(1), **given(tmp_path), teacher=llama(2))
    mixed = type("Mixed", bases, {})(llama(1), **given(tmp_path), teacher=llama(2))
    for each in (plain, mixed):
        each.train()
    assert mixed.state.log_history[0]["kd"] == pytest.approx(plain.state.log_history[0]["kd"], rel=1e-5)
    assert mixed.evaluate()["eval_kd"] == pytest.approx(plain.evaluate()["eval_kd"], rel=1e-5)


def skip_loss(self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
    if self is None:
        return super(DistillationTrainer, self).compute_loss(model, inputs)
    outputs = model(**inputs)
    return (outputs.loss, outputs) if return_outputs else outputs.loss


def skip_step(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    if self is None:
        return super(DistillationTrainer, self).training_step(model, inputs)
    loss = model(**self._prepare_inputs(inputs)).loss
    self.accelerator.backward(loss)
    return loss.detach()


def skip_count(self: Any, batch_samples: Any, device: Any) -> Any:
    return super(LossScalingTrainer, self)._get_num_items_in_batch(batch_samples, device)


@pytest.mark.parametrize(
    ("method", "function"),
    [("compute_loss", skip_loss), ("training_step", skip_step), ("_get_num_items_in_batch", skip_count)],
)
def test_an_override_that_skips_ours_when_it_runs_is_an_error_at_the_first_step(
    method: str, function: Any, tmp_path: Path
) -> None:
    student = llama(1)
    before = copy.deepcopy(student.state_dict())
    trainer = type("Mine", (DistillationTrainer,), {method: function})(student, **given(tmp_path), teacher=llama(2))
    with pytest.raises(OptionError, match=rf"Mine takes {method} from Mine.*super\(\).{method}"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_a_method_replaced_on_the_instance_is_an_error_at_the_first_step(tmp_path: Path) -> None:
    trainer = DistillationTrainer(llama(1), **given(tmp_path), teacher=llama(2))
    trainer.compute_loss = lambda model, inputs, **_: model(**inputs).loss  # type: ignore[method-assign]
    with pytest.raises(OptionError, match="compute_loss of this DistillationTrainer was replaced on the instance"):
        trainer.train()


def test_an_evaluation_that_skips_ours_is_an_error(tmp_path: Path) -> None:
    def prediction_step(self: Any, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        if self is None:
            return super(DistillationTrainer, self).prediction_step(model, inputs, True)
        with torch.no_grad():
            return model(**self._prepare_inputs(inputs)).loss, None, None

    mine = type("Mine", (DistillationTrainer,), {"prediction_step": prediction_step})
    with pytest.raises(OptionError, match="Mine takes prediction_step from Mine"):
        mine(llama(1), **given(tmp_path), teacher=llama(2)).evaluate()

    class Alone(DistillationTrainer):
        def evaluation_loop(self, *args: Any, **keywords: Any) -> Any:
            raise NotImplementedError

    with pytest.raises(OptionError, match="Alone takes evaluation_loop from Alone"):
        Alone(llama(1), **given(tmp_path), teacher=llama(2))


def test_a_loss_must_not_be_divided_twice(tmp_path: Path) -> None:
    trainer = DistillationTrainer(llama(1), **given(tmp_path), teacher=llama(2))
    trainer.loss_is_scaled_for_ga = False
    with pytest.raises(OptionError, match="loss_is_scaled_for_ga must be True"):
        trainer.train()


# Seq2SeqTrainer


@dataclass
class Arguments(DistillationArguments, Seq2SeqTrainingArguments):
    """The natural order."""


@dataclass
class OtherArguments(Seq2SeqTrainingArguments, DistillationArguments):
    """The other."""


def seq2seq(folder: Path, kind: Any, **changes: Any) -> dict[str, Any]:
    plain = arguments(folder)
    kept = (
        "output_dir",
        "max_steps",
        "optim",
        "max_grad_norm",
        "report_to",
        "save_strategy",
        "logging_steps",
        "disable_tqdm",
        "use_cpu",
    )
    options = {name: getattr(plain, name) for name in kept} | {
        "losses": {"ce": 0.5, "kd": 0.5},
        "learning_rate": 0.01,
    }
    return {
        "args": kind(**(options | changes)),
        "data_collator": collate,
        "train_dataset": examples_for("seq2seq-lm"),
        "eval_dataset": examples_for("seq2seq-lm", 6, seed=7),
    }


SEQ2SEQ = {
    "public": (Seq2SeqDistillationTrainer, Seq2SeqDistillationArguments),
    "ours first": (type("Ours", (DistillationTrainer, Seq2SeqTrainer), {}), Arguments),
    "theirs first": (type("Theirs", (Seq2SeqTrainer, DistillationTrainer), {}), OtherArguments),
    "mixin": (type("Mixed", (DistillationMixin, Seq2SeqTrainer), {}), Arguments),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", SEQ2SEQ)
def test_generation_and_the_objective_are_evaluated_together(name: str, tmp_path: Path) -> None:
    both, kind = SEQ2SEQ[name]
    seen: list[Any] = []

    def measure(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions)
        return {"length": float((prediction.predictions != 0).any(0).nonzero()[0].max()) + 1}

    options = seq2seq(tmp_path, kind, predict_with_generate=True, generation_max_length=9)
    trainer = both(model_for("seq2seq-lm", 1), **options, teacher=model_for("seq2seq-lm", 2), compute_metrics=measure)
    plain_options = seq2seq(tmp_path, kind)
    plain = DistillationTrainer(model_for("seq2seq-lm", 1), **plain_options, teacher=model_for("seq2seq-lm", 2))
    for each in (trainer, plain):
        each.train()
    assert trainer.state.log_history[0]["kd"] == plain.state.log_history[0]["kd"] > 0
    metrics, expected = trainer.evaluate(), plain.evaluate()
    for name in ("loss", "ce", "kd", "objective", "teacher_agreement", "teacher_ce", "perplexity"):
        assert metrics[f"eval_{name}"] == pytest.approx(expected[f"eval_{name}"], rel=1e-5), name
    assert seen[0].dtype.kind == "i" and 5 < metrics["eval_length"] <= 9
    assert trainer.evaluate(max_length=5)["eval_length"] <= 5
    predicted = trainer.predict(examples_for("seq2seq-lm", 3), num_beams=2)
    assert len(predicted.predictions) == 3 and predicted.metrics["test_kd"] > 0
    assert '"temperature"' in trainer.args.to_json_string()


def test_seq2seq_trainer_requires_seq2seq_arguments(tmp_path: Path) -> None:
    both = type("Both", (DistillationTrainer, Seq2SeqTrainer), {})
    with pytest.raises(OptionError, match="must be Seq2SeqTrainingArguments too; found DistillationArguments"):
        both(model_for("seq2seq-lm", 1), **(given(tmp_path)), teacher=model_for("seq2seq-lm", 2))
    with pytest.raises(OptionError, match="args must be Seq2SeqDistillationArguments.*found Seq2SeqTrainingArguments"):
        options = seq2seq(tmp_path, Arguments) | {"args": Seq2SeqTrainingArguments(str(tmp_path), use_cpu=True)}
        Seq2SeqDistillationTrainer(model_for("seq2seq-lm", 1), **options, teacher=model_for("seq2seq-lm", 2))
    with pytest.raises(OptionError, match="Seq2SeqTrainer.__init__.* takes no optimizer_cls_and_kwargs"):
        options = seq2seq(tmp_path, Arguments)
        both(model_for("seq2seq-lm", 1), **options, optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1}))
