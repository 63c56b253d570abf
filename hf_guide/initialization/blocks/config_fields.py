"""Config fields that depend on the blocks: find them, and remap their values to the blocks that a student keeps.

A field is found by what it does, not by its name alone: the teacher's model is built on the meta device with one block
fewer, its lists replaced by ones that record how they are accessed. A list that is indexed with each block's index has an
entry per block; a list that is tested for containing each index is a list of blocks. What only the forward pass uses is
found by the value that the config class gives it at another depth, or by its name. What none of this finds, a layout
declares (`register_layout(block_fields=...)`).
"""

import copy
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from hf_guide.errors import LayoutError, ShapeError
from hf_guide.models.tiny_models import MODEL_ERRORS
from hf_guide.validation import StringEnum

ConfigPath = tuple[str, ...]
"""The path of a value in a config: the names of nested configs, and the field's name at the end."""


class FieldKind(StringEnum):
    """How the value of a field depends on the blocks."""

    ENTRIES = "entries"  # a list with an entry per block
    STATES = "states"  # a list with an entry for the input and one per block
    KEYED = "keyed"  # a mapping from a block's index
    CYCLE = "cycle"  # a list whose entries repeat
    SOURCES = "sources"  # an entry per block: the index of another block
    NUMBERS = "numbers"  # the indices of the blocks that differ
    NUMBERS_FROM_ONE = "numbers_from_one"  # the same, counted from 1
    AFTER = "after"  # indices of blocks whose output is used, all different
    OUTPUTS = "outputs"  # indices of blocks whose output is used
    STATE_NUMBERS = "state_numbers"  # indices of hidden states: 0 is the input, negative ones count from the last
    FIRST = "first"  # how many blocks at the start differ; a start index
    LAST = "last"  # how many blocks at the end differ
    END = "end"  # the index of the last block that differs


@dataclass(frozen=True)
class Depth:
    """A field of a config that is a number of blocks, and the stacks (by the layout's pattern) of this depth."""

    path: ConfigPath
    size: int
    stacks: tuple[str, ...] = ()


@dataclass(frozen=True)
class BlockField:
    """A field that depends on the blocks of one depth."""

    path: ConfigPath
    kind: FieldKind
    depth: ConfigPath


def value_at(config: PreTrainedConfig, path: ConfigPath) -> Any:
    """Return the value at `path`; None where there is no such field.

    Example:
        >>> from transformers import LlamaConfig
        >>> value_at(LlamaConfig(num_hidden_layers=3), ("num_hidden_layers",))
        3
    """
    part: Any = config
    for name in path:
        if not isinstance(part, PreTrainedConfig):
            return None
        real = part.attribute_map.get(name, name)
        if real in part.__dict__ or not isinstance(getattr(type(part), real, None), property):
            part = part.__dict__.get(real)
        else:
            part = getattr(part, real)  # such as Nemotron-H's depth, the length of a list
    return part


def set_at(config: PreTrainedConfig, path: ConfigPath, value: Any) -> None:
    """Set the field at `path`."""
    part: Any = config
    for name in path[:-1]:
        part = getattr(part, name)
    setattr(part, path[-1], value)


def iter_subconfigs(
    config: PreTrainedConfig, prefix: ConfigPath = ()
) -> Iterator[tuple[ConfigPath, PreTrainedConfig]]:
    """Yield a config and its nested ones, each with its path."""
    yield prefix, config
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig) and not name.startswith("_"):
            yield from iter_subconfigs(value, (*prefix, name))


# ---------------------------------------------------------------------------------------------------------------------
# Remapping a value


