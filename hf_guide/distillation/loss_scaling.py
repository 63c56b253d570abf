"""What losses are divided by: gradient accumulation, `num_items_in_batch`, and Trainer's factor for several processes.

Every loss is a mean over the items of the whole accumulated batch, on all processes where
`average_tokens_across_devices` is set, so that one step is the same however its batch is split up.

Does: count the items of the micro-batches, and the targets that the model's own loss is averaged over; convert sums over a
micro-batch to parts of that mean, and the task loss, which models divide by themselves, into a sum; return a loss of zero,
with gradient, for a batch without any target.
Does not: compute the other losses (`objective.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from hf_guide.distillation.batch_builder import BatchBuilder, DistillationBatch
from hf_guide.distillation.objective import zero_loss_with_gradient
from hf_guide.distillation.subclass_logits import SubclassTargets
from hf_guide.errors import OptionError
from hf_guide.models.modes import eval_mode
from hf_guide.models.targets import target_inputs
from hf_guide.tasks import Task


@dataclass(frozen=True)
class LossDenominator:
    """What the sum of a loss over a micro-batch is divided by.

    Counts may be float64. What is computed with them has the dtype of the loss, the same on every process, which gather it.

    Attributes:
        num_items: Items of the accumulated batch, or of this micro-batch where `Trainer` counted none; never 0.
        num_targets: What the model's own loss is averaged over there; never 0.
        is_global: Whether `num_items` counts the accumulated batch.
        world_scale: Undoes the mean over processes of DistributedDataParallel, as `Trainer` does.
    """

    num_items: Any
    num_targets: Any
    is_global: bool
    world_scale: int

    def to_mean(self, loss_sum: Tensor) -> Tensor:
        """Return what a sum over the micro-batch contributes to the mean."""
        return (loss_sum / self.num_items * self.world_scale).to(loss_sum.dtype)

    def to_sum(self, loss_mean: Tensor) -> Tensor:
        """Return the sum over the micro-batch of what it contributes to the mean."""
        return (loss_mean * self.num_items / self.world_scale).to(loss_mean.dtype)

    def rescale(self, loss: Tensor, num_targets: Any) -> Tensor:
        """Return what the mean over a micro-batch's `num_targets` contributes to the mean."""
        return (loss * (num_targets / self.num_targets) * self.world_scale).to(loss.dtype)


_ITEMS_COUNTED_BY_TRAINER = ("token", "example", "pixel")
"""The items of tasks whose losses may be divided by `num_items_in_batch`; others are means over their own batch."""


