"""`from_teacher`, which makes a student, and `plan_student`, which states what it would make and take."""

import dataclasses
import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ParamSpec

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from hf_guide.calibration.vocabulary import ReducedVocabulary, change_vocabulary
from hf_guide.errors import OptionError
from hf_guide.hub.metadata import lineage_of
from hf_guide.hub.push import attach_report
from hf_guide.initialization.config import PlanOptions
from hf_guide.initialization.cost import MIN_CHECKED_BYTES, stored_bytes
from hf_guide.initialization.equivalence import depth_notes
from hf_guide.initialization.generation_config import copy_generation_config
from hf_guide.initialization.registry import InitializationMethod, StudentPlan
from hf_guide.initialization.sentence_modules import attach_teacher_modules, teacher_sentence_modules
from hf_guide.initialization.student_shape import (
    StudentShape,
    label_row_indices,
    resolve_dtype,
    resolve_student,
    vocab_row_indices,
)
from hf_guide.initialization.subclass_head import SubclassDirections, widen_to_subclasses
from hf_guide.initialization.tokenizer_change import OtherVocabulary
from hf_guide.initialization.trial_forward import check_forward
from hf_guide.methods import InitializationConfig, StudentSetup, make_method
from hf_guide.models.token_rows import attach_tokenizer
from hf_guide.shapes.search import START_FOLDER, describe_choice, find_shapes, search_folder
from hf_guide.teachers.checkpoint import TeacherCheckpoint, open_teacher
from hf_guide.utils.deprecation import RenamedOptions, with_renamed_parameters
from hf_guide.utils.half_precision import without_autocast
from hf_guide.utils.memory import peak_memory

P = ParamSpec("P")

DRY_RUN_MIN_PARAMETERS = 300_000_000
"""Number of parameters from which a student is also run before it is filled: smaller ones are filled within seconds."""


def on_cpu(make: Callable[P, PreTrainedModel]) -> Callable[P, PreTrainedModel]:
    """Decorate a function that makes a model: make it on the CPU, then move it to the caller's default device.

    Neither the caller's autocast nor its inference mode has an effect: one would round what is summed, the other make a model
    that cannot be trained.
    """

    @functools.wraps(make)
    def make_on_cpu(*args: P.args, **kwargs: P.kwargs) -> PreTrainedModel:
        device = torch.get_default_device()
        with torch.inference_mode(False), without_autocast():
            if device.type == "cpu":
                return make(*args, **kwargs)
            with torch.device("cpu"):
                student = make(*args, **kwargs)
            return student.to(device)  # type: ignore[arg-type, no-any-return]

    return make_on_cpu


