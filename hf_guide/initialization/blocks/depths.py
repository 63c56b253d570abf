"""Find the numbers of blocks that a config states, by building the model one block shorter."""

import copy
import dataclasses
import json
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from hf_guide.initialization.blocks.config_fields import (
    LAYER_WORDS,
    NON_DEPTH_WORDS,
    ConfigPath,
    Depth,
    ListAccess,
    StackDepths,
    iter_subconfigs,
    name_words,
    set_at,
    value_at,
)
from hf_guide.initialization.planning import stack_sizes
from hf_guide.layouts.grammar import Axis, AxisConcat, AxisName, AxisProduct
from hf_guide.layouts.registry import Layout, LayoutRow
from hf_guide.models.model_classes import meta_model, strip_base_prefix
from hf_guide.models.tiny_models import MODEL_ERRORS


class _RecordsAccess:
    """Record which entries of a sequence are read and which numbers it is asked for."""

    access: ListAccess

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int):
            self.access.indices.add(index)
        return super().__getitem__(index)  # type: ignore[misc]

    def __contains__(self, item: object) -> bool:
        if isinstance(item, int):
            self.access.membership_tests.add(item)
        return super().__contains__(item)  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        duplicate = type(self)(copy.deepcopy(list(self), memo))  # type: ignore[call-overload,call-arg]
        duplicate.access = self.access
        return duplicate


class RecordingList(_RecordsAccess, list):
    """A list that records how it is read."""


class RecordingTuple(_RecordsAccess, tuple):
    """A tuple that records how it is read."""


def record_list_access(config: PreTrainedConfig) -> dict[ConfigPath, ListAccess]:
    """Replace every list in `config` by one that records how it is read; return the records by path."""
    records: dict[ConfigPath, ListAccess] = {}
    for prefix, part in iter_subconfigs(config):
        for name, value in list(vars(part).items()):
            if name.startswith("_") or type(value) not in (list, tuple) or not value:
                continue
            recording: Any = RecordingList(value) if isinstance(value, list) else RecordingTuple(value)
            recording.access = ListAccess()
            path = (*prefix, name)
            records[path] = recording.access
            part.__dict__[name] = recording
    return records


def find_depths(config: PreTrainedConfig, model_class: type[PreTrainedModel], layout: Layout) -> StackDepths:
    """Return each number of blocks that `config` states, with the stacks that have it.

    Each candidate is lowered by one in turn and the model built on the meta device: what makes a stack shorter is its depth.
    Where a family refuses that, the field it usually calls `num_hidden_layers` is taken for the stack of its length.
    """
    config = copy.deepcopy(config)
    config.__dict__.pop("quantization_config", None)
    stacks_known = tuple(row.pattern for row in layout.rows if "{block}" in row.pattern)
    key = (model_class, json.dumps(config.to_dict(), sort_keys=True, default=str), stacks_known)
    if key not in _depths_cache:
        _depths_cache.clear()  # of one model at a time, for it is held
        _depths_cache[key] = _probe_depths(config, model_class, layout)
    return _depths_cache[key]


_depths_cache: dict[Any, StackDepths] = {}


def _probe_depths(config: PreTrainedConfig, model_class: type[PreTrainedModel], layout: Layout) -> StackDepths:
    model = meta_model(model_class, config)
    whole = stack_lengths(model, layout)
    found = StackDepths({}, {}, model)
    taken: set[str] = set()
    for path, size in _depth_candidates(config, set(whole.values())):
        stacks: tuple[str, ...] = ()
        records: dict[ConfigPath, ListAccess] = {}
        tables: dict[str, tuple[int, ConfigPath, bool]] = {}
        refused = False
        for with_lists in (False, True):  # where the length of a list is the depth, or must be
            shorter = _one_block_shorter(config, path, size, with_lists=with_lists)
            records = record_list_access(shorter)
            try:
                other = meta_model(model_class, shorter)
            except MODEL_ERRORS:
                refused = True
                continue
            sizes, tables = stack_lengths(other, layout), _per_block_parameters(model, other, path, size)
            stacks = tuple(stack for stack, had in whole.items() if had == size and sizes.get(stack, 0) == size - 1)
            if stacks:
                break
        if refused and not stacks:
            records, tables = {}, {}
            like = [stack for stack, had in whole.items() if had == size and stack not in taken]
            stacks = tuple(like) if len(like) == 1 and path[-1] == _standard_depth_field(config, path) else ()
        stacks = tuple(stack for stack in stacks if stack not in taken)
        if stacks:
            taken |= set(stacks)
            found.depths[path] = Depth(path, size, stacks)
            found.list_access[path] = records
            found.tables.update(tables)
    return found


