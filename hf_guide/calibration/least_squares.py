"""Solve the ridge regression of a weight's desired output on its input, towards the weight that is there."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_guide.calibration.normal_equations import (
    BUFFERED_ROWS,
    NormalEquations,
    NormalEquationSums,
    TrainValNormalEquations,
    symmetric_product,
)
from hf_guide.utils.distributed import rank_and_world_size
from hf_guide.utils.memory import return_freed_memory

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Ridges that are tried, in units of the mean square of a feature: from nearly unregularised to nearly fixed."""

ROUNDING_FLOOR = 1e-10
"""An update that reduces the squared error by less than this share of the weight's squared output is rounding, and dropped.

Where the models' own rounding is coarser its square is used: for bfloat16 some 6e-5.
"""

MIN_FEATURE_PENALTY = 1e-3
"""A feature is penalised as if its mean square were at least this share of the mean over all features."""

SCORED_SUMS = 64
"""Sums of a weight's rows, with random signs, by which its ridge is chosen: their mean error is that of the rows."""

CHUNK_BYTES = 8 << 20
"""Bytes of the rows of a weight, as of a head over a large vocabulary, that are fitted at a time, in float64."""

_Candidate = tuple[float, bool]
"""A ridge, and whether each feature is penalised by its own mean square."""


def max_eps(*dtypes: torch.dtype) -> float:
    """Return the relative spacing of numbers in the coarsest of the dtypes; 2^-7 for bfloat16."""
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def fit_dtype(eps: float) -> torch.dtype:
    """Return the dtype of the products of a fit: float64, or float32 for models whose rounding is coarser than float32's."""
    return torch.float32 if eps > torch.finfo(torch.float32).eps else torch.float64


@dataclass
class FitTarget:
    """A weight whose rows are fitted, a part at a time; each part is read when it is needed.

    Attributes:
        rows: The number of its rows.
        weight: Returns some of its rows, (rows, features), float64 and on the CPU.
        teacher: Returns the rows, (rows, targets), of the weight that computes the desired outputs from the targets of the
            normal equations; None if those targets are what the outputs lack.
    """

    rows: int
    weight: Callable[[slice], Tensor]
    teacher: Callable[[slice], Tensor] | None = None

    def missing(self, rows: slice, weight: Tensor, sums: NormalEquations) -> Tensor:
        """Return for some rows the sum of r^T x, (rows, features), with r what their outputs lack, in the sums' dtype."""
        return sums.cross[rows] if self.teacher is None else _missing(self.teacher(rows), weight, sums)

    def scored(self, dtype: torch.dtype) -> "ScoredRows":
        """Return that by which the ridge is chosen, computed in a dtype."""
        signs = random_signs(self.rows).to(dtype)
        chunks = row_chunks(self.rows, BUFFERED_ROWS)
        weight = sum((signs[:, rows] @ self.weight(rows).to(dtype) for rows in chunks), torch.zeros((), dtype=dtype))
        if self.teacher is None:
            return ScoredRows(weight, signs, None)
        teacher = sum((signs[:, rows] @ self.teacher(rows).to(dtype) for rows in chunks), torch.zeros((), dtype=dtype))
        return ScoredRows(weight, teacher, weight)


@dataclass
class ScoredRows:
    """Sums of a weight's rows, by which its ridge is chosen.

    Attributes:
        weight: The sums, (sums, features).
        desired: What multiplies the targets, (sums, targets).
        present: What multiplies the features, and is subtracted; None if the targets are what the outputs lack.
    """

    weight: Tensor
    desired: Tensor
    present: Tensor | None

    def missing(self, sums: NormalEquations) -> Tensor:
        """Return the sum of r^T x, (sums, features), in the dtype of the normal equations."""
        return _missing(self.desired, self.present, sums)