@on_cpu
@with_renamed_parameters(
    RenamedOptions(
        names={"calibration_dir": "calibration_cache_dir"},
        values={"calibration_dataset": {"teacher": "self_generated"}},
    )
)
def from_teacher(
    teacher: "str | os.PathLike[str] | PreTrainedModel",
    config: PreTrainedConfig | None = None,
    *,
    method: "str | InitializationConfig | Mapping[str, Any]" = "guide",
    calibration_dataset: Any = None,
    calibration_cache_dir: "str | os.PathLike[str] | None" = None,
    model_class: type[Any] | None = None,
    dtype: "str | torch.dtype | None" = None,
    num_parameters: "int | str | None" = None,
    active_parameters: "int | str | None" = None,
    memory: "int | str | None" = None,
    cache_length: int | None = None,
    search_steps: int | None = None,
    tokenizer: Any = None,
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
    """Return a stock Transformers model of the requested shape, initialized from `teacher`.

    By default with GUIDE (arXiv 2510.06502): the residual stream is projected onto the principal directions of the embedding
    table, the outer blocks are kept, and all other axes are selected evenly.

    Args:
        teacher: A Hub id, a folder, or a loaded model, which is not modified. "calibrated" runs it: a loaded model on its
            own device, any other on this process's GPU where there is one, and it must fit there.
        config: The student's config, of the teacher's own config class; None derives it from the teacher's.
        method: Name of a registered method ("guide", "calibrated", "uniform", "random", or one of your own), an
            `InitializationConfig`, or a mapping of its options. `hf-guide methods` lists them.
        calibration_dataset: For "calibrated": a `datasets` dataset with `input_ids`, `pixel_values` or text (tokenized by
            the teacher's tokenizer), a list of texts, an iterable of batches (dicts of tensors), or "self_generated" for text
            that a causal language model samples itself. Its first `calibration_tokens` tokens are used. Under
            torch.distributed each rank processes its share, and all ranks get the same student. For a smaller `vocab_size`,
            with any method: texts, rows of text or conversations, all of which choose the pieces that are kept.
        calibration_cache_dir: For "calibrated": a folder, new or of the same call, that stores statistics and refitted
            weights. If the process is killed, the same call resumes from it. With a budget it holds two folders, of the
            search and of the student. The folder is not deleted automatically; remove
            it after saving the student. All ranks must see it.
        model_class: The student's class or an Auto class, such as AutoModelForSequenceClassification; None takes the
            teacher's.
        dtype: Of the student; None or "auto" takes the teacher's. Arithmetic is in float32 or better.
        num_parameters: Instead of sizes, how many parameters the student has: a number, or "23M", "1.5B" or "25%" of the
            teacher's. The best of `find_shapes`, within 2 %, is taken: "calibrated" compares starts on part of the data, at
            the cost of a few more of them, and any other method a rule. The report notes the shape. Overrides fix sizes.
        active_parameters, memory, cache_length: Likewise, what a token passes of a mixture of experts, or the bytes of weights
            and key-value cache ("500MB"), the cache for 2,048 positions by default.
        tokenizer: Another fast tokenizer than the teacher's, or its name or folder. Rows of tokens that the teacher has are
            copied, those of other pieces are means of the teacher's pieces that spell them (arXiv 2402.09977), and special
            tokens are matched by name or role; the report counts them. Logits of student and teacher can then not be compared.
        search_steps: With these and "calibrated": for how many steps the best starts are distilled before they are compared.
        num_subclasses: Number of outputs per class of a classifier to be trained with LELP; all of a class's start as the
            teacher's. The student's config records it.
        projector: A `SubclassProjector` of the teacher: each output starts at its subclass's direction instead.
        revision, token, cache_dir, local_files_only, trust_remote_code, gguf_file, subfolder: As in `from_pretrained`.
        show_progress: Whether to show progress bars.
        **overrides: Fields of the teacher's config that the student changes, such as `hidden_size=288`. Values that the
            family derives from others (`layer_types`, ...) are derived again; heads stay as large as the teacher's where
            the family has a field for it (`head_dim`), and are hidden size / heads elsewhere. With a `vocab_size` below the
            teacher's the student keeps the pieces of its fast tokenizer (BPE, Unigram or WordPiece) that
            `calibration_dataset` uses, all special and added tokens, and the bytes or characters without which texts could
            not be encoded; with `num_parameters` and its like, "auto" chooses the size, too.

    Returns:
        The student, in evaluation mode and on torch's default device as `from_pretrained` returns it, with an
        `initialization_report`, which `save_pretrained` writes next to the weights; with it the tokenizer of another
        vocabulary.

    Raises:
        OptionError: Unknown method, option or override (the nearest valid name is given); a cache folder of another call.
        ShapeError: A shape that the family rejects or cannot run with, or that cannot be made from this teacher.
        LayoutError: A family whose axes are not known.
        ResourceError: More memory than is available, estimated before a weight is read; states what would help.
        TeacherError: A teacher that cannot be read, or whose files change while they are read.
        SubclassError: A projector of another teacher.
        VocabularyError: A smaller vocabulary of a tokenizer of another kind, or one too small; or a tokenizer whose pieces are
            not known.
        TaskError: Subclasses of something other than a classifier of whole examples.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> teacher = LlamaForCausalLM(LlamaConfig(
        ...     vocab_size=96, hidden_size=48, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4
        ... ))
        >>> student = from_teacher(teacher, hidden_size=24, num_hidden_layers=2, show_progress=False)
        >>> student.initialization_report.blocks
        {'layers': [0, 3]}
    """
    files = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only, "subfolder": subfolder}
    code = {"trust_remote_code": trust_remote_code, "gguf_file": gguf_file}
    budget = {
        "num_parameters": num_parameters,
        "active_parameters": active_parameters,
        "memory": memory,
        "cache_length": cache_length,
        "search_steps": search_steps,
    }
    if any(value is not None for value in budget.values()):
        shared = {
            "method": method,
            "calibration_dataset": calibration_dataset,
            "model_class": model_class,
            "dtype": dtype,
            "tokenizer": tokenizer,
        }
        shared |= {"revision": revision, "show_progress": show_progress, **files, **code}
        head = {"num_subclasses": num_subclasses, "projector": projector}
        return _from_teacher_of_budget(teacher, config, budget, calibration_cache_dir, shared, head, overrides)
    method_config = InitializationConfig.parse(method)
    initializer = make_method(method_config)
    if config is None and "vocab_size" not in overrides:  # a dataset may be for the vocabulary alone
        initializer.check_data(calibration_dataset, calibration_cache_dir)

    checkpoint = open_teacher(teacher, revision=revision, **code, **files)  # type: ignore[arg-type]
    checkpoint, config, vocabulary = change_vocabulary(
        checkpoint,
        teacher,
        config,
        overrides,
        calibration_dataset,
        tokenizer=tokenizer,
        gguf_file=gguf_file,
        **files,
    )
    if isinstance(vocabulary, ReducedVocabulary) and not initializer.requires_data:
        calibration_dataset = None
    initializer.check_data(calibration_dataset, calibration_cache_dir)

    options, shape, setup = _resolve(
        initializer,
        checkpoint,
        config,
        overrides,
        source=teacher,
        model_class=model_class,
        dtype=dtype,
        files=files,
        code=code,
        calibration_dataset=calibration_dataset,
        calibration_cache_dir=calibration_cache_dir,
        identity=_identity(num_subclasses, projector, vocabulary),
        show_progress=show_progress,
    )
    modules = teacher_sentence_modules(teacher, checkpoint, shape.model_class, files)
    if vocabulary is not None and modules is not None:
        modules.check_no_token_ids()
    _check_cost(initializer, setup)
    scores = initializer.collect(setup)
    is_measured = scores is not None
    while scores is not None:
        shape = resolve_student(
            checkpoint, config, overrides, options, model_class, keywords=FROM_TEACHER_PARAMETERS, influence=scores
        )
        setup = dataclasses.replace(setup, config=shape.config, options=shape.plan_options(options))
        scores = initializer.reselect(shape.layers)
    setup, dropped = _with_label_rows(setup, num_subclasses, projector)

    student = initializer.build(setup)
    needs_dry_run = initializer.requires_layout and not is_measured
    if needs_dry_run and student.num_parameters() > DRY_RUN_MIN_PARAMETERS:
        check_forward(student, setup.teacher.config, filled=False)
    report = initializer.initialize(student, setup)
    checkpoint.weights.check_unchanged()

    report.options, report.lineage = dataclasses.asdict(method_config), lineage_of(teacher)
    report.approximations += [*dropped, *shape.approximations]
    report.notes += shape.notes
    if initializer.requires_layout:
        report.approximations += depth_notes(setup.layout, setup.teacher, setup.config, report.blocks)
    report.notes += check_forward(student, setup.teacher.config, filled=True)
    if modules is not None:
        attach_teacher_modules(student, modules, report, seed=method_config.seed)
    report.bases.clear()
    report.peak_memory_bytes = peak_memory()
    attach_report(student, report)
    if vocabulary is not None:
        report.vocabulary = vocabulary.facts
        attach_tokenizer(student, vocabulary.tokenizer)
    translate = None if vocabulary is None else vocabulary.translate
    copy_generation_config(student, teacher, translate=translate, revision=revision, **files)
    return student.eval()  # type: ignore[no-any-return]


