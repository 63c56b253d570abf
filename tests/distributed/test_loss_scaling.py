"""A process without targets adds nothing, and what is not finite in one process ends all of them at that step."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.launch import run_processes

# Batches of four in their order, of which each of two processes has every other: of the three steps the first has targets in
# one process only, the second in none, the third in both.
EMPTY = [1, 2, 3]


def run(processes: int, folder: Path, **given: Any) -> dict[str, Any]:
    given = {"task": "causal-lm", "empty": EMPTY, "per_device": 8 // processes, "arguments": {}} | given
    return run_processes("without_targets.py", processes, given, folder)


@pytest.mark.extended
@pytest.mark.parametrize(
    ("task", "average"),
    [
        ("causal-lm", True),
        pytest.param("seq2seq-lm", False, marks=pytest.mark.slow),
        pytest.param("seq2seq-lm", True, marks=pytest.mark.slow),
        pytest.param("causal-lm", False, marks=pytest.mark.slow),
        pytest.param("token-classification", True, marks=pytest.mark.slow),
        pytest.param("sequence-classification", True, marks=pytest.mark.slow),
    ],
)
def test_a_process_without_targets_adds_nothing(task: str, average: bool, tmp_path: Path) -> None:
    arguments = {"losses": {"ce": 0.5, "kd": 0.5}, "average_tokens_across_devices": average}
    one, two = (run(processes, tmp_path, task=task, arguments=arguments) for processes in (1, 2))
    weights, expected = (torch.tensor(each["weights"]) for each in (two, one))
    assert torch.equal(weights[1], weights[2]) and two["log"][1]["loss"] == 0.0
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[2], weights[3])
    assert all(math.isfinite(value) for entry in two["log"] for value in entry.values())
    step = expected[1] - expected[0]
    # Without the average over devices a process is a vote, as in `Trainer`, and one of the two votes for nothing.
    share = 1.0 if average else 0.5
    assert (weights[1] - weights[0] - share * step).norm() < 1e-4 * step.norm()
    if average:
        assert (weights - expected).norm() < 1e-4 * (expected[-1] - expected[0]).norm()
        for name in ("ce", "kd", "loss"):
            assert two["log"][0][name] == pytest.approx(one["log"][0][name], rel=1e-4)


@pytest.mark.extended
def test_sharded_weights_do_not_wait_for_a_process_without_targets(tmp_path: Path) -> None:
    arguments = {"losses": {"ce": 0.5, "kd": 0.5}}
    one, two = (run(processes, tmp_path, arguments=arguments, sharded=processes == 2) for processes in (1, 2))
    weights, expected = (torch.tensor(each["weights"]) for each in (two, one))
    assert torch.equal(weights[1], weights[2])
    assert (weights - expected).norm() < 1e-4 * (expected[-1] - expected[0]).norm()


@pytest.mark.extended
@pytest.mark.parametrize(
    ("spoil", "sharded"),
    [
        pytest.param("loss", False, marks=pytest.mark.slow),
        ("gradient", True),
        pytest.param("gradient", False, marks=pytest.mark.slow),
    ],
)
def test_what_is_not_finite_in_one_process_ends_all(spoil: str, sharded: bool, tmp_path: Path) -> None:
    arguments = {"losses": {"ce": 0.5, "kd": 0.5}}
    found = run(2, tmp_path, empty=[], spoil=spoil, arguments=arguments, sharded=sharded)
    assert all("step 2" in error for error in found["errors"]), found["errors"]
    if spoil == "loss":
        assert "the loss 'kd' is inf" in found["errors"][1]
        assert "Another process" in found["errors"][0]
    else:
        assert all("gradient" in error for error in found["errors"])
    assert len(found["weights"]) == 2 and (sharded or found["saved"] == ["checkpoint-1"])
