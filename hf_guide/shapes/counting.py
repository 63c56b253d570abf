"""Count the parameters and the cache of students from shapes: of thousands by a rule, and of one exactly.

Each dimension of each parameter is an affine function of the size fields, and of the size of a head, with and without the
number of key/value heads as a factor, where that size is the width divided by the number of heads. The slopes are found by
changing fields in a model on the meta device, those of a head's size first, as only they need several changed at a time. The
number of parameters of any shape is then a sum of products, for all shapes at once. So are the bytes of its cache, whose
tensors have such dimensions too.

What a token passes in a mixture of experts leaves out the experts that it is not routed to. Stacked experts are recognised by
the layout's axes or, where these are inferred and do not name experts, by the module that Transformers names so.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedConfig, PreTrainedModel

from hf_guide.errors import LayoutError, ShapeError
from hf_guide.initialization.infer_layout import layout_for
from hf_guide.initialization.size_checks import experts_per_token
from hf_guide.layouts.grammar import AxisName, axis_names
from hf_guide.layouts.registry import PREFIX_AXES, Layout
from hf_guide.models.model_classes import strip_base_prefix
from hf_guide.shapes.cache import CacheMeter
from hf_guide.shapes.fields import ModelProbe, SizeField, SizeFields, SizeRole

Sizes = Mapping[str, np.ndarray]
"""For each size field its value in every shape."""

_Lengths = dict[str, tuple[float, ...]]
"""For each parameter a number for each of its dimensions: its lengths, or a slope of them."""

_LengthsOf = Callable[[PreTrainedModel], _Lengths]
"""Returns the lengths of what is counted of a model: its parameters, or the tensors of its cache."""

_EXPERTS_MODULE = re.compile(r"(^|\.)experts\.")
"""The module of stacked experts in every mixture of Transformers; a shared expert, which every token passes, has another."""


@dataclass(frozen=True)
class _Variable:
    """What the length of a dimension is affine in: the product of some fields, divided by another's."""

    factors: tuple[str, ...]
    divisor: str | None = None

    def __call__(self, sizes: Mapping[str, Any]) -> Any:
        """Return its value, of one shape or of an array of each."""
        product = math.prod(sizes[name] for name in self.factors)
        return product if self.divisor is None else product / sizes[self.divisor]


_Dimension = tuple[float, tuple[tuple[_Variable, float], ...]]
"""A constant, and a slope for each variable that the length of a dimension depends on."""


@dataclass(frozen=True)
class Cost:
    """What shapes cost, one entry for each; whole numbers.

    Attributes:
        parameters: Number of parameters, tied ones counted once.
        active: Those that a token passes, of a mixture of experts; all of any other model.
        lookups: Those of embedding tables, of which a token reads a row.
        tied_head: Those of a table that is also the language head.
    """

    parameters: np.ndarray
    active: np.ndarray
    lookups: np.ndarray
    tied_head: np.ndarray

    @property
    def flops_per_token(self) -> np.ndarray:
        """Floating-point operations of a forward pass: 2 for each weight that a token passes; none for looking up a row.

        Attention's products of queries and keys, which grow with the context, are not counted.
        """
        return 2 * (self.active - self.lookups + self.tied_head)


@dataclass(frozen=True)
class _Group:
    """Parameters of the same kind and dimensions."""

    count: int
    depth: str | None
    dimensions: tuple[_Dimension, ...]
    is_expert: bool
    is_lookup: bool
    is_tied_head: bool


