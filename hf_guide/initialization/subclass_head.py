"""The classification head of a student with subclasses: S rows for each of the teacher's C classes.

Does: read and write `num_subclasses` in a config, name the subclasses, and widen a teacher's head before the student is made
of it, so that its rows are transferred like all others.
Does not: find subclasses (`hf_guide.lelp` does) or make the student (`hf_guide.from_teacher(num_subclasses=...)` does).
"""

import copy
import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_guide.errors import OptionError, SubclassError, TaskError
from hf_guide.models.model_classes import meta_model
from hf_guide.models.penultimate import find_classifier
from hf_guide.tasks import OutputKind, Task, output_kind, task_of
from hf_guide.teachers.checkpoint import TeacherCheckpoint
from hf_guide.teachers.tensor_source import FileState, TensorSource
from hf_guide.utils.labels import config_class_names, subclass_names
from hf_guide.validation import check_integer

_SUBCLASS_TASKS = tuple(task for task in Task if task.is_example_classification)


class SubclassDirections(Protocol):
    """What initializing a head needs of a `SubclassProjector`.

    Attributes:
        num_classes, num_subclasses: C and S.
    """

    @property
    def num_classes(self) -> int:  # noqa: D102
        ...
    @property
    def num_subclasses(self) -> int:  # noqa: D102
        ...

    def head_offsets(self) -> tuple[Tensor, Tensor]:
        """Return what the rows of subclasses add to their class's row, (C * S, D), and to its bias, (C * S,).

        Raises:
            OptionError: The subclasses are no directions.
        """

    def check_teacher(self, teacher: Any) -> None:
        """Check that a loaded teacher is the one that the directions were found in.

        Raises:
            SubclassError: It is another.
        """

    def fingerprint(self) -> str:
        """Return a hash of everything that the subclasses depend on."""


def get_num_subclasses(config: Any) -> int:
    """Return how many subclasses each class of a student has: its config's `num_subclasses`, else 1.

    Raises:
        TaskError: The number is invalid, does not divide the number of labels, or the classes do not exclude each other.

    Example:
        >>> from transformers import BertConfig
        >>> get_num_subclasses(BertConfig(num_labels=6, num_subclasses=3)), get_num_subclasses(BertConfig())
        (3, 1)
    """
    count = getattr(config, "num_subclasses", None)
    if count is None or count == 1:
        return 1
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise TaskError(
            f"num_subclasses in the student's config must be a whole number of at least 1; found {count!r}."
        )
    if config.num_labels % count:
        raise TaskError(
            f"The student has {config.num_labels} outputs, which is not a multiple of its {count} subclasses a class. Give "
            "it classes * num_subclasses labels, as from_teacher(num_subclasses=...) does."
        )
    if output_kind(Task.SEQUENCE_CLASSIFICATION, config) is not OutputKind.CATEGORICAL:
        raise TaskError(
            f"Subclasses need classes that exclude each other; the student's problem_type is {config.problem_type}, with "
            f"num_labels={config.num_labels}."
        )
    return count


def widen_to_subclasses(
    teacher: TeacherCheckpoint,
    config: PreTrainedConfig,
    model_class: type[PreTrainedModel],
    label_rows: Tensor | None,
    num_subclasses: int | None,
    projector: SubclassDirections | None,
) -> tuple[TeacherCheckpoint, PreTrainedConfig, Tensor | None, list[str]]:
    """Return teacher, student config and label rows of a student with subclasses, and a list of what cannot be transferred.

    Args:
        teacher: As `open_teacher` returns it.
        config, model_class: The student's, without subclasses.
        label_rows: The teacher's class of each of the student's classes; None for all in order.
        num_subclasses: Subclasses of each class; None takes the projector's, or 1.
        projector: Its directions initialize the rows; without one all rows of a class equal the teacher's.

    Raises:
        OptionError, SubclassError, TaskError: As `resolve_num_subclasses`, `widen_teacher_head` and `check_student_task`.
    """
    offsets = None if projector is None else projector.head_offsets()
    count = resolve_num_subclasses(teacher.config, num_subclasses, projector)
    if count == 1:
        return teacher, config, label_rows, []
    check_student_task(model_class, config)
    lost: list[str] = []
    classes = len(config_class_names(teacher.config))
    if offsets is not None:
        teacher, lost = widen_teacher_head(teacher, *offsets, num_subclasses=count)
    wide_rows = widen_label_rows(label_rows, classes, count, teacher_is_wide=offsets is not None)
    return teacher, widen_config(config, count), wide_rows, lost


def resolve_num_subclasses(
    teacher: PreTrainedConfig, num_subclasses: int | None, projector: SubclassDirections | None
) -> int:
    """Return how many subclasses each class of the student has.

    Raises:
        OptionError: Not a whole number of at least 1, another number than the projector's, or the teacher has subclasses.
        SubclassError: The projector has another number of classes than the teacher.
    """
    if projector is not None:
        num_subclasses = projector.num_subclasses if num_subclasses is None else num_subclasses
        if num_subclasses != projector.num_subclasses:
            raise OptionError(
                f"num_subclasses is {num_subclasses} and the projector's {projector.num_subclasses}; leave the former out."
            )
        if projector.num_classes != teacher.num_labels:
            raise SubclassError(
                f"The projector has {projector.num_classes} classes and the teacher {teacher.num_labels}. Fit one to this "
                "teacher with fit_subclasses."
            )
    count = 1 if num_subclasses is None else check_integer("num_subclasses", num_subclasses)
    if count > 1 and get_num_subclasses(teacher) > 1:
        raise OptionError(
            f"The teacher has {get_num_subclasses(teacher)} subclasses a class already, which the student inherits; leave "
            "num_subclasses out."
        )
    return count


