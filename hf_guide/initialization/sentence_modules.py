"""Carry the modules of a sentence-transformers teacher (pooling, dense layers, normalization, prompts) over to a student."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from hf_guide.initialization.build import rng_seed
from hf_guide.initialization.report import InitializationReport, ParameterRecord
from hf_guide.models.layer_mapping import width_of_config
from hf_guide.models.positions import max_input_tokens
from hf_guide.models.sentence_files import check_hidden_size, read_sentence_modules
from hf_guide.models.sentence_modules import SentenceModules, attach_sentence_modules, attached_sentence_modules
from hf_guide.tasks import Task, task_of_class_name
from hf_guide.teachers.checkpoint import TeacherCheckpoint


def teacher_sentence_modules(
    source: Any, teacher: TeacherCheckpoint, model_class: type[PreTrainedModel], hub: Mapping[str, Any]
) -> SentenceModules | None:
    """Return the modules of a teacher that a student of `model_class` needs; None if it has none.

    An embedding model's are for a student without a head, a cross-encoder's for one with the head of the teacher.

    Args:
        source: The `teacher` argument of `from_teacher`.
        teacher: It, opened.
        model_class: The student's class.
        hub: Keywords of `from_pretrained` by which the teacher was found.

    Raises:
        TeacherError: The teacher's modules cannot be read, or are not supported.
    """
    has_head = not _is_headless(model_class)
    is_loaded = isinstance(source, PreTrainedModel)
    if_unknown = (
        "ignore" if has_head and is_loaded else "warn"
    )  # nothing is asked of the Hub for a model that is loaded
    if is_loaded:
        modules = attached_sentence_modules(source)
        if modules is None and source.config._name_or_path:
            name, revision = source.config._name_or_path, getattr(source.config, "_commit_hash", None)
            modules = read_sentence_modules(name, revision=revision, if_unknown=if_unknown)
    else:
        names = ("token", "cache_dir", "local_files_only", "subfolder")
        where = {key: hub[key] for key in names if hub.get(key) is not None}
        modules = read_sentence_modules(source, revision=teacher.revision, if_unknown=if_unknown, **where)
    if modules is None or has_head != modules.is_cross_encoder:
        return None
    if modules.is_cross_encoder and task_of_class_name(model_class.__name__) not in _CROSS_ENCODER_TASKS:
        return None
    if modules.hidden_size is not None:
        check_hidden_size(modules, width_of_config(teacher.config), teacher.name)
    return copy.deepcopy(modules)


_CROSS_ENCODER_TASKS = (Task.SEQUENCE_CLASSIFICATION, Task.CAUSAL_LM)


def _is_headless(model_class: type[PreTrainedModel]) -> bool:
    """Return whether a class has no head: its outputs are hidden states."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES, MODEL_MAPPING_NAMES

    bases = {name for names in _values(MODEL_MAPPING_NAMES) for name in names}
    bases |= {name for names in _values(MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES) for name in names}
    return any(base.__name__ in bases for base in model_class.__mro__)


def _values(mapping: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [(names,) if isinstance(names, str) else tuple(names) for names in mapping.values()]


def attach_teacher_modules(
    student: PreTrainedModel, modules: SentenceModules, report: InitializationReport, *, seed: int
) -> None:
    """Attach a teacher's modules, resized to the student, and record in the report what was approximated.

    Args:
        student: Initialized.
        modules: The teacher's.
        report: Of the student, with the bases by which its hidden states are narrower.
        seed: Of the weights of a dense layer for whose input there is no basis.

    Raises:
        ShapeError: A module cannot follow the student's width.
    """
    if modules.hidden_size is not None:
        width = width_of_config(student.config)
        basis = None if width == modules.hidden_size else _basis(report, modules.hidden_size, width)
        with rng_seed(seed):
            resized = modules.resized(width, basis)
        _record(modules, resized, report, basis)
        modules = resized
    _limit_length(modules, student, report)
    attach_sentence_modules(student, modules)


def _basis(report: InitializationReport, teacher_width: int, width: int) -> Tensor | None:
    """Return the basis of the axis of this size, the residual stream's where there are several."""
    axes = [axis for axis, sizes in report.sizes.items() if sizes == [teacher_width, width] and axis in report.bases]
    return report.bases["embed" if "embed" in axes else axes[0]] if axes else None


def _record(
    before: SentenceModules, after: SentenceModules, report: InitializationReport, basis: Tensor | None
) -> None:
    """Add the dense layers that follow the student's width, and a narrower embedding, to the report."""
    for path, module in after.trainable.items():
        teacher = before.trainable[path].state_dict()
        for name, tensor in module.state_dict().items():
            record = ParameterRecord(f"{path}.{name}", list(tensor.shape))
            source = teacher.get(name)
            same = source is not None and source.shape == tensor.shape
            if same or basis is not None:
                record.source = f"{path}.{name}"
                record.source_shape = list(tensor.shape if source is None else source.shape)
            if not same and basis is not None:
                record.steps = ["input axis: as the hidden size"]
                report.approximations.append(
                    f"{path}.{name}: its input axis follows the hidden size, {before.hidden_size} -> {after.hidden_size}"
                )
            elif not same:
                report.randomly_initialized.append(f"{path}.{name}")
            report.parameters.append(record)
    if after.width != before.width:
        report.notes.append(
            f"The embedding is narrower, {before.width} -> {after.width}: no dense layer after the pooling restores its width."
        )


def _limit_length(modules: SentenceModules, student: PreTrainedModel, report: InitializationReport) -> None:
    """Limit `max_seq_length` to what the student's position embeddings allow."""
    settings = modules.files
    length = (settings.transformer_config or {}).get("max_seq_length")
    limit = max_input_tokens(student.config)
    if isinstance(length, int) and limit is not None and limit < length:
        settings.transformer_config = {**(settings.transformer_config or {}), "max_seq_length": limit}
        report.notes.append(f"max_seq_length is {limit}, the student's positions, and was {length}.")
