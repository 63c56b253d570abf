"""`from_teacher` as a class's own: a mixin for classes of one's own, and one Auto class a task."""

import os
from collections.abc import Mapping
from typing import Any

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from hf_guide.errors import OptionError
from hf_guide.initialization.options import InitializationConfig
from hf_guide.initialization.report import InitializationReport
from hf_guide.saving import save_student
from hf_guide.students import from_teacher


class _Door:
    """`from_teacher` as a classmethod, of a class that has its model class already."""

    @classmethod
    def _student_class(cls) -> type[Any]:
        return cls

    @classmethod
    def from_teacher(
        cls,
        teacher: "str | os.PathLike[str] | PreTrainedModel",
        config: PreTrainedConfig | None = None,
        *,
        method: "str | InitializationConfig | Mapping[str, Any]" = "guide",
        calibration_dataset: Any = None,
        **options: Any,
    ) -> Any:
        """As `hf_guide.from_teacher`, for the class or task that this stands for."""
        if "model_class" in options:
            raise OptionError(
                f"{cls.__name__}.from_teacher has its model class already; call hf_guide.from_teacher to choose another."
            )
        return from_teacher(
            teacher,
            config,
            method=method,
            calibration_dataset=calibration_dataset,
            model_class=cls._student_class(),
            **options,
        )


class FromTeacherMixin(_Door):
    """`from_teacher` as a classmethod, for `class MyStudent(FromTeacherMixin, LlamaForCausalLM)`.

    The saved config names the stock class, so the folder loads where hf_guide is not installed.
    """

    initialization_report: InitializationReport | None = None

    def save_pretrained(self, save_directory: "str | os.PathLike[str]", *args: Any, **kwargs: Any) -> None:
        """Save a folder that the stock class loads, and write `initialization_report.json` beside the weights."""
        save = super().save_pretrained.__func__  # type: ignore[misc]
        save_student(self, save, save_directory, *args, architecture=_stock_class(self).__name__, **kwargs)  # type: ignore[arg-type]


def _stock_class(student: Any) -> type:
    """Return the class that a folder of this student loads as where its own class is not known."""
    bases = [base for base in type(student).__mro__ if issubclass(base, PreTrainedModel)]
    stock = (base for base in bases if base.__module__.startswith(("transformers.models.", "transformers_modules.")))
    return next(stock, type(student))


class _AutoStudent(_Door):
    """What the Auto classes share: a task's stock class, filled from a teacher."""

    model_class: type[Any] = AutoModel

    def __init__(self) -> None:
        name = type(self).__name__
        raise OSError(f"{name} is not instantiated; use {name}.from_teacher(teacher, ...).")

    @classmethod
    def _student_class(cls) -> type[Any]:
        return cls.model_class


class AutoStudent(_AutoStudent):
    """A base model, without a head, that starts inside its teacher."""


class AutoStudentForCausalLM(_AutoStudent):
    """A causal language model that starts inside its teacher."""

    model_class = AutoModelForCausalLM


class AutoStudentForMaskedLM(_AutoStudent):
    """A masked language model that starts inside its teacher."""

    model_class = AutoModelForMaskedLM


class AutoStudentForSequenceClassification(_AutoStudent):
    """A sequence classifier that starts inside its teacher; its head too where the labels agree."""

    model_class = AutoModelForSequenceClassification


class AutoStudentForTokenClassification(_AutoStudent):
    """A token classifier that starts inside its teacher; its head too where the labels agree."""

    model_class = AutoModelForTokenClassification


class AutoStudentForSeq2SeqLM(_AutoStudent):
    """An encoder-decoder that starts inside its teacher."""

    model_class = AutoModelForSeq2SeqLM


class AutoStudentForImageClassification(_AutoStudent):
    """An image classifier that starts inside its teacher; its head too where the labels agree."""

    model_class = AutoModelForImageClassification
