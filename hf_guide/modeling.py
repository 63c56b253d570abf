"""`from_teacher`: the way from a teacher to a student that starts inside it, whatever the method.

`from_teacher` as a class's own: a mixin for classes of one's own, and one Auto class a task.
"""

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ParamSpec

import torch
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
from transformers.initialization import no_init_weights

from hf_guide.calibration.data import check_calibration_dataset
from hf_guide.calibration.resume import check_calibration_dir, describe_call
from hf_guide.errors import OptionError, ShapeError
from hf_guide.hub.push import attach_report, save_student
from hf_guide.initialization.apply import initialize, rng_seed
from hf_guide.initialization.built_shape import check_computed_overrides, check_overrides_hold
from hf_guide.initialization.config import InitializationConfig, Method
from hf_guide.initialization.equivalence import depth_notes
from hf_guide.initialization.generation_config import copy_generation_config
from hf_guide.initialization.infer_layout import layout_for
from hf_guide.initialization.plan import Plan
from hf_guide.initialization.planning import make_plan, strip_base_prefix
from hf_guide.initialization.report import InitializationReport
from hf_guide.initialization.requested_sizes import check_config_sizes, check_expert_counts, check_requested_sizes
from hf_guide.initialization.resolve import (
    label_row_indices,
    resolve_class,
    resolve_config,
    resolve_dtype,
    vocab_row_indices,
)
from hf_guide.initialization.subclass_head import SubclassDirections, widen_to_subclasses
from hf_guide.initialization.trial_forward import check_forward
from hf_guide.layouts.hierarchy import check_single_stage_width
from hf_guide.methods.calibrated import collect_calibration, initialize_calibrated, select_blocks_by_influence
from hf_guide.models.tiny_models import MODEL_ERRORS
from hf_guide.teachers.checkpoint import TeacherCheckpoint, open_teacher

P = ParamSpec("P")

DRY_RUN_MIN_PARAMETERS = 300_000_000
"""Parameters above which a student is tried also before it is filled: smaller ones are filled in seconds."""


def on_cpu(make: Callable[P, PreTrainedModel]) -> Callable[P, PreTrainedModel]:
    """Make a student on the CPU, where the plan and its arithmetic are, and then take it to the caller's default device."""

    @functools.wraps(make)
    def door(*args: P.args, **kwargs: P.kwargs) -> PreTrainedModel:
        home = torch.get_default_device()
        if home.type == "cpu":
            return make(*args, **kwargs)
        with torch.device("cpu"):
            student = make(*args, **kwargs)
        return student.to(home)  # type: ignore[arg-type]

    return door


