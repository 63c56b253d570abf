"""Start scripts of this folder under torchrun, with gloo on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def torchrun(
    script: str, processes: int, params: dict[str, Any], folder: Path, *, seconds: int = 240
) -> dict[str, Any]:
    """Run a script of this folder under torchrun and return what its rank 0 wrote; its `world_size` must be there."""
    params = params | {"output": str(folder / f"world_{processes}.json")}
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "ACCELERATE_USE_CPU": "true",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if "deepspeed" in params.get("arguments", {}):
        environment |= {"DS_ACCELERATOR": "cpu"}
        del environment["ACCELERATE_USE_CPU"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        + [str(Path(__file__).with_name(script)), json.dumps(params)],
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds,
        env=environment,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    result = json.loads(Path(params["output"]).read_text())
    assert result["world_size"] == processes
    return result
