"""A student's config made from its teacher's.

Does: keep what was said, derive again what the family derives, set what goes by block for the blocks that are kept, refuse
what the family refuses.
Does not: choose blocks, or look at weights.
"""

import copy
from collections.abc import Collection, Mapping, Sequence
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
from hf_guide.validation import did_you_mean

# What identifies or stores the teacher, and is not the student's.
_NOT_INHERITED = ("model_type", "transformers_version", "_name_or_path", "quantization_config", "transformers_weights")
_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size"),
)
# An attention width that the config states on its own, so that heads need not divide the hidden size.
_HEAD_SIZES = ("head_dim", "d_kv", "d_head", "attention_head_size", "kv_channels", "v_head_dim")
_CONFIG_ERRORS = (
    *(StrictDataclassFieldValidationError, StrictDataclassClassValidationError, ValueError, ZeroDivisionError),
    *(NotImplementedError, AttributeError, KeyError, IndexError),
)


@dataclass(frozen=True)
class _BlockFieldRules:
    """What the fields that go by block follow: blocks by depth; where those are not chosen, even ones."""

    fields: tuple[BlockField, ...]
    blocks: Mapping[ConfigPath, Sequence[int]]
    even: Mapping[ConfigPath, Sequence[int]]
    sizes: Mapping[ConfigPath, int]
    left: frozenset[FieldKind]

    def values(
        self, teacher_config: PreTrainedConfig, values: Mapping[str, Any], prefix: ConfigPath
    ) -> dict[str, Any]:
        """Return the values that one part's fields take, by name; `values` are the teacher's."""
        found: dict[str, Any] = {}
        for field in self.fields:
            name = field.path[-1]
            blocks = self.blocks.get(field.depth, self.even.get(field.depth))
            if field.path[:-1] != prefix or blocks is None or name not in values or field.kind in self.left:
                continue
            try:
                found[name] = remap_field(values[name], field.kind, blocks, self.sizes[field.depth])
            except ShapeError as error:
                raise ShapeError(
                    f"{type(teacher_config).__name__}.{name}={values[name]!r} cannot follow the blocks "
                    f"{list(blocks)}: {error}."
                ) from error
        if "attention_layers" in found and "attention_types" in values:  # GPT-Neo computes one from the other
            found["attention_types"] = [[found["attention_layers"], 1]]
        return found


