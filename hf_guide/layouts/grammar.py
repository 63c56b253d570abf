"""The grammar of axis names, and how one axis of one tensor gets smaller.

An axis is written as in einops: a name (`embed`), a whole number (`3`), a product (`(heads head_dim)`), or a product of
sums (`(heads q_dim + heads k_dim + heads head_dim)`), nested at will. A tensor's axes are written side by side.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_guide.errors import LayoutError


@dataclass(frozen=True)
class AxisName:
    """An axis of one meaning, or a whole number of places that are always kept."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class AxisProduct:
    """Axes laid out inside one another, the last one running fastest."""

    factors: "tuple[Axis, ...]"

    def __str__(self) -> str:
        return "(" + " ".join(map(str, self.factors)) + ")"


@dataclass(frozen=True)
class AxisConcat:
    """Axes laid out one after another, as in a fused query, key and value."""

    terms: "tuple[Axis, ...]"

    def __str__(self) -> str:
        return "(" + " + ".join(str(term).removeprefix("(").removesuffix(")") for term in self.terms) + ")"


Axis = AxisName | AxisProduct | AxisConcat
AxisSelector = Callable[[str], tuple[Tensor, Tensor]]


def parse_axes(pattern: str) -> tuple[Axis, ...]:
    """Return the axes that `pattern` names, for example `"(heads head_dim) embed"`.

    Raises:
        LayoutError: unbalanced parentheses or an unexpected character.
    """
    tokens = re.findall(r"[A-Za-z_]\w*|\d+|[()+]|\S", pattern)
    position = 0

    def product() -> tuple[Axis, ...]:
        nonlocal position
        factors: list[Axis] = []
        while position < len(tokens) and tokens[position] not in ("+", ")"):
            token = tokens[position]
            position += 1
            if token == "(":
                terms = [product()]
                while position < len(tokens) and tokens[position] == "+":
                    position += 1
                    terms.append(product())
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

    axes = product()
    if position != len(tokens):
        raise LayoutError(f"The axes {pattern!r} do not parse at {tokens[position]!r}.")
    return axes


def axis_names(axis: Axis) -> list[str]:
    """Return the names in `axis`, whole numbers left out, in their order."""
    if isinstance(axis, AxisName):
        return [] if axis.name.isdigit() else [axis.name]
    parts = axis.factors if isinstance(axis, AxisProduct) else axis.terms
    return [name for part in parts for name in axis_names(part)]


def name_and_repeats(axis: Axis) -> tuple[str, int]:
    """Return the name of `axis` and how often it stands side by side: once, or n times in `(n name)`; "" for other axes."""
    if isinstance(axis, AxisName):
        return axis.name, 1
    if isinstance(axis, AxisProduct) and len(axis.factors) == 2:
        times, inner = axis.factors
        if isinstance(times, AxisName) and times.name.isdigit() and isinstance(inner, AxisName):
            return inner.name, int(times.name)
    return "", 1


def merge_adjacent(axis: Axis, first: str, second: str) -> Axis:
    """Return `axis` with the names `first` and `second`, where they stand side by side, made the one "first second"."""
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
    """Return the length of `axis`, or None where a name in it has no known size."""
    if isinstance(axis, AxisName):
        return int(axis.name) if axis.name.isdigit() else sizes.get(axis.name)
    parts = [axis_size(part, sizes) for part in (axis.factors if isinstance(axis, AxisProduct) else axis.terms)]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    return math.prod(known) if isinstance(axis, AxisProduct) else sum(known)


