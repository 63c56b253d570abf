"""Ridge regression of what a weight should make of its input, held to the weight that is there."""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_guide.utils.distributed import all_reduce_sum_, rank_and_world_size


def max_eps(*dtypes: torch.dtype) -> float:
    """Return the relative spacing of numbers in the coarsest of the dtypes: 2^-7 of bfloat16."""
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def at_least_float32(rows: Tensor) -> Tensor:
    """Return rows in float32 or better, for sums and differences that the dtype of a model would round or overflow."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


@dataclass
class NormalEquations:
    """Second moments of rows x of features and y of what goes with them, float64: the normal equations, streamed.

    Attributes:
        gram: sum of x^T x, (features, features).
        cross: sum of y^T x, (targets, features).
        energy: sum of |y|^2, (1,).
    """

    gram: Tensor
    cross: Tensor
    energy: Tensor

    @classmethod
    def of(cls, features: int, targets: int) -> "NormalEquations":
        """Return empty sums."""
        return cls(
            torch.zeros(features, features, dtype=torch.float64),
            torch.zeros(targets, features, dtype=torch.float64),
            torch.zeros(1, dtype=torch.float64),
        )

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows, (tokens, features) and (tokens, targets); their products are taken in float32 or better."""
        dtype = torch.promote_types(at_least_float32(x).dtype, at_least_float32(y).dtype)
        x, y = x.to(dtype), y.to(dtype)
        self.gram += (x.T @ x).double().cpu()
        self.cross += (y.T @ x).double().cpu()
        self.energy += y.square().sum(dtype=torch.float64).cpu()

    def gather(self) -> "NormalEquations":
        """Add what the other processes have."""
        all_reduce_sum_([self.gram, self.cross, self.energy])
        return self

    def __add__(self, other: "NormalEquations") -> "NormalEquations":
        return NormalEquations(self.gram + other.gram, self.cross + other.cross, self.energy + other.energy)


RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Those that are tried, in units of the mean square of a feature: from nearly free to nearly fixed."""

ROUNDING_FLOOR = 1e-10
"""What is gained less than this, of the square of what a weight makes, is a rounding error of the sums and left alone.

It is the square of the models' own rounding where that is coarser: of bfloat16 some 6e-5.
"""

MIN_FEATURE_PENALTY = 1e-3
"""A feature is held as if its mean square were at least this share of the mean of all."""

VALIDATION_EVERY = 4
"""Of so many batches the last is held out while a ridge is chosen."""


@dataclass
class TrainValNormalEquations:
    """Sums of what is fitted to, and of the batches that are held out to choose how strongly."""

    fitted: NormalEquations
    held_out: NormalEquations

    @classmethod
    def of(cls, features: int, targets: int) -> "TrainValNormalEquations":
        """Return empty sums."""
        return cls(NormalEquations.of(features, targets), NormalEquations.of(features, targets))

    def add(self, x: Tensor, y: Tensor, batch: int) -> None:
        """Add rows of a batch of this number."""
        rank, size = rank_and_world_size()
        (self.held_out if (rank + batch * size) % VALIDATION_EVERY == VALIDATION_EVERY - 1 else self.fitted).add(x, y)

    def gather(self) -> "TrainValNormalEquations":
        """Add what the other processes have."""
        self.fitted.gather()
        self.held_out.gather()
        return self


def select_ridge(
    own: Tensor,
    grams: tuple[Tensor, Tensor],
    residuals: tuple[Tensor, Tensor],
    ridge: float | None,
    rounding: float = 0.0,
) -> tuple[Tensor, float | None]:
    """Return the correction D, (out, features), and the ridge: the one given, or the one that does best on what is held out.

    Args:
        own: the weight that is there, (out, features), float64.
        grams, residuals: as `correction` takes them, of what is fitted to and of what is held out.
        rounding: of the models that were heard, as `max_eps` tells it.

    Returns:
        D fitted to both together; a ridge of None where every D does worse on what is held out than none, or gains no more
        than rounding errors are, which is then zero.
    """
    whole, by_feature = (grams[0] + grams[1], residuals[0] + residuals[1]), False
    if ridge is None and grams[1].any():
        best, gain = None, 0.0
        for tried, loud in itertools.product(RIDGES, (False, True)):
            found = ridge_update(grams[0], residuals[0], tried, by_feature=loud)
            less = _sse_reduction(found, grams[1], residuals[1])
            if less > gain:
                best, gain = (tried, loud), less
        if best is None:
            return torch.zeros_like(own), None
        ridge, by_feature = best
    ridge = RIDGES[2] if ridge is None else ridge
    found = ridge_update(*whole, ridge, by_feature=by_feature)
    if _sse_reduction(found, *whole) <= max(ROUNDING_FLOOR, rounding**2) * ((own @ whole[0]) * own).sum().item():
        return torch.zeros_like(own), None
    return found, ridge


def _sse_reduction(found: Tensor, gram: Tensor, residual: Tensor) -> float:
    """Return by how much the sum of squares falls with a correction."""
    return (2 * (found * residual).sum() - ((found @ gram) * found).sum()).item()


def ridge_update(gram: Tensor, residual: Tensor, ridge: float, *, by_feature: bool = False) -> Tensor:
    """Return the D that minimises sum |r - D x|^2 + ridge * sum_j m_j |D_j|^2.

    Args:
        gram: sum of x^T x, (features, features); residual: sum of r^T x, (out, features).
        by_feature: m_j is the sum of squares of feature j, and otherwise the mean of those sums, the same for every feature. A
            few loud features (massive activations) make the mean large, and then hold all others where they are.

    Returns:
        (out, features), float64: what is added to the weight. Where the weight leaves no residual it is zero.
    """
    squares = gram.diagonal()
    scale = squares.mean()
    if scale <= 0:
        return torch.zeros_like(residual)
    held = (squares / scale).clamp(min=MIN_FEATURE_PENALTY) if by_feature else torch.ones_like(squares)
    system = gram / scale
    system.diagonal().add_(ridge * held)
    factor, failed = torch.linalg.cholesky_ex(system)
    if failed:
        return (residual / scale) @ torch.linalg.pinv(system, hermitian=True)
    return torch.cholesky_solve((residual / scale).T, factor).T


def append_bias_column(rows: Tensor, has_bias: bool) -> Tensor:
    """Return rows, (tokens, width), with a column of ones where a bias is to be fitted with them."""
    return torch.cat([rows, torch.ones_like(rows[:, :1])], 1) if has_bias else rows
