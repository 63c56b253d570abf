"""Prepare a batch of the dataloader for the losses: its items, their labels and the teachers' signals at them.

An item is what a teacher's loss is averaged over: a token with a target, an example, a frame (`models.targets`). The model's
own loss is averaged over its targets, which may be others.
"""

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers.utils import find_labels

from hf_guide.data.sentence_collator import ROWS_KEY, SCORES_KEY, SENTENCE_COLUMNS
from hf_guide.distillation.cached_teacher import CachedTeacher, missing_example_error, split_teacher_columns
from hf_guide.distillation.losses.divergences import widest_float_dtype
from hf_guide.distillation.losses.registry import (
    TASK_LOSS,
    LossTerm,
    logit_losses,
    required_signals,
)
from hf_guide.distillation.subclass_logits import SUBCLASS_COLUMNS, TARGETS_KEY, SubclassTargets
from hf_guide.errors import TaskError
from hf_guide.models.adapters import forward_parameters, without_adapter
from hf_guide.models.packed_rows import check_packed_rows
from hf_guide.models.targets import (
    complete_inputs,
    count_targets,
    frame_mask,
    has_targets,
    item_labels,
    target_inputs,
    target_mask,
)
from hf_guide.tasks import OutputKind, Task, output_kind
from hf_guide.teachers.forward import LiveTeacher
from hf_guide.teachers.signals import TeacherSignal, TeacherSignals
from hf_guide.utils.labels import IGNORE_INDEX

_LABEL_ADVICE = {
    Task.CAUSAL_LM: "Pass data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False), which makes them of the tokens",
    Task.MASKED_LM: "Pass data_collator=DataCollatorForLanguageModeling(tokenizer), which makes them of the masked tokens",
    Task.SEQ2SEQ_LM: "Give the dataset labels, the target's tokens, and pass data_collator=DataCollatorForSeq2Seq(tokenizer)",
}
"""Where a batch gets labels, for tasks whose datasets often have none of their own."""


