"""Start scripts of this folder as torchrun starts them, with gloo on the CPU, without the launcher's own imports."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

ROOT = Path(__file__).resolve().parents[2]


def run_processes(
    script: str, processes: int, params: dict[str, Any], folder: Path, *, seconds: int = 240
) -> dict[str, Any]:
    """Run a script of this folder in several processes and return what its rank 0 wrote; its `world_size` must be there.

    One process alone is this one, but for DeepSpeed, which needs the environment of a group.
    """
    params = params | {"output": str(folder / f"world_{processes}.json")}
    if processes == 1 and "deepspeed" not in params.get("arguments", {}):
        importlib.import_module(f"tests.distributed.{Path(script).stem}").main(params)
    else:
        _run_group(Path(__file__).with_name(script), processes, params, folder, seconds)
    result = json.loads(Path(params["output"]).read_text())
    assert result["world_size"] == processes
    return result


def _run_group(script: Path, processes: int, params: dict[str, Any], folder: Path, seconds: int) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "ACCELERATE_USE_CPU": "true",
        "TOKENIZERS_PARALLELISM": "false",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is this process's, as it is the agent's under torchrun
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    if "deepspeed" in params.get("arguments", {}):
        environment |= {"DS_ACCELERATOR": "cpu"}
        del environment["ACCELERATE_USE_CPU"]
    started: list[subprocess.Popen[bytes]] = []
    logs = [folder / f"process_{rank}.log" for rank in range(processes)]
    deadline = time.monotonic() + seconds
    try:
        for rank, log in enumerate(logs):
            with log.open("wb") as file:
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                command = [sys.executable, str(script), json.dumps(params)]
                started.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment | own))
        codes: list[int | None] = [None]
        while None in codes and not any(codes) and time.monotonic() < deadline:
            time.sleep(0.05)
            codes = [each.poll() for each in started]
    finally:
        for each in started:  # those that wait for one that has failed
            each.kill()
            each.wait()
    if codes != [0] * processes:
        ends = [signal.Signals(-code).name if code and code < 0 else code for code in codes]
        printed = "\n".join(f"Process {rank}:\n{log.read_text()[-4000:]}" for rank, log in enumerate(logs))
        raise AssertionError(f"The processes ended with {ends} (None: it was ended)\n{printed}")
