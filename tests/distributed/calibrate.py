"""Make a calibrated student under torchrun; rank 0 writes what it became and whether all processes have the same.

With `folder` it continues from there; `dataset` replaces the data, of which `batches` takes the first ones; `teacher` is the
folder of a teacher; with `kill`, a file's name, the process that would write that file is killed instead.
"""

import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hf_guide.calibration import resume
from hf_guide.teachers.tensor_source import SafetensorsTensors
from hf_guide.utils import files
from tests.calibration.small_students import make_student, token_batches
from tests.tiny import KINDS

arguments = json.loads(sys.argv[1])
dist.init_process_group("gloo")
sync_and_rename = files.sync_and_rename


def dying(partial: Path, path: Path) -> None:
    """Rename the file, or end this process at the one that is named."""
    if path.name == arguments.get("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    sync_and_rename(partial, path)


files.sync_and_rename = dying
resume.SECONDS_BETWEEN_SAVES = 0.0
reads: Counter[str] = Counter()
read = SafetensorsTensors._read


def counting(self: SafetensorsTensors, name: str, rows: "slice | None") -> torch.Tensor:
    """Read a tensor, and count it."""
    reads[name] += 1
    return read(self, name, rows)


SafetensorsTensors._read = counting
teacher = arguments.get("teacher") or KINDS["llama"].teacher().double()
dataset = arguments.get("dataset") or token_batches()[: arguments.get("batches")]
student = make_student(teacher, dataset, arguments.get("folder"))
vector = torch.cat([parameter.detach().flatten() for parameter in student.parameters()])
everyone = [torch.zeros_like(vector) for _ in range(dist.get_world_size())]
dist.all_gather(everyone, vector)
counts: list[Any] = [None] * dist.get_world_size()
dist.all_gather_object(counts, dict(reads))
if dist.get_rank() == 0:
    equal = all(torch.equal(each, vector) for each in everyone)
    tokens = student.initialization_report.calibration["tokens"]
    Path(arguments["output"]).write_text(
        json.dumps(
            {
                "world_size": dist.get_world_size(),
                "equal": equal,
                "tokens": tokens,
                "vector": vector.tolist(),
                "reads": counts,
            }
        )
    )
dist.destroy_process_group()
