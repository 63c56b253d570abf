"""Sums of products of rows: what they are, in which dtype, and what of them is in memory."""

import weakref

import pytest
import torch

from hf_guide.calibration.normal_equations import (
    NormalEquationSums,
    SymmetricSum,
    TrainValNormalEquations,
    add_symmetric_product_,
    symmetric_product,
)
from tests.calibration.test_least_squares import normal


@pytest.mark.parametrize("width", [3, 1024, 1031])
def test_a_symmetric_product_is_the_product(width: int) -> None:
    rows = normal(5, width)
    torch.testing.assert_close(symmetric_product(rows), rows.T @ rows)


@pytest.mark.parametrize("width", [3, 1024, 1031])
def test_a_symmetric_product_in_float32_is_added_in_float64(width: int) -> None:
    rows, before = normal(5, width).float(), normal(width, width)
    total = before.clone()
    assert add_symmetric_product_(total, rows) is total
    torch.testing.assert_close(total, before + (rows.T @ rows).double(), rtol=0, atol=2e-6)
    torch.testing.assert_close(total - total.T, before - before.T, rtol=0, atol=2e-6)


@pytest.mark.parametrize("width", [1, 3, 1024, 1031])
def test_a_sum_in_strips_is_the_whole_matrix(width: int) -> None:
    rows = normal(5, width)
    total = SymmetricSum.zeros(width)
    total.add(rows[:2])
    total.add(rows[2:])
    whole = rows.T @ rows
    torch.testing.assert_close(total.full(), whole)
    torch.testing.assert_close(total.full(torch.float32, 4.0), (whole / 4).float())
    torch.testing.assert_close(total.diagonal(), whole.diagonal())
    torch.testing.assert_close(total.without_last().full(), whole[:-1, :-1])
    in_memory = sum(strip.untyped_storage().nbytes() for strip in total.strips)
    assert in_memory <= whole.nbytes * (1 if width < 1024 else 0.57)


def test_merged_sums_are_those_of_all_rows_and_the_held_out_ones_are_freed() -> None:
    x, y, held_out = normal(12, 3), normal(12, 2, seed=1), torch.arange(12) % 3 == 2
    sums = TrainValNormalEquations.zeros(3, 2)
    sums.add(x, y, held_out)
    sums.reduce()
    held_out_sums = weakref.ref(sums.validation)
    sums.merge()
    assert held_out_sums() is None
    total = sums.take_total().full()
    torch.testing.assert_close(total.gram, x.T @ x)
    torch.testing.assert_close(total.cross, y.T @ x)
    assert not sums.train.gram.strips


def test_a_clone_of_sums_is_of_its_own() -> None:
    sums = NormalEquationSums.zeros(3, 2)
    copy = sums.clone()
    sums.add(normal(4, 3), normal(4, 2))
    assert not copy.full().gram.any() and not copy.full().cross.any()
