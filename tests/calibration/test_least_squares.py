"""Ridge regression towards a weight, which is left alone where no update holds on other tokens."""

import pytest
import torch
from torch import Tensor

from hf_guide.calibration.least_squares import NormalEquations, ridge_update, select_ridge


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normal_equations(x: Tensor, y: Tensor) -> NormalEquations:
    total = NormalEquations.zeros(x.shape[1], y.shape[1])
    for rows in zip(x.split(7), y.split(7), strict=True):
        total.add(*rows)
    return total


@pytest.mark.parametrize("by_feature", [False, True])
def test_an_update_is_ridge_regression(by_feature: bool) -> None:
    x, r = normal(50, 6), normal(50, 3, seed=1)
    total = normal_equations(x, r)
    squares = x.square().sum(0)
    penalty = squares.diag() if by_feature else squares.mean() * torch.eye(6, dtype=torch.float64)
    expected = torch.linalg.solve(x.T @ x + 0.1 * penalty, x.T @ r).T
    torch.testing.assert_close(ridge_update(total.gram, total.cross, 0.1, by_feature=by_feature), expected)


def test_noise_is_not_fitted_and_what_holds_on_other_tokens_is() -> None:
    weight, truth = normal(3, 30, seed=2), 0.1 * normal(3, 30, seed=3)
    for noise, changed in ((1.0, False), (1e-3, True)):
        halves = []
        for seed in (4, 5):
            x = normal(40, 30, seed=seed)
            r = noise * normal(40, 3, seed=seed + 10) + (x @ truth.T if changed else 0)
            halves.append(normal_equations(x, r))
        grams, residuals = (halves[0].gram, halves[1].gram), (halves[0].cross, halves[1].cross)
        update, ridge = select_ridge(weight, grams, residuals, None)
        if changed:
            assert (update - truth).norm() < 0.05 * truth.norm()
        else:
            assert ridge is None or ridge >= 1
            assert update.norm() < 0.3 * select_ridge(weight, grams, residuals, 1e-3)[0].norm()


def test_high_variance_features_do_not_regularise_the_others() -> None:
    scales = torch.ones(20, dtype=torch.float64)
    scales[0] = 1e3
    x, truth = normal(400, 20) * scales, normal(3, 20, seed=1)
    halves = [normal_equations(rows, rows @ truth.T) for rows in x.split(200)]
    grams, residuals = (halves[0].gram, halves[1].gram), (halves[0].cross, halves[1].cross)
    update, _ = select_ridge(torch.zeros(3, 20, dtype=torch.float64), grams, residuals, None)
    by_mean = ridge_update(
        grams[0] + grams[1], residuals[0] + residuals[1], 1e-3
    )  # by the mean of all, the high-variance one's
    errors = [((each - truth)[:, 1:].norm() / truth[:, 1:].norm()).item() for each in (update, by_mean)]
    assert errors[0] < 0.1 < 0.9 < errors[1]
