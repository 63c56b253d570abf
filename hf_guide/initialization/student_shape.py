"""Resolve what the student is: its class, config, dtype and blocks, and which rows its vocabulary and labels take."""

import copy
import dataclasses
import inspect
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import auto_factory, modeling_auto

from hf_guide.errors import OptionError, ShapeError
from hf_guide.initialization.blocks.mapping import StudentBlocks, resolve_blocks
from hf_guide.initialization.config import PlanOptions, owner_of_option
from hf_guide.initialization.infer_layout import layout_for
from hf_guide.initialization.size_checks import (
    check_computed_overrides,
    check_config_sizes,
    check_expert_counts,
    check_initialization,
    check_overrides_hold,
    check_requested_sizes,
)
from hf_guide.initialization.student_config import derive_student_config, split_heads_note, validate_student_config
from hf_guide.teachers.checkpoint import TeacherCheckpoint, tokenizer_length
from hf_guide.validation import did_you_mean

_MISSING = object()


@dataclass(frozen=True)
class StudentShape:
    """The student's class and config, and the teacher's blocks that feed it.

    Attributes:
        notes: What the report notes of how blocks were chosen, and of heads that are split.
        approximations: What the config cannot state of the blocks that feed it.
    """

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    layers: dict[str, list[int]]
    notes: list[str]
    approximations: list[str]

    def plan_options(self, options: PlanOptions | None) -> PlanOptions:
        """Return a method's plan options with these blocks listed."""
        options = options or PlanOptions()
        if not self.layers:
            return options
        layers = {stack.removesuffix(".{block}"): list(blocks) for stack, blocks in self.layers.items()}
        return dataclasses.replace(options, layer_selection=layers)


def resolve_student(
    teacher: TeacherCheckpoint,
    config: PreTrainedConfig | None,
    overrides: Mapping[str, Any],
    options: PlanOptions | None,
    model_class: type[Any] | None,
    *,
    keywords: Collection[str] = (),
    influence: "Mapping[str, Sequence[float]] | None" = None,
) -> StudentShape:
    """Return the student's class, its config and its blocks, having checked every requested size.

    Args:
        teacher: The opened teacher.
        config: The student's config; None takes the teacher's with `overrides`.
        overrides: Fields of the teacher's config that the student changes.
        options: The plan's; None where nothing of the teacher but its config is used.
        model_class: A class or an Auto class; None takes the teacher's.
        keywords: Of the caller, one of which may be meant where an override is unknown.
        influence: Of each of the teacher's blocks, by stack, once it is known.

    Raises:
        OptionError, ShapeError: As `resolve_config`, `resolve_class` and the checks of sizes.
    """
    deepest = _max_listed_depth(options)
    check_requested_sizes(teacher.config, overrides, deepest=deepest)
    check_computed_overrides(teacher.model_class, teacher.config, overrides)
    blocks = resolve_config(teacher, config, overrides, options, keywords=keywords, influence=influence)
    student_class = resolve_class(teacher, blocks.config, model_class)
    if config is not None:
        check_config_sizes(blocks.config, teacher.config, deepest=deepest)
    check_expert_counts(blocks.config, teacher.config)
    check_overrides_hold(student_class, blocks.config, teacher.config, overrides)
    check_initialization(student_class, blocks.config, teacher.config)
    notes = [*blocks.notes, *split_heads_note(teacher.config, blocks.config, overrides)]
    return StudentShape(student_class, blocks.config, blocks.layers, notes, blocks.approximations)


def _max_listed_depth(options: PlanOptions | None) -> int:
    """Return how many blocks a stack may have because a list of the teacher's blocks is given for it; 0 without lists."""
    layers = PlanOptions.layer_selection if options is None else options.layer_selection
    lists = layers.values() if isinstance(layers, dict) else [layers]
    return max((len(blocks) for blocks in lists if not isinstance(blocks, str)), default=0)