class ParameterCounter:
    """Counts the parameters of many shapes at once, and the bytes of their caches."""

    def __init__(self, probe: ModelProbe, fields: SizeFields, cache: CacheMeter | None = None):
        """Find the rule.

        Args:
            probe: Builds models of the teacher's family.
            fields: The teacher's size fields.
            cache: Measures the cache of a model; None where no budget depends on it.
        """
        self.fields = fields
        self.depth_sizes = {each.name: each.size for each in fields.of(SizeRole.DEPTH)}
        # Stated, so that none follows another: as many key/value heads as heads, or Falcon's MLP of four times the width.
        follow = (SizeRole.KEY_VALUE_HEADS, SizeRole.MLP)
        stated = {each.name: each.size for each in fields.fields if each.role in follow}
        kept = {**fields.kept, **stated}
        base = probe.build(kept)
        if base is None:
            raise LayoutError(f"No {probe.model_class.__name__} can be built with {kept}, the teacher's own sizes.")
        # The user's, where it is overridden: it is no size field.
        self.experts_per_token = experts_per_token(base[0])
        layout = layout_for(base[0], probe.model_class)
        self.num_experts = _num_experts(layout, base[1])
        self.groups = _group(probe, fields, kept, base[1], layout, _memoized(lambda model: _lengths(model, layout)))
        self.cache_groups: list[_Group] = []
        if cache is not None:
            cache.tensors(base[1])  # the error of a family whose cache cannot be measured
            lengths_of = _memoized(lambda model: _cache_lengths(cache, model, fields))
            self.cache_groups = _group(probe, fields, kept, base[1], layout, lengths_of, required=False)

    def count(self, sizes: Sizes) -> Cost:
        """Return what shapes cost. Blocks of several kinds count as their average: `exact_cost` counts one shape exactly.

        Args:
            sizes: For each size field an array of its values.
        """
        length = len(next(iter(sizes.values())))
        total, experts, lookups, tied = (np.zeros(length) for _ in range(4))
        for group in self.groups:
            numel = self._numel(group, sizes, length)
            total += numel
            experts += numel * group.is_expert
            lookups += numel * group.is_lookup
            tied += numel * group.is_tied_head
        inactive = experts * (1 - self._active_share(sizes, length))
        return Cost(total, total - inactive, lookups, tied)

    def count_cache(self, sizes: Sizes) -> np.ndarray:
        """Return bytes of the cache of shapes; of blocks of several kinds their average, as in `count`."""
        length = len(next(iter(sizes.values())))
        return sum((self._numel(group, sizes, length) for group in self.cache_groups), np.zeros(length))

    def _numel(self, group: _Group, sizes: Sizes, length: int) -> np.ndarray:
        numel = np.full(length, float(group.count))
        for constant, slopes in group.dimensions:
            numel = numel * (constant + sum(slope * variable(sizes) for variable, slope in slopes))
        if group.depth is not None:
            numel = numel * sizes[group.depth] / self.depth_sizes[group.depth]
        return numel

    def _active_share(self, sizes: Sizes, length: int) -> np.ndarray:
        if self.num_experts is None or self.experts_per_token is None:
            return np.ones(length)
        field = self.fields.main(SizeRole.EXPERTS)
        number = np.full(length, float(self.num_experts)) if field is None else sizes[field.name]
        return np.minimum(1.0, self.experts_per_token / number)


def exact_cost(model: PreTrainedModel, config: PreTrainedConfig) -> dict[str, int]:
    """Return the entries of a `Cost`, and its `flops_per_token`, of one model, which may be on the meta device.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from hf_guide.models.model_classes import meta_model
        >>> config = LlamaConfig(vocab_size=10, hidden_size=8, intermediate_size=4, num_hidden_layers=1, num_attention_heads=2)
        >>> exact_cost(meta_model(LlamaForCausalLM, config), config)["parameters"]
        536
    """
    layout = layout_for(config, type(model))
    head = _tied_table(model)
    total = experts = lookups = tied = 0
    for name, parameter in model.named_parameters():
        kind = _kind_of(layout, strip_base_prefix(name, model.base_model_prefix))
        total += parameter.numel()
        experts += parameter.numel() * kind[0]
        lookups += parameter.numel() * kind[1]
        tied += parameter.numel() * (parameter is head)
    active = total
    per_token, count = experts_per_token(config), _num_experts(layout, model)
    if per_token is not None and count:
        active -= experts - round(experts * min(per_token, count) / count)
    return {
        "parameters": total,
        "active_parameters": active,
        "flops_per_token": 2 * (active - lookups + tied),
        "table_parameters": lookups,
    }


