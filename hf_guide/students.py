"""The doors: `from_teacher`, the same as a mixin, and one Auto class a task."""

import copy
import functools
import json
import os
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from hf_guide.errors import OptionError, ShapeError
from hf_guide.initialization.configs import derive_student_config, for_blocks
from hf_guide.initialization.derive import layout_for
from hf_guide.initialization.methods import initialize, initialize_the_rest
from hf_guide.initialization.options import InitializationConfig, Method
from hf_guide.initialization.report import InitializationReport
from hf_guide.initialization.selection import choose_blocks
from hf_guide.initialization.weights import Teacher, open_teacher, tokenizer_length


def from_teacher(
    teacher: "str | os.PathLike[str] | PreTrainedModel",
    config: PreTrainedConfig | None = None,
    *,
    method: "str | InitializationConfig | Mapping[str, Any]" = "guide",
    calibration_dataset: Any = None,
    model_class: type[Any] | None = None,
    dtype: "str | torch.dtype | None" = None,
    revision: str | None = None,
    token: "str | bool | None" = None,
    cache_dir: "str | os.PathLike[str] | None" = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
    gguf_file: str | None = None,
    subfolder: str = "",
    show_progress: bool = True,
    **overrides: Any,
) -> PreTrainedModel:
    """Return a stock Transformers model of exactly the shape asked for that starts inside `teacher`.

    GUIDE (arXiv 2510.06502): the student's residual stream is the teacher's, seen in the principal directions of the
    embedding table; all other axes are selected evenly.

    Args:
        teacher: a Hub id, a folder, or a loaded model, which is left untouched.
        config: the student's config, of the teacher's own config class; None takes the teacher's.
        method: "guide", "uniform" or "random", or an `InitializationConfig` (or a mapping of its fields).
        calibration_dataset: data for methods that look at activations; none of today's methods does.
        model_class: the student's class or an Auto class, such as AutoModelForSequenceClassification; None takes the teacher's.
        dtype: of the student; None or "auto" takes the teacher's. The arithmetic is float32 or better.
        revision, token, cache_dir, local_files_only, trust_remote_code, gguf_file, subfolder: as in `from_pretrained`.
        show_progress: whether to show a progress bar.
        **overrides: fields of the teacher's config that the student changes, such as `hidden_size=288`. Values that the family
            derives from others (`head_dim`, `layer_types`, ...) follow again.

    Returns:
        The student, in evaluation mode as `from_pretrained` gives it, with an `initialization_report`, which
        `save_pretrained` writes beside the weights.

    Raises:
        OptionError: an unknown method, option or override, with the nearest valid name.
        ShapeError: a shape that the family refuses, or that cannot be made from this teacher.
        LayoutError: a family whose axes are not known.
        TeacherError: a teacher that cannot be read.
    """
    options = InitializationConfig.parse(method)
    if calibration_dataset is not None:
        raise OptionError(f"calibration_dataset was given, but method={options.method!r} looks at no data; leave it out.")
    opened = open_teacher(
        teacher,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        trust_remote_code=trust_remote_code,
        gguf_file=gguf_file,
        subfolder=subfolder,
    )
    student_config = resolve_config(opened, config, overrides, options)
    student_class = resolve_class(opened, student_config, model_class)
    layout = None if options.method == Method.RANDOM else layout_for(opened.config, opened.model_class)
    vocab = vocabulary_places(opened, student_config)
    student = build_student(student_class, student_config, student_dtype(dtype, opened), options)
    if layout is None:
        report = InitializationReport.of_random(student, opened, options)
    else:
        report = initialize(
            student,
            opened,
            layout,
            options,
            vocab_places=vocab,
            label_places=label_places(opened.config, student_config),
            show_progress=show_progress,
        )
    attach_report(student, report)
    carry_generation_config(student, teacher, opened, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only, subfolder=subfolder)
    return student.eval()