def _missing(desired: Tensor, present: Tensor | None, sums: NormalEquations) -> Tensor:
    """Return what multiplies the targets and what multiplies the features, applied to the normal equations and subtracted."""
    products = desired.to(sums.cross) @ sums.cross
    return products if present is None else products - present.to(sums.gram) @ sums.gram


def random_signs(rows: int) -> Tensor:
    """Return signs, (SCORED_SUMS, rows), always the same ones; of fewer rows the identity.

    With random signs s the expectation of (s B) M (s B)^T is the trace of B M B^T (Hutchinson's estimator).
    """
    if rows <= SCORED_SUMS:
        return torch.eye(rows)
    return torch.randint(2, (SCORED_SUMS, rows), generator=torch.Generator().manual_seed(0)).mul_(2).sub_(1)


def row_chunks(rows: int, width: int) -> list[slice]:
    """Return the parts of a weight's rows that are fitted at a time.

    Example:
        >>> row_chunks(5000, 512)
        [slice(0, 2048, None), slice(2048, 4096, None), slice(4096, 5000, None)]
    """
    step = max(1, CHUNK_BYTES // (8 * max(1, width)))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


@dataclass
class Fit:
    """The fitted rows of a weight, which are computed as they are iterated over.

    Attributes:
        ridge: The ridge, as chosen.
        parts: Each part and its fitted rows, (rows, features).
    """

    ridge: float
    parts: Iterator[tuple[slice, Tensor]]


def fit_weights(
    targets: Sequence[FitTarget],
    sums: TrainValNormalEquations,
    ridge: float | None,
    eps: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> list[Fit | None]:
    """Fit weights of one input, with the given ridge or the best on the held-out rows, to all rows.

    Args:
        targets: The weights.
        sums: The normal equations of their input, which are used up, for the want of memory.
        ridge: None chooses one of `RIDGES`, where there are held-out rows.
        eps: Relative rounding error of the models, from `max_eps`.
        dtype: The dtype of what is proportional to the number of rows.

    Returns:
        None where every update does worse on the held-out rows than none, none of the rows is held out to show that, or the
        update reduces the error by no more than rounding.
    """
    return_freed_memory()  # of the run that collected the sums
    scored = [target.scored(dtype) for target in targets]
    chosen: list[_Candidate | None] = [None if ridge is None else (ridge, False)] * len(targets)
    if ridge is None and sums.validation.gram.diagonal().any():
        chosen = _best_on_validation(scored, sums, eps, dtype)
    total = sums.take_total().full()
    needs_gram = any(target.teacher is not None for target in targets)
    in_dtype = NormalEquations(total.gram.to(dtype) if needs_gram else total.gram, total.cross.to(dtype))
    factors = {candidate: RidgeFactor(total.gram, *candidate) for candidate in set(chosen) if candidate is not None}
    fits: list[Fit | None] = []
    for target, rows, candidate in zip(targets, scored, chosen, strict=True):
        if candidate is None:
            fits.append(None)
            continue
        missing, weight = rows.missing(in_dtype).double(), rows.weight.double()
        update = factors[candidate].update(missing)
        floor = max(ROUNDING_FLOOR, eps**2) * ((weight @ total.gram) * weight).sum().item()
        is_real = _sse_reduction(update, total.gram, missing) > floor
        fits.append(Fit(candidate[0], _fitted_parts(target, factors[candidate], in_dtype)) if is_real else None)
    return fits


def _fitted_parts(target: FitTarget, factor: "RidgeFactor", total: NormalEquations) -> Iterator[tuple[slice, Tensor]]:
    is_solved = target.teacher is not None and target.rows > len(total.gram) + len(total.cross)
    if is_solved:  # a product with the solution takes less than two, with the sums and with the inverse
        total = NormalEquations(factor.update(total.gram), factor.update(total.cross))
    for rows in row_chunks(target.rows, len(total.gram)):
        weight = target.weight(rows)
        missing = target.missing(rows, weight, total)
        yield rows, weight + (missing if is_solved else factor.update(missing))


def _best_on_validation(
    scored: Sequence[ScoredRows], sums: TrainValNormalEquations, eps: float, dtype: torch.dtype
) -> list[_Candidate | None]:
    """Return for each weight the ridge and the kind of penalty with the least error on the held-out rows.

    One factorization serves all weights. Candidates are computed in float32 for models that are no more exact: they are only
    compared. (An eigendecomposition, which would serve all ridges, takes as long as 17 factorizations.)
    """
    search_dtype = torch.float32 if eps >= torch.finfo(torch.float32).eps else torch.float64
    scale = _overflow_scale(sums.train.gram.diagonal()) if search_dtype == torch.float32 else 1.0

    def in_search_dtype(each: NormalEquationSums) -> tuple[Tensor, Tensor]:
        """Return the Gram matrix and what the scored rows lack, divided by the scale."""
        equations = each.full(dtype, scale)
        missing = torch.cat([rows.missing(equations) for rows in scored]).to(search_dtype)
        return (equations.gram if dtype == search_dtype else each.gram.full(search_dtype, scale)), missing

    gram, missing = in_search_dtype(sums.train)
    held_out_gram, held_out = in_search_dtype(sums.validation)
    sums.merge()  # so that less is in memory
    sizes = [len(rows.weight) for rows in scored]

    def reductions(ridge: float, by_feature: bool) -> list[float]:
        update = RidgeFactor(gram, ridge, by_feature).update(missing)
        terms = (update * (2 * held_out - update @ held_out_gram)).sum(1, dtype=torch.float64)
        return [part.sum().item() for part in terms.split(sizes)]

    return _search(len(sizes), lambda by_feature: lambda ridge: reductions(ridge, by_feature))


def _search(count: int, by_penalty: Callable[[bool], Callable[[float], Sequence[float]]]) -> list[_Candidate | None]:
    """Return for each of several weights the candidate that reduces the error on held-out rows most, if any does.

    Of either penalty ridges are tried from the middle one, for the second from the first's best, to both sides of the best so
    far: between the strongest, which changes nothing, and the weakest there is one best.

    Args:
        count: The number of weights.
        by_penalty: Returns, for a kind of penalty, what returns by how much a ridge reduces the error of each weight.
    """
    best: list[tuple[float, _Candidate | None]] = [(0.0, None)] * count
    start = len(RIDGES) // 2
    for by_feature in (True, False):
        reductions, found, pending = by_penalty(by_feature), dict[int, Sequence[float]](), {start}
        while pending:
            for index in pending:
                found[index] = reductions(RIDGES[index])
            tops = {max(found, key=lambda index, w=weight: found[index][w]) for weight in range(count)}  # type: ignore[misc]
            pending = {near for top in tops for near in (top - 1, top + 1) if 0 <= near < len(RIDGES)} - found.keys()
        for index, values in found.items():
            candidate = (RIDGES[index], by_feature)
            best = [
                max(old, (new, candidate), key=lambda each: each[0]) for old, new in zip(best, values, strict=True)
            ]
        start = max(found, key=lambda index: sum(found[index]))
    return [candidate for _, candidate in best]


def _overflow_scale(squares: Tensor) -> float:
    """Return what sums of squares are divided by, so that float32 does not overflow."""
    return squares.mean().clamp(min=torch.finfo(torch.float32).tiny).item()


def _sse_reduction(update: Tensor, gram: Tensor, residual: Tensor) -> float:
    """Return by how much an update reduces the sum of squared errors."""
    return (2 * (update * residual).sum() - ((update @ gram) * update).sum()).item()


def _penalties(squares: Tensor, by_feature: bool) -> Tensor:
    """Return the penalty of each feature, in units of their mean square, from their sums of squares."""
    penalty = squares / _overflow_scale(squares) if by_feature else torch.ones_like(squares)
    return penalty.clamp(min=MIN_FEATURE_PENALTY)


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
        # A unit diagonal, because features with massive activations would cost the others the digits of the dtype.
        self._unit = (squares / self._scale + ridge * _penalties(squares, by_feature)).rsqrt()
        self._factor = factorize_(self._system(gram))
        self._inverse = torch.linalg.pinv(self._system(gram), hermitian=True) if self._factor is None else None

    def _system(self, gram: Tensor) -> Tensor:
        system = (gram * (self._unit / self._scale)).mul_(self._unit[:, None])
        system.diagonal().fill_(1.0)
        return system

    def update(self, residual: Tensor) -> Tensor:
        """Return the update for the sum of r^T x, (out, features), in its dtype."""
        if self._scale <= 0:
            return torch.zeros_like(residual)
        unit = self._unit.to(residual.dtype)
        right = residual / self._scale * unit
        if self._factor is not None and len(right) > len(self._factor):
            self._inverse = torch.cholesky_inverse(self._factor)  # a product takes half the time of a solution
            self._factor = None
        if self._inverse is not None:
            return (right @ self._inverse.to(right.dtype)) * unit
        assert self._factor is not None
        return solve_factorized(self._factor, right.to(self._factor.dtype).T).T.to(residual.dtype) * unit


def factorize_(system: Tensor) -> Tensor | None:
    """Return the Cholesky factor of a symmetric matrix, in its memory; None if it is not positive definite.

    Example:
        >>> factorize_(torch.diag(torch.tensor([4.0, 9.0])))
        tensor([[2., 0.],
                [0., 3.]])
    """
    factor, failed = system.mT, torch.empty((), dtype=torch.int32, device=system.device)  # LAPACK stores columns
    torch.linalg.cholesky_ex(factor, out=(factor, failed))
    return None if failed else factor


def solve_factorized(factor: Tensor, right: Tensor) -> Tensor:
    """Return the solution X of L L^T X = B, without the copy of L that `torch.cholesky_solve` makes."""
    return torch.linalg.solve_triangular(
        factor.mT, torch.linalg.solve_triangular(factor, right, upper=False), upper=True
    )


class TokenRegression:
    """The ridge regression of one weight over rows of its inputs and of what its outputs lack.

    With no more tokens than features the rows are kept, and a system of (tokens, tokens) is solved, the dual problem with the
    same solution: (G + p P)^-1 x^T = P^-1 x^T (x P^-1 x^T + p)^-1. Of more they are summed to normal equations, as they are
    where there is more than one process.
    """

    def __init__(self) -> None:
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []
        self._sums: TrainValNormalEquations | None = None
        self._count = 0

    def add(self, x: Tensor, y: Tensor, held_out: Tensor) -> None:
        """Add rows, (tokens, features) and (tokens, outputs), of which those are held out for which `held_out` is true."""
        if self._sums is None:
            self._rows.append((x.cpu(), y.cpu(), held_out.cpu()))
            self._count += len(x)
            if self._count > x.shape[1] or rank_and_world_size()[1] > 1:
                self._sums = TrainValNormalEquations.zeros(x.shape[1], y.shape[1])
                while self._rows:  # each is freed as soon as it is added
                    self._sums.add(*self._rows.pop(0))
        else:
            self._sums.add(x, y, held_out)

    def fit(self, weight: Tensor, ridge: float | None, eps: float = 0.0) -> Fit | None:
        """Fit a weight, (outputs, features) float64; as `fit_weights`."""
        if self._sums is not None:
            target = FitTarget(len(weight), lambda rows: weight[rows])
            return fit_weights([target], self._sums.reduce(), ridge, eps, fit_dtype(eps))[0]
        if not self._count:
            return None
        train = sum(int((~held_out).sum()) for _, _, held_out in self._rows)
        x, y = (
            torch.cat([rows[index][rows[2] == held_out] for held_out in (False, True) for rows in self._rows])
            for index in (0, 1)
        )
        self._rows.clear()
        dtype = fit_dtype(eps)
        return _fit_dual(weight, x.to(dtype), y.to(dtype), train, ridge, eps)


def _fit_dual(weight: Tensor, x: Tensor, y: Tensor, train: int, ridge: float | None, eps: float) -> Fit | None:
    """Fit a weight to rows of which the first `train` choose it, and the others its ridge."""
    chosen: _Candidate | None = None if ridge is None else (ridge, False)
    signs = random_signs(len(weight)).to(x.dtype)
    scored = y @ signs.T
    kernel: TokenKernel | None = None
    if ridge is None and 0 < train < len(x):
        dtype = torch.float32 if eps >= torch.finfo(torch.float32).eps else torch.float64
        expected = scored.to(dtype)

        def reductions(by_feature: bool) -> Callable[[float], list[float]]:
            nonlocal kernel
            kernel = None  # before there is another
            kernel = TokenKernel(x, x[:train].square().sum(0), by_feature)
            predicting = kernel.matrix[train:, :train].to(dtype)

            def reduction(ridge: float) -> list[float]:
                assert kernel is not None
                return [_explained(predicting @ kernel.coefficients(expected[:train], ridge), expected[train:])]

            return reduction

        (chosen,) = _search(1, reductions)
    if chosen is None:
        return None
    kernel = TokenKernel(x, x.square().sum(0), chosen[1], kernel)
    coefficients = kernel.coefficients(y, chosen[0])
    written = x @ (signs @ weight.to(x.dtype)).T
    floor = max(ROUNDING_FLOOR, eps**2) * written.square().sum(dtype=torch.float64).item()
    if not _explained(kernel.matrix @ (coefficients @ signs.T), scored) > floor:
        return None
    return Fit(chosen[0], iter([(slice(0, len(weight)), weight + kernel.update(coefficients))]))


def _explained(predicted: Tensor, expected: Tensor) -> float:
    """Return by how much predictions, (tokens, outputs), reduce the sum of squares of what is expected."""
    return (predicted * (2 * expected - predicted)).sum(dtype=torch.float64).item()


class TokenKernel:
    """The system of a ridge regression between tokens, x P^-1 x^T, with P the penalties of the features.

    Args:
        x: The rows, (tokens, features).
        squares: For each feature the sum of squares that the penalties are relative to.
        by_feature: As in `ridge_update`.
        previous: A system of the same rows, which is used up: without penalties by feature it differs in its scale alone.
    """

    def __init__(self, x: Tensor, squares: Tensor, by_feature: bool, previous: "TokenKernel | None" = None):
        self._scale = _overflow_scale(squares)
        self._root = _penalties(squares, by_feature).sqrt() if by_feature else None
        self._rows = x if self._root is None else x / self._root
        self.matrix: Tensor
        if previous is not None and previous._root is self._root:
            self.matrix = previous.matrix.mul_(previous._scale / self._scale)
        else:
            self.matrix = symmetric_product(self._rows.T).div_(self._scale)

    def coefficients(self, y: Tensor, ridge: float) -> Tensor:
        """Return what the first rows are multiplied by, (tokens, outputs), for as many rows of targets, in their dtype."""
        count = len(y)
        unit = (self.matrix.diagonal()[:count].to(y.dtype) + ridge).rsqrt()
        right, factor = y * unit[:, None], factorize_(self._system(unit))
        if factor is None:
            return (torch.linalg.pinv(self._system(unit), hermitian=True) @ right) * unit[:, None]
        return solve_factorized(factor, right) * unit[:, None]

    def _system(self, unit: Tensor) -> Tensor:
        system = self.matrix[: len(unit), : len(unit)].to(unit.dtype, copy=True)
        system.mul_(unit).mul_(unit[:, None]).diagonal().fill_(1.0)
        return system

    def update(self, coefficients: Tensor) -> Tensor:
        """Return the weight's update, (outputs, features), for coefficients of all rows."""
        update = (coefficients.T @ self._rows).div_(self._scale)
        return update if self._root is None else update / self._root


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