def solve_sizes(axes: tuple[Axis, ...], shape: torch.Size, sizes: Mapping[str, int], parameter: str) -> dict[str, int]:
    """Return the size of every name in `axes` for one tensor of `shape`.

    An axis of a single name takes its size from the tensor; one unknown factor of a product follows by division.

    Raises:
        LayoutError: the axes do not multiply out to the shape; names the parameter, the pattern and both shapes.
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
    expected = tuple(axis_size(axis, solved) for axis in axes)
    if expected != tuple(shape):
        raise LayoutError(
            f"{parameter} has shape {tuple(shape)}, but its layout '{pattern}' "
            f"multiplies out to {expected} with the config's sizes."
        )
    return solved


def select_indices(axis: Axis, leaf: AxisSelector, sizes: Mapping[str, int]) -> tuple[Tensor, Tensor]:
    """Return which places of the teacher's flattened `axis` the student keeps, and a factor for each.

    `leaf(name)` gives both for one named axis; `sizes` are the teacher's.
    """
    if isinstance(axis, AxisName):
        if axis.name.isdigit():
            return torch.arange(int(axis.name)), torch.ones(int(axis.name), dtype=torch.float64)
        return leaf(axis.name)
    parts = [
        select_indices(part, leaf, sizes) for part in (axis.factors if isinstance(axis, AxisProduct) else axis.terms)
    ]
    lengths = [axis_size(part, sizes) or 0 for part in (axis.factors if isinstance(axis, AxisProduct) else axis.terms)]
    places, factors = parts[0]
    if isinstance(axis, AxisProduct):
        for (inner, inner_factors), length in zip(parts[1:], lengths[1:], strict=True):
            places = (places[:, None] * length + inner[None, :]).flatten()
            factors = (factors[:, None] * inner_factors[None, :]).flatten()
        return places, factors
    offsets = [sum(lengths[:i]) for i in range(len(lengths))]
    places = torch.cat([part[0] + offset for part, offset in zip(parts, offsets, strict=True)])
    return places, torch.cat([part[1] for part in parts])


def group_indices(axis: Axis, groups: str, group: int, size: str, sizes: Mapping[str, int]) -> Tensor:
    """Return where on an axis the places of `size` of one group stand, its members one after another."""

    def leaf(name: str) -> tuple[Tensor, Tensor]:
        if name == groups:
            places = torch.tensor([group])
        else:
            places = torch.arange(sizes[name]) if name in (size, "group") else torch.arange(0)
        return places, torch.ones(len(places), dtype=torch.float64)

    return select_indices(axis, leaf, sizes)[0]


@dataclass(frozen=True)
class Identity:
    """The axis stays as it is."""

    def __str__(self) -> str:
        return "kept"


@dataclass(frozen=True)
class Selection:
    """The axis keeps the teacher's `places`, each times its factor; a place of -1 is a row of zeros (a padded vocabulary)."""

    places: Tensor
    factors: Tensor
    size: int

    def __str__(self) -> str:
        scaled = "" if bool((self.factors == 1).all()) else ", scaled"
        return f"selection {self.size} -> {len(self.places)}{scaled}"


@dataclass(frozen=True)
class Projection:
    """The axis is contracted with `matrix`, (d_T, d_S)."""

    matrix: Tensor

    @property
    def is_selection(self) -> bool:
        """Whether each direction is one of the places."""
        return bool(((self.matrix == 0) | (self.matrix == 1)).all() and (self.matrix.sum(0) == 1).all())

    def __str__(self) -> str:
        return f"{'places' if self.is_selection else 'projection'} {self.matrix.shape[0]} -> {self.matrix.shape[1]}"


AxisMap = Identity | Selection | Projection


def apply_selection(tensor: Tensor, dim: int, chosen: Selection) -> Tensor:
    """Return `tensor` with only the chosen places of axis `dim`, in its own dtype; the factors are left to the caller."""
    if not bool((chosen.places < 0).any()):
        return tensor.index_select(dim, chosen.places.to(tensor.device))
    kept = tensor.index_select(dim, chosen.places.clamp(min=0).to(tensor.device))
    shape = [1] * tensor.ndim
    shape[dim] = -1
    return kept.masked_fill_((chosen.places < 0).view(shape).to(tensor.device), 0)


def project_axis(
    tensor: Tensor, dim: int, matrix: Tensor, dtype: torch.dtype, *, diagonal: Tensor | None = None
) -> Tensor:
    """Return `tensor` with axis `dim` contracted with `diag(diagonal) @ matrix`, computed in `dtype`.

    The work goes in pieces of about 64 MB, so that a half-precision tensor is never held whole in a wider dtype.
    """
    effective = matrix if diagonal is None else diagonal[:, None] * matrix
    effective = effective.to(device=tensor.device, dtype=dtype)
    moved = tensor.movedim(dim, -1)
    result = torch.empty(*moved.shape[:-1], matrix.shape[1], dtype=dtype, device=tensor.device)
    if moved.ndim == 1:
        return moved.to(dtype) @ effective
    rows_at_once = max(1, (64 << 20) // max(1, moved[0].numel() * dtype.itemsize))
    for start in range(0, moved.shape[0], rows_at_once):
        piece = slice(start, start + rows_at_once)
        torch.matmul(moved[piece].to(dtype), effective, out=result[piece])
    return result.movedim(-1, dim)
