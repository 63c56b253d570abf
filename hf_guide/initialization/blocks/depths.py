"""Find the fields of a config that are a number of blocks, by building the model one block shorter."""

import copy
import dataclasses
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
from hf_guide.initialization.blocks.stacks import stack_sizes
from hf_guide.layouts.grammar import Axis, AxisConcat, AxisName, AxisProduct
from hf_guide.layouts.registry import Layout, LayoutRow
from hf_guide.models.model_classes import meta_model, strip_base_prefix
from hf_guide.models.tiny_models import MODEL_ERRORS
from hf_guide.utils.by_value import ByValue


class _RecordsAccess:
    """Record the indices and the membership tests with which a sequence is accessed."""

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
    """A list that records how it is accessed."""


class RecordingTuple(_RecordsAccess, tuple):
    """A tuple that records how it is accessed."""


def record_list_access(config: PreTrainedConfig) -> dict[ConfigPath, ListAccess]:
    """Replace every list in `config` by one that records how it is accessed; return the records by path."""
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
    """Return the depths of `config`, with the stacks of each.

    Each candidate is lowered by one and the model built on the meta device: what makes a stack shorter is its depth. Where a
    family raises on that, the standard field of the depth is assigned to the stack of its length.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from hf_guide.layouts.registry import registered_layouts
        >>> depths = find_depths(LlamaConfig(num_hidden_layers=3), LlamaForCausalLM, registered_layouts()["llama"])
        >>> depths.depths[("num_hidden_layers",)].stacks
        ('layers.{block}',)
    """
    config = copy.deepcopy(config)
    config.__dict__.pop("quantization_config", None)
    stacks_known = tuple(row.pattern for row in layout.rows if "{block}" in row.pattern)
    key = ByValue.of((model_class, config, stacks_known))
    if key not in _depths_cache:
        if len(_depths_cache) == _KEPT_MODELS:
            del _depths_cache[next(iter(_depths_cache))]
        _depths_cache[key] = _probe_depths(config, model_class, layout)
    return _depths_cache[key]


_depths_cache: dict[ByValue[Any], StackDepths] = {}
_KEPT_MODELS = 8  # they are on the meta device


def _probe_depths(config: PreTrainedConfig, model_class: type[PreTrainedModel], layout: Layout) -> StackDepths:
    model = meta_model(model_class, config)
    lengths = stack_lengths(model, layout)
    result = StackDepths({}, {}, model)
    assigned: set[str] = set()
    for path, size in _depth_candidates(config, set(lengths.values())):
        stacks: tuple[str, ...] = ()
        records: dict[ConfigPath, ListAccess] = {}
        tables: dict[str, tuple[int, ConfigPath, bool]] = {}
        has_raised = False
        for with_lists in (False, True):  # where the length of a list is the depth, or must equal it
            shorter = _one_block_shorter(config, path, size, with_lists=with_lists)
            records = record_list_access(shorter)
            try:
                shorter_model = meta_model(model_class, shorter)
            except MODEL_ERRORS:
                has_raised = True
                continue
            shorter_lengths, tables = (
                stack_lengths(shorter_model, layout),
                _per_block_parameters(model, shorter_model, path, size),
            )
            stacks = tuple(
                stack
                for stack, length in lengths.items()
                if length == size and shorter_lengths.get(stack, 0) == size - 1
            )
            if stacks:
                break
        if has_raised and not stacks:
            records, tables = {}, {}
            of_this_length = [stack for stack, length in lengths.items() if length == size and stack not in assigned]
            stacks = (
                tuple(of_this_length)
                if len(of_this_length) == 1 and path[-1] == _standard_depth_field(config, path)
                else ()
            )
        stacks = tuple(stack for stack in stacks if stack not in assigned)
        if stacks:
            assigned |= set(stacks)
            result.depths[path] = Depth(path, size, stacks)
            result.list_access[path] = records
            result.per_block.update(tables)
    return result


def stack_lengths(model: PreTrainedModel, layout: Layout) -> dict[str, int]:
    """Return the number of blocks of each stack of a model."""
    sizes = stack_sizes(layout, [strip_base_prefix(name, model.base_model_prefix) for name in model.state_dict()])
    return {stack: size for stack, size in sizes.items() if stack.endswith("{block}")}


def add_block_axes(layout: Layout, config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> Layout:
    """Return an inferred layout with a `blocks` axis in the parameters outside of blocks that have an entry per block.

    In such an axis the block varies slowest, as in ESM's contact head over (blocks heads) or Gemma 3n's per-layer embeddings.
    """
    try:
        depths = find_depths(config, model_class, layout)
    except MODEL_ERRORS:
        return layout
    rows: dict[str, LayoutRow] = {}
    stacks: dict[str, str] = {}
    for name, (axis, path, has_input) in depths.per_block.items():
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
    """Return the parameters with an axis that one more block makes longer: by name as `StackDepths.per_block`."""
    result = {}
    shapes = {name: tensor.shape for name, tensor in shorter.state_dict().items()}
    for name, tensor in model.state_dict().items():
        shorter_shape = shapes.get(name, ())
        changed = [
            axis
            for axis, (length, shorter_length) in enumerate(zip(tensor.shape, shorter_shape, strict=False))
            if length != shorter_length
        ]
        if len(changed) != 1 or len(shorter_shape) != tensor.ndim:
            continue
        length, shorter_length = tensor.shape[changed[0]], shorter_shape[changed[0]]
        if length % size == 0 and shorter_length == length // size * (size - 1):
            result[name] = (changed[0], path, False)
        elif (length, shorter_length) == (size + 1, size):
            result[name] = (changed[0], path, True)
    return result


def _one_block_shorter(config: PreTrainedConfig, path: ConfigPath, size: int, *, with_lists: bool) -> PreTrainedConfig:
    """Return a config with one block fewer and, with `with_lists`, one entry fewer in lists of that length."""
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
    candidates = []
    for prefix, part in iter_subconfigs(config):
        standard = part.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        names = [name for name, value in vars(part).items() if type(value) is int and value in sizes and value > 1]
        if standard not in vars(part) and value_at(part, (standard,)) in sizes:
            names.append(standard)
        depth_like = [
            name
            for name in names
            if name == standard or (name_words(name) & LAYER_WORDS and not name_words(name) & NON_DEPTH_WORDS)
        ]
        candidates += [
            ((*prefix, name), value_at(part, (name,)))
            for name in sorted(depth_like, key=lambda name: name != standard)
        ]
    return candidates
