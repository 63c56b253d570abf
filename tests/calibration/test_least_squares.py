"""Ridge regression towards a weight, which is left alone where no update holds on other tokens."""

import itertools

import pytest
import torch
from torch import Tensor

from hf_guide.calibration import least_squares
from hf_guide.calibration.least_squares import (
    RIDGES,
    Fit,
    FitTarget,
    TokenKernel,
    TokenRegression,
    fit_weights,
    ridge_update,
)
from hf_guide.calibration.normal_equations import NormalEquationSums, TrainValNormalEquations


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normal_equations(x: Tensor, y: Tensor) -> NormalEquationSums:
    total = NormalEquationSums.zeros(x.shape[1], y.shape[1])
    for rows in zip(x.split(7), y.split(7), strict=True):
        total.add(*rows)
    return total


def fit(weight: Tensor, train: NormalEquationSums, validation: NormalEquationSums, ridge: float | None) -> Fit | None:
    target = FitTarget(len(weight), lambda rows: weight[rows])
    return fit_weights([target], TrainValNormalEquations(train, validation).clone(), ridge)[0]


def fitted(fit: Fit | None, weight: Tensor) -> Tensor:
    result = weight.clone()
    for rows, values in [] if fit is None else fit.parts:
        result[rows] = values
    return result


@pytest.mark.parametrize("by_feature", [False, True])
def test_an_update_is_ridge_regression(by_feature: bool) -> None:
    x, r = normal(50, 6), normal(50, 3, seed=1)
    total = normal_equations(x, r)
    squares = x.square().sum(0)
    penalty = squares.diag() if by_feature else squares.mean() * torch.eye(6, dtype=torch.float64)
    expected = torch.linalg.solve(x.T @ x + 0.1 * penalty, x.T @ r).T
    torch.testing.assert_close(ridge_update(total.gram.full(), total.cross, 0.1, by_feature=by_feature), expected)


def test_noise_is_not_fitted_and_what_holds_on_other_tokens_is() -> None:
    weight, truth = normal(3, 30, seed=2), 0.1 * normal(3, 30, seed=3)
    for noise, changed in ((1.0, False), (1e-3, True)):
        halves = []
        for seed in (4, 5):
            x = normal(40, 30, seed=seed)
            r = noise * normal(40, 3, seed=seed + 10) + (x @ truth.T if changed else 0)
            halves.append(normal_equations(x, r))
        chosen = fit(weight, *halves, None)
        update = fitted(chosen, weight) - weight
        if changed:
            assert (update - truth).norm() < 0.05 * truth.norm()
        else:
            assert chosen is None or chosen.ridge >= 1
            assert update.norm() < 0.3 * (fitted(fit(weight, *halves, 1e-3), weight) - weight).norm()


