"""Sum the normal equations of a regression over rows of activations, a batch at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_guide.utils.distributed import all_reduce_sum_

BUFFERED_ROWS = 1024
"""Rows of which a product is taken at once."""

SYMMETRIC_BLOCKS, MIN_SYMMETRIC_WIDTH = 8, 1024
"""A symmetric product is computed in so many strips from the diagonal on, where it is that wide."""


def at_least_float32(rows: Tensor) -> Tensor:
    """Return rows in float32 or better, for sums and differences that a model's dtype would round or overflow."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def append_bias_column(rows: Tensor, has_bias: bool) -> Tensor:
    """Return rows, (tokens, width), with a column of ones if a bias is to be fitted too."""
    return torch.cat([rows, torch.ones_like(rows[:, :1])], 1) if has_bias else rows


def symmetric_product(rows: Tensor) -> Tensor:
    """Return x^T x of rows x, (width, width), with little more than half of the operations where it is wide.

    Example:
        >>> x = torch.randn(16, 2048)
        >>> torch.testing.assert_close(symmetric_product(x), x.T @ x, atol=1e-4, rtol=1e-4)
    """
    return add_symmetric_product_(rows.new_zeros(rows.shape[1], rows.shape[1]), rows)


def add_symmetric_product_(total: Tensor, rows: Tensor) -> Tensor:
    """Add x^T x of rows x to `total`, (width, width), which may be of another dtype and device, and return it.

    Of a wide product only a strip is in memory at a time.

    Example:
        >>> add_symmetric_product_(torch.eye(2, dtype=torch.float64), torch.ones(3, 2))
        tensor([[4., 3.],
                [3., 4.]], dtype=torch.float64)
    """
    for start, end in _strip_bounds(rows.shape[1]):
        strip = _strip_product(rows, start, end).to(total.device)
        total[start:end, start:] += strip
        total[end:, start:end] += strip[:, end - start :].T
    return total


