"""What is part of the default run does not depend on the order or on chance."""

from collections import Counter

import pytest

from tests.conftest import default_parameters

NAMES = [f"{kind}-{option}" for kind in ("llama", "gpt2", "bert", "t5") for option in range(6)]


@pytest.mark.parametrize("count", [0, 1, 4, 24, 30])
def test_as_many_parameters_as_asked_are_chosen_in_any_order(count: int) -> None:
    chosen = default_parameters(NAMES, count)
    assert chosen <= set(NAMES) and len(chosen) == min(count, len(NAMES))
    assert default_parameters(reversed(NAMES), count) == chosen


def test_one_parameter_more_changes_at_most_one_that_is_chosen() -> None:
    before = default_parameters(NAMES, 4)
    assert all(len(before - default_parameters([*NAMES, f"vit-{number}"], 4)) <= 1 for number in range(20))


def test_they_are_not_all_of_one_kind() -> None:
    kinds = Counter(name.partition("-")[0] for name in default_parameters(NAMES, 6))
    assert len(kinds) >= 3


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["one", "two", "three", pytest.param("four", marks=pytest.mark.slow)])
def test_all_other_parameters_are_extended(name: str, request: pytest.FixtureRequest) -> None:
    kept = default_parameters(["one]", "two]", "three]"], 2)
    markers = {marker.name for marker in request.node.iter_markers()}
    assert ("extended" in markers) == (name != "four" and f"{name}]" not in kept)