def _memoized(lengths_of: _LengthsOf) -> _LengthsOf:
    """Return a function that measures each model once. The probe keeps the models, so that none has the id of another."""
    known: dict[int, _Lengths] = {}

    def memoized(model: PreTrainedModel) -> _Lengths:
        if id(model) not in known:
            known[id(model)] = lengths_of(model)
        return known[id(model)]

    return memoized


def _cache_lengths(cache: CacheMeter, model: PreTrainedModel, fields: SizeFields) -> _Lengths:
    """Return the lengths of each tensor of a model's cache, bytes of a number first; none of a model that does not run.

    They are named as parameters of the decoder's blocks.
    """
    prefix = next((each for each in reversed(list(fields.stacks)) if "encoder" not in each), "")
    try:
        tensors = cache.tensors(model)
    except ShapeError:  # such as one of fewer key/value heads alone, where the family has as many as heads
        return {}
    return {f"{prefix}{each.layer}.{each.name}": (each.itemsize, *each.shape) for each in tensors}


def _group(
    probe: ModelProbe,
    fields: SizeFields,
    kept: Mapping[str, int],
    base: PreTrainedModel,
    layout: Layout,
    lengths_of: _LengthsOf,
    *,
    required: bool = True,
) -> list[_Group]:
    sizes = {each.name: each.size for each in fields.fields}
    slopes = _head_slopes(probe, kept, fields, base, lengths_of)
    slopes |= {
        _Variable((each.name,)): _slopes(probe, kept, fields.moved_by(each), sizes, base, slopes, lengths_of, required)
        for each in fields.fields
        if each.role is not SizeRole.DEPTH and not fields.follows(each)
    }
    slopes |= {
        _Variable((each.name,)): _depth_slopes(probe, kept, each, fields, base, lengths_of)
        for each in fields.of(SizeRole.DEPTH)
    }
    table = _tied_table(base)
    head = next((name for name, parameter in base.named_parameters() if parameter is table), None)
    lengths = lengths_of(base)
    occurrences = Counter(_without_index(name, fields) for name in lengths)
    groups: Counter[tuple[object, ...]] = Counter()
    for name, of_parameter in lengths.items():
        relative = strip_base_prefix(name, base.base_model_prefix)
        depth = next((field for prefix, field in fields.stacks.items() if relative.startswith(prefix)), None)
        if (
            occurrences[_without_index(name, fields)] == 1
        ):  # of one block alone, such as T5's table of relative positions
            depth = None
        dimensions = []
        for dim, length in enumerate(of_parameter):
            found = tuple((each, by_name[name][dim]) for each, by_name in slopes.items() if by_name[name][dim])
            constant = length - sum(slope * variable(sizes) for variable, slope in found)
            dimensions.append((constant, found))
        is_expert, is_lookup = _kind_of(layout, relative)
        groups[(depth, tuple(dimensions), is_expert, is_lookup, name == head)] += 1
    return [
        _Group(count, depth, dimensions, is_expert, is_lookup, is_head)  # type: ignore[arg-type]
        for (depth, dimensions, is_expert, is_lookup, is_head), count in groups.items()
    ]


def _without_index(name: str, fields: SizeFields) -> str:
    """Return a parameter's name without the index of its block."""
    prefix = next((each for each in fields.stacks if each in name), None)
    if prefix is None:
        return name
    before, _, rest = name.partition(prefix)
    return f"{before}{prefix}{rest.partition('.')[2]}"


