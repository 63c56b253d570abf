"""A budget parses as people write it, and states what it must be where it does not."""

import pytest

from hf_guide.errors import OptionError
from hf_guide.shapes.budget import Budget


def parse(**options):
    return Budget.parse(**options, teacher_parameters=2000)


@pytest.mark.parametrize(
    ("text", "number"),
    [(300, 300), ("300", 300), ("23M", 23_000_000), ("1.5b", 1_500_000_000), ("400 K", 400_000), ("25%", 500)],
)
def test_a_number_of_parameters_is_a_number_or_a_text_with_a_unit(text, number):
    assert parse(num_parameters=text).num_parameters == number


@pytest.mark.parametrize(("text", "number"), [("500MB", 500_000_000), ("1.5GiB", 3 << 29), (4096, 4096)])
def test_memory_is_bytes_or_a_text_with_a_unit(text, number):
    assert parse(memory=text).memory == number
    assert parse(memory=text).num_cached(None) == 2048


@pytest.mark.parametrize(
    "value", ["23X", "many", "-5M", "0M", "0%", "120%", 0, 2.5, True, "", "1e6M", "2.5", "0.0001K"]
)
def test_other_values_are_errors_that_name_the_option(value):
    with pytest.raises(OptionError, match="num_parameters must be"):
        parse(num_parameters=value)


@pytest.mark.parametrize(("value", "percentage"), [("0.25", "25%"), (0.25, "25%"), (" 0.015 ", "1.5%")])
def test_a_fraction_is_refused_with_the_percentage_that_it_is(value, percentage):
    for option in ("num_parameters", "active_parameters"):
        with pytest.raises(OptionError, match=f"{option} must be .*; found .* write '{percentage}'"):
            parse(**{option: value})


@pytest.mark.parametrize("value", ["500", "5%", "5M", "x", 0, "0.0001KB"])
def test_memory_without_a_unit_of_bytes_is_an_error(value):
    with pytest.raises(OptionError, match="memory must be"):
        parse(memory=value)


def test_a_cache_length_needs_memory_and_no_option_is_no_budget():
    assert parse() is None
    with pytest.raises(OptionError, match="cache_length is of use only with memory"):
        parse(num_parameters=5, cache_length=128)