def widen_config(config: PreTrainedConfig, num_subclasses: int) -> PreTrainedConfig:
    """Return a config with `num_subclasses` labels for each class, "positive/0", "positive/1", ..., and their number in it."""
    wide = copy.deepcopy(config)
    names = subclass_names(config_class_names(config), num_subclasses)
    wide.id2label = dict(enumerate(names))
    wide.label2id = {name: number for number, name in enumerate(names)}
    wide.num_subclasses = num_subclasses
    return wide


def widen_label_rows(
    label_rows: Tensor | None, num_classes: int, num_subclasses: int, *, teacher_is_wide: bool
) -> Tensor | None:
    """Return the row of the teacher's head that each row of the student's is initialized from.

    Args:
        label_rows: The teacher's class of each of the student's classes; None for all in order, empty for none.
        num_classes: The teacher's.
        teacher_is_wide: The teacher's head has rows for subclasses (`widen_teacher_head`).
    """
    classes = torch.arange(num_classes) if label_rows is None else label_rows
    if not teacher_is_wide:
        return classes.repeat_interleave(num_subclasses)
    return (classes[:, None] * num_subclasses + torch.arange(num_subclasses)).flatten()


def check_student_task(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> None:
    """Check that a student classifies whole sequences or images.

    Raises:
        TaskError: It has another task.
    """
    task = task_of(meta_model(model_class, config))
    if task not in _SUBCLASS_TASKS:
        raise TaskError(f"Subclasses need {' or '.join(_SUBCLASS_TASKS)}; {model_class.__name__} is for {task}.")


@dataclass(frozen=True)
class _OverriddenTensors(TensorSource):
    """A teacher's tensors, those of the head replaced."""

    weights: TensorSource
    head: dict[str, Tensor]

    def keys(self) -> Collection[str]:
        return self.weights.keys()

    def shape(self, name: str) -> torch.Size:
        return self.head[name].shape if name in self.head else self.weights.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.weights.dtype(name)

    def get(self, name: str) -> Tensor:
        return self.head[name] if name in self.head else self.weights.get(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.head[name][start:stop] if name in self.head else self.weights.rows(name, start, stop)

    def prefetch(self, name: str) -> None:
        if name not in self.head:
            self.weights.prefetch(name)

    def file_states(self) -> Collection[FileState]:
        return self.weights.file_states()


def widen_teacher_head(
    teacher: TeacherCheckpoint, row_offsets: Tensor, bias_offsets: Tensor, *, num_subclasses: int
) -> tuple[TeacherCheckpoint, list[str]]:
    """Return the teacher with a head whose logits are those of its subclasses, and a list of what cannot be transferred.

    Row w_c becomes w_c + tau / beta u_{c,s}, u the projector's directions, and the bias likewise: up to a number that all
    subclasses of a class share, tau times the log-probabilities that the projector assigns.

    Args:
        row_offsets: (C * S, D), what each subclass adds to its class's row.
        bias_offsets: (C * S,), likewise for the bias.

    Raises:
        SubclassError: The teacher has no linear head whose input is as wide as the offsets.
    """
    model = meta_model(teacher.model_class, teacher.config)
    classifier = find_classifier(model, task_of(model))
    module_name = next((name for name, module in model.named_modules() if module is classifier), None)
    if module_name is None:
        raise SubclassError(
            f"{teacher.model_class.__name__} makes its logits of several layers, so its head cannot be initialized from "
            "directions. Leave projector out: all rows of a class are then the teacher's."
        )
    if classifier.in_features != row_offsets.shape[1]:
        raise SubclassError(
            f"The input of the teacher's head is {classifier.in_features} wide and the projector's embeddings "
            f"{row_offsets.shape[1]}. Fit one to this teacher with fit_subclasses."
        )
    head, lost = {}, []
    weight, bias = f"{module_name}.weight", f"{module_name}.bias"
    rows = teacher.weights.get(weight)
    head[weight] = rows.double().repeat_interleave(num_subclasses, 0) + row_offsets.to(rows.device)
    if classifier.bias is None:
        lost.append(f"{module_name} has no bias for the offsets of the subclasses' directions.")
    else:
        biases = teacher.weights.get(bias)
        head[bias] = biases.double().repeat_interleave(num_subclasses) + bias_offsets.to(biases.device)
    head = {
        name: value.to(torch.promote_types(teacher.weights.dtype(name), torch.float32)) for name, value in head.items()
    }
    wide = dataclasses.replace(
        teacher,
        config=widen_config(teacher.config, num_subclasses),
        weights=_OverriddenTensors(teacher.weights, head),
    )
    return wide, lost
