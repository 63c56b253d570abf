"""Three ways out for a student with subclasses, each exact about what it is.

- "code": the class logits that it was trained and measured by, in a class of its own whose code is saved beside the weights.
- "subclasses": the stock model, whose labels are the subclasses ("positive/3").
- "classes": the stock model with one row a class, refitted on the student's own features. A linear layer cannot say all that
  a log-sum-exp does, so how often the two agree is measured on held-out examples.
"""

import os
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from hf_guide.distillation.trainer import DistillationTrainer
from hf_guide.distillation.training_record import build_training_record
from hf_guide.errors import OptionError
from hf_guide.hub.model_card import write_model_card
from hf_guide.hub.push import attach_record, save_student
from hf_guide.lelp.modeling_subclass import (
    SubclassConfig,
    SubclassModel,
    SubclassModelForImageClassification,
    SubclassModelForSequenceClassification,
    wrap_student,
)
from hf_guide.lelp.refit import check_subclass_student, refit_class_head
from hf_guide.models.code_references import clean_saved_folder
from hf_guide.tasks import Task
from hf_guide.utils.files import staged_update
from hf_guide.utils.labels import config_class_names
from hf_guide.validation import did_you_mean

__all__ = [
    "SubclassConfig",
    "SubclassModelForImageClassification",
    "SubclassModelForSequenceClassification",
    "ExportFormat",
    "save_subclass_student",
    "with_class_logits",
]

_CLASSES: dict[Task, tuple[type[SubclassModel], Any]] = {
    Task.SEQUENCE_CLASSIFICATION: (SubclassModelForSequenceClassification, AutoModelForSequenceClassification),
    Task.IMAGE_CLASSIFICATION: (SubclassModelForImageClassification, AutoModelForImageClassification),
}

# Loaded with hf_guide they need no trust_remote_code; saved, their code goes along.
AutoConfig.register(SubclassConfig.model_type, SubclassConfig, exist_ok=True)
SubclassConfig.register_for_auto_class()
for _model_class, _auto in _CLASSES.values():
    _auto.register(SubclassConfig, _model_class, exist_ok=True)
    _model_class.register_for_auto_class(_auto.__name__)


class ExportFormat(str, Enum):
    """How a student with subclasses is saved."""

    CODE = "code"
    SUBCLASSES = "subclasses"
    CLASSES = "classes"


def save_subclass_student(
    student: "PreTrainedModel | DistillationTrainer",
    save_directory: str | os.PathLike[str],
    way: str | ExportFormat = "code",
    *,
    dataset: Any = None,
    eval_dataset: Any = None,
    processing_class: Any = None,
    data_collator: Callable[[Any], Mapping[str, Any]] | None = None,
    batch_size: int = 32,
    show_progress: bool = True,
) -> PreTrainedModel:
    """Save a student with subclasses one of three ways, with its records, its card and its tokenizer; return what was saved.

    Args:
        student: whose config has `num_subclasses`; or the `DistillationTrainer` that trained it, of whose run the record and
            the card then tell, and whose tokenizer or image processor is saved where none is given.
        save_directory: a folder.
        way: "code", "subclasses" or "classes", see this module.
        dataset, eval_dataset, data_collator, batch_size: of "classes", see `refit_class_head`.
        processing_class: the tokenizer or image processor, saved beside the weights.
        show_progress: whether to show progress, and print how near the refitted head is.

    Raises:
        OptionError: an unknown way, "classes" without a dataset, or a student with an adapter.
        TaskError: a student without subclasses.
    """
    kind = _parse_export_format(way)
    if isinstance(student, DistillationTrainer):
        processing_class = processing_class or student.processing_class
        student = _student_with_record(student)
    check_subclass_student(student)
    model: PreTrainedModel = student
    if kind is ExportFormat.CODE:
        model = with_class_logits(student)
    elif kind is ExportFormat.CLASSES:
        if dataset is None:
            raise OptionError('way="classes" refits the head: give it a dataset to learn from; no labels are needed.')
        refitted = refit_class_head(
            student,
            dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=data_collator,
            batch_size=batch_size,
            show_progress=show_progress,
        )
        model = refitted.model
        if show_progress:
            print(refitted)
    _save_with_records(student, model, Path(save_directory), processing_class)
    return model


def _student_with_record(trainer: DistillationTrainer) -> PreTrainedModel:
    """Return the student of a trainer, with the record of its run."""
    student: PreTrainedModel = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    attach_record(student, build_training_record(trainer))
    return student


def with_class_logits(student: PreTrainedModel) -> SubclassModel:
    """Return a model whose logits are the student's class logits exactly, and whose labels are the classes.

    The student is inside, not a copy. Saved, its code goes along: `AutoModelForSequenceClassification.from_pretrained(folder,
    trust_remote_code=True)` (or `...ForImageClassification`) loads it anywhere; where this class has been imported from
    hf_guide, it needs no trust.
    """
    task = check_subclass_student(student)
    return wrap_student(student, _CLASSES[task][0], config_class_names(student.config))


def _save_with_records(student: PreTrainedModel, model: PreTrainedModel, folder: Path, processing_class: Any) -> None:
    for name in ("initialization_report", "distillation_record"):
        told = getattr(student, name, None)
        if told is not None and getattr(model, name, None) is None:
            setattr(model, name, told)
    with staged_update(folder) as new:
        save_student(model, type(model).save_pretrained, new)
        if processing_class is not None:
            processing_class.save_pretrained(new)
            clean_saved_folder(new)
    if any(getattr(model, name, None) is not None for name in ("initialization_report", "distillation_record")):
        write_model_card(folder, getattr(model, "initialization_report", None))


def _parse_export_format(way: "str | ExportFormat") -> ExportFormat:
    known = [each.value for each in ExportFormat]
    try:
        return ExportFormat(way)
    except ValueError:
        raise OptionError(
            f"way={way!r} is not known; expected one of {known}.{did_you_mean(str(way), known)}"
        ) from None