def remap_field(value: Any, kind: FieldKind, blocks: Sequence[int], depth: int) -> Any:
    """Return the student's value of a field.

    Args:
        value: the teacher's.
        blocks: the teacher's block that feeds each of the student's.
        depth: the number of the teacher's blocks.

    Raises:
        ShapeError: no value means the same for these blocks; with the reason.

    Example:
        >>> remap_field([0, 2, 5], FieldKind.NUMBERS, blocks=[1, 2, 5], depth=6)
        [1, 2]
    """
    if value is None:
        return None
    match kind:
        case FieldKind.ENTRIES:
            entries = [value[block] for block in blocks]
            return "".join(entries) if isinstance(value, str) else type(value)(entries)
        case FieldKind.CYCLE:
            return type(value)(value[block % len(value)] for block in blocks)
        case FieldKind.STATES:
            return type(value)([value[0], *(value[block + 1] for block in blocks)])
        case FieldKind.KEYED:
            return _remap_keys(value, blocks)
        case FieldKind.SOURCES:
            index_of = {block: index for index, block in reversed(list(enumerate(blocks)))}
            return type(value)(index_of.get(value[block], index) for index, block in enumerate(blocks))
        case FieldKind.NUMBERS | FieldKind.NUMBERS_FROM_ONE:
            first = int(kind == FieldKind.NUMBERS_FROM_ONE)
            named = {int(number) - first for number in value}
            return type(value)(index + first for index, block in enumerate(blocks) if block in named)
        case FieldKind.AFTER:
            mapped = _map_numbers(value, functools.partial(_output_number, blocks=blocks, depth=depth))
            if not isinstance(value, int) and len(set(mapped)) < len(set(value)):
                raise ShapeError(
                    f"the outputs of the blocks {list(value)} are used, and two of them would be the same: at least one "
                    "block must be selected between each two"
                )
            return mapped
        case FieldKind.OUTPUTS:
            return _map_numbers(value, functools.partial(_output_number, blocks=blocks, depth=depth))
        case FieldKind.STATE_NUMBERS:
            return _map_numbers(value, functools.partial(_state_number, blocks=blocks, depth=depth))
        case FieldKind.FIRST:
            return sum(block < value for block in blocks) if value > 0 else value
        case FieldKind.LAST:
            return sum(block >= depth - value for block in blocks) if value > 0 else value
        case FieldKind.END:
            return sum(block <= value for block in blocks) - 1 if value >= 0 else value


def _remap_keys(value: Mapping[Any, Any], blocks: Sequence[int]) -> dict[Any, Any]:
    remapped = {}
    for index, block in enumerate(blocks):
        for key in (block, str(block)):
            if key in value:
                remapped[type(key)(index)] = value[key]
    return remapped


def _map_numbers(value: Any, number: Callable[[int], int]) -> Any:
    return number(value) if isinstance(value, int) else type(value)(number(int(entry)) for entry in value)


def _output_number(number: int, blocks: Sequence[int], depth: int) -> int:
    """Return the index of the last selected block up to `number`: its output is the teacher's with the others bypassed."""
    block = number + depth if number < 0 else number
    index = sum(each <= block for each in blocks) - 1
    if index < 0:
        raise ShapeError(f"the output of block {block} is used, and neither it nor one before it is selected")
    return index - len(blocks) if number < 0 else index


def _state_number(number: int, blocks: Sequence[int], depth: int) -> int:
    """Return the index of the hidden state after those of the selected blocks that precede the teacher's state."""
    state = number + depth + 1 if number < 0 else number
    index = sum(each < state for each in blocks)
    return index - len(blocks) - 1 if number < 0 else index


# ---------------------------------------------------------------------------------------------------------------------
# Finding the fields


@dataclass
class ListAccess:
    """The indices and membership tests with which a list was accessed while a model was built."""

    indices: set[int] = field(default_factory=set)
    membership_tests: set[int] = field(default_factory=set)


LAYER_WORDS = frozenset(("layer", "layers", "block", "blocks", "depth"))
INDEX_WORDS = frozenset(("index", "indices", "indexes", "idx", "idxs", "ids", "layers", "blocks"))
OUTPUT_WORDS = frozenset(("out", "output", "outputs", "feature", "features", "deepstack", "intermediate"))
OTHER_STACK_WORDS = frozenset(("mtp", "target", "nextn"))  # other stacks than this one
NON_DEPTH_WORDS = frozenset(("norm", "eps", "type", "scale", "dropout", "head", "heads", "size", "dim"))

DECLARED_KINDS: dict[str, dict[str, FieldKind]] = {
    "bert": {"pruned_heads": FieldKind.KEYED},
    "dpt": {"backbone_out_indices": FieldKind.AFTER},
    "eomt": {"num_blocks": FieldKind.LAST},
    "mllama_vision_model": {"intermediate_layers_indices": FieldKind.OUTPUTS},
    "seggpt": {"merge_index": FieldKind.AFTER, "intermediate_hidden_state_indices": FieldKind.AFTER},
}
"""Fields whose kind cannot be found, by the `model_type` of the (nested) config. A layout declares its own."""