FROM_TEACHER_PARAMETERS = [
    name for name in inspect.signature(from_teacher).parameters if name not in ("teacher", "overrides")
]


def _from_teacher_of_budget(
    teacher: "str | os.PathLike[str] | PreTrainedModel",
    config: PreTrainedConfig | None,
    budget: Mapping[str, Any],
    calibration_cache_dir: "str | os.PathLike[str] | None",
    shared: Mapping[str, Any],
    head: Mapping[str, Any],
    overrides: Mapping[str, Any],
) -> PreTrainedModel:
    """Return the student of the best shape of a budget: the same as of a call with that shape's sizes.

    Args:
        shared: Arguments of both `find_shapes` and `from_teacher`.
        head: Other arguments of `from_teacher`.
    """
    given = _given_budget(budget, config)
    if isinstance(shared["calibration_dataset"], Iterator):
        raise OptionError(
            f"calibration_dataset is an iterator, which can be read once, and with {', '.join(given)} it is read for the "
            "search and for the student: pass a list or a dataset."
        )
    shapes = find_shapes(teacher, **budget, calibration_cache_dir=calibration_cache_dir, **shared, **overrides)
    folder = search_folder(calibration_cache_dir, START_FOLDER)
    options: dict[str, Any] = {**shared, **head, **overrides, **shapes[0].overrides}
    student = from_teacher(teacher, calibration_cache_dir=folder, **options)
    report: Any = student.initialization_report
    report.shape_choice = describe_choice(shapes, given, student.num_parameters(), head_rows=head["num_subclasses"])
    return student