def resolve_config(
    teacher: TeacherCheckpoint,
    config: PreTrainedConfig | None,
    overrides: Mapping[str, Any],
    options: PlanOptions | None,
    *,
    keywords: Collection[str] = (),
    influence: "Mapping[str, Sequence[float]] | None" = None,
) -> StudentBlocks:
    """Return the student's config, `config` itself or the teacher's with overrides, and the blocks that feed it.

    Args:
        options: The plan's; None where nothing of the teacher but its config is used, so that no blocks are chosen.
        keywords: Of the caller, one of which may be meant where an override is unknown.
        influence: Of each of the teacher's blocks, by stack, once it is known.

    Raises:
        OptionError: A config and overrides together, an unknown override, or an invalid config.
        ShapeError: Another family than the teacher's, or sizes that do not fit each other.
    """
    if config is None:
        for name, value in overrides.items():
            if (method := owner_of_option(name)) is not None and not hasattr(teacher.config, name):
                raise OptionError(
                    f"{name!r} is an option of the method, not of the config; pass "
                    f"method={{'method': {method!r}, {name!r}: {value!r}}}."
                )
        if options is None:
            return StudentBlocks(derive_student_config(teacher.config, overrides, keywords=keywords))
        layout = layout_for(teacher.config, teacher.model_class)
        return resolve_blocks(teacher, layout, None, overrides, options, keywords=keywords, influence=influence)
    family = type(teacher.config).__name__
    if not isinstance(config, PreTrainedConfig):
        raise OptionError(
            f"config must be a {family}, or left out for the teacher's with overrides such as hidden_size=...; found "
            f"{f'the class {config.__name__}' if isinstance(config, type) else f'a {type(config).__name__}'}."
        )
    if overrides:
        raise OptionError(
            f"config and the overrides {sorted(overrides)} are both given: set them on the config, or "
            f"leave the config out.{_keyword_hint(overrides, keywords)}"
        )
    if config.model_type != teacher.config.model_type:
        raise ShapeError(
            f"The student's config is a {type(config).__name__} ({config.model_type!r}), the teacher a "
            f"{teacher.config.model_type!r}: a student must be of its teacher's family. Pass a {family}."
        )
    teacher_values = teacher.config.to_dict()
    changed = {name for name, value in config.to_dict().items() if teacher_values.get(name, _MISSING) != value}
    student = validate_student_config(copy.deepcopy(config), teacher.config, changed | {"rotary_dim"})
    if options is None:
        return StudentBlocks(student)
    layout = layout_for(teacher.config, teacher.model_class)
    return resolve_blocks(teacher, layout, student, {}, options, influence=influence)


def _keyword_hint(overrides: Collection[str], keywords: Collection[str]) -> str:
    return next((hint for name in overrides if (hint := did_you_mean(name, keywords))), "")


def resolve_class(
    teacher: TeacherCheckpoint, config: PreTrainedConfig, model_class: type[Any] | None
) -> type[PreTrainedModel]:
    """Return the student's class: `model_class`, the class that an Auto class maps the config to, or the teacher's.

    Raises:
        OptionError: The Auto class has no model of this family, or the class is not a Transformers model.
    """
    if model_class is None:
        return teacher.model_class
    if isinstance(model_class, type) and issubclass(model_class, PreTrainedModel):
        expected = getattr(model_class, "config_class", None)
        if expected is not None and not isinstance(config, expected):
            raise OptionError(
                f"{model_class.__name__} takes a {expected.__name__}, but the teacher and so the student have a "
                f"{type(config).__name__}. Choose a class of its family, such as {teacher.model_class.__name__}."
            )
        return model_class
    mapping = getattr(model_class, "_model_mapping", None)
    if mapping is None:
        raise OptionError(
            f"model_class must be a model class or an Auto class of Transformers, such as {teacher.model_class.__name__} "
            f"or AutoModelForCausalLM; found {model_class!r}."
        )
    if type(config) not in mapping:
        raise OptionError(
            f"Transformers has no {getattr(model_class, '__name__', model_class)} for {config.model_type!r}. "
            f"It has {', '.join(auto_classes(config)) or 'no Auto class at all for it'}."
        )
    mapped = mapping[type(config)]
    return mapped[0] if isinstance(mapped, tuple) else mapped