def test_high_variance_features_do_not_regularise_the_others() -> None:
    scales = torch.ones(20, dtype=torch.float64)
    scales[0] = 1e3
    x, truth = normal(400, 20) * scales, normal(3, 20, seed=1)
    halves = [normal_equations(rows, rows @ truth.T) for rows in x.split(200)]
    zeros, total = (
        torch.zeros(3, 20, dtype=torch.float64),
        TrainValNormalEquations(*halves).clone().take_total().full(),
    )
    update = fitted(fit(zeros, *halves, None), zeros)
    by_mean = ridge_update(total.gram, total.cross, 1e-3)  # by the mean of all, the high-variance one's
    errors = [((each - truth)[:, 1:].norm() / truth[:, 1:].norm()).item() for each in (update, by_mean)]
    assert errors[0] < 0.1 < 0.9 < errors[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("by_feature", [False, True])
@pytest.mark.parametrize("features", [20, 40, 41, 200])
def test_the_system_of_tokens_has_the_solution_of_that_of_features(
    features: int, by_feature: bool, dtype: torch.dtype
) -> None:
    x, y = normal(40, features) * normal(1, features, seed=1).exp(), normal(40, 3, seed=2)
    weights = normal(40, 1, seed=3).exp()
    x, y = (x * weights).to(dtype), (y * weights).to(dtype)
    kernel = TokenKernel(x, x.square().sum(0), by_feature)
    for ridge in RIDGES:
        expected = ridge_update(x.double().T @ x.double(), (y.T @ x).double(), ridge, by_feature=by_feature)
        found = kernel.update(kernel.coefficients(y, ridge)).double()
        assert (found - expected).norm() < (
            1e-9 if dtype == torch.float64 else 2e-3
        ) * expected.norm()  # of a condition of 1e5


@pytest.mark.parametrize("ridge", [None, 0.1])
@pytest.mark.parametrize("tokens", [39, 40, 41])
def test_few_tokens_are_fitted_as_many_are(tokens: int, ridge: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same ridge and the same weight by either problem, with fewer tokens than features, as many, and more."""
    monkeypatch.setattr(least_squares, "SCORED_SUMS", 4)
    weight, missing = normal(9, 40, seed=1), 0.1 * normal(9, 40, seed=2)
    x = normal(tokens, 40) * normal(1, 40, seed=3).exp()
    y = x @ missing.T + 0.1 * normal(tokens, 9, seed=4)
    regression, sums = TokenRegression(), TrainValNormalEquations.zeros(40, 9)
    held_out = torch.arange(tokens) % 4 == 3
    for rows in zip(x.split(5), y.split(5), held_out.split(5), strict=True):
        regression.add(*rows)
        sums.add(*rows)
    assert (regression._sums is None) == (tokens <= 40)
    sums.reduce()
    found, expected = regression.fit(weight, ridge), fit(weight, sums.train, sums.validation, ridge)
    assert found is not None and expected is not None
    assert found.ridge == expected.ridge
    result = fitted(found, weight)
    torch.testing.assert_close(result, fitted(expected, weight), rtol=1e-9, atol=1e-9)
    assert not torch.equal(result, weight)


def test_noise_of_few_tokens_is_not_fitted() -> None:
    weight, x = normal(3, 60, seed=1), normal(40, 60)
    regression = TokenRegression()
    for batch, rows in enumerate(x.split(4)):
        regression.add(rows, 1e-12 * normal(4, 3, seed=batch), torch.arange(4) == 3)
    assert regression.fit(weight, None) is None


@pytest.mark.parametrize("tokens", [20, 80])
@pytest.mark.parametrize("is_held_out", [False, True])
def test_without_rows_on_both_sides_only_a_given_ridge_is_fitted(tokens: int, is_held_out: bool) -> None:
    """Of fewer tokens than features and of more."""
    weight, x = normal(3, 60, seed=1), normal(tokens, 60)
    for ridge in (None, 0.1):
        regression = TokenRegression()
        regression.add(x, x @ normal(60, 3, seed=2), torch.full((tokens,), is_held_out))
        assert (regression.fit(weight, ridge) is None) == (ridge is None)


def test_rows_that_do_not_choose_the_ridge_are_fitted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, missing = normal(64, 12, seed=1), normal(64, 12, seed=2)
    halves = [normal_equations(x, x @ missing.T + 0.3 * normal(56, 64, seed=9)) for x in normal(112, 12).split(56)]
    by_all = fitted(fit(weight, *halves, 0.1), weight)
    monkeypatch.setattr(least_squares, "SCORED_SUMS", 16)
    monkeypatch.setattr(least_squares, "CHUNK_BYTES", 8 * 12 * 10)  # the last part is shorter
    torch.testing.assert_close(fitted(fit(weight, *halves, 0.1), weight), by_all)


@pytest.mark.parametrize("noise", [0.01, 0.3, 3.0, 30.0])
@pytest.mark.parametrize("reads_teacher", [False, True])
def test_the_ridge_that_sums_of_rows_choose_has_the_least_error_of_all_rows(noise: float, reads_teacher: bool) -> None:
    """Rows of unlike size, more of them than sums; on held-out rows they lose at most 3 percent of the best reduction."""
    sizes = normal(500, 1, seed=5).exp()
    weight, missing = normal(500, 30, seed=1), sizes * normal(500, 30, seed=2)
    features = normal(120, 30) * normal(1, 30, seed=3).exp()
    target = FitTarget(500, lambda rows: weight[rows])
    lacking = features @ missing.T + noise * sizes.T * normal(120, 500, seed=9)
    targets = lacking
    if reads_teacher:  # the same, as what a teacher's weight makes of its own features
        targets = features @ weight.T + lacking
        target = FitTarget(500, lambda rows: weight[rows], lambda rows: torch.eye(500, dtype=torch.float64)[rows])
    halves = [normal_equations(*rows) for rows in zip(features.split(60), targets.split(60), strict=True)]
    sums = TrainValNormalEquations(*halves)
    scored = target.scored(torch.float64)
    train, validation = sums.train.full(), sums.validation.full()
    (chosen,) = least_squares._best_on_validation([scored], sums, 0.0, torch.float64)

    def reduction(ridge: float, by_feature: bool) -> float:
        update = ridge_update(train.gram, target.missing(slice(None), weight, train), ridge, by_feature=by_feature)
        held_out = target.missing(slice(None), weight, validation)
        return (2 * (update * held_out).sum() - ((update @ validation.gram) * update).sum()).item()

    best = max(reduction(*each) for each in itertools.product(RIDGES, (False, True)))
    found = reduction(*chosen) if chosen is not None else 0.0
    assert found >= 0.97 * max(best, 0.0)
