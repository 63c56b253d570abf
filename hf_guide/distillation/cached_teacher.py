"""A captured teacher: it says what a collator read from disk and put into the batch."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_guide.errors import CaptureError, TaskError
from hf_guide.models.layer_mapping import depth_of_config
from hf_guide.signal_cache.codec import COLUMN_PREFIX
from hf_guide.signal_cache.reader import MISSING_EXAMPLE_HINT, Capture
from hf_guide.tasks import Task
from hf_guide.teachers.alignment import align_labels, shared_vocabulary_size
from hf_guide.teachers.forward import align_logits
from hf_guide.teachers.signals import DenseTarget, TeacherSignal, TeacherSignals, TopKTarget


def split_teacher_columns(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a batch's inputs for the student, and what a captured teacher says of it."""
    captured = {name: value for name, value in inputs.items() if name.startswith(COLUMN_PREFIX)}
    return {name: value for name, value in inputs.items() if name not in captured}, captured


@dataclass
class CachedTeacher:
    """A capture that speaks as a teacher does."""

    capture: Capture
    classes: int | None
    order: list[int] | None

    @property
    def config(self) -> Any:
        """The teacher's config."""
        return self.capture.manifest.teacher_config_object()

    @property
    def depth(self) -> int:
        """The teacher's number of blocks."""
        return depth_of_config(self.capture.manifest.teacher_config_object())

    def width(self, name: str) -> int | None:
        """Return how wide `hidden_N` or `features` is, None where it was not captured."""
        shape = self.capture.manifest.shapes.get(name)
        return shape[-1] if shape else None

    def forward(
        self, captured: Mapping[str, Any], mask: Tensor, needs: Collection[TeacherSignal], layers: Collection[int]
    ) -> TeacherSignals | None:
        """Return what was captured of the items that `mask` picks; None where the batch carries nothing.

        Raises:
            CaptureError: the objective needs what was not captured.
        """
        if not captured:
            return None
        target: Callable[[slice], DenseTarget | TopKTarget] | None = None
        missing = []
        if TeacherSignal.LOGITS in needs:
            if "teacher_logits" in captured:
                logits = align_logits(captured["teacher_logits"][mask], self.classes, self.order)
                target = lambda rows: DenseTarget(logits[rows])  # noqa: E731
            elif "teacher_topk_indices" in captured:
                kept = [
                    captured[COLUMN_PREFIX + name][mask]
                    for name in ("topk_indices", "topk_log_probs", "log_normalizer")
                ]
                target = lambda rows: TopKTarget(*(each[rows] for each in kept))  # noqa: E731
            else:
                missing.append("logits")
        hidden = {
            layer: found for layer in layers if (found := captured.get(f"{COLUMN_PREFIX}hidden_{layer}")) is not None
        }
        if TeacherSignal.HIDDEN_STATES in needs and len(hidden) < len(set(layers)):
            missing.append(f"hidden states of layers {sorted(set(layers) - hidden.keys())}")
        features = captured.get(f"{COLUMN_PREFIX}features")
        if TeacherSignal.FEATURES in needs and features is None:
            missing.append("penultimate features")
        if missing:
            raise CaptureError(
                f"The objective needs what {self.capture.folder} does not hold: {', '.join(missing)}. Capture "
                "again with them, or change the objective."
            )
        return TeacherSignals(
            target=target, hidden_states=hidden, features=None if features is None else features[mask]
        )


def load_cached_teacher(capture: Capture, student: Any, task: Task, processing_class: Any) -> CachedTeacher:
    """Return a capture as the teacher of `student`.

    Raises:
        TaskError: it is of a teacher for another task.
        VocabularyError: vocabularies or labels that do not agree.
        CaptureError: it was made with another tokenizer.
    """
    if capture.task is not task:
        raise TaskError(f"{capture.folder} is of a teacher for {capture.task}; the student is for {task}.")
    capture.check(processing_class=processing_class)
    if not task.is_language_model:
        order = align_labels(student.config, capture.manifest.teacher_config_object())
        return CachedTeacher(capture, None, order)
    # The tokenizer was compared by its fingerprint above: what is left are padded rows.
    tokenizer = processing_class if hasattr(processing_class, "get_vocab") else None
    size, classes = student.get_output_embeddings().weight.shape[0], capture.manifest.classes
    shared = shared_vocabulary_size(tokenizer, tokenizer, size, classes)
    if shared < classes and not capture.manifest.is_dense:
        raise CaptureError(
            f"{capture.folder} has {classes} rows of the teacher's vocabulary, of which the student shares {shared}. Capture "
            f"again with vocabulary_size={shared}: which rows are among the largest is settled there."
        )
    return CachedTeacher(capture, shared, None)


def missing_example_error(capture: Capture) -> CaptureError:
    """Return the error for a batch to train on that was not captured."""
    return CaptureError(f"A batch to train on has an example that is not in {capture.folder}. {MISSING_EXAMPLE_HINT}")
