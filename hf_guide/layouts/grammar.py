"""The grammar of axis names, and the map that makes one axis of a tensor smaller.

An axis is written as in einops: a name (`embed`), a whole number (`3`), a product (`(heads head_dim)`), or a product of
sums (`(heads q_dim + heads k_dim + heads head_dim)`), nested at will. A tensor's axes are separated by spaces.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_guide.errors import LayoutError


@dataclass(frozen=True)
class AxisName:
    """An axis with a name, or a whole number of entries that every student keeps."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class AxisProduct:
    """Axes nested in one another; the last one varies fastest."""

    factors: "tuple[Axis, ...]"

    def __str__(self) -> str:
        return "(" + " ".join(map(str, self.factors)) + ")"


@dataclass(frozen=True)
class AxisConcat:
    """Axes that follow one another, as in a fused query, key and value."""

    terms: "tuple[Axis, ...]"

    def __str__(self) -> str:
        return "(" + " + ".join(str(term).removeprefix("(").removesuffix(")") for term in self.terms) + ")"


Axis = AxisName | AxisProduct | AxisConcat
AxisSelector = Callable[[str], tuple[Tensor, Tensor]]
"""The indices that are selected on a named axis, and a factor for each."""


def parse_axes(pattern: str) -> tuple[Axis, ...]:
    """Parse the axes of a tensor.

    Args:
        pattern: for example `"(heads head_dim) embed"`.

    Raises:
        LayoutError: unbalanced parentheses or an unexpected character.

    Example:
        >>> [str(axis) for axis in parse_axes("(heads q_dim + heads k_dim) embed")]
        ['(heads q_dim + heads k_dim)', 'embed']
    """
    tokens = re.findall(r"[A-Za-z_]\w*|\d+|[()+]|\S", pattern)
    position = 0

    def parse_product() -> tuple[Axis, ...]:
        nonlocal position
        factors: list[Axis] = []
        while position < len(tokens) and tokens[position] not in ("+", ")"):
            token = tokens[position]
            position += 1
            if token == "(":
                terms = [parse_product()]
                while position < len(tokens) and tokens[position] == "+":
                    position += 1
                    terms.append(parse_product())
                if position == len(tokens) or not all(terms):
                    raise LayoutError(f"The axes {pattern!r} do not parse: a parenthesis is empty or not closed.")
                position += 1
                joined = [term[0] if len(term) == 1 else AxisProduct(term) for term in terms]
                factors.append(joined[0] if len(joined) == 1 else AxisConcat(tuple(joined)))
            elif re.fullmatch(r"\w+", token):
                factors.append(AxisName(token))
            else:
                raise LayoutError(f"The axes {pattern!r} do not parse at {token!r}.")
        return tuple(factors)

    axes = parse_product()
    if position != len(tokens):
        raise LayoutError(f"The axes {pattern!r} do not parse at {tokens[position]!r}.")
    return axes


def axis_names(axis: Axis) -> list[str]:
    """Return the names in `axis` in their order, without the whole numbers.

    Example:
        >>> axis_names(parse_axes("(2 heads head_dim)")[0])
        ['heads', 'head_dim']
    """
    if isinstance(axis, AxisName):
        return [] if axis.name.isdigit() else [axis.name]
    return [name for part in _parts(axis) for name in axis_names(part)]


def _parts(axis: "AxisProduct | AxisConcat") -> tuple[Axis, ...]:
    return axis.factors if isinstance(axis, AxisProduct) else axis.terms


def name_and_repeats(axis: Axis) -> tuple[str, int]:
    """Return the name of `axis` and how often it is repeated: once, or n times in `(n name)`; "" for other axes."""
    if isinstance(axis, AxisName):
        return axis.name, 1
    if isinstance(axis, AxisProduct) and len(axis.factors) == 2:
        repeats, inner = axis.factors
        if isinstance(repeats, AxisName) and repeats.name.isdigit() and isinstance(inner, AxisName):
            return inner.name, int(repeats.name)
    return "", 1