def _head_slopes(
    probe: ModelProbe, kept: Mapping[str, int], fields: SizeFields, base: PreTrainedModel, lengths_of: _LengthsOf
) -> dict[_Variable, _Lengths]:
    """Return the slopes in the size of a head, and in that times the number of key/value heads, where it follows the width.

    With the width and the number of heads both changed, what is affine in each of them cancels in a mixed difference, and only
    multiples of the size of a head are left. Whether the factor is the number of key/value heads follows from that difference
    at another number of them.
    """
    width, groups = fields.main(SizeRole.WIDTH), fields.main(SizeRole.KEY_VALUE_HEADS)
    slopes: dict[_Variable, _Lengths] = {}
    if not fields.heads_follow_width or width is None:
        return slopes
    wider = dict.fromkeys(fields.moved_by(width), 2 * width.size)
    for heads in fields.of(SizeRole.HEADS):
        mixed = None
        for number in (each for each in _other_values(heads.size) if width.size % each == 0):
            mixed = _mixed_difference(probe, kept, wider, {heads.name: number}, base, lengths_of)
            if mixed is not None:
                break
        if mixed is None:
            continue
        unit = width.size / number - width.size / heads.size  # the mixed difference of the size of a head itself
        multiples = {name: tuple(each / unit for each in lengths) for name, lengths in mixed.items()}
        in_groups = {name: (0.0,) * len(lengths) for name, lengths in multiples.items()}
        for other in _other_values(groups.size) if groups is not None and _any(multiples) else ():
            assert groups is not None
            moved = _mixed_difference(
                probe, {**kept, groups.name: other}, wider, {heads.name: number}, base, lengths_of
            )
            if moved is not None:
                step = unit * (other - groups.size)
                in_groups = {
                    name: tuple((new - old) / step for new, old in zip(moved[name], mixed[name], strict=True))
                    for name in mixed
                }
                break
        size = groups.size if groups is not None else 0
        alone = {
            name: tuple(whole - size * part for whole, part in zip(multiples[name], in_groups[name], strict=True))
            for name in multiples
        }
        if _any(alone):
            slopes[_Variable((width.name,), heads.name)] = alone
        if groups is not None and _any(in_groups):
            slopes[_Variable((width.name, groups.name), heads.name)] = in_groups
    return slopes


def _mixed_difference(
    probe: ModelProbe,
    kept: Mapping[str, int],
    first: Mapping[str, int],
    second: Mapping[str, int],
    base: PreTrainedModel,
    lengths_of: _LengthsOf,
) -> _Lengths | None:
    """Return how much more lengths change with two changes than with each alone; None where one makes no such model."""
    corners = []
    for changes in ({**first, **second}, first, second, {}):
        built = probe.build({**kept, **changes})
        lengths = None if built is None else lengths_of(built[1])
        if lengths is None or lengths.keys() != lengths_of(base).keys():
            return None
        corners.append(lengths)
    both, one, other, neither = corners
    return {
        name: tuple(
            a - b - c + d for a, b, c, d in zip(both[name], one[name], other[name], neither[name], strict=True)
        )
        for name in both
    }


def _lengths(model: PreTrainedModel, layout: Layout) -> _Lengths:
    """Return the lengths of each parameter; those that are one for each head, as one with an axis of heads in front.

    Their number follows that of the heads: StableLM may have a norm for each. Names with several numbers, as of ALBERT's
    groups of layers, are no such.
    """
    others = ((row.expression, row.expression.groupindex.keys() - {"block", "parameter"}) for row in layout.rows)
    numbered = [expression for expression, placeholders in others if len(placeholders) == 1]
    lengths: _Lengths = {}
    for name, parameter in model.named_parameters():
        relative = strip_base_prefix(name, model.base_model_prefix)
        matched = next((found for each in numbered if (found := each.fullmatch(relative))), None)
        if matched is None:
            lengths[name] = tuple(parameter.shape)
            continue
        (placeholder,) = matched.groupdict().keys() - {"block", "parameter"}
        start, end = (index - len(relative) or len(name) for index in matched.span(placeholder))
        stacked = f"{name[:start]}*{name[end:]}"
        lengths[stacked] = (lengths.get(stacked, (0,))[0] + 1, *parameter.shape)
    return lengths


def _any(lengths: _Lengths) -> bool:
    return any(itertools.chain.from_iterable(lengths.values()))


