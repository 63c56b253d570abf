"""A batch of the dataloader, prepared for the losses: its items, their labels, and the signals of the teachers.

An item is what a loss is averaged over: a token with a target, or an example.
"""

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from hf_guide.distillation.cached_teacher import CachedTeacher, missing_example_error, split_teacher_columns
from hf_guide.distillation.losses.registry import TASK_LOSS, LossTerm, categorical_terms, required_signals
from hf_guide.distillation.subclass_logits import SUBCLASS_COLUMNS, TARGETS_KEY, SubclassTargets
from hf_guide.errors import TaskError
from hf_guide.models.adapters import forward_parameters
from hf_guide.models.targets import add_decoder_inputs, item_labels, target_mask
from hf_guide.tasks import Task
from hf_guide.teachers.forward import LiveTeacher
from hf_guide.teachers.signals import TeacherSignal, TeacherSignals
from hf_guide.utils.labels import IGNORE_INDEX


@dataclass(frozen=True)
class DistillationBatch:
    """A batch, its items and the teachers' signals at them.

    Attributes:
        inputs: What the student is called with, labels included.
        mask: Which positions (batch, length), or examples (batch,), are items.
        labels: Of the items, (items,) or (items, labels).
        signals: One entry for each teacher.
        subclasses: Of the items, the probabilities of all subclasses, (items, C * S), where a loss needs them.
        has_padding_examples: Whether the dataloader filled its last batch up with examples that count for nothing.
    """

    inputs: dict[str, Any]
    mask: Tensor
    labels: Tensor | None
    signals: list[TeacherSignals]
    subclasses: Tensor | None = None
    has_padding_examples: bool = False

    @functools.cached_property
    def num_items(self) -> Tensor:
        """The number of items, a scalar on their device."""
        return self.mask.sum()

    @functools.cached_property
    def num_labeled_items(self) -> Tensor:
        """How many of the items have a label."""
        if self.labels is None or self.labels.is_floating_point() or self.labels.ndim > 1:
            return self.mask.sum()
        return (self.labels != IGNORE_INDEX).sum()