def stack_lengths(model: PreTrainedModel, layout: Layout) -> dict[str, int]:
    """Return how many blocks each stack of a model has."""
    sizes = stack_sizes(layout, [strip_base_prefix(name, model.base_model_prefix) for name in model.state_dict()])
    return {stack: size for stack, size in sizes.items() if stack.endswith("{block}")}


def add_block_axes(layout: Layout, config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> Layout:
    """Return a derived layout in which axes with an entry per block, outside of blocks, are known as such.

    Such an axis is laid out by block first, as in ESM's contact head over (blocks heads) or Gemma 3n's embeddings per layer.
    """
    try:
        depths = find_depths(config, model_class, layout)
    except MODEL_ERRORS:
        return layout
    rows: dict[str, LayoutRow] = {}
    stacks: dict[str, str] = {}
    for name, (axis, path, has_input) in depths.tables.items():
        match = layout.find(strip_base_prefix(name, model_class.base_model_prefix))
        stack = depths.depths[path].stacks[0]
        if match is None or "block" in match.numbers or match.is_bias or match.row.pattern in rows:
            continue
        axes: list[Axis] = list(match.row.axes)
        if not isinstance(axes[axis], AxisName):
            continue
        axes[axis] = (
            AxisConcat((AxisName("1"), AxisName("blocks")))
            if has_input
            else AxisProduct((AxisName("blocks"), axes[axis]))
        )
        rows[match.row.pattern] = dataclasses.replace(match.row, axes=tuple(axes))
        stacks[match.row.pattern] = stack
    if not rows:
        return layout
    return dataclasses.replace(
        layout,
        rows=tuple(rows.get(row.pattern, row) for row in layout.rows),
        block_tables={**layout.block_tables, **stacks},
    )


def _per_block_parameters(
    model: PreTrainedModel, shorter: PreTrainedModel, path: ConfigPath, size: int
) -> dict[str, tuple[int, ConfigPath, bool]]:
    """Return the parameters that are longer on one axis by what one more block brings."""
    found = {}
    shapes = {name: tensor.shape for name, tensor in shorter.state_dict().items()}
    for name, tensor in model.state_dict().items():
        less = shapes.get(name, ())
        grown = [axis for axis, (had, has) in enumerate(zip(tensor.shape, less, strict=False)) if had != has]
        if len(grown) != 1 or len(less) != tensor.ndim:
            continue
        had, has = tensor.shape[grown[0]], less[grown[0]]
        if had % size == 0 and has == had // size * (size - 1):
            found[name] = (grown[0], path, False)
        elif (had, has) == (size + 1, size):
            found[name] = (grown[0], path, True)
    return found


def _one_block_shorter(config: PreTrainedConfig, path: ConfigPath, size: int, *, with_lists: bool) -> PreTrainedConfig:
    """Return a config with one block fewer, and with `with_lists` one entry fewer in lists of that length."""
    shorter = copy.deepcopy(config)
    part = value_at(shorter, path[:-1]) if len(path) > 1 else shorter
    if path[-1] in part.__dict__:
        set_at(shorter, path, size - 1)
    for name, value in list(vars(part).items()) if with_lists else ():
        if isinstance(value, list) and len(value) == size:
            part.__dict__[name] = value[:-1]
    return shorter


def _standard_depth_field(config: PreTrainedConfig, path: ConfigPath) -> str:
    part = value_at(config, path[:-1]) if len(path) > 1 else config
    return part.attribute_map.get("num_hidden_layers", "num_hidden_layers")


def _depth_candidates(config: PreTrainedConfig, sizes: set[int]) -> list[tuple[ConfigPath, int]]:
    found = []
    for prefix, part in iter_subconfigs(config):
        usual = part.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        names = [name for name, value in vars(part).items() if type(value) is int and value in sizes and value > 1]
        if usual not in vars(part) and value_at(part, (usual,)) in sizes:
            names.append(usual)
        named = [
            name
            for name in names
            if name == usual or (name_words(name) & LAYER_WORDS and not name_words(name) & NON_DEPTH_WORDS)
        ]
        found += [((*prefix, name), value_at(part, (name,))) for name in sorted(named, key=lambda name: name != usual)]
    return found