def name_words(name: str) -> set[str]:
    """Return the words of a field's name, in lower case."""
    return set(name.lower().split("_"))


@dataclass(frozen=True)
class StackDepths:
    """The depths of a config, and how its lists are accessed with one block fewer.

    Attributes:
        depths: by path.
        list_access: by the path of a depth and that of a list, how the list is accessed with this depth lowered by one.
        model: built from the config, on the meta device; None where none was built.
        per_block: parameters outside of blocks that have an entry per block: by name the axis, the path of the depth, and
            whether an entry for the stack's input precedes them.
    """

    depths: dict[ConfigPath, Depth]
    list_access: dict[ConfigPath, dict[ConfigPath, ListAccess]]
    model: PreTrainedModel | None = None
    per_block: dict[str, tuple[int, ConfigPath, bool]] = field(default_factory=dict)

    def of_stack(self, stack: str) -> Depth | None:
        """Return the depth of a stack; None where it is not known."""
        return next((depth for depth in self.depths.values() if stack in depth.stacks), None)


def standard_depths(config: PreTrainedConfig) -> StackDepths:
    """Return the depths of a config by the standard name of the field, without building a model."""
    standard = StackDepths({}, {})
    for prefix, part in iter_subconfigs(config):
        name = part.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        size = vars(part).get(name)
        if type(size) is int and size > 0:
            path = (*prefix, name)
            standard.depths[path] = Depth(path, size)
    return standard


def find_block_fields(
    config: PreTrainedConfig, depths: StackDepths, declared: "Mapping[str, str] | None" = None
) -> list[BlockField]:
    """Return the fields of `config` and its nested configs that depend on the blocks.

    Args:
        declared: kinds by dotted path from the root, such as {"vision_config.deepstack_visual_indexes": "after"}; "none" for
            a field that does not depend on them. A kind may name its depth: "after vision_config.depth".

    Raises:
        LayoutError: a declared kind or depth that is not known.
    """
    declared_kinds = {tuple(name.split(".")): meaning for name, meaning in (declared or {}).items()}
    fields: dict[ConfigPath, BlockField] = {}
    for prefix, part in iter_subconfigs(config):
        depths_here = {path: depth for path, depth in depths.depths.items() if path[:-1] == prefix}
        for name, value in _flat_values(part).items():
            path = (*prefix, name)
            if path in depths.depths or value is None or isinstance(value, (bool, float)):
                continue
            if path in declared_kinds:
                if declared_kinds[path] != "none":
                    fields[path] = _declared_field(path, declared_kinds[path], depths_here, depths)
                continue
            kind = DECLARED_KINDS.get(part.model_type, {}).get(name)
            if kind is not None and depths_here:
                fields[path] = BlockField(path, kind, next(iter(depths_here)))
                continue
            for depth in depths_here.values():
                kind = _infer_kind(part, name, value, depth, depths.list_access.get(depth.path, {}).get(path))
                if kind is not None:
                    fields[path] = BlockField(path, kind, depth.path)
                    break
            if (
                path not in fields
                and (field_of_other := _field_of_other_stack(path, value, depths_here, depths)) is not None
            ):
                fields[path] = field_of_other
    return list(fields.values())


def _flat_values(part: PreTrainedConfig) -> dict[str, Any]:
    """Return a config's own values, without nested configs, tuples as tuples."""
    serialized = part.to_dict()
    return {
        name: vars(part).get(name, value)
        for name, value in serialized.items()
        if not isinstance(vars(part).get(name), PreTrainedConfig) and not name.startswith("_")
    }


def _declared_field(
    path: ConfigPath, meaning: str, depths_here: Mapping[ConfigPath, Depth], depths: StackDepths
) -> BlockField:
    kind, _, depth = meaning.partition(" ")
    depth_path = tuple(depth.split(".")) if depth else next(iter(depths_here), ())
    if kind not in [member.value for member in FieldKind]:
        raise LayoutError(
            f"block_fields gives {meaning!r} for {'.'.join(path)!r}; it must be one of "
            f"{[member.value for member in FieldKind]}, or 'none'."
        )
    if depth_path not in depths.depths:
        raise LayoutError(
            f"block_fields gives {meaning!r} for {'.'.join(path)!r}, but the config's depths are "
            f"{['.'.join(path) for path in depths.depths]}: name one of them after the kind."
        )
    return BlockField(path, FieldKind(kind), depth_path)


