"""Config fields that go by block: find them, and make their values follow the blocks that a student keeps.

A field is found by what it does, not by its name alone: the teacher's model is built on the meta device with one block
fewer, its lists replaced by ones that record how they are read. A list that is read at each block's number has an entry per
block; a list that is asked whether it contains each number lists blocks. What only the forward pass looks at is found by
what the config class makes of another depth, or by its name. What none of this finds, a layout declares
(`register_layout(block_fields=...)`).
"""

import copy
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from hf_guide.errors import LayoutError, ShapeError
from hf_guide.models.tiny_models import MODEL_ERRORS

ConfigPath = tuple[str, ...]
"""Where a value is in a config: names of nested configs, and the field's own at the end."""


class FieldKind(str, Enum):
    """How the value of a field goes by block."""

    ENTRIES = "entries"  # a list with an entry per block
    STATES = "states"  # a list with an entry for the input and one per block
    KEYED = "keyed"  # a mapping from a block's number
    CYCLE = "cycle"  # a list whose entries are taken in turn, again and again
    SOURCES = "sources"  # an entry per block, the number of another block
    NUMBERS = "numbers"  # the numbers of the blocks that differ; those of dropped blocks go
    NUMBERS_FROM_ONE = "numbers_from_one"  # the same, counted from 1
    AFTER = "after"  # numbers of blocks whose output is used, each another's
    OUTPUTS = "outputs"  # numbers of blocks whose output is used
    STATE_NUMBERS = "state_numbers"  # numbers of hidden states: 0 is the input, negative ones count from the last
    FIRST = "first"  # how many blocks at the start differ; a start index
    LAST = "last"  # how many blocks at the end differ
    END = "end"  # the number of the last block that differs

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Depth:
    """A number of blocks that a config states, and the stacks (by a layout's pattern) that have it."""

    path: ConfigPath
    size: int
    stacks: tuple[str, ...] = ()


@dataclass(frozen=True)
class BlockField:
    """A field that goes by the blocks of one depth."""

    path: ConfigPath
    kind: FieldKind
    depth: ConfigPath


def value_at(config: PreTrainedConfig, path: ConfigPath) -> Any:
    """Return the value at `path`, None where there is no such field."""
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
# How a value follows


def remap_field(value: Any, kind: FieldKind, blocks: Sequence[int], depth: int) -> Any:
    """Return the student's value of a field whose value in the teacher, `depth` blocks deep, is `value`.

    Args:
        blocks: the teacher's block that feeds each of the student's.

    Raises:
        ShapeError: no value of the student's says what the teacher's says of these blocks; with the reason.
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
            place = {block: index for index, block in reversed(list(enumerate(blocks)))}
            return type(value)(place.get(value[block], index) for index, block in enumerate(blocks))
        case FieldKind.NUMBERS | FieldKind.NUMBERS_FROM_ONE:
            first = int(kind == FieldKind.NUMBERS_FROM_ONE)
            named = {int(number) - first for number in value}
            return type(value)(index + first for index, block in enumerate(blocks) if block in named)
        case FieldKind.AFTER:
            mapped = _map_numbers(value, functools.partial(_output_number, blocks=blocks, depth=depth))
            if not isinstance(value, int) and len(set(mapped)) < len(set(value)):
                raise ShapeError(
                    f"the outputs of the blocks {list(value)} are used, and two of them would be one: between each two "
                    "a block must be kept"
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
    kept = {}
    for index, block in enumerate(blocks):
        for key in (block, str(block)):
            if key in value:
                kept[type(key)(index)] = value[key]
    return kept


def _map_numbers(value: Any, number: Callable[[int], int]) -> Any:
    return number(value) if isinstance(value, int) else type(value)(number(int(entry)) for entry in value)


def _output_number(number: int, blocks: Sequence[int], depth: int) -> int:
    """Return the last kept block up to `number`: its output is the teacher's there, when the dropped ones are skipped."""
    block = number + depth if number < 0 else number
    kept = sum(each <= block for each in blocks) - 1
    if kept < 0:
        raise ShapeError(f"the output of block {block} is used, and neither it nor one before it is kept")
    return kept - len(blocks) if number < 0 else kept


def _state_number(number: int, blocks: Sequence[int], depth: int) -> int:
    """Return the hidden state after as many of the kept blocks as stand before the teacher's."""
    state = number + depth + 1 if number < 0 else number
    kept = sum(each < state for each in blocks)
    return kept - len(blocks) - 1 if number < 0 else kept