def _given_budget(budget: Mapping[str, Any], config: PreTrainedConfig | None) -> dict[str, Any]:
    """Return the entries of a budget that are set; an OptionError where there is a config, too."""
    given = {name: value for name, value in budget.items() if value is not None}
    if given and config is not None:
        raise OptionError(
            f"config states every size already, so {', '.join(given)} cannot choose any: leave one of them out."
        )
    return given


def _resolve(
    initializer: InitializationMethod,
    checkpoint: TeacherCheckpoint,
    config: PreTrainedConfig | None,
    overrides: Mapping[str, Any],
    *,
    model_class: type[Any] | None,
    dtype: "str | torch.dtype | None",
    files: Mapping[str, Any],
    code: Mapping[str, Any],
    **fields: Any,
) -> tuple[PlanOptions | None, StudentShape, StudentSetup]:
    """Return the method's plan options, the student's shape and its setup, whose other fields are `fields`."""
    options = initializer.plan_options() if initializer.requires_layout else None
    shape = resolve_student(checkpoint, config, overrides, options, model_class, keywords=FROM_TEACHER_PARAMETERS)
    setup = StudentSetup(
        teacher=checkpoint,
        model_class=shape.model_class,
        config=shape.config,
        dtype=resolve_dtype(dtype, checkpoint),
        options=shape.plan_options(options),
        vocab_indices=vocab_row_indices(checkpoint, shape.config, gguf_file=code["gguf_file"], **files),
        hub={**files, **code},
        **fields,
    )
    return options, shape, setup


def _check_cost(initializer: InitializationMethod, setup: StudentSetup) -> None:
    """Check that what a large teacher takes fits into memory, and show it above the progress bar.

    Raises:
        ResourceError: It does not fit.
    """
    if stored_bytes(setup.teacher) < MIN_CHECKED_BYTES:
        return
    estimate = initializer.estimate_cost(setup)
    estimate.check_fits()
    if setup.show_progress:
        tqdm.write(
            f"{setup.model_class.__name__} by {initializer.config.method}: {estimate.summary()}", file=sys.stderr
        )