def _infer_kind(
    part: PreTrainedConfig, name: str, value: Any, depth: Depth, access: ListAccess | None
) -> FieldKind | None:
    """Return how a field depends on the blocks of `depth`, a field of the same config; None where it does not."""
    size, words = depth.size, name_words(name)
    if isinstance(value, Mapping):
        numbered = value and all(str(key).isdigit() and int(key) < size for key in value)
        return FieldKind.KEYED if numbered and words & LAYER_WORDS else None
    if isinstance(value, int):
        return _infer_number_kind(name, value, size)
    if isinstance(value, str):
        return FieldKind.ENTRIES if len(value) == size > 1 and "pattern" in words else None
    if not isinstance(value, (list, tuple)) or words & OTHER_STACK_WORDS:
        return None
    integers = bool(value) and all(type(entry) is int for entry in value)
    all_but_last = set(range(size - 1))
    if access is not None and size > 2:
        if all_but_last <= access.indices and size - 1 not in access.indices and len(value) >= size:
            return FieldKind.SOURCES if integers and _are_sources(name, value, size) else FieldKind.ENTRIES
        if integers and len(access.membership_tests) > 1 and access.membership_tests <= set(range(size)):
            return FieldKind.NUMBERS if 0 in access.membership_tests else FieldKind.NUMBERS_FROM_ONE
    if len(value) == size and (words & LAYER_WORDS or _follows_depth(part, name, depth)):
        if not (integers and words & OUTPUT_WORDS):
            return FieldKind.SOURCES if integers and _are_sources(name, value, size) else FieldKind.ENTRIES
    if not words & LAYER_WORDS and not words & OUTPUT_WORDS:
        return None
    if 0 < len(value) < size and "types" in words and all(isinstance(entry, str) for entry in value):
        return FieldKind.CYCLE
    if (integers or not value) and words & INDEX_WORDS and all(-size <= number <= size for number in value):
        if words & OUTPUT_WORDS:
            by_state = any(number == size for number in value) or "layers" in words
            return FieldKind.STATE_NUMBERS if by_state else FieldKind.AFTER
        if all(0 <= number < size for number in value):
            return FieldKind.NUMBERS
    return None


def _infer_number_kind(name: str, value: int, size: int) -> FieldKind | None:
    words = name_words(name)
    if not 0 < value <= size or words & NON_DEPTH_WORDS:
        return None
    if {"shared", "layers"} <= words or {"last", "layers"} <= words:
        return FieldKind.LAST
    if "end" in words and words & (INDEX_WORDS | LAYER_WORDS):
        return FieldKind.END
    counts_from_start = (
        ({"first", "replace"} <= words)
        or ("first" in words and words & LAYER_WORDS)
        or ("start" in words and words & (INDEX_WORDS | LAYER_WORDS))
        or ({"dense", "layers"} <= words)
        or ({"hash", "layers"} <= words)
        or ({"max", "window", "layers"} <= words)
    )
    return FieldKind.FIRST if counts_from_start else None


def _are_sources(name: str, value: Sequence[int], size: int) -> bool:
    """Return whether each entry is the index of the block itself, or of an earlier one whose entry is its own index."""
    if not name_words(name) & {"source", "sources"} and list(value) != list(range(size)):
        return False
    return all(0 <= source <= block and value[source] == source for block, source in enumerate(value))


def _follows_depth(part: PreTrainedConfig, name: str, depth: Depth) -> bool:
    """Return whether the config class gives this list the length of the depth where the list is left out."""
    return name in _depth_sized_lists(type(part), json.dumps(part.to_dict(), sort_keys=True, default=str), part, depth)


_depth_sized_cache: dict[tuple[type, str, str], frozenset[str]] = {}


