"""Rows of a benchmark are read as they were written, and summarized over seeds."""

import math

import pytest

from examples.common.results import append_row, mean_and_spread, read_rows, spearman


def test_rows_are_read_as_they_were_written(tmp_path):
    file = tmp_path / "made" / "rows.jsonl"
    assert read_rows(file) == []
    rows = [{"arm": "first, then\nsecond", "loss": 1.5}, {"arm": "1 ± 0", "curve": [[0, 2.0], [10, 1.0]]}]
    for row in rows:
        append_row(file, row)
    assert read_rows(file) == rows


def test_a_deviation_is_of_several_values_and_a_mean_of_finite_ones():
    assert mean_and_spread([1.0, 2.0, 3.0]) == "2.00 ± 1.00"
    assert mean_and_spread([1.26], digits=1) == "1.3"
    assert mean_and_spread([]) == "-" and mean_and_spread([], none="") == ""
    assert mean_and_spread([1.0, math.inf, math.nan]) == "1 of 3"


def test_the_rank_correlation_is_of_the_order_alone():
    assert spearman([1.0, 2.0, 10.0], [3.0, 4.0, 5.0]) == pytest.approx(1.0)
    assert spearman([1.0, 2.0, 3.0], [1.0, 0.0, -9.0]) == pytest.approx(-1.0)