@dataclass(frozen=True)
class BatchBuilder:
    """Prepares the batches of one student.

    Attributes:
        student: The model itself, not its wrappers.
        losses: What it is trained on, which decides the signals that teachers compute.
        layers: Student layer -> teacher layer, for losses that compare hidden states.
        accelerator: Knows how many of the last examples its dataloader added as filling.
        subclasses: Where probabilities of subclasses come from.
        label_names: The names of labels in a batch.
        shifted: Passed to `tasks.target_mask`.
        max_logits: How many teacher logits are held at once.
    """

    student: Any
    task: Task
    teachers: Sequence[LiveTeacher | CachedTeacher]
    losses: Mapping[str, LossTerm]
    layers: Mapping[int, int]
    accelerator: Accelerator
    subclasses: SubclassTargets
    label_names: Collection[str]
    shifted: bool | None
    max_logits: int

    @property
    def teacher_only_columns(self) -> set[str]:
        """The columns that only teachers read, and those that are targets."""
        live = (each.bare for each in self.teachers if isinstance(each, LiveTeacher))
        return set(SUBCLASS_COLUMNS).union(*map(forward_parameters, live)) - forward_parameters(self.student)

    def student_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the part of a batch that the student itself is called with."""
        excluded = self.teacher_only_columns
        return {name: value for name, value in split_teacher_columns(inputs)[0].items() if name not in excluded}

    def target_mask(self, inputs: Mapping[str, Any], *, training: bool) -> Tensor:
        """Return which positions are items; where subclasses are learned, examples without a label are, too."""
        if training and self.subclasses.learned:
            inputs = {name: value for name, value in inputs.items() if name != "labels"}
        return target_mask(self.task, inputs, shifted=self.shifted)

    def count_items(self, inputs: Mapping[str, Any], *, training: bool) -> Tensor:
        """Return the number of a batch's items, and of those that have a label, (2,)."""
        mask = self.target_mask(inputs, training=training)
        labeled = (
            target_mask(self.task, inputs, shifted=self.shifted) if training and self.subclasses.learned else mask
        )
        return torch.stack([mask.sum(), labeled.sum()])

    def build(self, inputs: Mapping[str, Any], *, training: bool) -> DistillationBatch:
        """Return a batch with the signals of its teachers.

        Args:
            inputs: Those of the collator.
            training: Whether teachers compute the signals of the losses alone; otherwise what evaluation reports, too.

        Raises:
            TaskError: The task loss is among the losses, and the batch has no labels.
            CaptureError: An example to train on is not in the signal cache.
            TeacherError: The teacher's forward failed.
        """
        own, cached = split_teacher_columns(inputs)
        own = add_decoder_inputs(self.student, self.task, own)
        mask = self.target_mask(own, training=training)
        num_real = len(mask) if training else _num_real_examples(self.accelerator, len(mask))
        if num_real < len(mask):
            own = _mask_padding_examples(own, mask, num_real)
        if TASK_LOSS in self.losses and not any(own.get(name) is not None for name in self.label_names):
            raise TaskError(
                f"The losses have the task loss, 'ce', but the batch has no {' or '.join(self.label_names)}; it has "
                f"{sorted(own)}. Give the dataset labels, or leave 'ce' out."
            )
        self._check_labels(own)
        signals = self._teacher_signals(own, cached, mask, training=training)
        orders = [teacher.order for teacher in self.teachers]
        cache = getattr(self.subclasses.provider, "capture", None)
        if training and cache is not None and own.get(TARGETS_KEY) is None:
            raise missing_example_error(cache)
        subclasses = self.subclasses.batch_targets(own, mask, signals, orders, training=training)
        for name in self.teacher_only_columns:
            own.pop(name, None)
        labels = item_labels(self.task, own, mask, shifted=self.shifted)
        return DistillationBatch(own, mask, labels, signals, subclasses, num_real < len(mask))

    def _check_labels(self, inputs: Mapping[str, Any]) -> None:
        names, labels = categorical_terms(self.losses), inputs.get("labels")
        if names and isinstance(labels, Tensor) and labels.is_floating_point():
            raise TaskError(
                f"The labels of the batch are {labels.dtype}, {tuple(labels.shape)}: a regression, or several labels at once, "
                f"which {' and '.join(map(repr, names))} cannot learn. Labels must be class numbers (int64); or use "
                "the losses 'features' or 'hidden_states'."
            )

    def _teacher_signals(
        self, own: Mapping[str, Any], cached: Mapping[str, Any], mask: Tensor, *, training: bool
    ) -> list[TeacherSignals]:
        learned = required_signals(self.losses) | self.subclasses.needs(own)
        required = learned if training else learned | {TeacherSignal.LOGITS}
        layers = self.layers.values()
        signals: list[TeacherSignals] = []
        for teacher in self.teachers if required else ():
            if isinstance(teacher, CachedTeacher):
                from_cache = teacher.forward(cached, mask, learned, layers)
                if from_cache is None and training:
                    raise missing_example_error(teacher.capture)
                signals += [] if from_cache is None else [from_cache]
            else:
                signals.append(teacher.forward(own, mask, required, layers, max_logits=self.max_logits))
        return signals


def _num_real_examples(accelerator: Accelerator, size: int) -> int:
    """Return how many of this process's `size` examples the dataloader did not add as filling of the last batches."""
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.in_dataloader or not state.end_of_dataloader:
        return size
    if state.remainder <= 0:
        return size
    return max(0, min(size, state.remainder - accelerator.process_index * size))


def _mask_padding_examples(inputs: dict[str, Any], mask: Tensor, num_real: int) -> dict[str, Any]:
    """Return `inputs` without labels after the first `num_real` examples; `mask` is changed in place."""
    mask[num_real:] = False
    masked = dict(inputs)
    for name in ("labels", "shift_labels"):
        if isinstance(masked.get(name), Tensor) and not masked[name].is_floating_point():
            masked[name] = masked[name].clone()
            masked[name][num_real:] = IGNORE_INDEX
    return masked
