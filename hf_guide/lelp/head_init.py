"""The head of a student with subclasses: S rows for each of the teacher's C, and where they begin.

Does: widen a config, and the teacher's head before the student is made of it, so that the rows go the way of all rows.
Does not: make the student (`hf_guide.from_teacher(num_subclasses=...)` does).
"""

import copy
import dataclasses
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_guide.distillation.subclass_logits import config_class_names, get_num_subclasses, subclass_names
from hf_guide.errors import OptionError, SubclassError, TaskError
from hf_guide.lelp.projector import SubclassProjector
from hf_guide.lelp.splitters.scorers import LinearScorer
from hf_guide.models.model_classes import meta_model
from hf_guide.models.penultimate import find_classifier
from hf_guide.tasks import Task, task_of
from hf_guide.teachers.checkpoint import TeacherCheckpoint, TensorSource

_SUBCLASS_TASKS = (Task.SEQUENCE_CLASSIFICATION, Task.IMAGE_CLASSIFICATION)


def widen_to_subclasses(
    teacher: TeacherCheckpoint,
    config: PreTrainedConfig,
    model_class: type[PreTrainedModel],
    places: Tensor | None,
    num_subclasses: int | None,
    projector: SubclassProjector | None,
) -> tuple[TeacherCheckpoint, PreTrainedConfig, Tensor | None, list[str]]:
    """Return teacher, student's config and places of labels for a student with subclasses, and what cannot be carried over.

    Args:
        teacher: as `open_teacher` gives it.
        config, model_class: the student's, as it would be without subclasses.
        places: which of the teacher's classes each of the student's is.

    Raises:
        OptionError, SubclassError, TaskError: as `resolve_num_subclasses`, `widen_teacher_head` and `check_student_task`.
    """
    count = resolve_num_subclasses(teacher.config, num_subclasses, projector)
    if count == 1:
        return teacher, config, places, []
    check_student_task(model_class, config)
    lost: list[str] = []
    classes = len(config_class_names(teacher.config))
    if projector is not None:
        teacher, lost = widen_teacher_head(teacher, projector)
    return (
        teacher,
        widen_config(config, count),
        widen_label_rows(places, classes, count, teacher_is_wide=projector is not None),
        lost,
    )


def resolve_num_subclasses(
    teacher: PreTrainedConfig, num_subclasses: int | None, projector: SubclassProjector | None
) -> int:
    """Return how many subclasses the student is to have for each class.

    Raises:
        OptionError: not a whole number of at least 1, another number than the projector's, or a projector whose subclasses
            are no directions.
        SubclassError: a projector of another number of classes.
    """
    if projector is not None:
        num_subclasses = projector.num_subclasses if num_subclasses is None else num_subclasses
        if num_subclasses != projector.num_subclasses:
            raise OptionError(
                f"num_subclasses is {num_subclasses} and the projector's {projector.num_subclasses}; leave the former out."
            )
        if not isinstance(projector.scores, LinearScorer):
            raise OptionError(
                f"The subclasses of the splitter {projector.splitter!r} are no directions that a head could begin with. Leave "
                "projector out: the rows of a class then begin alike."
            )
        if projector.num_classes != teacher.num_labels:
            raise SubclassError(
                f"The projector is of {projector.num_classes} classes and the teacher has {teacher.num_labels}. Fit one "
                "to this teacher with fit_subclasses."
            )
    count = 1 if num_subclasses is None else num_subclasses
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise OptionError(f"num_subclasses is a whole number of at least 1; found {num_subclasses!r}.")
    if count > 1 and get_num_subclasses(teacher) > 1:
        raise OptionError(
            f"The teacher has {get_num_subclasses(teacher)} subclasses a class already, which the student inherits; leave "
            "num_subclasses out."
        )
    return count


def widen_config(config: PreTrainedConfig, num_subclasses: int) -> PreTrainedConfig:
    """Return a config with `num_subclasses` labels for each, "positive/0", "positive/1", ..., that says how many they are."""
    wide = copy.deepcopy(config)
    names = subclass_names(config_class_names(config), num_subclasses)
    wide.id2label = dict(enumerate(names))
    wide.label2id = {name: number for number, name in enumerate(names)}
    wide.num_subclasses = num_subclasses
    return wide


def widen_label_rows(
    places: Tensor | None, num_classes: int, num_subclasses: int, *, teacher_is_wide: bool
) -> Tensor | None:
    """Return which of the teacher's rows each of the student's begins as.

    Args:
        places: which of the teacher's classes each of the student's is; None for all in order, empty for none.
        num_classes: the teacher's.
        teacher_is_wide: the teacher's head has rows for subclasses (`widen_teacher_head`).
    """
    classes = torch.arange(num_classes) if places is None else places
    if not teacher_is_wide:
        return classes.repeat_interleave(num_subclasses)
    return (classes[:, None] * num_subclasses + torch.arange(num_subclasses)).flatten()


def check_student_task(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> None:
    """Refuse students that are no classifiers of whole examples.

    Raises:
        TaskError: names the task.
    """
    task = task_of(meta_model(model_class, config))
    if task not in _SUBCLASS_TASKS:
        raise TaskError(f"Subclasses are for {' and '.join(_SUBCLASS_TASKS)}; {model_class.__name__} is for {task}.")


@dataclass(frozen=True)
class _OverriddenTensors:
    """A teacher's tensors, of which those of the head have been replaced."""

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


def widen_teacher_head(
    teacher: TeacherCheckpoint, projector: SubclassProjector
) -> tuple[TeacherCheckpoint, list[str]]:
    """Return the teacher with a head whose logits are those of its subclasses, and what could not be carried over.

    Row w_c becomes w_c + tau / beta u_{c,s}, u the projector's directions, and the bias likewise: up to a number that is the
    same for all subclasses of a class, tau times the log-probabilities that the projector makes.

    Raises:
        SubclassError: the head is fed something else than the projector's embeddings.
    """
    model = meta_model(teacher.model_class, teacher.config)
    classifier = find_classifier(model, task_of(model))
    home = next((name for name, module in model.named_modules() if module is classifier), None)
    if home is None:
        raise SubclassError(
            f"{teacher.model_class.__name__} makes its logits of several layers, so no head can begin at directions. Leave "
            "projector out: the rows of a class then begin alike."
        )
    if not isinstance(projector.scores, LinearScorer) or classifier.in_features != projector.embedding_size:
        raise SubclassError(
            f"The teacher's head is fed {classifier.in_features} numbers and the projector is of {projector.embedding_size}. "
            "Fit one to this teacher with fit_subclasses."
        )
    slope = projector.temperature / projector.subclass_temperature
    rows = slope * projector.scores.directions.transpose(1, 2).flatten(0, 1)
    head, lost = {}, []
    weight, bias = f"{home}.weight", f"{home}.bias"
    count = projector.num_subclasses
    own = teacher.weights.get(weight)
    head[weight] = own.double().repeat_interleave(count, 0) + rows.to(own.device)
    if classifier.bias is None:
        lost.append(f"{home} has no bias for the offsets of the subclasses' directions.")
    else:
        own = teacher.weights.get(bias)
        head[bias] = own.double().repeat_interleave(count) + slope * projector.scores.offsets.flatten().to(own.device)
    head = {
        name: value.to(torch.promote_types(teacher.weights.dtype(name), torch.float32)) for name, value in head.items()
    }
    wide = dataclasses.replace(
        teacher, config=widen_config(teacher.config, count), weights=_OverriddenTensors(teacher.weights, head)
    )
    return wide, lost
