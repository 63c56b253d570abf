"""Several processes find the shapes that one finds, with as little data; what they cannot divide is an error in all."""

from pathlib import Path
from typing import Any

import pytest

from hf_guide import find_shapes
from tests.calibration.small_students import token_batches
from tests.distributed.launch import run_processes
from tests.tiny import KINDS

CALLS: dict[str, dict[str, Any]] = {
    "one batch": {"rows": [8, 8]},
    "two rows": {"rows": [2, 2]},
    "few tokens": {"rows": [8, 8], "method": {"calibration_tokens": 17}},
    "others": {"rows": [8, "self_generated"]},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    path: Path = tmp_path_factory.mktemp("shapes")
    return run_processes("shapes.py", 2, {"calls": CALLS}, path)["found"]


def test_one_batch_is_split_between_processes_that_find_the_shapes_of_one(found: dict[str, list[Any]]) -> None:
    first, second = found["one batch"]
    shapes = find_shapes(
        KINDS["llama"].teacher().double(),
        num_parameters="40%",
        limit=1,
        method={"method": "calibrated", "calibration_batch_size": 32},
        calibration_dataset=token_batches(16, 8)[:1],
        show_progress=False,
    )
    assert first == second and [each[0] for each in first] == [shape.overrides for shape in shapes]
    for (_, *losses), shape in zip(first, shapes, strict=True):
        assert losses == pytest.approx([shape.quick_loss, shape.loss], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "advice"), [("two rows", "pass more data"), ("few tokens", "raise calibration_tokens above 17")]
)
def test_too_few_rows_are_an_error_that_names_what_ended_the_reading(
    found: dict[str, list[Any]], name: str, advice: str
) -> None:
    first, second = found[name]
    assert first == second and first.startswith(
        "OptionError: calibration_dataset makes 1 batches that cannot be split"
    )
    assert (
        f"without the 1 rows that are held out to compare with, for 2 processes, and each needs one: {advice}" in first
    )


def test_other_data_in_each_process_are_an_error_before_any_is_generated(found: dict[str, list[Any]]) -> None:
    first, second = found["others"]
    assert first == second and first.startswith("OptionError: The processes do not make the same call")