def _depth_sized_lists(kind: type, key: str, part: PreTrainedConfig, depth: Depth) -> frozenset[str]:
    cached = _depth_sized_cache.get((kind, key, depth.path[-1]))
    if cached is not None:
        return cached
    values = {
        name: value for name, value in part.to_dict().items() if name not in ("model_type", "transformers_version")
    }
    candidates = [name for name, value in values.items() if isinstance(value, list) and len(value) == depth.size]
    depth_sized: set[str] = set()
    for names in [
        candidates,
        *([name] for name in candidates),
    ]:  # all at once, then one by one where the class raises
        others = {name: copy.deepcopy(value) for name, value in values.items() if name not in names}
        try:
            longer = kind(**others | {depth.path[-1]: depth.size + 1}).to_dict()
        except MODEL_ERRORS:
            continue
        depth_sized |= {
            name for name in names if isinstance(longer.get(name), list) and len(longer[name]) == depth.size + 1
        }
    _depth_sized_cache[kind, key, depth.path[-1]] = frozenset(depth_sized)
    return _depth_sized_cache[kind, key, depth.path[-1]]


def _field_of_other_stack(
    path: ConfigPath, value: Any, depths_here: Mapping[ConfigPath, Depth], depths: StackDepths
) -> BlockField | None:
    """Return a field such as `vision_feature_layer`: indices of hidden states of a nested config's stack."""
    words = name_words(path[-1])
    if not {"feature", "features"} & words or not words & {"layer", "layers"}:
        return None
    numbers = [value] if isinstance(value, int) else value
    if not isinstance(numbers, (list, tuple)) or not all(type(number) is int for number in numbers):
        return None
    nested = [depth for depth in depths.depths.values() if depth.path[: len(path) - 1] == path[:-1]]
    named = [depth for depth in nested if any(name_words(part) & words - LAYER_WORDS for part in depth.path[:-1])]
    nested = named or list(depths_here.values()) or [depth for depth in nested if "text_config" not in depth.path]
    fitting = [depth for depth in nested if all(-depth.size - 1 <= number <= depth.size for number in numbers)]
    return BlockField(path, FieldKind.STATE_NUMBERS, fitting[0].path) if len(fitting) == 1 else None


def block_lists(config: PreTrainedConfig) -> dict[ConfigPath, Sequence[int]]:
    """Return the lists of block indices of a config and its nested ones, found by their names."""
    return {
        (*prefix, name): value
        for prefix, part in iter_subconfigs(config)
        for name, value in vars(part).items()
        if isinstance(value, (list, tuple))
        and value
        and all(type(entry) is int for entry in value)
        and name_words(name) & LAYER_WORDS
        and name_words(name) & INDEX_WORDS
    }


def ambiguous_block_fields(config: PreTrainedConfig, fields: Sequence[BlockField]) -> list[ConfigPath]:
    """Return fields that seem to list blocks, in pairs or deeper lists, and are not in `fields`."""
    known = {each.path for each in fields}
    return [
        (*prefix, name)
        for prefix, part in iter_subconfigs(config)
        for name, value in vars(part).items()
        if (*prefix, name) not in known
        and not name.startswith("_")
        and name_words(name) & LAYER_WORDS
        and isinstance(value, (list, tuple))
        and value
        and all(isinstance(entry, (list, tuple)) and all(type(each) is int for each in entry) for entry in value)
    ]


def kv_sharing_sources(part: PreTrainedConfig) -> dict[int, int]:
    """Return, for each block that takes its keys and values from another block, the index of that block."""
    try:
        modes = getattr(part, "kv_sharing_modes", None)
    except MODEL_ERRORS:  # a property that contradicts other values of the config
        return {}
    if not isinstance(modes, list):
        return {}
    listed = getattr(part, "kv_source_layers", None)
    types = getattr(part, "layer_types", None) or [""] * len(modes)
    sources: dict[int, int] = {}
    for block, mode in enumerate(modes):
        if not isinstance(mode, str) or not mode.startswith("reuse"):
            continue
        candidates = [other for other in range(block) if modes[other] == "store" and types[other] == types[block]]
        if isinstance(listed, list):
            sources[block] = listed[block]
        elif candidates:
            sources[block] = candidates[-1]
    return sources


def shared_entry_sources(part: PreTrainedConfig, size: int) -> dict[int, frozenset[int]]:
    """Return, for each block whose entry in a list is "shared", the earlier blocks whose entry is not."""
    sources: dict[int, frozenset[int]] = {}
    for value in vars(part).values():
        if isinstance(value, list) and len(value) == size and "shared" in value:
            for block, entry in enumerate(value):
                if entry == "shared":
                    sources[block] = frozenset(other for other in range(block) if value[other] != "shared")
    return sources