def merge_adjacent(axis: Axis, first: str, second: str) -> Axis:
    """Return `axis` with `first` and `second`, where they are adjacent factors, merged into one name "first second"."""
    if isinstance(axis, AxisName):
        return axis
    if isinstance(axis, AxisConcat):
        return AxisConcat(tuple(merge_adjacent(term, first, second) for term in axis.terms))
    factors: list[Axis] = []
    for factor in axis.factors:
        if factor == AxisName(second) and factors and factors[-1] == AxisName(first):
            factors[-1] = AxisName(f"{first} {second}")
        else:
            factors.append(merge_adjacent(factor, first, second))
    return factors[0] if len(factors) == 1 else AxisProduct(tuple(factors))


def axis_size(axis: Axis, sizes: Mapping[str, int]) -> int | None:
    """Return the length of `axis`; None where a name in it has no known size.

    Example:
        >>> axis_size(parse_axes("(heads head_dim)")[0], {"heads": 4, "head_dim": 16})
        64
    """
    if isinstance(axis, AxisName):
        return int(axis.name) if axis.name.isdigit() else sizes.get(axis.name)
    lengths = [axis_size(part, sizes) for part in _parts(axis)]
    known = [length for length in lengths if length is not None]
    if len(known) < len(lengths):
        return None
    return math.prod(known) if isinstance(axis, AxisProduct) else sum(known)


def solve_sizes(axes: tuple[Axis, ...], shape: torch.Size, sizes: Mapping[str, int], parameter: str) -> dict[str, int]:
    """Return the size of every name in `axes` for one tensor of `shape`.

    An axis of a single name takes its size from the tensor; one unknown factor of a product follows by division, one unknown
    term of a sum by subtraction.

    Args:
        sizes: those that are known from the config.
        parameter: the tensor's name, for the error.

    Raises:
        LayoutError: the axes do not multiply out to the shape; names the parameter, the pattern and both shapes.

    Example:
        >>> solve_sizes(parse_axes("(heads head_dim) embed"), torch.Size([64, 32]), {"heads": 4}, "q_proj")
        {'heads': 4, 'head_dim': 16, 'embed': 32}
    """
    pattern = " ".join(map(str, axes))
    if len(axes) != len(shape):
        raise LayoutError(f"{parameter} has shape {tuple(shape)}, but its layout '{pattern}' names {len(axes)} axes.")
    solved = dict(sizes)
    for axis, length in zip(axes, shape, strict=True):
        if isinstance(axis, AxisName) and not axis.name.isdigit():
            solved[axis.name] = length
        elif isinstance(axis, AxisProduct):
            unknown = [factor for factor in axis.factors if axis_size(factor, solved) is None]
            known = math.prod(axis_size(factor, solved) or 1 for factor in axis.factors if factor not in unknown)
            if len(unknown) == 1 and isinstance(unknown[0], AxisName) and length % known == 0:
                solved[unknown[0].name] = length // known
        elif isinstance(axis, AxisConcat):
            unknown = [term for term in axis.terms if axis_size(term, solved) is None]
            if len(unknown) == 1 and isinstance(unknown[0], AxisName):
                solved[unknown[0].name] = length - sum(axis_size(term, solved) or 0 for term in axis.terms)
    expected = tuple(axis_size(axis, solved) for axis in axes)
    if expected != tuple(shape):
        raise LayoutError(
            f"{parameter} has shape {tuple(shape)}, but its layout '{pattern}' "
            f"multiplies out to {expected} with the config's sizes."
        )
    return solved


def select_indices(axis: Axis, selector: AxisSelector, sizes: Mapping[str, int]) -> tuple[Tensor, Tensor]:
    """Return the indices of the teacher's flattened `axis` that the student keeps, and a factor for each.

    Args:
        selector: gives both for one named axis.
        sizes: the teacher's.

    Example:
        >>> first_two = lambda name: (torch.arange(2), torch.ones(2))
        >>> select_indices(parse_axes("(heads head_dim)")[0], first_two, {"heads": 4, "head_dim": 8})[0].tolist()
        [0, 1, 8, 9]
    """
    if isinstance(axis, AxisName):
        if axis.name.isdigit():
            return torch.arange(int(axis.name)), torch.ones(int(axis.name), dtype=torch.float64)
        return selector(axis.name)
    selected = [select_indices(part, selector, sizes) for part in _parts(axis)]
    lengths = [axis_size(part, sizes) or 0 for part in _parts(axis)]
    indices, factors = selected[0]
    if isinstance(axis, AxisProduct):
        for (inner, inner_factors), length in zip(selected[1:], lengths[1:], strict=True):
            indices = (indices[:, None] * length + inner[None, :]).flatten()
            factors = (factors[:, None] * inner_factors[None, :]).flatten()
        return indices, factors
    offsets = [sum(lengths[:i]) for i in range(len(lengths))]
    indices = torch.cat([part[0] + offset for part, offset in zip(selected, offsets, strict=True)])
    return indices, torch.cat([part[1] for part in selected])


