"""A teacher whose signals a collator read from a signal cache and added to the batch."""

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_guide.errors import CaptureError, TaskError
from hf_guide.models.layer_mapping import depth_of_config
from hf_guide.signal_cache.codec import COLUMN_PREFIX
from hf_guide.signal_cache.reader import MISSING_EXAMPLE_HINT, Capture
from hf_guide.tasks import OutputKind, Task, output_kind
from hf_guide.teachers.alignment import align_labels, check_same_tokens, shared_vocabulary_size
from hf_guide.teachers.forward import align_logits, check_item_axes
from hf_guide.teachers.signals import DenseTarget, TeacherSignal, TeacherSignals, TopKTarget


def split_teacher_columns(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a batch into the inputs of the student and the columns of a cached teacher."""
    cached = {name: value for name, value in inputs.items() if name.startswith(COLUMN_PREFIX)}
    return {name: value for name, value in inputs.items() if name not in cached}, cached


@dataclass
class CachedTeacher:
    """The teacher of a signal cache, with the interface of `LiveTeacher`.

    Attributes:
        classes: How many of its first classes the student shares; None for all.
        order: The teacher's class of each of the student's; None for the same order.
    """

    capture: Capture
    classes: int | None
    order: list[int] | None

    @functools.cached_property
    def config(self) -> Any:
        """The teacher's config."""
        return self.capture.manifest.teacher_config_object()

    @functools.cached_property
    def kind(self) -> OutputKind:
        """What its logits are."""
        return output_kind(self.capture.task, self.config)

    @property
    def depth(self) -> int:
        """The teacher's number of blocks."""
        return depth_of_config(self.config, self.capture.task)

    def width(self, name: str) -> int | None:
        """Return the width of `hidden_N` or `features`; None if the cache does not have it."""
        shape = self.capture.manifest.shapes.get(name)
        return shape[-1] if shape else None

    def forward(
        self, cached: Mapping[str, Any], mask: Tensor, required: Collection[TeacherSignal], layers: Collection[int]
    ) -> TeacherSignals | None:
        """Return the signals of the items in `mask`; None if the batch has no cached columns.

        Raises:
            CaptureError: The cache does not have a required signal.
        """
        if not cached:
            return None
        target: Callable[[slice], DenseTarget | TopKTarget] | None = None
        missing = ["boxes"] if TeacherSignal.BOXES in required else []
        if TeacherSignal.LOGITS in required:
            if "teacher_logits" in cached:
                captured = captured_logits(self.capture.task, cached["teacher_logits"], mask)
                logits = align_logits(captured[mask], self.classes, self.order)
                kind = self.kind
                target = lambda rows: DenseTarget(logits[rows], kind)  # noqa: E731
            elif "teacher_topk_indices" in cached:
                tensors = [
                    cached[COLUMN_PREFIX + name][mask] for name in ("topk_indices", "topk_log_probs", "log_normalizer")
                ]
                target = lambda rows: TopKTarget(*(each[rows] for each in tensors))  # noqa: E731
            else:
                missing.append("logits")
        hidden = {
            layer: states for layer in layers if (states := cached.get(f"{COLUMN_PREFIX}hidden_{layer}")) is not None
        }
        if TeacherSignal.HIDDEN_STATES in required and len(hidden) < len(set(layers)):
            missing.append(f"hidden states of layers {sorted(set(layers) - hidden.keys())}")
        features = cached.get(f"{COLUMN_PREFIX}features")
        if TeacherSignal.FEATURES in required and features is None:
            missing.append("penultimate features")
        if missing:
            raise CaptureError(
                f"The losses need {', '.join(missing)}, which {self.capture.folder} does not have. Capture again with "
                "them, or change the losses."
            )
        return TeacherSignals(
            target=target, hidden_states=hidden, features=None if features is None else features[mask]
        )


def captured_logits(task: Task, logits: Tensor, mask: Tensor) -> Tensor:
    """Return cached logits in the canonical form, with the positions of `mask`.

    Raises:
        TaskError: They have others.
    """
    if task.row.outputs[0].items == "boundary":
        logits = logits.transpose(1, 2)  # stored token by token
    elif task.row.outputs[0].items == "frame" and logits.shape[1] < mask.shape[1]:
        logits = torch.nn.functional.pad(logits, (0, 0, 0, mask.shape[1] - logits.shape[1]))
    check_item_axes(task, logits, mask, "captured teacher")
    return logits


def load_cached_teacher(capture: Capture, student: Any, task: Task, processing_class: Any) -> CachedTeacher:
    """Return a signal cache as the teacher of `student`.

    Raises:
        TaskError: Its teacher is for another task.
        VocabularyError: Vocabularies or labels that do not agree.
        CaptureError: Its tokenizer is another one.
    """
    if not task.accepts_teacher_for(capture.task):
        raise TaskError(
            f"{capture.folder} is the cache of a teacher for {capture.task}; the student is for {task}. Use a teacher of the "
            "student's task."
        )
    capture.check(processing_class=processing_class)
    if not task.is_language_model:
        config = capture.manifest.teacher_config_object()
        axis = task.row.outputs[0].classes
        if axis == "characters":  # the tokenizer's fingerprint was compared above
            check_same_tokens(student.config, config, min(student.config.vocab_size, config.vocab_size))
        return CachedTeacher(capture, None, align_labels(student.config, config, task) if axis == "labels" else None)
    # The tokenizer's fingerprint was compared above: only padding rows may differ.
    tokenizer = processing_class if hasattr(processing_class, "get_vocab") else None
    size, classes = student.get_output_embeddings().weight.shape[0], capture.manifest.classes
    shared = shared_vocabulary_size(tokenizer, tokenizer, size, classes)
    if shared < classes and not capture.manifest.is_dense:
        raise CaptureError(
            f"{capture.folder} has {classes} rows of the teacher's vocabulary, of which the student shares {shared}. Capture "
            f"again with vocabulary_size={shared}: the top k is selected there."
        )
    return CachedTeacher(capture, shared, None)


def missing_example_error(capture: Capture) -> CaptureError:
    """Return the error for a training batch with an example that is not in the cache."""
    return CaptureError(f"A training batch has an example that is not in {capture.folder}. {MISSING_EXAMPLE_HINT}")
