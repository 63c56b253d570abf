"""Solve the ridge regression of a weight's desired output on its input, towards the weight that is there."""

import itertools
from collections.abc import Callable, Sequence
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


ReadRows = Callable[[], tuple[Tensor, tuple[Tensor, Tensor]]]
"""Returns some rows of a weight, (rows, features), and the sums of r^T x of the train and of the validation batches, with r
what those rows' output lacks; float64."""

_Candidate = tuple[float, bool]
"""A ridge, and whether each feature is penalised by its own mean square."""


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
        self.gram += (x.T @ x).cpu()  # added in float64, without a copy in it
        self.cross += (y.T @ x).cpu()

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
    """Return the update of one weight, (out, features), and its ridge, as `select_ridges`; zero and None for no update."""
    fitted = select_ridges([[lambda: (weight, residuals)]], grams, ridge, eps)[0]
    return (torch.zeros_like(weight), None) if fitted is None else (fitted[0] - weight, fitted[1])


def select_ridges(
    weights: Sequence[Sequence[ReadRows]], grams: tuple[Tensor, Tensor], ridge: float | None, eps: float = 0.0
) -> list[tuple[Tensor, float] | None]:
    """Return each weight updated, (out, features), and its ridge: the given one, or the best on the held-out batches.

    Args:
        weights: The weights of one input, each in parts of some rows, which are read when they are needed.
        grams: Sum of x^T x as in `ridge_update`, of the train and of the validation batches.
        ridge: None chooses one of `RIDGES`.
        eps: Relative rounding error of the models, from `max_eps`.

    Returns:
        The weights fitted to all batches, float64, or float32 of several parts. None where every update does worse on the
        held-out batches than none, or reduces the error by no more than rounding does.
    """
    chosen: list[_Candidate | None] = [(RIDGES[2] if ridge is None else ridge, False)] * len(weights)
    if ridge is None and grams[1].any():
        chosen = _best_on_validation(weights, grams, eps)
    gram = grams[0] + grams[1]
    factors: dict[_Candidate, RidgeFactor] = {}
    results: list[tuple[Tensor, float] | None] = []
    for parts, candidate in zip(weights, chosen, strict=True):
        if candidate is None:
            results.append(None)
            continue
        if candidate not in factors:
            factors[candidate] = RidgeFactor(gram, *candidate)
        fitted: list[Tensor] = []
        reduction = floor = 0.0
        for read in parts:
            weight, (train, validation) = read()
            residual = train + validation
            update = factors[candidate].update(residual)
            reduction += _sse_reduction(update, gram, residual)
            floor += max(ROUNDING_FLOOR, eps**2) * ((weight @ gram) * weight).sum().item()
            fitted.append(weight + update if len(parts) == 1 else (weight + update).float())
        results.append((torch.cat(fitted), candidate[0]) if reduction > floor else None)
    return results


def _best_on_validation(
    weights: Sequence[Sequence[ReadRows]], grams: tuple[Tensor, Tensor], eps: float
) -> list[_Candidate | None]:
    """Return for each weight the ridge and the kind of penalty with the least error on the held-out batches.

    One factorization serves all weights. Candidates are computed in float32 for models that are no more exact: they are only
    compared, and the update itself is computed from the chosen one in float64. (An eigendecomposition, which would serve all
    ridges, takes as long as 17 factorizations.)
    """
    dtype = torch.float32 if eps >= torch.finfo(torch.float32).eps else torch.float64
    scale = grams[0].diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)  # so that float32 does not overflow
    train, validation = ((gram / scale).to(dtype) for gram in grams)
    candidates = list(itertools.product(RIDGES, (False, True)))
    kept = {each: RidgeFactor(train, *each) for each in candidates} if max(map(len, weights)) > 1 else {}
    best: list[_Candidate | None] = [None] * len(weights)
    best_reductions = [0.0] * len(weights)
    if not kept:  # all weights at once, one factor at a time
        residuals = [read()[1] for (read,) in weights]
        joined = [(torch.cat(each) / scale).to(dtype) for each in zip(*residuals, strict=True)]
        sizes = [len(each) for each, _ in residuals]
        for candidate in candidates:
            update = RidgeFactor(train, *candidate).update(joined[0])
            terms = (update * (2 * joined[1] - update @ validation)).sum(1, dtype=torch.float64)
            for index, part in enumerate(terms.split(sizes)):
                if part.sum() > best_reductions[index]:
                    best[index], best_reductions[index] = candidate, part.sum().item()
        return best
    for index, parts in enumerate(weights):
        reductions = dict.fromkeys(candidates, 0.0)
        for read in parts:
            fitted_to, held_out = ((each / scale).to(dtype) for each in read()[1])
            for candidate, factor in kept.items():
                update = factor.update(fitted_to)
                terms = update * (2 * held_out - update @ validation)
                reductions[candidate] += terms.sum(dtype=torch.float64).item()
        top = max(candidates, key=reductions.__getitem__)
        best[index] = top if reductions[top] > 0 else None
    return best


def _sse_reduction(update: Tensor, gram: Tensor, residual: Tensor) -> float:
    """Return by how much an update reduces the sum of squared errors."""
    return (2 * (update * residual).sum() - ((update @ gram) * update).sum()).item()


class RidgeFactor:
    """The factorized system of a ridge regression, in the dtype of `gram`, for any number of weights of one input.

    Args:
        gram: Sum of x^T x, (features, features).
        ridge: Strength of the regularisation.
        by_feature: As in `ridge_update`.
    """

    def __init__(self, gram: Tensor, ridge: float, by_feature: bool):
        squares = gram.diagonal()
        self._scale = squares.mean()
        if self._scale <= 0:
            return
        penalty = squares / self._scale if by_feature else torch.ones_like(squares)
        penalty = penalty.clamp(min=MIN_FEATURE_PENALTY)
        # A unit diagonal, because features with massive activations would cost the others the digits of the dtype.
        self._unit = (squares / self._scale + ridge * penalty).rsqrt()
        system = gram / self._scale
        system.mul_(self._unit).mul_(self._unit[:, None])
        system.diagonal().fill_(1.0)
        self._factor, failed = torch.linalg.cholesky_ex(system)
        self._inverse = torch.linalg.pinv(system, hermitian=True) if failed else None

    def update(self, residual: Tensor) -> Tensor:
        """Return the update for the sum of r^T x, (out, features)."""
        if self._scale <= 0:
            return torch.zeros_like(residual)
        right = residual / self._scale * self._unit
        if self._inverse is None and len(right) > len(self._factor):
            self._inverse = torch.cholesky_inverse(self._factor)  # a product takes half the time of a solution
        if self._inverse is not None:
            return (right @ self._inverse) * self._unit
        return torch.cholesky_solve(right.T, self._factor).T * self._unit


def ridge_update(gram: Tensor, residual: Tensor, ridge: float, *, by_feature: bool = False) -> Tensor:
    """Return the D that minimises sum |r - D x|^2 + ridge * sum_j m_j |D_j|^2, (out, features) in the dtype of `gram`.

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
    return RidgeFactor(gram, ridge, by_feature).update(residual)