def group_indices(axis: Axis, groups: str, group: int, size: str, sizes: Mapping[str, int]) -> Tensor:
    """Return the indices on `axis` of the entries of one group: those of its members one after another.

    Args:
        groups: the axis that counts the groups, such as "kv_heads".
        group: the number of the group.
        size: the axis of an entry of a group, such as "head_dim".
    """

    def selector(name: str) -> tuple[Tensor, Tensor]:
        if name == groups:
            indices = torch.tensor([group])
        else:
            indices = torch.arange(sizes[name]) if name in (size, "group") else torch.arange(0)
        return indices, torch.ones(len(indices), dtype=torch.float64)

    return select_indices(axis, selector, sizes)[0]


@dataclass(frozen=True)
class Identity:
    """The axis stays as it is."""

    def __str__(self) -> str:
        return "kept"


@dataclass(frozen=True)
class Selection:
    """The axis keeps the teacher's entries at `indices`, each times its factor; -1 is a row of zeros (a padded vocabulary)."""

    indices: Tensor
    factors: Tensor
    size: int

    def __str__(self) -> str:
        scaled = "" if bool((self.factors == 1).all()) else ", scaled"
        return f"selection {self.size} -> {len(self.indices)}{scaled}"


@dataclass(frozen=True)
class Projection:
    """The axis is contracted with `matrix`, (d_T, d_S)."""

    matrix: Tensor

    @functools.cached_property
    def is_selection(self) -> bool:
        """Whether each direction is one of the teacher's channels."""
        return bool(((self.matrix == 0) | (self.matrix == 1)).all() and (self.matrix.sum(0) == 1).all())

    def __str__(self) -> str:
        kind = "channels" if self.is_selection else "projection"
        return f"{kind} {self.matrix.shape[0]} -> {self.matrix.shape[1]}"


AxisMap = Identity | Selection | Projection


def apply_selection(tensor: Tensor, dim: int, selection: Selection) -> Tensor:
    """Return `tensor` with only the selected entries of axis `dim`, in its own dtype; the factors are not applied."""
    absent = selection.indices < 0
    if not bool(absent.any()):
        return tensor.index_select(dim, selection.indices.to(tensor.device))
    selected = tensor.index_select(dim, selection.indices.clamp(min=0).to(tensor.device))
    shape = [1] * tensor.ndim
    shape[dim] = -1
    return selected.masked_fill_(absent.view(shape).to(tensor.device), 0)


def project_axis(
    tensor: Tensor, dim: int, matrix: Tensor, dtype: torch.dtype, *, diagonal: Tensor | None = None
) -> Tensor:
    """Return `tensor` with axis `dim` contracted with `diag(diagonal) @ matrix`, whose product is rounded to `dtype` once.

    The tensor is processed in pieces of about 64 MB, so that one in half precision is never held whole in a wider dtype.
    """
    effective = torch.empty(matrix.shape, dtype=dtype, device=matrix.device)
    if diagonal is None:
        effective.copy_(matrix)
    else:
        torch.mul(diagonal[:, None], matrix, out=effective)
    effective = effective.to(tensor.device)
    moved = tensor.movedim(dim, -1)
    result = torch.empty(*moved.shape[:-1], matrix.shape[1], dtype=dtype, device=tensor.device)
    if moved.ndim == 1:
        return moved.to(dtype) @ effective
    rows_at_once = max(1, (64 << 20) // max(1, moved[0].numel() * dtype.itemsize))
    for start in range(0, moved.shape[0], rows_at_once):
        piece = slice(start, start + rows_at_once)
        torch.matmul(moved[piece].to(dtype), effective, out=result[piece])
    return result.movedim(-1, dim)
