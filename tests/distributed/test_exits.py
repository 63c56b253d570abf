"""A process ends with exit code 0 after its last collective."""

from pathlib import Path

import pytest

from tests.distributed.launch import run_processes


@pytest.mark.extended
def test_a_process_that_exits_after_a_collective_does_not_abort(tmp_path: Path) -> None:
    run_processes("exits.py", 2, {"waits": True}, tmp_path)


@pytest.mark.slow
def test_without_waiting_a_process_aborts_at_exit(tmp_path: Path) -> None:
    """Where this fails, PyTorch no longer needs it, and the wait can go."""
    with pytest.raises(AssertionError, match="SIGABRT"):
        for _ in range(5):
            run_processes("exits.py", 4, {"waits": False}, tmp_path)