@on_cpu
def from_teacher(
    teacher: "str | os.PathLike[str] | PreTrainedModel",
    config: PreTrainedConfig | None = None,
    *,
    method: "str | InitializationConfig | Mapping[str, Any]" = "guide",
    calibration_dataset: Any = None,
    calibration_dir: "str | os.PathLike[str] | None" = None,
    model_class: type[Any] | None = None,
    dtype: "str | torch.dtype | None" = None,
    num_subclasses: int | None = None,
    projector: SubclassDirections | None = None,
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
    embedding table; of blocks the outer ones are kept, and all other axes are selected evenly.

    Args:
        teacher: a Hub id, a folder, or a loaded model, which is left untouched. "calibrated" runs it: a loaded model where it
            is, any other on this process's GPU where there is one, and it must fit there.
        config: the student's config, of the teacher's own config class; None takes the teacher's.
        method: "guide", "calibrated", "uniform" or "random", or an `InitializationConfig` (or a mapping of its fields).
        calibration_dataset: for "calibrated": a `datasets` dataset with `input_ids`, `pixel_values` or text (which the
            teacher's tokenizer cuts up), a list of texts, an iterable of batches (dicts of tensors), or "teacher" for text
            that a causal language model writes itself. Its first `calibration_tokens` go through the teacher. Under
            torch.distributed each process hears its share, and all get the same student.
        calibration_dir: for "calibrated": a folder, new or of the same call, that keeps what is heard and fitted. Killed at
            any moment, the same call goes on from there. It stays when the student is made, for that is not saved by then:
            remove it once it is. All processes must see it.
        model_class: the student's class or an Auto class, such as AutoModelForSequenceClassification; None takes the
            teacher's.
        dtype: of the student; None or "auto" takes the teacher's. The arithmetic is float32 or better.
        num_subclasses: of a classifier that is to learn by LELP: so many outputs for each class, which begin alike, as the
            teacher's; the config tells how many they are.
        projector: a `SubclassProjector` of the teacher's: each output begins at its subclass's direction instead.
        revision, token, cache_dir, local_files_only, trust_remote_code, gguf_file, subfolder: as in `from_pretrained`.
        show_progress: whether to show a progress bar.
        **overrides: fields of the teacher's config that the student changes, such as `hidden_size=288`. Values that
            the family derives from others (`head_dim`, `layer_types`, ...) follow again.

    Returns:
        The student, in evaluation mode and on torch's default device as `from_pretrained` gives it, with an
        `initialization_report`, which `save_pretrained` writes beside the weights.

    Raises:
        OptionError: an unknown method, option or override, with the nearest valid name; a calibration_dir of another call.
        ShapeError: a shape that the family refuses or cannot run with, or that cannot be made from this teacher.
        LayoutError: a family whose axes are not known.
        TeacherError: a teacher that cannot be read.
        SubclassError: a projector of another teacher.
        TaskError: subclasses of something else than a classifier of whole examples.
    """
    options = InitializationConfig.parse(method)
    if options.method == Method.CALIBRATED:
        check_calibration_dataset(calibration_dataset, options.method)
        if calibration_dir is not None:
            check_calibration_dir(Path(calibration_dir))
    elif calibration_dataset is not None or calibration_dir is not None:
        given = "calibration_dir" if calibration_dataset is None else "calibration_dataset"
        raise OptionError(f"{given} was given, but method={options.method!r} looks at no data; leave it out.")
    hub: dict[str, Any] = {
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
        "subfolder": subfolder,
    }
    opened = open_teacher(teacher, revision=revision, trust_remote_code=trust_remote_code, gguf_file=gguf_file, **hub)
    check_requested_sizes(opened.config, overrides, deepest=_max_listed_depth(options))
    check_computed_overrides(opened.model_class, opened.config, overrides)
    resolved = resolve_config(opened, config, overrides, options, keywords=FROM_TEACHER_PARAMETERS)
    student_config, planned = resolved.config, resolved.options(options)
    student_class = resolve_class(opened, student_config, model_class)
    if config is not None:
        check_config_sizes(student_config, opened.config, deepest=_max_listed_depth(options))
    check_expert_counts(student_config, opened.config)
    check_overrides_hold(student_class, student_config, opened.config, overrides)
    vocab = vocab_row_indices(opened, student_config, gguf_file=gguf_file, **hub)
    calibration = None
    if options.method == Method.CALIBRATED:
        plan = validate_plan(student_class, student_config, opened, planned)  # refuses before any data is read
        files = {**hub, "trust_remote_code": trust_remote_code, "gguf_file": gguf_file}
        folder, call = None, None
        if calibration_dir is not None:
            folder = Path(calibration_dir)
            call = describe_call(opened, student_class, student_config, resolve_dtype(dtype, opened), options)
            call |= {"num_subclasses": num_subclasses}
            if projector is not None:
                call |= {"projector": projector.fingerprint()}
        calibration = collect_calibration(
            teacher,
            opened,
            calibration_dataset,
            options,
            folder=folder,
            call=call,
            show_progress=show_progress,
            **files,
        )
        influence = {stack: values.tolist() for stack, values in calibration.statistics.block_influence.items()}
        resolved = resolve_config(
            opened, config, overrides, options, keywords=FROM_TEACHER_PARAMETERS, influence=influence
        )
        student_config = resolved.config
        planned = select_blocks_by_influence(calibration, options, plan.stacks, resolved.layers)
    labels = label_row_indices(opened.config, student_config)
    lost: list[str] = []
    if num_subclasses is not None or projector is not None:
        opened, student_config, labels, lost = widen_to_subclasses(
            opened, student_config, student_class, labels, num_subclasses, projector
        )
        if projector is not None and isinstance(teacher, PreTrainedModel):
            projector.check_teacher(teacher)
    layout = None if options.method == Method.RANDOM else layout_for(opened.config, opened.model_class)
    student = build_student(student_class, student_config, resolve_dtype(dtype, opened), options)
    if options.method not in (Method.CALIBRATED, Method.RANDOM) and student.num_parameters() > DRY_RUN_MIN_PARAMETERS:
        check_forward(student, opened.config, filled=False)
    if layout is None:
        report = InitializationReport.of_random(student, opened, options)
    elif calibration is not None:
        report = initialize_calibrated(
            student,
            opened,
            layout,
            planned,
            calibration,
            vocab_places=vocab,
            label_places=labels,
            show_progress=show_progress,
        )
    else:
        report = initialize(
            student,
            opened,
            layout,
            planned,
            vocab_places=vocab,
            label_places=labels,
            show_progress=show_progress,
        )
    report.options = dataclasses.asdict(options)
    report.approximations += [*lost, *resolved.approximations]
    report.notes += resolved.notes
    if layout is not None:
        report.approximations += depth_notes(layout, opened, student_config, report.blocks)
    report.notes += check_forward(student, opened.config, filled=True)
    attach_report(student, report)
    copy_generation_config(student, teacher, revision=revision, **hub)
    return student.eval()


def validate_plan(
    student_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    teacher: TeacherCheckpoint,
    options: InitializationConfig,
) -> Plan:
    """Return the plan of a student that is not kept, so that what cannot be made is refused.

    Raises:
        ShapeError, LayoutError: as `make_plan`.
    """
    layout = layout_for(teacher.config, teacher.model_class)
    prefix = teacher.base_model_prefix
    check_single_stage_width(
        layout, {strip_base_prefix(name, prefix): teacher.weights.shape(name) for name in teacher.weights.keys()}
    )
    student = build_student(student_class, config, teacher.dtype, options)
    everything = torch.arange(getattr(config, "vocab_size", None) or 0)  # rows are looked at by `vocab_row_indices`
    plan = make_plan(
        student,
        teacher,
        layout,
        options,
        vocab_places=everything,
        label_places=label_row_indices(teacher.config, config),
    )
    check_forward(student, teacher.config, filled=False)
    return plan


def _max_listed_depth(options: InitializationConfig) -> int:
    """Return how many blocks a student's stack may have because the user lists the teacher's block for each; 0 for no list."""
    lists = options.layers.values() if isinstance(options.layers, dict) else [options.layers]
    return max((len(blocks) for blocks in lists if not isinstance(blocks, str)), default=0)


FROM_TEACHER_PARAMETERS = [
    name for name in inspect.signature(from_teacher).parameters if name not in ("teacher", "overrides")
]


def build_student(
    student_class: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype, options: InitializationConfig
) -> PreTrainedModel:
    """Return a model of `config`; only for `random` are its parameters initialised, as `from_config` does it.

    Raises:
        ShapeError: the family refuses the shape; with its reason.
    """
    try:
        with rng_seed(options.seed):  # constructors draw, whether it is needed or not
            if options.method == Method.RANDOM:
                return student_class._from_config(config, dtype=dtype)
            with no_init_weights():
                student = student_class._from_config(config, dtype=dtype)
    except MODEL_ERRORS as error:
        reason = str(error) if isinstance(error, (ValueError, RuntimeError)) else f"{type(error).__name__}: {error}"
        raise ShapeError(f"{student_class.__name__} refuses this config: {reason}") from error
    student.tie_weights()
    return student


class _FromTeacherBase:
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


class FromTeacherMixin(_FromTeacherBase):
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


class _AutoStudent(_FromTeacherBase):
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