@dataclass(frozen=True, kw_only=True)
class DistillationBatch:
    """A batch, its items and the teachers' signals at them.

    Attributes:
        inputs: What the student is called with, labels included.
        mask: Which positions (batch, positions), or examples (batch,), are items.
        labels: Of the items, (items,) or (items, labels).
        signals: One entry for each teacher.
        subclasses: Of the items, the probabilities of all subclasses, (items, C * S), where a loss needs them.
        has_padding_examples: Whether the dataloader filled its last batch up with examples that count for nothing.
        has_targets: Whether it has what the model's own loss needs.
        num_targets: What the model's own loss is averaged over, a scalar.
        frames: Of sounds, which frames are not padding, (batch, frames).
        scores: Gold similarities of the texts of each example, (batch,), where the collator adds them.
        rows_per_example: How many consecutive rows the collator makes of an example.
    """

    inputs: dict[str, Any]
    mask: Tensor
    labels: Tensor | None
    signals: list[TeacherSignals]
    subclasses: Tensor | None = None
    has_padding_examples: bool = False
    has_targets: bool = True
    num_targets: Tensor = field(default_factory=lambda: torch.tensor(1))
    frames: Tensor | None = None
    scores: Tensor | None = None
    rows_per_example: int = 1

    @functools.cached_property
    def num_items(self) -> Tensor:
        """The number of items, a scalar on their device."""
        return self.mask.sum()


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
        compares_logits: Whether the logits of student and teachers can be compared, in evaluation, too.
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
    compares_logits: bool = True

    @property
    def teacher_only_columns(self) -> set[str]:
        """The columns that only teachers read, and those that are targets."""
        live = (each.bare for each in self.teachers if isinstance(each, LiveTeacher))
        columns = {*SUBCLASS_COLUMNS, *SENTENCE_COLUMNS}
        return columns.union(*map(forward_parameters, live)) - forward_parameters(self.student)

    def student_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the part of a batch that the student itself is called with."""
        excluded = self.teacher_only_columns
        return {name: value for name, value in split_teacher_columns(inputs)[0].items() if name not in excluded}

    def target_mask(self, inputs: Mapping[str, Any], *, training: bool) -> Tensor:
        """Return which positions are items; where subclasses are learned, examples without a label are, too."""
        if training and self.subclasses.learned:
            inputs = {name: value for name, value in inputs.items() if name != "labels"}
        return target_mask(self.task, inputs, shifted=self.shifted, model=self.student)

    def count_items(self, inputs: Mapping[str, Any], *, training: bool) -> Tensor:
        """Return the number of a batch's items, and of what the model's own loss is averaged over, (2,), float64 or less."""
        mask = self.target_mask(inputs, training=training)
        dtype = widest_float_dtype(mask.device)
        return torch.stack([mask.sum().to(dtype), self._count_targets(inputs, mask).to(dtype)])

    def _count_targets(self, inputs: Mapping[str, Any], mask: Tensor) -> Tensor:
        if self.subclasses.learned:  # then examples without a label are items, too
            mask = target_mask(self.task, inputs, shifted=self.shifted, model=self.student)
        return count_targets(self.task, inputs, mask, self.student)

    def build(self, inputs: Mapping[str, Any], *, training: bool) -> DistillationBatch:
        """Return a batch with the signals of its teachers.

        Args:
            inputs: Those of the collator.
            training: Whether teachers compute the signals of the losses alone; otherwise what evaluation reports, too.

        Raises:
            TaskError: The task loss is among the losses, and the batch has no labels.
            CaptureError: An example to train on is not in the signal cache.
            TeacherError: The teacher's forward failed.
            OptionError: Rows have several texts each, which the student or a teacher would mix.
        """
        own, cached = split_teacher_columns(inputs)
        sentences = {name: own.pop(name) for name in SENTENCE_COLUMNS if name in own}
        check_packed_rows(self.student, own, "student")
        own = complete_inputs(self.student, self.task, own)
        mask = self.target_mask(own, training=training)
        rows = int(sentences[ROWS_KEY][0]) if ROWS_KEY in sentences else 1
        num_real = len(mask) if training else rows * _num_real_examples(self.accelerator, len(mask) // rows)
        if num_real < len(mask):
            own = _mask_padding_examples(own, mask, num_real)
        is_labeled = has_targets(self.task, own, self.label_names)
        if TASK_LOSS in self.losses and not is_labeled:
            raise self._no_labels_error(own)
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
        num_targets = self._count_targets(own, mask)
        has_frames = self.task.row.inputs == "audio" and not self.task.row.targets_in_decoder
        frames = frame_mask(own, self.student) if has_frames else None
        return DistillationBatch(
            inputs=own,
            mask=mask,
            labels=labels,
            signals=signals,
            subclasses=subclasses,
            has_padding_examples=num_real < len(mask),
            has_targets=is_labeled,
            num_targets=num_targets,
            frames=frames,
            scores=sentences.get(SCORES_KEY),
            rows_per_example=rows,
        )

    def _no_labels_error(self, inputs: Mapping[str, Any]) -> TaskError:
        """Return the error of a batch without targets for the task loss; its advice follows what the batch has instead."""
        model, names = type(without_adapter(self.student)), list(self.label_names)
        taken = find_labels(model)
        required = [name for name in target_inputs(self.task) if inputs.get(name) is None]  # whatever label_names is
        found = [] if required else [name for name in taken if inputs.get(name) is not None]
        if found:
            return TaskError(
                f"label_names is {names}, but the batch has {' and '.join(map(repr, found))}, of which {model.__name__} "
                f"computes the task loss, 'ce'. Leave label_names out, or set label_names={found}."
            )
        advice = _LABEL_ADVICE.get(self.task, "Give the dataset labels")
        if not required and taken and not set(taken) & set(names):
            advice += f", and leave label_names={names} out: {model.__name__} takes {' and '.join(map(repr, taken))}"
        return TaskError(
            f"The losses have the task loss, 'ce', but the batch has no {' or '.join(required or names)}; it has "
            f"{sorted(inputs)}. {advice}, or leave 'ce' out."
        )

    def _check_labels(self, inputs: Mapping[str, Any]) -> None:
        names, labels = logit_losses(self.losses), inputs.get("labels")
        is_categorical = output_kind(self.task, self.student.config) is OutputKind.CATEGORICAL
        if names and is_categorical and isinstance(labels, Tensor) and labels.is_floating_point():
            raise TaskError(
                f"The labels of the batch are {labels.dtype}, {tuple(labels.shape)}: a regression, or several labels at once, "
                f"which {' and '.join(map(repr, names))} cannot learn from classes that exclude each other. Labels must be "
                "class numbers (int64); or set problem_type in both configs to regression or multi_label_classification."
            )

    def _teacher_signals(
        self, own: Mapping[str, Any], cached: Mapping[str, Any], mask: Tensor, *, training: bool
    ) -> list[TeacherSignals]:
        learned = required_signals(self.losses) | self.subclasses.needs(own)
        required = learned if training or not self.compares_logits else learned | {TeacherSignal.LOGITS}
        if not training and self.task is Task.FEATURE_EXTRACTION:
            required = learned | {TeacherSignal.FEATURES}
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
    for name in ("start_positions", "end_positions"):
        if isinstance(masked.get(name), Tensor):
            masked[name] = masked[name].clone()
            masked[name][num_real:] = torch.iinfo(masked[name].dtype).max  # beyond the input: ignored
    for name in ("labels", "shift_labels"):
        if isinstance(masked.get(name), Tensor) and not masked[name].is_floating_point():
            masked[name] = masked[name].clone()
            masked[name][num_real:] = IGNORE_INDEX
    return masked
