"""Derive a student's config from its teacher's.

Does: keep explicit values, derive again what the family derives, remap fields that list one entry per block, and check sizes.
Does not: select blocks or read weights.
"""

import copy
import functools
import re
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import MISSING, dataclass, fields
from typing import Any

from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import PreTrainedConfig

from hf_guide.errors import OptionError, ShapeError
from hf_guide.initialization.blocks.config_fields import (
    BlockField,
    ConfigPath,
    FieldKind,
    find_block_fields,
    remap_field,
    standard_depths,
    value_at,
)
from hf_guide.initialization.selection import evenly_spaced_indices
from hf_guide.models.code_references import without_code_references
from hf_guide.utils.by_value import ByValue
from hf_guide.validation import did_you_mean

# What identifies or stores the teacher, and is not the student's.
_NOT_INHERITED = ("model_type", "transformers_version", "_name_or_path", "quantization_config", "transformers_weights")
_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size"),
)
_HEAD_SIZE = re.compile(r"(^|_)(head_dim|head_size|d_head|dim_head|d_kv|kv_channels)$")
_CONFIG_ERRORS = (
    *(StrictDataclassFieldValidationError, StrictDataclassClassValidationError, ValueError, ZeroDivisionError),
    *(NotImplementedError, AttributeError, KeyError, IndexError),
)


@dataclass(frozen=True)
class _BlockFieldRules:
    """The blocks by which fields with one entry per block are remapped: by depth; evenly spaced where none are selected."""

    fields: tuple[BlockField, ...]
    blocks: Mapping[ConfigPath, Sequence[int]]
    even: Mapping[ConfigPath, Sequence[int]]
    sizes: Mapping[ConfigPath, int]
    left: frozenset[FieldKind]

    def values(
        self, teacher_config: PreTrainedConfig, values: Mapping[str, Any], prefix: ConfigPath
    ) -> dict[str, Any]:
        """Return the remapped values of the fields of the config at `prefix`, by name; `values` are the teacher's."""
        remapped: dict[str, Any] = {}
        for field in self.fields:
            name = field.path[-1]
            blocks = self.blocks.get(field.depth, self.even.get(field.depth))
            if field.path[:-1] != prefix or blocks is None or name not in values or field.kind in self.left:
                continue
            try:
                remapped[name] = remap_field(values[name], field.kind, blocks, self.sizes[field.depth])
            except ShapeError as error:
                raise ShapeError(
                    f"{type(teacher_config).__name__}.{name}={values[name]!r} cannot follow the blocks "
                    f"{list(blocks)}: {error}."
                ) from error
        if "attention_layers" in remapped and "attention_types" in values:  # GPT-Neo computes one from the other
            remapped["attention_types"] = [[remapped["attention_layers"], 1]]
        return remapped


def is_head_size(name: str) -> bool:
    """Return whether a config field of this name states the size of a head apart from the hidden size.

    Example:
        >>> is_head_size("head_dim"), is_head_size("d_kv"), is_head_size("num_attention_heads")
        (True, True, False)
    """
    return _HEAD_SIZE.search(name) is not None


