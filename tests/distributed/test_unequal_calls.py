"""Processes that do not make the same call end with the same error, and do not wait for each other or mix their sums."""

from typing import Any

import pytest

from tests.distributed.launch import run_processes

CALLS = {
    "fewer": [{"batches": 8}, {"batches": 5}],
    "shards": [{"start": 0}, {"start": 8}],
    "empty": [{}, {"batches": 0}],
    "depth": [{"num_hidden_layers": 2}, {"num_hidden_layers": 3}],
    "option": [{}, {"method": {"calibration_tokens": 64}}],
    "generated": [{}, {"batches": "self_generated"}],
    "tokens": [{"start": 15, "method": {"calibration_tokens": 9}}] * 2,
    "row": [{"rows": 1, "batches": 1}] * 2,
    "same": [{}, {}],
}


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return run_processes("unequal_calls.py", 2, {"calls": CALLS}, tmp_path_factory.mktemp("calls"))["errors"]


def test_other_data_in_each_process_are_an_error_in_all(errors: dict[str, list[Any]]) -> None:
    for name, found in (("fewer", "8 batches in rank 0 and 5 in rank 1"), ("shards", "rank 0 and 8 others in rank 1")):
        first, second = errors[name]
        assert first == second and first.startswith(
            "OptionError: calibration_dataset is not the same in all processes"
        )
        assert found in first and "Pass the whole dataset in each process" in first
    assert errors["same"] == [None, None]


def test_an_error_in_the_data_of_one_process_is_one_in_all(errors: dict[str, list[Any]]) -> None:
    others, own = errors["empty"]
    assert own.startswith("OptionError: calibration_dataset is empty")
    assert others == f"OptionError: Process 1 failed: {own.removeprefix('OptionError: ')}"


def test_other_configs_or_options_in_each_process_are_an_error_in_all(errors: dict[str, list[Any]]) -> None:
    for name, found in (
        ("depth", "student_config.num_hidden_layers is 2 in rank 0 and 3 in rank 1"),
        ("option", "options.calibration_tokens is None in rank 0 and 64 in rank 1"),
        ("generated", "calibration_dataset is 'data' in rank 0 and 'self_generated' in rank 1"),
    ):
        first, second = errors[name]
        assert first == second and first.startswith("OptionError: The processes do not make the same call")
        assert found in first and "Pass the same teacher, config and options in all of them" in first


def test_fewer_rows_than_processes_are_an_error_that_names_what_ended_the_reading(
    errors: dict[str, list[Any]],
) -> None:
    for name, advice in (("tokens", "raise calibration_tokens above 9"), ("row", "pass more data")):
        first, second = errors[name]
        assert first == second
        assert f"makes 1 batches that cannot be split, for 2 processes, and each needs one: {advice}" in first
