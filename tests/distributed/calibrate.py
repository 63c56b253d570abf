"""Make a calibrated student under torchrun; rank 0 writes what it became and whether all processes have the same.

With `folder` it goes on from there; with `dataset` that is heard; with `kill`, a file's name, the process that would write
that file is killed instead.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from hf_guide.calibration import resume as checkpoint
from hf_guide.utils import files as folders
from tests.calibration.test_calibrated import student_of
from tests.tiny import KINDS

given = json.loads(sys.argv[1])
dist.init_process_group("gloo")
publish = folders.sync_and_rename


def dying(partial: Path, path: Path) -> None:
    """Publish, but for the file at which this process is to end."""
    if path.name == given.get("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    publish(partial, path)


folders.sync_and_rename = dying
checkpoint.SECONDS_BETWEEN_SAVES = 0.0
student = student_of(KINDS["llama"].teacher().double(), given.get("dataset"), given.get("folder"))
vector = torch.cat([parameter.detach().flatten() for parameter in student.parameters()])
everyone = [torch.zeros_like(vector) for _ in range(dist.get_world_size())]
dist.all_gather(everyone, vector)
if dist.get_rank() == 0:
    alike = all(torch.equal(each, vector) for each in everyone)
    said = student.initialization_report.calibration["tokens"]
    Path(given["output"]).write_text(
        json.dumps({"world_size": dist.get_world_size(), "alike": alike, "tokens": said, "vector": vector.tolist()})
    )
dist.destroy_process_group()