def _other_values(size: int) -> list[int]:
    """Return other values of a field, whole fractions first, which divide what the teacher's own divides."""
    return [
        *(size // divisor for divisor in (2, 3, 5) if size % divisor == 0),
        *([size - 1] if size > 1 else []),
        2 * size,
    ]


def _slopes(
    probe: ModelProbe,
    kept: Mapping[str, int],
    names: list[str],
    sizes: Mapping[str, int],
    base: PreTrainedModel,
    known: Mapping[_Variable, _Lengths],
    lengths_of: _LengthsOf,
    required: bool,
) -> _Lengths:
    """Return, by parameter, the slope of each dimension in one field, and in those that are always equal to it.

    Args:
        probe: Builds the models.
        kept: Overrides of every one of them.
        names: The fields.
        sizes: The teacher's size of every field.
        base: The model of these.
        known: Slopes in other variables, whose part of a change is not the field's own.
        lengths_of: Measures a model.
        required: Whether it is an error where no model shows the slope; otherwise it is 0.

    Raises:
        LayoutError: No other value of the field makes a model with the same parameters.
    """
    lengths, size = lengths_of(base), sizes[names[0]]
    for other in _other_values(size):
        built = probe.build({**kept, **dict.fromkeys(names, other)})
        if built is None:
            continue
        changed = lengths_of(built[1])
        if changed.keys() == lengths.keys():
            moved = {**sizes, **dict.fromkeys(names, other)}
            steps = [(variable(moved) - variable(sizes), by_name) for variable, by_name in known.items()]
            return {
                name: tuple(
                    (new - old - sum(step * by_name[name][dim] for step, by_name in steps)) / (other - size)
                    for dim, (old, new) in enumerate(zip(lengths[name], changed[name], strict=True))
                )
                for name in lengths
            }
    if size == 1 or not required:  # it cannot be smaller
        return {name: (0.0,) * len(each) for name, each in lengths.items()}
    raise LayoutError(
        f"How the parameters of {probe.model_class.__name__} depend on {names[0]} could not be found, so its shapes cannot be "
        "enumerated for a budget. Pass the sizes themselves."
    )


def _depth_slopes(
    probe: ModelProbe,
    kept: Mapping[str, int],
    depth: SizeField,
    fields: SizeFields,
    base: PreTrainedModel,
    lengths_of: _LengthsOf,
) -> _Lengths:
    """Return, by parameter, the slope of each dimension in a depth; not 0 only of parameters outside of the stacks.

    One of them may have an entry for each block, as the position embeddings that YOLOS adds between its blocks.
    """
    lengths = lengths_of(base)
    slopes = {name: (0.0,) * len(each) for name, each in lengths.items()}
    built = next(
        (found for other in _other_values(depth.size) if (found := probe.build({**kept, depth.name: other}))), None
    )
    if built is None:  # a list of the teacher's depth admits no other
        return slopes
    config, model = built
    step = getattr(config, depth.name) - depth.size
    for name, changed in lengths_of(model).items():
        is_of_block = strip_base_prefix(name, base.base_model_prefix).startswith(tuple(fields.stacks))
        if not is_of_block and len(changed) == len(lengths.get(name, ())):
            slopes[name] = tuple((new - old) / step for old, new in zip(lengths[name], changed, strict=True))
    return slopes


def _kind_of(layout: Layout, name: str) -> tuple[bool, bool]:
    """Return whether a parameter is an expert's, and whether it is a table of which a token reads a row."""
    is_expert = _EXPERTS_MODULE.search(name) is not None
    match = layout.find(name)
    if match is None:
        return is_expert, False
    names = {axis for each in match.axes for axis in axis_names(each)}
    is_expert = is_expert or ("experts" in names and bool(names & {"expert_mlp", "mlp"}))
    first = match.axes[0] if len(match.axes) == 2 else None
    is_lookup = first in [AxisName(axis) for axis in PREFIX_AXES] or (
        match.row.kind == "table" and first == AxisName("vocab")
    )
    return is_expert, is_lookup


def _num_experts(layout: Layout, model: PreTrainedModel) -> int | None:
    """Return how many experts a model has stacked, along the axis that the layout names, or the first; None without any."""
    for name, parameter in model.named_parameters():
        relative = strip_base_prefix(name, model.base_model_prefix)
        if _kind_of(layout, relative)[0]:
            match = layout.find(relative)
            named = match is not None and AxisName("experts") in match.axes
            return int(parameter.shape[match.axes.index(AxisName("experts")) if match is not None and named else 0])
    return None


def _tied_table(model: PreTrainedModel) -> object:
    """Return the language head's weight where it is the embedding table itself; None elsewhere."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    weight = getattr(head, "weight", None)
    return weight if weight is not None and weight is getattr(table, "weight", None) else None