# ---------------------------------------------------------------------------------------------------------------------
# Finding the fields


@dataclass
class ListAccess:
    """How a list was read while a model was built."""

    indices: set[int] = field(default_factory=set)
    membership_tests: set[int] = field(default_factory=set)


LAYER_WORDS = frozenset(("layer", "layers", "block", "blocks", "depth"))
INDEX_WORDS = frozenset(("index", "indices", "indexes", "idx", "idxs", "ids", "layers", "blocks"))
OUTPUT_WORDS = frozenset(("out", "output", "outputs", "feature", "features", "deepstack", "intermediate"))
OTHER_STACK_WORDS = frozenset(("mtp", "target", "nextn"))  # stacks that are no part of this one
NON_DEPTH_WORDS = frozenset(("norm", "eps", "type", "scale", "dropout", "head", "heads", "size", "dim"))

DECLARED_KINDS: dict[str, dict[str, FieldKind]] = {
    "bert": {"pruned_heads": FieldKind.KEYED},
    "dpt": {"backbone_out_indices": FieldKind.AFTER},
    "eomt": {"num_blocks": FieldKind.LAST},
    "mllama_vision_model": {"intermediate_layers_indices": FieldKind.OUTPUTS},
    "seggpt": {"merge_index": FieldKind.AFTER, "intermediate_hidden_state_indices": FieldKind.AFTER},
}
"""By the `model_type` of the (nested) config: fields whose meaning cannot be found. A layout declares its own."""


def name_words(name: str) -> set[str]:
    """Return the words of a field's name."""
    return set(name.lower().split("_"))


@dataclass(frozen=True)
class StackDepths:
    """The numbers of blocks that a config states, and how each of its lists is read with one block fewer.

    Attributes:
        model: built of the config, on the meta device; None where none was built.
        tables: by the names of parameters outside of blocks that have an entry per block: which axis, the depth that it has,
            and whether it has an entry for the stack's input before them.
    """

    depths: dict[ConfigPath, Depth]
    list_access: dict[ConfigPath, dict[ConfigPath, ListAccess]]
    model: PreTrainedModel | None = None
    tables: dict[str, tuple[int, ConfigPath, bool]] = field(default_factory=dict)

    def of_stack(self, stack: str) -> Depth | None:
        """Return the depth that a stack has."""
        return next((depth for depth in self.depths.values() if stack in depth.stacks), None)


def standard_depths(config: PreTrainedConfig) -> StackDepths:
    """Return the numbers of blocks as families usually call them, for when there is no model to build."""
    found = StackDepths({}, {})
    for prefix, part in iter_subconfigs(config):
        name = part.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        size = vars(part).get(name)
        if type(size) is int and size > 0:
            path = (*prefix, name)
            found.depths[path] = Depth(path, size)
    return found


def find_block_fields(
    config: PreTrainedConfig, depths: StackDepths, declared: "Mapping[str, str] | None" = None
) -> list[BlockField]:
    """Return the fields of `config` and its nested configs that go by block.

    Args:
        declared: kinds by dotted path from the root, such as {"vision_config.deepstack_visual_indexes": "after"}; "none" for
            a field that does not go by block. A kind may name its depth: "after vision_config.depth".

    Raises:
        LayoutError: a declared kind or depth that is not known.
    """
    said = {tuple(name.split(".")): meaning for name, meaning in (declared or {}).items()}
    found: dict[ConfigPath, BlockField] = {}
    for prefix, part in iter_subconfigs(config):
        own = {path: depth for path, depth in depths.depths.items() if path[:-1] == prefix}
        for name, value in _flat_values(part).items():
            path = (*prefix, name)
            if path in depths.depths or value is None or isinstance(value, (bool, float)):
                continue
            if path in said:
                if said[path] != "none":
                    found[path] = _declared_field(path, said[path], own, depths)
                continue
            kind = DECLARED_KINDS.get(part.model_type, {}).get(name)
            if kind is not None and own:
                found[path] = BlockField(path, kind, next(iter(own)))
                continue
            for depth in own.values():
                kind = _infer_kind(part, name, value, depth, depths.list_access.get(depth.path, {}).get(path))
                if kind is not None:
                    found[path] = BlockField(path, kind, depth.path)
                    break
            if path not in found and (elsewhere := _field_of_other_stack(path, value, own, depths)) is not None:
                found[path] = elsewhere
    return list(found.values())


