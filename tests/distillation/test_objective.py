"""What users write around the trainer: losses that build on its outputs, terms of their own, models with their own forward."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, set_seed

from hf_guide import DistillationTrainer, OptionError, register_loss
from hf_guide.distillation.losses.registry import _LOSSES
from tests.distillation.small import TASKS, collate, examples_for, llama, model_for
from tests.distillation.test_trainer import arguments


class OnOutputs(DistillationTrainer):
    """Adds a loss of the student's logits, which it takes from what `super()` returns."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **others: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **others)
        assert outputs.logits is outputs["logits"]
        self.seen = outputs.logits.shape[:2]
        loss = loss + outputs.logits.logsumexp(-1).square().sum()
        return (loss, outputs) if return_outputs else loss


@pytest.mark.sampled(2)
@pytest.mark.parametrize("objective", ["ce", "kd", {"ce": 0.5, "kd": 0.5}, "hidden_states"])
def test_a_derived_loss_has_the_logits(objective: Any, tmp_path: Path) -> None:
    data = examples_for("causal-lm", 4)
    shape = collate(data)["input_ids"].shape

    def trained(kind: type[DistillationTrainer]) -> tuple[DistillationTrainer, float]:
        args = arguments(tmp_path, losses=objective, max_steps=1, per_device_train_batch_size=4)
        trainer = kind(llama(1), args, collate, data, data, teacher=llama(2))
        trainer.train()
        return trainer, trainer.state.log_history[0]["loss"]

    plain, loss = trained(DistillationTrainer)
    derived, more = trained(OnOutputs)
    with torch.no_grad():
        logits = llama(1)(**{name: value for name, value in collate(data).items() if name != "labels"}).logits
    assert more - loss == pytest.approx(logits.logsumexp(-1).square().sum().item(), rel=1e-3)
    derived.seen = None
    derived.evaluate()
    assert derived.seen == shape


@pytest.fixture
def own_terms() -> Iterator[None]:
    before = dict(_LOSSES)

    @register_loss("mean_of_logits", requires="logits")
    def mean_of_logits(student: Any, teacher: Any, labels: Any, config: Any) -> torch.Tensor:
        return (student - teacher.logits).square().mean()

    @register_loss("class_by_class", requires="logits")
    def class_by_class(student: Any, teacher: Any, labels: Any, config: Any) -> torch.Tensor:
        return (student - teacher.logits).square()

    @register_loss("mean_of_states", requires="hidden_states")
    def mean_of_states(student: Any, teacher: Any, config: Any) -> torch.Tensor:
        return (student - teacher).square().mean()

    @register_loss("mean_of_embeddings", requires="features")
    def mean_of_embeddings(student: Any, teacher: Any, config: Any) -> torch.Tensor:
        return (student - teacher).square().mean()

    yield
    _LOSSES.clear()
    _LOSSES.update(before)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("term", ["mean_of_logits", "class_by_class", "mean_of_states", "mean_of_embeddings"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.usefixtures("own_terms")
def test_a_loss_that_is_not_one_value_an_item_is_an_error(task: str, term: str, tmp_path: Path) -> None:
    args = arguments(tmp_path, losses={"ce": 0.5, term: 0.5}, max_steps=1)
    trainer = DistillationTrainer(model_for(task, 1), args, collate, examples_for(task, 4), teacher=model_for(task, 2))
    with pytest.raises(OptionError, match=f"'{term}' must return one value an item"):
        trainer.train()


def test_a_loss_of_labels_alone_is_an_error() -> None:
    with pytest.raises(OptionError, match="'labels' is for the task loss alone.*'smoothed'.*compute_loss_func"):
        register_loss("smoothed", requires="labels")


class PassesOn(LlamaForCausalLM):
    """A model whose forward names none of its inputs."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class NamesOne(LlamaForCausalLM):
    """A model whose forward names one of the inputs, and passes the others on."""

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids, **kwargs)


def of_class(kind: Any, seed: int) -> Any:
    stock = llama(seed)
    set_seed(seed)
    model = kind(stock.config)
    model.load_state_dict(stock.state_dict())
    return model


@pytest.mark.sampled(2)
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("kind", [PassesOn, NamesOne])
def test_a_forward_that_passes_its_inputs_on_has_those_of_the_stock_one(kind: Any, side: str, tmp_path: Path) -> None:
    data = [
        {"input_ids": [0] * pads + ids, "attention_mask": [0] * pads + [1] * len(ids), "labels": [-100] * pads + ids}
        for pads, ids in ((3, [5, 6, 7]), (1, [8, 9, 10, 11, 12]))
    ]

    def measured(student: Any, teacher: Any) -> dict[str, float]:
        args = arguments(tmp_path, remove_unused_columns=False, max_steps=1)
        trainer = DistillationTrainer(student, args, collate, data, data, teacher=teacher)
        trainer.train()
        metrics = trainer.evaluate()
        return {name: metrics[f"eval_{name}"] for name in ("loss", "ce", "kd", "teacher_ce")}

    kinds = {"student": LlamaForCausalLM, "teacher": LlamaForCausalLM} | {side: kind}
    found = measured(of_class(kinds["student"], 1), of_class(kinds["teacher"], 2))
    assert found == pytest.approx(measured(llama(1), llama(2)), rel=1e-5)


class WithoutLabels(DistillationTrainer):
    """Takes the labels away, and adds a task loss of its own."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **others: Any) -> Any:
        labels = inputs.pop("labels")
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **others)
        loss = loss + cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return (loss, outputs) if return_outputs else loss


def test_labels_may_be_kept_from_the_trainer(tmp_path: Path) -> None:
    data = examples_for("causal-lm", 4)
    trainer = WithoutLabels(
        llama(1), arguments(tmp_path, losses="kd", max_steps=2), collate, data, data, teacher=llama(2)
    )
    trainer.train()
    assert trainer.evaluate()["eval_kd"] > 0
