"""Solve the ridge regression of a weight's desired output on its input, towards the weight that is there."""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_guide.utils.distributed import all_reduce_sum_, rank_and_world_size

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Ridges that are tried, in units of the mean square of a feature: from nearly unregularised to nearly fixed."""

ROUNDING_FLOOR = 1e-10
"""An update that reduces the squared error by less than this share of the weight's squared output is rounding, and dropped.

Where the models' own rounding is coarser its square is used: for bfloat16 some 6e-5.
"""

MIN_FEATURE_PENALTY = 1e-3
"""A feature is penalised as if its mean square were at least this share of the mean over all features."""

VALIDATION_EVERY = 4
"""The last of so many batches is held out to choose the ridge."""


def max_eps(*dtypes: torch.dtype) -> float:
    """Return the relative spacing of numbers in the coarsest of the dtypes; 2^-7 for bfloat16."""
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def at_least_float32(rows: Tensor) -> Tensor:
    """Return rows in float32 or better, for sums and differences that a model's dtype would round or overflow."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def append_bias_column(rows: Tensor, has_bias: bool) -> Tensor:
    """Return rows, (tokens, width), with a column of ones if a bias is to be fitted too."""
    return torch.cat([rows, torch.ones_like(rows[:, :1])], 1) if has_bias else rows


@dataclass
class NormalEquations:
    """Sums over rows x of features and rows y of targets, float64.

    Attributes:
        gram: Sum of x^T x, (features, features).
        cross: Sum of y^T x, (targets, features).
    """

    gram: Tensor
    cross: Tensor

    @classmethod
    def zeros(cls, features: int, targets: int) -> "NormalEquations":
        """Return empty sums."""
        return cls(
            torch.zeros(features, features, dtype=torch.float64), torch.zeros(targets, features, dtype=torch.float64)
        )

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows, (tokens, features) and (tokens, targets); their products are taken in float32 or better."""
        dtype = torch.promote_types(at_least_float32(x).dtype, at_least_float32(y).dtype)
        x, y = x.to(dtype), y.to(dtype)
        self.gram += (x.T @ x).double().cpu()
        self.cross += (y.T @ x).double().cpu()

    def reduce(self) -> "NormalEquations":
        """Add the sums of the other processes."""
        all_reduce_sum_([self.gram, self.cross])
        return self


@dataclass
class TrainValNormalEquations:
    """Normal equations of the batches that are fitted to, and of those held out to choose the ridge."""

    train: NormalEquations
    validation: NormalEquations

    @classmethod
    def zeros(cls, features: int, targets: int) -> "TrainValNormalEquations":
        """Return empty sums."""
        return cls(NormalEquations.zeros(features, targets), NormalEquations.zeros(features, targets))

    def add(self, x: Tensor, y: Tensor, batch: int) -> None:
        """Add the rows of this process's batch of that index."""
        rank, world_size = rank_and_world_size()
        is_validation = (rank + batch * world_size) % VALIDATION_EVERY == VALIDATION_EVERY - 1
        (self.validation if is_validation else self.train).add(x, y)

    def reduce(self) -> "TrainValNormalEquations":
        """Add the sums of the other processes."""
        self.train.reduce()
        self.validation.reduce()
        return self


def select_ridge(
    weight: Tensor,
    grams: tuple[Tensor, Tensor],
    residuals: tuple[Tensor, Tensor],
    ridge: float | None,
    eps: float = 0.0,
) -> tuple[Tensor, float | None]:
    """Return the update of a weight, (out, features), and its ridge: the given one, or the best on the held-out batches.

    Args:
        weight: The weight that is updated, (out, features), float64.
        grams, residuals: As in `ridge_update`, of the train and of the validation batches.
        ridge: None chooses one of `RIDGES`.
        eps: Relative rounding error of the models, from `max_eps`.

    Returns:
        The update fitted to all batches. It is zero, and the ridge None, where every update does worse on the held-out
        batches than none, or reduces the error by no more than rounding does.
    """
    total, by_feature = (grams[0] + grams[1], residuals[0] + residuals[1]), False
    if ridge is None and grams[1].any():
        best, best_reduction = None, 0.0
        for candidate, candidate_by_feature in itertools.product(RIDGES, (False, True)):
            update = ridge_update(grams[0], residuals[0], candidate, by_feature=candidate_by_feature)
            reduction = _sse_reduction(update, grams[1], residuals[1])
            if reduction > best_reduction:
                best, best_reduction = (candidate, candidate_by_feature), reduction
        if best is None:
            return torch.zeros_like(weight), None
        ridge, by_feature = best
    ridge = RIDGES[2] if ridge is None else ridge
    update = ridge_update(*total, ridge, by_feature=by_feature)
    if _sse_reduction(update, *total) <= max(ROUNDING_FLOOR, eps**2) * ((weight @ total[0]) * weight).sum().item():
        return torch.zeros_like(weight), None
    return update, ridge


def _sse_reduction(update: Tensor, gram: Tensor, residual: Tensor) -> float:
    """Return by how much an update reduces the sum of squared errors."""
    return (2 * (update * residual).sum() - ((update @ gram) * update).sum()).item()


def ridge_update(gram: Tensor, residual: Tensor, ridge: float, *, by_feature: bool = False) -> Tensor:
    """Return the D that minimises sum |r - D x|^2 + ridge * sum_j m_j |D_j|^2, (out, features) float64.

    Args:
        gram: Sum of x^T x, (features, features).
        residual: Sum of r^T x, (out, features), with r what the weight's output lacks. Where it is zero, so is D.
        ridge: Strength of the regularisation.
        by_feature: m_j is the sum of squares of feature j; otherwise the mean of those sums, the same for every feature. A
            few features with massive activations make that mean so large that all others stay as they are.

    Example:
        >>> x = torch.randn(50, 4, dtype=torch.float64)
        >>> missing = x @ torch.ones(4, 2, dtype=torch.float64)  # what a weight that is one too small lacks
        >>> update = ridge_update(x.T @ x, missing.T @ x, ridge=1e-9)
        >>> bool(torch.allclose(update, torch.ones(2, 4, dtype=torch.float64)))
        True
    """
    squares = gram.diagonal()
    scale = squares.mean()
    if scale <= 0:
        return torch.zeros_like(residual)
    penalty = (squares / scale).clamp(min=MIN_FEATURE_PENALTY) if by_feature else torch.ones_like(squares)
    system = gram / scale
    system.diagonal().add_(ridge * penalty)
    factor, failed = torch.linalg.cholesky_ex(system)
    if failed:
        return (residual / scale) @ torch.linalg.pinv(system, hermitian=True)
    return torch.cholesky_solve((residual / scale).T, factor).T