def _strip_bounds(width: int) -> Iterator[tuple[int, int]]:
    """Yield the first row of each strip of a symmetric matrix, and the one after its last."""
    step = width if width < MIN_SYMMETRIC_WIDTH else -(-width // SYMMETRIC_BLOCKS)
    for start in range(0, width, max(1, step)):
        yield start, min(start + step, width)


def _strip_product(rows: Tensor, start: int, end: int) -> Tensor:
    """Return a strip of x^T x from the diagonal on, (end - start, width - start)."""
    return rows[:, start:end].T @ rows[:, start:]


class SymmetricSum:
    """The sum of x^T x over rows x, in float64, of which strips from the diagonal on are in memory.

    Example:
        >>> total = SymmetricSum.zeros(2)
        >>> total.add(torch.ones(3, 2))
        >>> total.full()
        tensor([[3., 3.],
                [3., 3.]], dtype=torch.float64)
    """

    def __init__(self, strips: list[Tensor]):
        self.strips = strips

    @classmethod
    def zeros(cls, width: int) -> "SymmetricSum":
        """Return an empty sum, (width, width)."""
        return cls(
            [torch.zeros(end - start, width - start, dtype=torch.float64) for start, end in _strip_bounds(width)]
        )

    def add(self, rows: Tensor) -> None:
        """Add x^T x of rows x, (tokens, width); products are of the rows' dtype."""
        start = 0
        for strip in self.strips:
            end = start + len(strip)
            strip += _strip_product(rows, start, end).to(strip.device)
            start = end

    def diagonal(self) -> Tensor:
        """Return the sums of squares, (width,)."""
        return torch.cat([strip.diagonal() for strip in self.strips])

    def without_last(self) -> "SymmetricSum":
        """Return the sum without the last column of the rows, sharing memory."""
        strips = [strip[:, :-1] for strip in self.strips]
        return SymmetricSum([*strips[:-1], strips[-1][:-1]])

    def full(self, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
        """Return the matrix divided by `scale`, (width, width), in a dtype."""
        width = sum(map(len, self.strips))
        total, start = torch.empty(width, width, dtype=dtype), 0
        for strip in self.strips:
            end = start + len(strip)
            total[start:end, start:] = strip if scale == 1.0 else strip / scale
            total[end:, start:end] = total[start:end, end:].T
            start = end
        return total


class RowBuffer:
    """Rows of several tensors that are passed on together, about `BUFFERED_ROWS` at a time.

    Sums in float64 of products in float32 cost as much as the products themselves where those are of few rows.

    Example:
        >>> sums = []
        >>> buffer = RowBuffer(lambda rows: sums.append(len(rows)))
        >>> for _ in range(5):
        ...     buffer.add(torch.zeros(300, 2))
        >>> buffer.flush()
        >>> sums
        [1200, 300]
    """

    def __init__(self, add: Callable[..., None]):
        self._add = add
        self._rows: list[tuple[Tensor, ...]] = []

    def add(self, *rows: Tensor) -> None:
        """Add rows, (tokens, width) each, of as many tensors at each call."""
        self._rows.append(rows)
        if sum(len(each[0]) for each in self._rows) >= BUFFERED_ROWS:
            self.flush()

    def flush(self) -> None:
        """Pass on what is there."""
        if self._rows:
            joined = [torch.cat(each) if len(each) > 1 else each[0] for each in zip(*self._rows, strict=True)]
            self._rows.clear()
            self._add(*joined)


@dataclass
class NormalEquations:
    """The normal equations of the regression of targets y on features x.

    Attributes:
        gram: Sum of x^T x, (features, features).
        cross: Sum of y^T x, (targets, features).
    """

    gram: Tensor
    cross: Tensor


@dataclass
class NormalEquationSums:
    """Sums over rows x of features and rows y of targets, float64.

    Attributes:
        gram: Sum of x^T x.
        cross: Sum of y^T x, (targets, features).
    """

    gram: SymmetricSum
    cross: Tensor

    @classmethod
    def zeros(cls, features: int, targets: int) -> "NormalEquationSums":
        """Return empty sums."""
        return cls(SymmetricSum.zeros(features), torch.zeros(targets, features, dtype=torch.float64))

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows, (tokens, features) and (tokens, targets); their products are taken in float32 or better."""
        dtype = torch.promote_types(at_least_float32(x).dtype, at_least_float32(y).dtype)
        x, y = x.to(dtype), y.to(dtype)
        self.gram.add(x)
        self.cross += (y.T @ x).cpu()

    def reduce(self) -> "NormalEquationSums":
        """Add the sums of the other processes."""
        all_reduce_sum_(self._tensors())
        return self

    def clone(self) -> "NormalEquationSums":
        """Return a copy of the sums."""
        return NormalEquationSums(SymmetricSum([strip.clone() for strip in self.gram.strips]), self.cross.clone())

    def without_last_feature(self) -> "NormalEquationSums":
        """Return the sums over the other features, sharing memory."""
        return NormalEquationSums(self.gram.without_last(), self.cross[:, :-1])

    def __iadd__(self, other: "NormalEquationSums") -> "NormalEquationSums":
        for total, part in zip(self._tensors(), other._tensors(), strict=True):
            total += part
        return self

    def _tensors(self) -> list[Tensor]:
        return [*self.gram.strips, self.cross]

    def full(self, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> NormalEquations:
        """Return the normal equations divided by `scale`, in a dtype."""
        return NormalEquations(self.gram.full(dtype, scale), (self.cross / scale).to(dtype))


@dataclass
class TrainValNormalEquations:
    """Normal equations of the rows that are fitted to, and of those held out to choose the ridge."""

    train: NormalEquationSums
    validation: NormalEquationSums

    def __post_init__(self) -> None:
        self._buffers = [RowBuffer(each.add) for each in (self.train, self.validation)]

    @classmethod
    def zeros(cls, features: int, targets: int) -> "TrainValNormalEquations":
        """Return empty sums."""
        return cls(NormalEquationSums.zeros(features, targets), NormalEquationSums.zeros(features, targets))

    def add(self, x: Tensor, y: Tensor, held_out: Tensor) -> None:
        """Add rows, of which those are held out for which `held_out`, (tokens,) bool, is true."""
        for buffer, mask in zip(self._buffers, (~held_out, held_out), strict=True):
            if mask.any():
                buffer.add(x[mask], y[mask])

    def reduce(self) -> "TrainValNormalEquations":
        """Add the sums of the other processes."""
        for buffer in self._buffers:
            buffer.flush()
        self.train.reduce()
        self.validation.reduce()
        return self

    def without_last_feature(self) -> "TrainValNormalEquations":
        """Return the sums over the other features, sharing memory."""
        return TrainValNormalEquations(self.train.without_last_feature(), self.validation.without_last_feature())

    def clone(self) -> "TrainValNormalEquations":
        """Return a copy of the sums."""
        return TrainValNormalEquations(self.train.clone(), self.validation.clone())

    def merge(self) -> None:
        """Make those that are fitted the sums over all rows; the others are freed. No rows are added from then on."""
        self._buffers.clear()  # they refer to the sums, which would stay in memory
        if self.validation.gram.strips:
            self.train += self.validation
            self.validation = NormalEquationSums.zeros(0, 0)

    def take_total(self) -> NormalEquationSums:
        """Return the sums over all rows, which are no longer kept here."""
        self.merge()
        total, self.train = self.train, NormalEquationSums.zeros(0, 0)
        return total
