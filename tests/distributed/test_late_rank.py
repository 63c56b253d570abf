"""A rank that has not begun a call is waited for, and the others warn of it."""

from pathlib import Path

from tests.distributed.launch import run_processes


def test_a_rank_that_does_not_begin_is_warned_of_once_and_waited_for(tmp_path: Path) -> None:
    result = run_processes("late_rank.py", 2, {}, tmp_path)
    assert result["sums"] == [3.0, 20.0]
    (message,) = result["messages"]
    assert "rank 1 has not begun the call" in message and "All 2 processes must call from_teacher" in message
