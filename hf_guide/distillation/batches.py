"""A batch of the dataloader made what a student learns from: its items, their labels, and what the teachers say of it."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from hf_guide.distillation.cached_teacher import CachedTeacher, missing_example_error, split_teacher_columns
from hf_guide.distillation.losses.registry import TASK_LOSS, categorical_terms
from hf_guide.distillation.objective import DistillationBatch, ObjectiveComputer
from hf_guide.distillation.subclass_logits import SUBCLASS_COLUMNS, TARGETS_KEY, SubclassTargets
from hf_guide.errors import TaskError
from hf_guide.models.adapters import forward_parameters
from hf_guide.models.targets import add_decoder_inputs, item_labels, target_mask
from hf_guide.tasks import Task
from hf_guide.teachers.forward import LiveTeacher
from hf_guide.teachers.signals import TeacherSignal, TeacherSignals
from hf_guide.utils.labels import IGNORE_INDEX


@dataclass(frozen=True)
class BatchBuilder:
    """Reads batches for one student.

    Attributes:
        student: without what wraps it.
        learning: what it learns, and so what teachers are listened to for.
        accelerator: knows which of the last examples its dataloader only filled up with.
        subclasses: where probabilities of subclasses come from.
        label_names: the names that labels have in a batch.
        shifted: as `tasks.target_mask` takes it.
    """

    student: Any
    task: Task
    teachers: Sequence[LiveTeacher | CachedTeacher]
    objective_computer: ObjectiveComputer
    accelerator: Accelerator
    subclasses: SubclassTargets
    label_names: Collection[str]
    shifted: bool | None = None

    @property
    def teacher_only_columns(self) -> set[str]:
        """The columns that only teachers read, and those that are targets."""
        live = (each.bare for each in self.teachers if isinstance(each, LiveTeacher))
        return set(SUBCLASS_COLUMNS).union(*map(forward_parameters, live)) - forward_parameters(self.student)

    def student_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return what of a batch the student itself is fed."""
        others = self.teacher_only_columns
        return {name: value for name, value in split_teacher_columns(inputs)[0].items() if name not in others}

    def target_mask(self, inputs: Mapping[str, Any], *, training: bool) -> Tensor:
        """Return which places are items: where subclasses are learned, examples without a label, too."""
        unlabelled = training and self.subclasses.learned
        given = {name: value for name, value in inputs.items() if name != "labels"} if unlabelled else inputs
        return target_mask(self.task, given, shifted=self.shifted)

    def count(self, inputs: Mapping[str, Any], *, training: bool) -> Tensor:
        """Return how many items a batch has, and how many of them have a label, (2,)."""
        mask = self.target_mask(inputs, training=training)
        labelled = (
            target_mask(self.task, inputs, shifted=self.shifted) if training and self.subclasses.learned else mask
        )
        return torch.stack([mask.sum(), labelled.sum()])

    def read(self, inputs: Mapping[str, Any], *, training: bool) -> DistillationBatch:
        """Return a batch with what its teachers say of it.

        Args:
            inputs: what the collator made.
            training: the objective alone is listened for; otherwise whatever evaluation reports, too.

        Raises:
            TaskError: the objective has the task loss, and the batch no labels.
            CaptureError: a batch to train on was not captured, by the trainer's capture or by the collator's.
            TeacherError: what a teacher says cannot be had.
        """
        own, captured = split_teacher_columns(inputs)
        own = add_decoder_inputs(self.student, self.task, own)
        mask = self.target_mask(own, training=training)
        real = len(mask) if training else _num_real_examples(self.accelerator, len(mask))
        if real < len(mask):
            own = _mask_padding_examples(own, mask, real)
        if TASK_LOSS in self.objective_computer.weights and not any(
            own.get(name) is not None for name in self.label_names
        ):
            raise TaskError(
                f"The objective has the task loss, 'ce', but the batch has no {' or '.join(self.label_names)}; it has "
                f"{sorted(own)}. Give the dataset labels, or leave 'ce' out."
            )
        self._check_labels(own)
        signals = self._teacher_signals(own, captured, mask, training=training)
        orders = [teacher.order for teacher in self.teachers]
        captured_targets = getattr(self.subclasses.provider, "capture", None)
        if training and captured_targets is not None and own.get(TARGETS_KEY) is None:
            raise missing_example_error(captured_targets)
        subclasses = self.subclasses.batch_targets(own, mask, signals, orders, training=training)
        for name in self.teacher_only_columns:
            own.pop(name, None)
        return DistillationBatch(
            own, mask, item_labels(self.task, own, mask, shifted=self.shifted), signals, subclasses, real < len(mask)
        )

    def _check_labels(self, inputs: Mapping[str, Any]) -> None:
        names, labels = categorical_terms(self.objective_computer.weights), inputs.get("labels")
        if names and isinstance(labels, Tensor) and labels.is_floating_point():
            raise TaskError(
                f"The labels of the batch are {labels.dtype}, {tuple(labels.shape)}: a regression, or several labels at once, "
                f"of which {' and '.join(map(repr, names))} cannot be learned. Labels must be class numbers (int64), or learn "
                "from the teacher by 'embedding' or 'hidden'."
            )

    def _teacher_signals(
        self, own: Mapping[str, Any], captured: Mapping[str, Any], mask: Tensor, *, training: bool
    ) -> list[TeacherSignals]:
        args = self.objective_computer.args
        learned = self.objective_computer.needs | self.subclasses.needs(own)
        needs = learned if training else learned | {TeacherSignal.LOGITS}
        layers = self.objective_computer.layers.values()
        signals: list[TeacherSignals] = []
        for teacher in self.teachers if needs else ():
            if isinstance(teacher, CachedTeacher):
                said = teacher.listen(captured, mask, learned, layers)
                if said is None and training:
                    raise missing_example_error(teacher.capture)
                signals += [] if said is None else [said]
            else:
                signals.append(teacher.listen(own, mask, needs, layers, max_logits=args.max_logits))
        return signals

    def has_no_signals(self, batch: DistillationBatch) -> bool:
        """Return whether nothing was captured of a batch that teachers should speak of."""
        missing = self.objective_computer.needs_subclasses and batch.subclasses is None
        return missing or bool(self.objective_computer.needs and not batch.signals)


def _num_real_examples(accelerator: Accelerator, size: int) -> int:
    """Return how many of this process's `size` examples the dataloader did not add to fill the last batches up."""
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.in_dataloader or not state.end_of_dataloader:
        return size
    if state.remainder <= 0:
        return size
    return max(0, min(size, state.remainder - accelerator.process_index * size))


def _mask_padding_examples(inputs: dict[str, Any], mask: Tensor, real: int) -> dict[str, Any]:
    """Return `inputs` with no label after the first `real` examples; `mask` is changed in place."""
    mask[real:] = False
    found = dict(inputs)
    for name in ("labels", "shift_labels"):
        if isinstance(found.get(name), Tensor) and not found[name].is_floating_point():
            found[name] = found[name].clone()
            found[name][real:] = IGNORE_INDEX
    return found