class LossScalingTrainer(Trainer):
    """A `Trainer` that counts the items of accumulated batches, and scales the task loss of any model by them."""

    # Every loss is divided by the number of items in the whole accumulated batch, so Trainer must not divide again.
    loss_is_scaled_for_ga = True

    called_methods: set[str]
    task: Task
    _batch_builder: BatchBuilder
    _subclass_targets: SubclassTargets
    _is_predicting: bool = False
    counted_items: Any = None
    """What `_get_num_items_in_batch` returned last."""

    _has_own_task_loss: bool = False
    """Whether another trainer's `compute_loss` gives the task loss."""

    _targets_per_item: Tensor | None = None
    """What the model's own loss is averaged over, for each item of the accumulated batch."""

    _accepts_num_items: bool | None = None
    """Whether the student's own loss is divided by `num_items_in_batch`; None until it is known."""

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Count the items of all micro-batches, on all processes where `average_tokens_across_devices` is set."""
        if not self._is_predicting:
            self.called_methods.add("_get_num_items_in_batch")
        self.counted_items = self._count_items(batch_samples, device)
        return self.counted_items

    def _count_items(self, batch_samples: list[Any], device: torch.device) -> Any:
        if self.compute_loss_func is not None or not batch_samples:
            return _at_least_one(super()._get_num_items_in_batch(batch_samples, device))
        training = not self._is_predicting
        counts = [self._batch_builder.count_items(batch, training=training) for batch in batch_samples]
        totals = torch.stack(counts).sum(0).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            totals = self.accelerator.gather(totals).view(-1, 2).sum(0)
        num_items, num_targets = totals
        self._targets_per_item = num_targets / num_items.clamp(min=1)
        # Without any target the losses are sums over nothing, and zero whatever they are divided by.
        return num_items.clamp(min=1) / (self.get_tp_size() * self.get_cp_size() * self.get_sp_size())

    def _loss_denominator(self, batch: DistillationBatch, num_items_in_batch: Any) -> LossDenominator:
        """Return what the losses of a micro-batch are divided by, given `Trainer`'s count, or None."""
        if batch.has_padding_examples:
            num_items_in_batch = None  # it counts what the dataloader only filled the last batches up with
        if num_items_in_batch is None:
            return LossDenominator(batch.num_items.clamp(min=1), _at_least_one(batch.num_targets), False, 1)
        is_averaged = self.args.average_tokens_across_devices
        world_scale = self.accelerator.num_processes // self.get_tp_size() if is_averaged else 1
        ratio = self._targets_per_item
        if self.compute_loss_func is not None or ratio is None:
            ratio = batch.num_targets / batch.num_items.clamp(min=1)
        num_items = _at_least_one(num_items_in_batch)
        return LossDenominator(num_items, _at_least_one(num_items * ratio), True, world_scale)

    def _divide_by_accumulation_steps(self, loss: Tensor, denominator: LossDenominator) -> Tensor:
        """Return the loss of a training step; without a global count, the mean over micro-batches, as in `Trainer`."""
        return loss if denominator.is_global else loss / getattr(self, "current_gradient_accumulation_steps", 1)

    def _task_loss(
        self, model: nn.Module, inputs: dict[str, Any], batch: DistillationBatch, denominator: LossDenominator
    ) -> tuple[Tensor, Any]:
        """Return the task loss as `Trainer` computes it, a mean over the targets of the accumulated batch, and outputs."""
        if not batch.has_targets or not bool(batch.num_targets):
            return self._zero_task_loss(model, inputs)
        if self._has_own_task_loss:
            loss, outputs = self._next_task_loss(model, inputs, batch)
        elif denominator.is_global and self._model_normalizes_loss(model, inputs):
            count = denominator.num_targets
            count = count.float() if isinstance(count, Tensor) else count  # float64 would make the loss float64
            loss, outputs = Trainer.compute_loss(self, model, dict(inputs), True, count)
            return loss, outputs
        else:
            loss, outputs = Trainer.compute_loss(self, model, dict(inputs), True, None)
        # A mean over the micro-batch: other trainers' losses, and those of models that take no num_items_in_batch (T5, BERT's
        # classifiers).
        return denominator.rescale(loss, batch.num_targets), outputs

    def _next_task_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], batch: DistillationBatch
    ) -> tuple[Tensor, Any]:
        """Return the loss of another trainer's `compute_loss`, a mean over the targets of the micro-batch, and its outputs.

        It is passed the micro-batch's own number of targets, so that it is a mean whether it uses that number or not, and on
        several processes is not multiplied by their number.

        Raises:
            OptionError: They have no gradient in training, or are no loss and outputs.
        """
        is_averaged = self.args.average_tokens_across_devices
        self.args.average_tokens_across_devices = False
        try:
            result = super().compute_loss(
                model, dict(inputs), return_outputs=True, num_items_in_batch=_at_least_one(batch.num_targets)
            )
        finally:
            self.args.average_tokens_across_devices = is_averaged
        _check_task_loss(result, type(self).__name__)
        loss, outputs = result
        return loss, outputs

    def _zero_task_loss(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        """Return zero and the outputs of a batch without labels: many models' own loss is 0 / 0 there.

        The zero has a gradient, zero too, to every parameter: DistributedDataParallel and FSDP wait for it.
        """
        labels = {*self.label_names, "labels", "shift_labels", *target_inputs(self.task)}
        outputs = model(**{name: value for name, value in inputs.items() if name not in labels})
        loss = zero_loss_with_gradient(outputs)
        return loss, outputs if isinstance(outputs, dict) else (loss, *outputs)

    def _task_loss_sum(
        self, model: nn.Module, inputs: dict[str, Any], batch: DistillationBatch, denominator: LossDenominator
    ) -> tuple[Tensor, Any]:
        """Return the task loss as a sum over the items, of which those without a target have the mean of the others."""
        loss, outputs = self._task_loss(model, inputs, batch, denominator)
        return denominator.to_sum(loss), outputs

    def _model_normalizes_loss(self, model: nn.Module, inputs: dict[str, Any]) -> bool:
        """Return whether the task loss that `Trainer` computes is divided by the `num_items_in_batch` it is passed."""
        if self.task.row.outputs[0].items not in _ITEMS_COUNTED_BY_TRAINER:
            return False
        if self.compute_loss_func is not None or self.label_smoother is not None:
            return True
        if not self.model_accepts_loss_kwargs:
            return False
        if self.args.world_size == self.args.gradient_accumulation_steps == 1:
            return True  # its own batch is the whole batch
        if self._accepts_num_items is None:
            self._accepts_num_items = accepts_num_items_in_batch(model, inputs)
        return self._accepts_num_items


@torch.no_grad()
def accepts_num_items_in_batch(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Return whether a model's own loss is divided by `num_items_in_batch`, not by the items of its own batch.

    `Trainer` passes it to every model whose forward takes keywords, and assumes the former; with the latter (T5, BERT's
    classifiers) gradients would grow with accumulation and processes. It is tested by computing the loss of one batch
    with a count of one and of two. Modes and random states are restored.
    """
    devices = sorted({tensor.device.index for tensor in inputs.values() if getattr(tensor, "is_cuda", False)})
    with torch.random.fork_rng(devices=devices), eval_mode(model):
        one, two = (model(**inputs, num_items_in_batch=torch.tensor(float(count))) for count in (1, 2))
    losses = [outputs["loss"] if isinstance(outputs, dict) else outputs[0] for outputs in (one, two)]
    return bool(torch.isclose(losses[0], 2 * losses[1], rtol=1e-3)) and bool(losses[0] != losses[1])


def _check_task_loss(result: Any, trainer: str) -> None:
    """Check what a user's `compute_loss` returned: a loss, and the outputs that it was computed from."""
    returned = "The compute_loss that gives the task loss of " + trainer
    is_pair = isinstance(result, tuple) and len(result) == 2
    if not is_pair or not isinstance(result[0], Tensor) or not isinstance(result[1], (Mapping, tuple, list)):
        found = [type(each).__name__ for each in result] if isinstance(result, tuple) else type(result).__name__
        raise OptionError(
            f"{returned} must return (loss, outputs) where return_outputs is True, the outputs being the model's; "
            f"found {found}."
        )
    loss, outputs = result
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    tensors = [each for each in values if isinstance(each, Tensor) and each.is_floating_point()]
    if torch.is_grad_enabled() and not (loss.requires_grad and any(each.requires_grad for each in tensors)):
        raise OptionError(
            f"{returned} returned a loss or outputs without gradient, from which nothing can be learned. Return the loss and "
            "the outputs of one forward pass, without no_grad() or detach()."
        )


def _at_least_one(num_items: Any) -> Any:
    """Return a number of items to divide by, 1 where there are none; None stays."""
    if isinstance(num_items, Tensor):
        return torch.where(num_items > 0, num_items, torch.ones_like(num_items))
    return num_items if num_items is None or num_items > 0 else 1
