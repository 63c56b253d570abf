"""Of several processes, those that are left learn which has ended; and all resume from the same whole checkpoint."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.distributed.launch import ROOT, run_processes

CAPTURE = """
import os, sys, time
from pathlib import Path
from hf_guide import HfGuideError, capture_teacher
from hf_guide.utils import distributed
from tests.signal_cache.tiny_teachers import TEACHERS, Pad, examples_for

distributed.HEARTBEAT_TIMEOUT = 4.0

class Slow(Pad):
    def __call__(self, features):
        time.sleep(0.02)
        if os.environ["RANK"] == sys.argv[2] and Path(sys.argv[1], "shard-000003.arrow").exists():
            os.kill(os.getpid(), 9)
        return super().__call__(features)

try:
    capture_teacher(TEACHERS["causal-lm"].teacher(), examples_for("causal-lm", 60), sys.argv[1], data_collator=Slow(),
                    config={"top_k": 8, "shard_size": 5, "batch_size": 2}, show_progress=False)
except HfGuideError as error:
    sys.exit(str(error))
"""

SUM = """
import os, sys, time
import torch
import torch.distributed as dist
from hf_guide import HfGuideError
from hf_guide.utils import distributed

dist.init_process_group("gloo")
number = [torch.ones(3, dtype=torch.float64)]
distributed.all_reduce_sum_(number)
assert number[0].tolist() == [dist.get_world_size()] * 3
if os.environ["RANK"] == sys.argv[2]:
    os.kill(os.getpid(), 9)
try:
    distributed.all_reduce_sum_(number)
except HfGuideError as error:
    sys.exit(str(error))
"""


def started_by_hand(script: str, folder: Path, killed: int, size: int) -> list[tuple[int, str]]:
    """Run processes without torchrun, of which one kills itself; return each one's exit code and stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"ACCELERATE_USE_CPU": "true", "WORLD_SIZE": str(size)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script), str(folder), str(killed)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        return [(process.wait(240), process.stderr.read() if process.stderr else "") for process in running]
    finally:
        for process in running:
            process.kill()


@pytest.mark.extended
@pytest.mark.parametrize("killed", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_capture_whose_other_process_was_killed_names_it(killed: int, tmp_path: Path) -> None:
    ended = started_by_hand(CAPTURE, tmp_path / "capture", killed, 2)
    assert ended[killed][0] == -signal.SIGKILL
    code, message = ended[1 - killed]
    assert code == 1 and f"Of the 2 processes rank {killed} stopped responding" in message
    assert f"while rank {1 - killed} waited for shard-" in message


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 2])
def test_a_sum_whose_other_process_was_killed_names_it(killed: int, tmp_path: Path) -> None:
    ended = started_by_hand(SUM, tmp_path, killed, 3)
    for rank, (code, message) in enumerate(ended):
        assert code == (-signal.SIGKILL if rank == killed else 1), message
        assert rank == killed or f"rank {killed}" in message


@pytest.mark.extended
def test_all_processes_resume_from_the_same_complete_checkpoint(tmp_path: Path) -> None:
    found = run_processes("checkpoints.py", 2, {"folder": str(tmp_path / "run")}, tmp_path)
    assert found["checkpoints"] == ["checkpoint-6", "checkpoint-3"] == sorted(found["left"], reverse=True)
    assert {"rng_state_0.pth", "rng_state_1.pth", "distillation_progress.json"} <= set(found["files"])
    assert found["same"] and found["curves"][0] == found["curves"][1] and found["finished"] == 6
