"""NaN and infinity are found wherever they are, and large finite values are none."""

import math

import pytest
import torch

from hf_guide.utils.finite import is_finite, non_finite_rows


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_is_found(dtype, value):
    values = torch.ones(5, 3, 2, dtype=dtype)
    assert is_finite(values) and len(non_finite_rows(values)) == 0
    values[3, 1, 0] = values[1, 0, 0] = value
    assert not is_finite(values) and non_finite_rows(values).tolist() == [1, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sum_that_overflows_is_no_infinity(dtype):
    values = torch.full((4, 2), torch.finfo(dtype).max, dtype=dtype)
    assert not bool(values.sum().isfinite())
    assert is_finite(values) and len(non_finite_rows(values)) == 0


def test_infinities_that_cancel_are_found():
    values = torch.tensor([[math.inf, 1.0], [-math.inf, 1.0]])
    assert non_finite_rows(values).tolist() == [0, 1]


def test_numbers_without_infinity_and_empty_tensors_are_finite():
    assert (
        is_finite(torch.tensor([2**62]))
        and is_finite(torch.empty(0, 3))
        and len(non_finite_rows(torch.empty(0, 3))) == 0
    )