def derive_student_config(
    teacher_config: PreTrainedConfig,
    overrides: Mapping[str, Any],
    *,
    keywords: Collection[str] = (),
    blocks: "Mapping[ConfigPath, Sequence[int]] | None" = None,
    block_fields: "Sequence[BlockField] | None" = None,
    left: Collection[FieldKind] = (),
) -> PreTrainedConfig:
    """Return a new config of the teacher's class with `overrides` applied; the teacher's is left as it is.

    Names are the family's own or its aliases (`hidden_size` for GPT-2's `n_embd`); a nested config takes a mapping.
    A value that the class would give on its own from the others (`head_dim` = hidden size / heads, as many key/value
    heads as heads, `layer_types` from a pattern) is derived again from the overridden ones. A value that was said
    explicitly stays, also where it grew with the width once (T5's `d_kv`, Gemma's `query_pre_attn_scalar`); only
    GPT-J's `rotary_dim` is lowered to the head size where it would exceed it. Fields that go by block, in nested configs as
    well, take their values at `blocks`, or at even blocks where none are chosen; factors of long RoPE, one
    for each rotated pair, as the pairs are. Labels are kept unless `num_labels` or `id2label` is overridden, token ids
    always; the quantisation is dropped. `keywords` are the caller's own, one of which may be meant by an unknown name.

    Args:
        blocks: by the path of a number of blocks, such as ("text_config", "num_hidden_layers"), the teacher's block that
            feeds each of the student's. What is overridden does not follow them.
        block_fields: what goes by block, from `find_block_fields`; by default what can be found without building a model.
        left: kinds of fields that do not follow.

    Raises:
        OptionError: an unknown name (with the nearest known ones), one given twice, or a value of the wrong type.
        ShapeError: a shape the family refuses, with the family's own reason; blocks that the teacher does not have.
    """
    if block_fields is None:
        block_fields = find_block_fields(teacher_config, standard_depths(teacher_config))
    asked = overridden_values(teacher_config, overrides)
    chosen = {path: list(kept) for path, kept in (blocks or {}).items()}
    sizes = {path: value_at(teacher_config, path) for path in {*(field.depth for field in block_fields), *chosen}}
    even = {
        path: [i * size // asked[path] for i in range(asked[path])]
        for path, size in sizes.items()
        if type(asked.get(path)) is int and asked[path] != size
    }
    for path, kept in chosen.items():
        if any(not 0 <= block < sizes[path] for block in kept):
            raise ShapeError(f"The teacher has blocks 0 to {sizes[path] - 1}, but {kept} were asked for.")
    following = _BlockFieldRules(tuple(block_fields), chosen, even, sizes, frozenset(left))
    return _derive(teacher_config, overrides, keywords, following, ())


def overridden_values(
    config: PreTrainedConfig, overrides: Mapping[str, Any], prefix: ConfigPath = ()
) -> dict[ConfigPath, Any]:
    """Return what is overridden by its path, under the family's own names; of nested configs what is inside."""
    found: dict[ConfigPath, Any] = {}
    for name, value in overrides.items():
        path = (*prefix, _real_name(config, name))
        nested = config.__dict__.get(path[-1])
        if isinstance(nested, PreTrainedConfig) and isinstance(value, Mapping):
            found |= overridden_values(nested, value, path)
        elif isinstance(nested, PreTrainedConfig) and isinstance(value, PreTrainedConfig):
            found |= {(*path, inner): said for inner, said in _constructor_values(value).items()}
        else:
            found[path] = value
    return found


def _derive(
    teacher_config: PreTrainedConfig,
    overrides: Mapping[str, Any],
    keywords: Collection[str],
    following: _BlockFieldRules,
    prefix: ConfigPath,
) -> PreTrainedConfig:
    """Derive one config, and its nested ones; `prefix` is where it is."""
    overrides = _canonical_names(teacher_config, overrides, keywords)
    for path in following.blocks:  # of a nested config of which nothing else changes
        if path[: len(prefix)] == prefix and len(path) > len(prefix) + 1:
            overrides.setdefault(path[len(prefix)], {})
    values = _constructor_values(teacher_config)
    derived = _derived_names(type(teacher_config), values) - overrides.keys()
    heads_name, groups_name = (_real_name(teacher_config, n) for n in ("num_attention_heads", "num_key_value_heads"))
    each_its_own = isinstance(values.get(groups_name), int) and values[groups_name] == values.get(heads_name)
    if "id2label" in overrides or overrides.get("num_labels", teacher_config.num_labels) != teacher_config.num_labels:
        derived |= {"id2label", "label2id"} - overrides.keys()
    overrides = {
        name: _nested(teacher_config.__dict__.get(name), value, following, (*prefix, name))
        for name, value in overrides.items()
    }

    kept = {name: value for name, value in values.items() if name not in derived}
    by_block = following.values(teacher_config, values, prefix)
    explicit = {field.path for field in following.fields if field.depth in following.blocks}
    kept |= {
        name: value
        for name, value in by_block.items()
        if (*prefix, name) in explicit or name not in derived - {"attention_types"}
    }
    kept = _dedupe_aliases(kept, overrides)
    if "out_indices" in by_block:  # of a backbone, which names the same states in two more ways
        said = overrides.keys() & {"out_features", "out_indices"}
        kept = {
            name: value
            for name, value in kept.items()
            if name not in ("stage_names", "out_features") and not (name == "out_indices" and said)
        }
    if each_its_own:  # and stays so, also where the class does not derive it
        kept[groups_name] = overrides.get(heads_name, values[heads_name])
    if "id2label" in overrides and "label2id" not in overrides:
        kept["label2id"] = {label: index for index, label in overrides["id2label"].items()}
    rope = _subsample_rope_factors(teacher_config, values, kept | overrides)
    config = _build(type(teacher_config), kept | rope | overrides, overrides)
    return validate_student_config(config, teacher_config, overrides)


def _constructor_values(config: PreTrainedConfig) -> dict[str, Any]:
    """Return what the config's class needs to be built again, under the family's own names."""
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


def _canonical_names(
    config: PreTrainedConfig, overrides: Mapping[str, Any], keywords: Collection[str]
) -> dict[str, Any]:
    known = _known_names(config)
    named: dict[str, Any] = {}
    for name, value in overrides.items():
        real = _real_name(config, name)
        if real not in known:
            names = known | config.attribute_map.keys() | set(keywords)
            near = _nested_override_hint(config, name, value) or did_you_mean(name, names)
            raise OptionError(f"{type(config).__name__} has no {name!r} to override.{near}")
        if real in named and named[real] != value:
            raise OptionError(f"{name!r} and its other name say both {named[real]!r} and {value!r}: give one.")
        named[real] = value
    return named


def _nested_override_hint(config: PreTrainedConfig, name: str, value: Any) -> str:
    """Return how a nested config that knows `name` is given it; "" where none does."""
    parts = {part: nested for part, nested in vars(config).items() if isinstance(nested, PreTrainedConfig)}
    having = [part for part, nested in parts.items() if _real_name(nested, name) in _known_names(nested)]
    return f" It is a part's: {' or '.join(f'{part}={ {name: value}!r}' for part in having)}." if having else ""


def _nested(current: Any, value: Any, following: _BlockFieldRules, path: ConfigPath) -> Any:
    if isinstance(current, PreTrainedConfig) and isinstance(value, Mapping):
        return _derive(current, value, (), following, path)
    return copy.deepcopy(value)


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _size(config: PreTrainedConfig, name: str) -> int | None:
    value = config.__dict__.get(_real_name(config, name))  # no attribute access: some families refuse to name one size
    return value if isinstance(value, int) else None


def _derived_names(config_class: type[PreTrainedConfig], values: Mapping[str, Any]) -> set[str]:
    """Return the names whose value the class gives on its own once they are left out, all of them together."""
    defaults = {field.name: field.default for field in fields(config_class)}

    def given_without(names: set[str]) -> dict[str, Any]:
        try:
            config = config_class(**copy.deepcopy({k: v for k, v in values.items() if k not in names}))
        except (*_CONFIG_ERRORS, TypeError):  # TypeError: a required value was left out
            return {}
        given = _constructor_values(config)  # not attributes: a backbone stores `out_features` elsewhere
        return {name: _plain(given.get(name, MISSING)) for name in names}

    def is_number_or_list(value: Any) -> bool:
        return isinstance(value, (int, float, list)) and not isinstance(value, bool)

    # A value equal to a constant default comes back on its own either way; only computed ones need the trial.
    candidates = {k for k, v in values.items() if is_number_or_list(v) and v != _plain(defaults.get(k, MISSING))}
    derived = {name for name in candidates if given_without({name}) == {name: values[name]}}
    while derived:
        given = given_without(derived)
        wrong = {name for name in derived if name not in given or given[name] != values[name]}
        if not wrong:
            break
        derived -= wrong
    return derived


def _subsample_rope_factors(
    config: PreTrainedConfig, had: Mapping[str, Any], wanted: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the RoPE parameters with one factor for each pair that a smaller head keeps."""

    def head_size(values: Mapping[str, Any]) -> int | None:
        hidden, heads = (values.get(_real_name(config, name)) for name in ("hidden_size", "num_attention_heads"))
        size = values.get("head_dim") or (
            hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads > 0 else None
        )
        return size if isinstance(size, int) else None

    before, after = head_size(had), head_size(wanted)
    rope = had.get("rope_parameters")
    if not isinstance(rope, dict) or not before or not after or after >= before:
        return {}
    factors = {key: rope[key] for key in ("short_factor", "long_factor") if isinstance(rope.get(key), list)}
    thinned = {
        key: [value[place] for place in evenly_spaced_indices(len(value), max(1, len(value) * after // before))]
        for key, value in factors.items()
    }
    return {"rope_parameters": {**rope, **thinned}} if thinned else {}


def _dedupe_aliases(kept: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """GPT-Neo says its attention twice; the constructor computes `attention_layers` from `attention_types`."""
    if "attention_types" in kept or "attention_types" in overrides:
        return {name: value for name, value in kept.items() if name != "attention_layers"}
    return kept


def _build(
    config_class: type[PreTrainedConfig], values: Mapping[str, Any], overrides: Mapping[str, Any]
) -> PreTrainedConfig:
    asked = ", ".join(f"{name}={value!r}" for name, value in overrides.items())
    try:
        return config_class(**copy.deepcopy(dict(values)))
    except StrictDataclassFieldValidationError as error:
        raise OptionError(f"{config_class.__name__} refuses {asked}: {error}") from error
    except _CONFIG_ERRORS as error:
        raise ShapeError(f"{config_class.__name__} refuses {asked}: {error}") from error


def validate_student_config(
    config: PreTrainedConfig, teacher_config: PreTrainedConfig, overrides: Collection[str]
) -> PreTrainedConfig:
    """Refuse what many families notice only when they build or run the model; return the config.

    Raises:
        ShapeError: sizes among `overrides`, which are names of the family's own, that are impossible.
    """
    for name in _SIZES:
        size = _size(config, name)
        if _real_name(config, name) in overrides and size is not None and size < 1:
            raise ShapeError(f"{name} must be at least 1, not {size}.")
    hidden, heads, groups = (_size(config, n) for n in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    changed = {_real_name(config, n) for n in ("hidden_size", "num_attention_heads", "num_key_value_heads")}
    if not heads or not changed & set(overrides):
        return config
    if hidden and hidden % heads and not any(name in config.__dict__ for name in _HEAD_SIZES):
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