def _flat_values(part: PreTrainedConfig) -> dict[str, Any]:
    """Return a config's own values, nested configs left out, tuples as tuples."""
    stated = part.to_dict()
    return {
        name: vars(part).get(name, value)
        for name, value in stated.items()
        if not isinstance(vars(part).get(name), PreTrainedConfig) and not name.startswith("_")
    }


def _declared_field(
    path: ConfigPath, meaning: str, own: Mapping[ConfigPath, Depth], depths: StackDepths
) -> BlockField:
    kind, _, depth = meaning.partition(" ")
    where = tuple(depth.split(".")) if depth else next(iter(own), ())
    if kind not in [member.value for member in FieldKind]:
        raise LayoutError(
            f"block_fields says {meaning!r} of {'.'.join(path)!r}; it must be one of "
            f"{[member.value for member in FieldKind]}, or 'none'."
        )
    if where not in depths.depths:
        raise LayoutError(
            f"block_fields says {meaning!r} of {'.'.join(path)!r}, but the config's depths are "
            f"{['.'.join(path) for path in depths.depths]}: name one of them after the kind."
        )
    return BlockField(path, FieldKind(kind), where)


def _infer_kind(
    part: PreTrainedConfig, name: str, value: Any, depth: Depth, reads: ListAccess | None
) -> FieldKind | None:
    """Return how a field of the config that states `depth` goes by its blocks; None where it does not."""
    size, meaning = depth.size, name_words(name)
    if isinstance(value, Mapping):
        numbered = value and all(str(key).isdigit() and int(key) < size for key in value)
        return FieldKind.KEYED if numbered and meaning & LAYER_WORDS else None
    if isinstance(value, int):
        return _infer_number_kind(name, value, size)
    if isinstance(value, str):
        return FieldKind.ENTRIES if len(value) == size > 1 and "pattern" in meaning else None
    if not isinstance(value, (list, tuple)) or meaning & OTHER_STACK_WORDS:
        return None
    integers = bool(value) and all(type(entry) is int for entry in value)
    before = set(range(size - 1))
    if reads is not None and size > 2:
        if before <= reads.indices and size - 1 not in reads.indices and len(value) >= size:
            return FieldKind.SOURCES if integers and _are_sources(name, value, size) else FieldKind.ENTRIES
        if integers and len(reads.membership_tests) > 1 and reads.membership_tests <= set(range(size)):
            return FieldKind.NUMBERS if 0 in reads.membership_tests else FieldKind.NUMBERS_FROM_ONE
    if len(value) == size and (meaning & LAYER_WORDS or _follows_depth(part, name, depth)):
        if not (integers and meaning & OUTPUT_WORDS):
            return FieldKind.SOURCES if integers and _are_sources(name, value, size) else FieldKind.ENTRIES
    if not meaning & LAYER_WORDS and not meaning & OUTPUT_WORDS:
        return None
    if 0 < len(value) < size and "types" in meaning and all(isinstance(entry, str) for entry in value):
        return FieldKind.CYCLE
    if (integers or not value) and meaning & INDEX_WORDS and all(-size <= number <= size for number in value):
        if meaning & OUTPUT_WORDS:
            by_state = any(number == size for number in value) or "layers" in meaning
            return FieldKind.STATE_NUMBERS if by_state else FieldKind.AFTER
        if all(0 <= number < size for number in value):
            return FieldKind.NUMBERS
    return None


def _infer_number_kind(name: str, value: int, size: int) -> FieldKind | None:
    meaning = name_words(name)
    if not 0 < value <= size or meaning & NON_DEPTH_WORDS:
        return None
    if {"shared", "layers"} <= meaning or {"last", "layers"} <= meaning:
        return FieldKind.LAST
    if "end" in meaning and meaning & (INDEX_WORDS | LAYER_WORDS):
        return FieldKind.END
    counts_from_the_start = (
        ({"first", "replace"} <= meaning)
        or ("first" in meaning and meaning & LAYER_WORDS)
        or ("start" in meaning and meaning & (INDEX_WORDS | LAYER_WORDS))
        or ({"dense", "layers"} <= meaning)
        or ({"hash", "layers"} <= meaning)
        or ({"max", "window", "layers"} <= meaning)
    )
    return FieldKind.FIRST if counts_from_the_start else None