def resolve_config(
    teacher: Teacher, config: PreTrainedConfig | None, overrides: Mapping[str, Any], options: InitializationConfig
) -> PreTrainedConfig:
    """Return the student's config: the one given, or the teacher's with overrides.

    Raises:
        OptionError: both are given, or an override is unknown.
        ShapeError: another family or modality than the teacher's.
    """
    if config is None:
        student = derive_student_config(teacher.config, overrides)
        had, wanted = getattr(teacher.config, "num_hidden_layers", None), getattr(student, "num_hidden_layers", None)
        if isinstance(had, int) and isinstance(wanted, int) and had != wanted and options.method != Method.RANDOM:
            student = for_blocks(student, teacher.config, choose_blocks(had, wanted, options.layers), overridden=set(overrides))
        return student
    if overrides:
        raise OptionError(f"A config was given and also the overrides {sorted(overrides)}; set them on the config, or leave the config out.")
    if not isinstance(config, PreTrainedConfig):
        raise OptionError(f"config must be a transformers config; found {type(config).__name__}.")
    if config.model_type != teacher.config.model_type:
        raise ShapeError(
            f"The student's config is a {type(config).__name__} ({config.model_type!r}), the teacher is a "
            f"{teacher.config.model_type!r}: a student starts inside a teacher of its own family. Pass a {type(teacher.config).__name__}."
        )
    return copy.deepcopy(config)


def resolve_class(teacher: Teacher, config: PreTrainedConfig, model_class: type[Any] | None) -> type[PreTrainedModel]:
    """Return the student's class.

    Raises:
        OptionError: the task has no model of this family, or the class is not a Transformers model.
    """
    if model_class is None:
        return teacher.model_class
    if isinstance(model_class, type) and issubclass(model_class, PreTrainedModel):
        expected = getattr(model_class, "config_class", None)
        if expected is not None and not isinstance(config, expected):
            raise OptionError(f"{model_class.__name__} takes a {expected.__name__}, the student's config is a {type(config).__name__}.")
        return model_class
    mapping = getattr(model_class, "_model_mapping", None)
    if mapping is None:
        raise OptionError(f"model_class must be a Transformers model or Auto class; found {model_class!r}.")
    if type(config) not in mapping:
        raise OptionError(f"Transformers has no {getattr(model_class, '__name__', model_class)} for {config.model_type!r}.")
    found = mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found


def student_dtype(dtype: "str | torch.dtype | None", teacher: Teacher) -> torch.dtype:
    """Return the student's dtype, the teacher's where none is asked for.

    Raises:
        OptionError: no floating dtype of torch.
    """
    if dtype is None or dtype == "auto":
        return teacher.dtype
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise OptionError(f"dtype must be a floating dtype such as 'float32' or torch.bfloat16, or 'auto'; found {dtype!r}.")
    return found


def build_student(
    student_class: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype, options: InitializationConfig
) -> PreTrainedModel:
    """Return a model of `config`; only for `random` are its parameters initialised already.

    Raises:
        ShapeError: the family refuses the shape; with its reason.
    """
    try:
        with no_init_weights():
            student = student_class._from_config(config, dtype=dtype)
    except (ValueError, AssertionError, RuntimeError, ZeroDivisionError) as error:
        raise ShapeError(f"{student_class.__name__} refuses this shape: {error}") from error
    student.tie_weights()
    if options.method == Method.RANDOM:
        initialize_the_rest(student, options.seed)
    return student


def vocabulary_places(teacher: Teacher, config: PreTrainedConfig) -> Tensor | None:
    """Return which of the teacher's vocabulary rows the student keeps, -1 for a row of zeros; None where all.

    Raises:
        ShapeError: another vocabulary. Padded ones of the same tokenizer differ beyond its last token alone.
    """
    had, wanted = getattr(teacher.config, "vocab_size", None), getattr(config, "vocab_size", None)
    if not isinstance(had, int) or not isinstance(wanted, int) or had == wanted:
        return None
    real = tokenizer_length(teacher)
    if real is None or min(had, wanted) < real:
        told = "its tokenizer is not beside it" if real is None else f"its tokenizer has {real} tokens"
        raise ShapeError(
            f"The student's vocabulary has {wanted} rows, the teacher's {had} ({told}): a student speaks its teacher's tokens. "
            f"Leave vocab_size at {had}, or differ in the padded rows beyond the tokenizer's last token only."
        )
    return torch.tensor([row if row < min(real, had) else -1 for row in range(wanted)]) if wanted > had else torch.arange(wanted)