def auto_classes(config: PreTrainedConfig) -> list[str]:
    """Return the names of Transformers' Auto classes that have a model for a config."""
    autos = inspect.getmembers(modeling_auto, inspect.isclass)
    return [
        name
        for name, auto in autos
        if name.startswith("AutoModel")
        and issubclass(auto, auto_factory._BaseAutoModelClass)
        and type(config) in (getattr(auto, "_model_mapping", None) or {})
    ]


def resolve_dtype(dtype: "str | torch.dtype | None", teacher: TeacherCheckpoint) -> torch.dtype:
    """Return the student's dtype; None and "auto" mean the teacher's.

    Raises:
        OptionError: Not a floating dtype of torch that a model can be built in.
    """
    if dtype is None or dtype == "auto":
        return teacher.dtype
    resolved = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point or resolved.itemsize < 2:
        raise OptionError(f"dtype must be 'float32', 'bfloat16', 'float16', 'float64', or 'auto'; found {dtype!r}.")
    return resolved


def vocab_row_indices(
    teacher: TeacherCheckpoint,
    config: PreTrainedConfig,
    *,
    token: "str | bool | None" = None,
    cache_dir: "str | os.PathLike[str] | None" = None,
    local_files_only: bool = False,
    gguf_file: str | None = None,
    subfolder: str = "",
) -> Tensor | None:
    """Return the teacher's vocabulary row of each of the student's, -1 for a row of zeros; None for all in order.

    Raises:
        ShapeError: Another vocabulary. Padded sizes of the same tokenizer may differ beyond its last token.
    """
    teacher_size, student_size = getattr(teacher.config, "vocab_size", None), getattr(config, "vocab_size", None)
    if not isinstance(teacher_size, int) or not isinstance(student_size, int) or teacher_size == student_size:
        return None
    nameless = teacher.name == teacher.model_class.__name__  # a model that was never saved has no tokenizer
    num_tokens = (
        None
        if nameless
        else tokenizer_length(
            teacher,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            gguf_file=gguf_file,
            subfolder=subfolder,
        )
    )
    if num_tokens is None or min(teacher_size, student_size) < num_tokens:
        tokens = "no tokenizer was found" if num_tokens is None else f"its tokenizer has {num_tokens} tokens"
        raise ShapeError(
            f"The student's vocabulary has {student_size} rows, the teacher's {teacher_size} ({tokens}): a student must have "
            f"its teacher's tokens. Leave vocab_size at {teacher_size}, or let them differ in padded rows beyond the "
            "tokenizer's last token. For a smaller vocabulary, pass texts as calibration_dataset: the pieces that they use "
            "are kept, where the teacher's folder has its tokenizer."
        )
    return torch.tensor([row if row < teacher_size else -1 for row in range(student_size)])


def label_row_indices(teacher: PreTrainedConfig, student: PreTrainedConfig) -> Tensor | None:
    """Return the teacher's label, matched by name, of each of the student's; None where all agree.

    The result is empty where the student has labels that the teacher does not have: its head is initialized at random.

    Example:
        >>> from transformers import BertConfig
        >>> teacher = BertConfig(id2label={0: "negative", 1: "neutral", 2: "positive"})
        >>> label_row_indices(teacher, BertConfig(id2label={0: "positive", 1: "negative"}))
        tensor([2, 0])
    """
    teacher_labels, student_labels = (getattr(each, "id2label", None) or {} for each in (teacher, student))
    if teacher_labels == student_labels:
        return None
    rows = {name: int(number) for number, name in teacher_labels.items()}
    names = [student_labels[number] for number in sorted(student_labels)]
    if not names or any(name not in rows for name in names):
        return torch.empty(0, dtype=torch.long)
    if all(name.startswith("LABEL_") for name in names):
        return torch.empty(0, dtype=torch.long)
    return torch.tensor([rows[name] for name in names])