def derive_student_config(
    teacher_config: PreTrainedConfig,
    overrides: Mapping[str, Any],
    *,
    keywords: Collection[str] = (),
    blocks: "Mapping[ConfigPath, Sequence[int]] | None" = None,
    block_fields: "Sequence[BlockField] | None" = None,
    left: Collection[FieldKind] = (),
) -> PreTrainedConfig:
    """Return a new config of the teacher's class with `overrides` applied; the teacher's is not modified.

    Names are the family's own or its aliases (`hidden_size` for GPT-2's `n_embd`); a nested config takes a mapping. A value
    that the class computes from others (as many key/value heads as heads, `layer_types` from a pattern) is computed again
    from the overridden ones. The size of a head stays the teacher's where the family has a field for it (Llama's `head_dim`,
    T5's `d_kv`), so that a narrower student has whole heads; elsewhere (GPT-2, BERT) it is hidden size / heads. Another value
    that was set explicitly stays, even if it once grew with the width (Gemma's `query_pre_attn_scalar`); only GPT-J's
    `rotary_dim` is lowered to the head size where it would exceed it. Fields with one entry per block take the entries at
    `blocks`; factors of long RoPE, one per rotated pair, are subsampled as the pairs are. Labels are kept unless
    `num_labels` or `id2label` is overridden, token ids always. The quantization is dropped.

    Args:
        keywords: The caller's own, one of which may be meant by an unknown name.
        blocks: By the path of a number of blocks, such as ("text_config", "num_hidden_layers"), the teacher's block that
            feeds each of the student's; evenly spaced ones where it is missing. Overridden fields are not remapped.
        block_fields: Fields with one entry per block, from `find_block_fields`; by default those that can be found without
            building a model.
        left: Kinds of fields that are not remapped.

    Raises:
        OptionError: An unknown name (with the nearest known ones), one given twice, or a value of the wrong type.
        ShapeError: A shape the family rejects, with the family's own reason; blocks that the teacher does not have.

    Example:
        >>> from transformers import LlamaConfig
        >>> teacher = LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=8)
        >>> student = derive_student_config(teacher, {"hidden_size": 32, "num_hidden_layers": 2})
        >>> student.head_dim, student.num_hidden_layers
        (16, 2)
    """
    if block_fields is None:
        block_fields = find_block_fields(teacher_config, standard_depths(teacher_config))
    requested = overridden_values(teacher_config, overrides)
    selected = {path: list(indices) for path, indices in (blocks or {}).items()}
    sizes = {path: value_at(teacher_config, path) for path in {*(field.depth for field in block_fields), *selected}}
    even = {
        path: [i * size // requested[path] for i in range(requested[path])]
        for path, size in sizes.items()
        if type(requested.get(path)) is int and requested[path] != size
    }
    for path, indices in selected.items():
        if any(not 0 <= block < sizes[path] for block in indices):
            raise ShapeError(f"The teacher has blocks 0 to {sizes[path] - 1}, but {indices} were requested.")
    following = _BlockFieldRules(tuple(block_fields), selected, even, sizes, frozenset(left))
    return _derive(teacher_config, overrides, keywords, following, ())


def overridden_values(
    config: PreTrainedConfig, overrides: Mapping[str, Any], prefix: ConfigPath = ()
) -> dict[ConfigPath, Any]:
    """Return overrides by their path, under the family's own names; nested configs are flattened."""
    values: dict[ConfigPath, Any] = {}
    for name, value in overrides.items():
        path = (*prefix, _real_name(config, name))
        nested = config.__dict__.get(path[-1])
        if isinstance(nested, PreTrainedConfig) and isinstance(value, Mapping):
            values |= overridden_values(nested, value, path)
        elif isinstance(nested, PreTrainedConfig) and isinstance(value, PreTrainedConfig):
            values |= {(*path, inner): each for inner, each in _constructor_values(value).items()}
        else:
            values[path] = value
    return values


def _derive(
    teacher_config: PreTrainedConfig,
    overrides: Mapping[str, Any],
    keywords: Collection[str],
    following: _BlockFieldRules,
    prefix: ConfigPath,
) -> PreTrainedConfig:
    """Derive the config at `prefix`, and those nested in it."""
    overrides = _canonical_names(teacher_config, overrides, keywords)
    for path in following.blocks:  # of a nested config of which nothing else changes
        if path[: len(prefix)] == prefix and len(path) > len(prefix) + 1:
            overrides.setdefault(path[len(prefix)], {})
    values = _constructor_values(teacher_config)
    derived = _derived_names(ByValue.of((type(teacher_config), values))) - overrides.keys()
    heads_name, groups_name = (_real_name(teacher_config, n) for n in ("num_attention_heads", "num_key_value_heads"))
    each_its_own = isinstance(values.get(groups_name), int) and values[groups_name] == values.get(heads_name)
    if "id2label" in overrides or overrides.get("num_labels", teacher_config.num_labels) != teacher_config.num_labels:
        derived |= {"id2label", "label2id"} - overrides.keys()
    overrides = {
        name: _nested(teacher_config.__dict__.get(name), value, following, (*prefix, name))
        for name, value in overrides.items()
    }

    student_values = {name: value for name, value in values.items() if name not in derived}
    by_block = following.values(teacher_config, values, prefix)
    explicit = {field.path for field in following.fields if field.depth in following.blocks}
    student_values |= {
        name: value
        for name, value in by_block.items()
        if (*prefix, name) in explicit or name not in derived - {"attention_types"}
    }
    student_values = _dedupe_aliases(student_values, overrides)
    if "out_indices" in by_block:  # of a backbone, which names the same states in two more ways
        overridden = overrides.keys() & {"out_features", "out_indices"}
        student_values = {
            name: value
            for name, value in student_values.items()
            if name not in ("stage_names", "out_features") and not (name == "out_indices" and overridden)
        }
    if each_its_own:  # and stays so, also where the class does not derive it
        student_values[groups_name] = overrides.get(heads_name, values[heads_name])
    student_values |= _kept_head_sizes(teacher_config, values, student_values, overrides)
    if "id2label" in overrides and "label2id" not in overrides:
        student_values["label2id"] = {label: index for index, label in overrides["id2label"].items()}
    rope = _subsample_rope_factors(teacher_config, values, student_values | overrides)
    config = _build(type(teacher_config), student_values | rope | overrides, overrides)
    return validate_student_config(config, teacher_config, overrides)


def _constructor_values(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the arguments from which the config's class builds it again, under the family's own names."""
    return without_code_references(
        {name: value for name, value in config.to_dict().items() if name not in _NOT_INHERITED}
    )


def _real_name(config: PreTrainedConfig, name: str) -> str:
    return config.attribute_map.get(name, name)


def _known_names(config: PreTrainedConfig) -> set[str]:
    known = {field.name for field in fields(config)} | set(_constructor_values(config)) | {"num_labels"}
    if isinstance(getattr(type(config), "num_hidden_layers", None), property):
        known.add("num_hidden_layers")  # the length of a list
    return {name for name in known if not name.startswith("_")} - set(_NOT_INHERITED)


_OF_TEACHER = frozenset(
    "device_map max_memory offload_folder quantization_config load_in_4bit load_in_8bit tp_plan variant use_safetensors "
    "ignore_mismatched_sizes key_mapping force_download proxies low_cpu_mem_usage".split()
)
"""Arguments of `from_pretrained` alone."""

_OF_STUDENT = {
    "attn_implementation": "set_attn_implementation",
    "experts_implementation": "set_experts_implementation",
}
"""Arguments of `from_pretrained`, and the methods of a model that do the same later."""


def _loading_hint(name: str) -> str:
    if name in _OF_TEACHER:
        return f" It is an argument of from_pretrained: load the teacher with {name}=..., and pass the model."
    if name in _OF_STUDENT:
        return (
            f" It is an argument of from_pretrained: call {_OF_STUDENT[name]} of the student, or of a loaded teacher."
        )
    return ""


def _canonical_names(
    config: PreTrainedConfig, overrides: Mapping[str, Any], keywords: Collection[str]
) -> dict[str, Any]:
    known = _known_names(config)
    named: dict[str, Any] = {}
    for name, value in overrides.items():
        real = _real_name(config, name)
        if real not in known:
            if name in keywords:
                raise OptionError(f"{name!r} is an option of other functions, and has no effect here: leave it out.")
            names = known | config.attribute_map.keys() | set(keywords)
            near = _loading_hint(name) or _nested_override_hint(config, name, value) or did_you_mean(name, names)
            raise OptionError(f"{type(config).__name__} has no {name!r} to override.{near}")
        if real in named and named[real] != value:
            raise OptionError(f"{name!r} and its alias are both given, as {named[real]!r} and {value!r}: keep one.")
        named[real] = value
    return named


def _nested_override_hint(config: PreTrainedConfig, name: str, value: Any) -> str:
    """Return a hint at the nested config that has a field `name`; "" where none has."""
    parts = {part: nested for part, nested in vars(config).items() if isinstance(nested, PreTrainedConfig)}
    having = [part for part, nested in parts.items() if _real_name(nested, name) in _known_names(nested)]
    return (
        f" It is a field of a nested config: {' or '.join(f'{part}={ {name: value}!r}' for part in having)}."
        if having
        else ""
    )


def _nested(current: Any, value: Any, following: _BlockFieldRules, path: ConfigPath) -> Any:
    if isinstance(current, PreTrainedConfig) and isinstance(value, Mapping):
        return _derive(current, value, (), following, path)
    return copy.deepcopy(value)


def tuples_to_lists(value: Any) -> Any:
    """Return a value of a config with every tuple, nested ones too, as a list, as JSON stores it."""
    return [tuples_to_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


def _size(config: PreTrainedConfig, name: str) -> int | None:
    # No attribute access: some families raise where there is no one size.
    value = config.__dict__.get(_real_name(config, name))
    return value if isinstance(value, int) else None


@functools.lru_cache(maxsize=64)
def _derived_names(teacher: ByValue[tuple[type[PreTrainedConfig], dict[str, Any]]]) -> Set[str]:
    """Return the names whose values a config's class computes by itself when all of them are left out."""
    config_class, values = teacher.value
    defaults = {field.name: field.default for field in fields(config_class)}

    def values_without(names: set[str]) -> dict[str, Any]:
        try:
            config = config_class(**copy.deepcopy({k: v for k, v in values.items() if k not in names}))
        except (*_CONFIG_ERRORS, TypeError):  # TypeError: a required value was left out
            return {}
        values_again = _constructor_values(config)  # not attributes: a backbone stores `out_features` elsewhere
        return {name: tuples_to_lists(values_again.get(name, MISSING)) for name in names}

    def is_number_or_list(value: Any) -> bool:
        return isinstance(value, (int, float, list)) and not isinstance(value, bool)

    # A value equal to a constant default comes back on its own either way; only computed ones need the trial.
    candidates = {
        k for k, v in values.items() if is_number_or_list(v) and v != tuples_to_lists(defaults.get(k, MISSING))
    }
    derived = {name for name in candidates if values_without({name}) == {name: values[name]}}
    while derived:
        computed = values_without(derived)
        wrong = {name for name in derived if name not in computed or computed[name] != values[name]}
        if not wrong:
            break
        derived -= wrong
    return derived


def _kept_head_sizes(
    config: PreTrainedConfig,
    teacher_values: Mapping[str, Any],
    student_values: Mapping[str, Any],
    overrides: Mapping[str, Any],
) -> dict[str, int]:
    """Return the teacher's sizes of heads for the fields that state them and whose default is computed from the width."""
    optional = [field.name for field in fields(config) if field.default is None and is_head_size(field.name)]
    sizes = {name: teacher_values.get(name) for name in optional}
    hidden, heads = (_real_name(config, name) for name in ("hidden_size", "num_attention_heads"))
    width, count = teacher_values.get(hidden), teacher_values.get(heads)
    if sizes.get("head_dim", 0) is None and {hidden, heads} & overrides.keys() and width and count:
        sizes["head_dim"] = width // count  # Mixtral's, which its modules compute
    kept = {name: size for name, size in sizes.items() if isinstance(size, int) and name not in overrides}
    try:
        built = type(config)(**copy.deepcopy({**student_values, **overrides, **kept}))
    except (*_CONFIG_ERRORS, TypeError):  # XLNet's must be the width divided by the heads
        return {}
    return {name: size for name, size in kept.items() if vars(built).get(name) == size}


def split_heads_note(teacher: PreTrainedConfig, student: PreTrainedConfig, overrides: Collection[str]) -> list[str]:
    """Return a note for the report where heads are smaller than the teacher's because the hidden size is, or nothing.

    Example:
        >>> from transformers import GPT2Config
        >>> split_heads_note(GPT2Config(), GPT2Config(n_embd=384), ["hidden_size"])
        ["n_embd=384 is divided into n_head=12 heads of 32, and the teacher's have 64: n_head=6 would keep heads whole."]
    """
    hidden, heads, groups = ("hidden_size", "num_attention_heads", "num_key_value_heads")
    width, count, kv = (_size(student, name) for name in (hidden, heads, groups))
    before = (_size(teacher, hidden) or 0) // (_size(teacher, heads) or 1)
    stated = any(
        is_head_size(name) and isinstance(size, int) and size in (before, vars(teacher).get(name))
        for name, size in vars(student).items()
    )
    named = {_real_name(teacher, name) for name in overrides}
    hidden, heads, groups = (_real_name(teacher, name) for name in (hidden, heads, groups))
    if stated or hidden not in named or heads in named or not width or not count or width // count >= before:
        return []
    unit = before * (count // kv if kv else 1)
    whole = f"{heads}={width // before}" + (f" and {groups}={width // unit}" if kv and kv != count else "")
    advice = f"{whole} would" if width % unit == 0 else f"multiples of {unit} as {hidden} can"
    return [
        f"{hidden}={width} is divided into {heads}={count} heads of {width // count}, and the teacher's have {before}: "
        f"{advice} keep heads whole."
    ]


def _subsample_rope_factors(
    config: PreTrainedConfig, teacher_values: Mapping[str, Any], student_values: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the RoPE parameters with one factor per rotated pair that a smaller head keeps."""

    def head_size(values: Mapping[str, Any]) -> int | None:
        hidden, heads = (values.get(_real_name(config, name)) for name in ("hidden_size", "num_attention_heads"))
        size = values.get("head_dim") or (
            hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads > 0 else None
        )
        return size if isinstance(size, int) else None

    before, after = head_size(teacher_values), head_size(student_values)
    rope = teacher_values.get("rope_parameters")
    if not isinstance(rope, dict) or not before or not after or after >= before:
        return {}
    factors = {key: rope[key] for key in ("short_factor", "long_factor") if isinstance(rope.get(key), list)}
    thinned = {
        key: [value[index] for index in evenly_spaced_indices(len(value), max(1, len(value) * after // before))]
        for key, value in factors.items()
    }
    return {"rope_parameters": {**rope, **thinned}} if thinned else {}


def _dedupe_aliases(values: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Drop GPT-Neo's `attention_layers`, which its constructor computes from `attention_types`."""
    if "attention_types" in values or "attention_types" in overrides:
        return {name: value for name, value in values.items() if name != "attention_layers"}
    return values


def _build(
    config_class: type[PreTrainedConfig], values: Mapping[str, Any], overrides: Mapping[str, Any]
) -> PreTrainedConfig:
    requested = ", ".join(f"{name}={value!r}" for name, value in overrides.items())
    try:
        return config_class(**copy.deepcopy(dict(values)))
    except StrictDataclassFieldValidationError as error:
        raise OptionError(f"{config_class.__name__} rejects {requested}: {error}") from error
    except _CONFIG_ERRORS as error:
        raise ShapeError(f"{config_class.__name__} rejects {requested}: {error}") from error


def validate_student_config(
    config: PreTrainedConfig, teacher_config: PreTrainedConfig, overrides: Collection[str]
) -> PreTrainedConfig:
    """Check sizes that many families check only when they build or run the model; return the config.

    Args:
        overrides: Names of the sizes that were requested, the family's own.

    Raises:
        ShapeError: A requested size is impossible; names it.
    """
    for name in _SIZES:
        size = _size(config, name)
        if _real_name(config, name) in overrides and size is not None and size < 1:
            raise ShapeError(f"{name} must be at least 1, not {size}.")
    hidden, heads, groups = (_size(config, n) for n in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    changed = {_real_name(config, n) for n in ("hidden_size", "num_attention_heads", "num_key_value_heads")}
    if not heads or not changed & set(overrides):
        return config
    if hidden and hidden % heads and not any(map(is_head_size, config.__dict__)):
        raise ShapeError(
            f"hidden_size={hidden} does not divide into num_attention_heads={heads}: choose a multiple of {heads}."
        )
    if groups and heads % groups:
        raise ShapeError(
            f"num_attention_heads={heads} do not divide into num_key_value_heads={groups} groups: "
            f"the teacher has {_size(teacher_config, 'num_attention_heads')} heads in "
            f"{_size(teacher_config, 'num_key_value_heads')}. Choose a multiple of {groups} heads, or other groups."
        )
    rotary = _size(config, "rotary_dim")
    if hidden and rotary and rotary > hidden // heads:
        if "rotary_dim" in overrides:
            raise ShapeError(f"rotary_dim={rotary} exceeds the head size {hidden // heads}.")
        config.rotary_dim = hidden // heads
    return config