def label_places(teacher: PreTrainedConfig, student: PreTrainedConfig) -> Tensor | None:
    """Return which of the teacher's labels, by name, each of the student's is; None where all agree, empty where none can be.

    A head with labels that the teacher does not have is a new one.
    """
    had, wanted = getattr(teacher, "id2label", None) or {}, getattr(student, "id2label", None) or {}
    if had == wanted:
        return None
    place = {name: int(number) for number, name in had.items()}
    names = [wanted[number] for number in sorted(wanted)]
    if not names or any(name not in place for name in names):
        return torch.empty(0, dtype=torch.long)
    if all(name.startswith("LABEL_") for name in names):
        return torch.empty(0, dtype=torch.long)
    return torch.tensor([place[name] for name in names])


def attach_report(student: PreTrainedModel, report: InitializationReport) -> None:
    """Give `student` its `initialization_report`, and let its `save_pretrained` write it beside the weights.

    The class stays the stock one: only this instance's method is replaced, by one that copies and deep-copies with it.
    """
    student.initialization_report = report  # type: ignore[assignment]
    if not isinstance(student, FromTeacherMixin):
        wrapped = functools.wraps(type(student).save_pretrained)(save_pretrained)
        student.save_pretrained = types.MethodType(wrapped, student)  # type: ignore[method-assign]


def save_pretrained(self: PreTrainedModel, save_directory: "str | os.PathLike[str]", *args: Any, **kwargs: Any) -> None:
    """Save as the class does, and write `initialization_report.json` beside the weights."""
    type(self).save_pretrained(self, save_directory, *args, **kwargs)
    if kwargs.get("is_main_process", True):
        self.initialization_report.save(save_directory)  # type: ignore[operator,union-attr]


def carry_generation_config(student: PreTrainedModel, source: Any, teacher: Teacher, **where: Any) -> None:
    """Give a student that generates its teacher's generation config, where the teacher has one of its own."""
    if not student.can_generate():
        return
    if isinstance(source, PreTrainedModel):
        found = copy.deepcopy(getattr(source, "generation_config", None))
    else:
        try:
            found = GenerationConfig.from_pretrained(os.fspath(source), **where)
        except OSError:
            found = None
    if found is not None:
        student.generation_config = found


class FromTeacherMixin:
    """`from_teacher` as a classmethod, for `class MyStudent(FromTeacherMixin, LlamaForCausalLM)`.

    The saved config names the stock class, so the folder loads where hf_guide is not installed.
    """

    initialization_report: InitializationReport | None = None

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
        """As `hf_guide.from_teacher`, for this class."""
        return from_teacher(teacher, config, method=method, calibration_dataset=calibration_dataset, model_class=cls, **options)

    def save_pretrained(self, save_directory: "str | os.PathLike[str]", *args: Any, **kwargs: Any) -> None:
        """Save a folder that the stock class loads, and write `initialization_report.json` beside the weights."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if not kwargs.get("is_main_process", True):
            return
        stock = next(base.__name__ for base in type(self).__mro__ if base.__module__.startswith("transformers."))
        path = Path(save_directory) / "config.json"
        saved = json.loads(path.read_text(encoding="utf-8"))
        saved["architectures"] = [stock]
        path.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if self.initialization_report is not None:
            self.initialization_report.save(save_directory)


class _AutoStudent:
    """What the Auto classes share: a task's stock class, filled from a teacher."""

    model_class: type[Any] = AutoModel

    def __init__(self) -> None:
        raise OSError(f"{type(self).__name__} is not instantiated; use {type(self).__name__}.from_teacher(teacher, ...).")

    @classmethod
    def from_teacher(
        cls,
        teacher: "str | os.PathLike[str] | PreTrainedModel",
        config: PreTrainedConfig | None = None,
        *,
        method: "str | InitializationConfig | Mapping[str, Any]" = "guide",
        calibration_dataset: Any = None,
        **options: Any,
    ) -> PreTrainedModel:
        """As `hf_guide.from_teacher`, for this task."""
        return from_teacher(teacher, config, method=method, calibration_dataset=calibration_dataset, model_class=cls.model_class, **options)


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