def plan_student(
    teacher: "str | os.PathLike[str] | PreTrainedModel",
    config: PreTrainedConfig | None = None,
    *,
    method: "str | InitializationConfig | Mapping[str, Any]" = "guide",
    num_parameters: "int | str | None" = None,
    active_parameters: "int | str | None" = None,
    memory: "int | str | None" = None,
    cache_length: int | None = None,
    model_class: type[Any] | None = None,
    dtype: "str | torch.dtype | None" = None,
    tokenizer: Any = None,
    revision: str | None = None,
    token: "str | bool | None" = None,
    cache_dir: "str | os.PathLike[str] | None" = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
    gguf_file: str | None = None,
    subfolder: str = "",
    **overrides: Any,
) -> StudentPlan:
    """Return what `from_teacher` would make of these arguments, and its memory and time, from configs and headers of files.

    A teacher that is not stored as plain safetensors (`.bin`, GGUF, quantised) is loaded to learn its shapes.

    Args:
        teacher, config, method, model_class, dtype, tokenizer: As in `from_teacher`. Which blocks a method chooses by data is
            not known: `blocks` of the plan omits their stacks, and `measured` has how many are kept.
        num_parameters, active_parameters, memory, cache_length: As in `from_teacher`, of a method without calibration data.
        revision, token, cache_dir, local_files_only, trust_remote_code, gguf_file, subfolder: As in `from_pretrained`.
        **overrides: Fields of the teacher's config that the student changes.

    Raises:
        OptionError: As `from_teacher`; a budget with "calibrated", whose shape depends on the data.
        ShapeError, LayoutError, TeacherError: As `from_teacher`.

    Example:
        >>> plan = plan_student("HuggingFaceTB/SmolLM2-135M", num_hidden_layers=2)
        >>> plan.blocks, plan.estimate.memory_bytes < 10**9
        ({'layers': [0, 3]}, True)
    """
    initializer = make_method(InitializationConfig.parse(method))
    files = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only, "subfolder": subfolder}
    code = {"trust_remote_code": trust_remote_code, "gguf_file": gguf_file}
    budget: dict[str, Any] = {"num_parameters": num_parameters, "active_parameters": active_parameters}
    budget |= {"memory": memory, "cache_length": cache_length}
    if given := _given_budget(budget, config):
        if initializer.requires_data:
            raise OptionError(
                f"Which shape {initializer.config.method!r} makes of {', '.join(given)} depends on its data: run find_shapes "
                "(`hf-guide shapes`) with it, and plan the sizes that it names."
            )
        shared = {
            "model_class": model_class,
            "dtype": dtype,
            "tokenizer": tokenizer,
            "revision": revision,
            **files,
            **code,
        }
        found = find_shapes(teacher, limit=1, method=method, show_progress=False, **given, **shared, **overrides)
        overrides |= found[0].overrides
    checkpoint = open_teacher(teacher, revision=revision, **code, **files)  # type: ignore[arg-type]
    checkpoint, config, _ = change_vocabulary(
        checkpoint, teacher, config, overrides, None, tokenizer=tokenizer, gguf_file=gguf_file, **files
    )
    _, _, setup = _resolve(
        initializer,
        checkpoint,
        config,
        overrides,
        source=teacher,
        model_class=model_class,
        dtype=dtype,
        files=files,
        code=code,
    )
    return StudentPlan.of(initializer, setup)


def _identity(
    num_subclasses: int | None,
    projector: SubclassDirections | None,
    vocabulary: ReducedVocabulary | OtherVocabulary | None,
) -> dict[str, Any]:
    """Return what a student's head and vocabulary depend on, as JSON."""
    fingerprint = {} if projector is None else {"projector": projector.fingerprint()}
    kept = {} if vocabulary is None else {"vocabulary": vocabulary.identity}
    return {"num_subclasses": num_subclasses, **fingerprint, **kept}


def _with_label_rows(
    setup: StudentSetup, num_subclasses: int | None, projector: SubclassDirections | None
) -> tuple[StudentSetup, list[str]]:
    """Return the setup with the rows of the classification head, widened to subclasses, and what could not be transferred."""
    rows = label_row_indices(setup.teacher.config, setup.config)
    if num_subclasses is None and projector is None:
        return dataclasses.replace(setup, label_indices=rows), []
    teacher, config, rows, dropped = widen_to_subclasses(
        setup.teacher, setup.config, setup.model_class, rows, num_subclasses, projector
    )
    if projector is not None and isinstance(setup.source, PreTrainedModel):
        projector.check_teacher(setup.source)
    return dataclasses.replace(setup, teacher=teacher, config=config, label_indices=rows), dropped