def _are_sources(name: str, value: Sequence[int], size: int) -> bool:
    """Whether entries say from which block each takes something: itself, or one before it that takes its own."""
    if not name_words(name) & {"source", "sources"} and list(value) != list(range(size)):
        return False
    return all(0 <= source <= block and value[source] == source for block, source in enumerate(value))


def _follows_depth(part: PreTrainedConfig, name: str, depth: Depth) -> bool:
    """Whether the class itself makes this list longer or shorter with the depth, when it is left out."""
    return name in _depth_sized_lists(type(part), json.dumps(part.to_dict(), sort_keys=True, default=str), part, depth)


_depth_sized_cache: dict[tuple[type, str, str], frozenset[str]] = {}


def _depth_sized_lists(kind: type, key: str, part: PreTrainedConfig, depth: Depth) -> frozenset[str]:
    known = _depth_sized_cache.get((kind, key, depth.path[-1]))
    if known is not None:
        return known
    values = {
        name: value for name, value in part.to_dict().items() if name not in ("model_type", "transformers_version")
    }
    left_out = [name for name, value in values.items() if isinstance(value, list) and len(value) == depth.size]
    found: set[str] = set()
    for names in [left_out, *([name] for name in left_out)]:  # all at once, or each where others are then refused
        rest = {name: copy.deepcopy(value) for name, value in values.items() if name not in names}
        try:
            longer = kind(**rest | {depth.path[-1]: depth.size + 1}).to_dict()
        except MODEL_ERRORS:
            continue
        found |= {name for name in names if isinstance(longer.get(name), list) and len(longer[name]) == depth.size + 1}
    _depth_sized_cache[kind, key, depth.path[-1]] = frozenset(found)
    return _depth_sized_cache[kind, key, depth.path[-1]]


def _field_of_other_stack(
    path: ConfigPath, value: Any, own: Mapping[ConfigPath, Depth], depths: StackDepths
) -> BlockField | None:
    """Return what a field such as `vision_feature_layer` names: hidden states of a nested config's stack."""
    meaning = name_words(path[-1])
    if not {"feature", "features"} & meaning or not meaning & {"layer", "layers"}:
        return None
    numbers = [value] if isinstance(value, int) else value
    if not isinstance(numbers, (list, tuple)) or not all(type(number) is int for number in numbers):
        return None
    inside = [depth for depth in depths.depths.values() if depth.path[: len(path) - 1] == path[:-1]]
    named = [depth for depth in inside if any(name_words(part) & meaning - LAYER_WORDS for part in depth.path[:-1])]
    nested = named or list(own.values()) or [depth for depth in inside if "text_config" not in depth.path]
    fitting = [depth for depth in nested if all(-depth.size - 1 <= number <= depth.size for number in numbers)]
    return BlockField(path, FieldKind.STATE_NUMBERS, fitting[0].path) if len(fitting) == 1 else None


def block_lists(config: PreTrainedConfig) -> dict[ConfigPath, Sequence[int]]:
    """Return the lists of block numbers that a config and its nested ones hold, by what they are called."""
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
    """Return fields that seem to name blocks, in pairs or deeper lists, and that are none of `fields`."""
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
    """Return, of each block that takes its keys and values from another, which one that is."""
    try:
        modes = getattr(part, "kv_sharing_modes", None)
    except MODEL_ERRORS:  # a property that the config's other values do not go with
        return {}
    if not isinstance(modes, list):
        return {}
    named = getattr(part, "kv_source_layers", None)
    types = getattr(part, "layer_types", None) or [""] * len(modes)
    sources: dict[int, int] = {}
    for block, mode in enumerate(modes):
        if not isinstance(mode, str) or not mode.startswith("reuse"):
            continue
        before = [other for other in range(block) if modes[other] == "store" and types[other] == types[block]]
        if isinstance(named, list):
            sources[block] = named[block]
        elif before:
            sources[block] = before[-1]
    return sources


def shared_entry_sources(part: PreTrainedConfig, size: int) -> dict[int, frozenset[int]]:
    """Return, of each block that a list with an entry per block calls "shared", the blocks before it that are not."""
    needs: dict[int, frozenset[int]] = {}
    for value in vars(part).values():
        if isinstance(value, list) and len(value) == size and "shared" in value:
            for block, entry in enumerate(value):
                if entry == "shared":
                    needs[block] = frozenset(other for other in range(block) if value[other] != "shared")
    return needs
