"""End a process right after a collective, while a thread of gloo still holds its tensor and waits for the GIL."""

import atexit
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from hf_guide.utils import distributed

params = json.loads(sys.argv[1])
if not params["waits"]:
    atexit.unregister(distributed._let_collectives_finish)
dist.init_process_group("gloo")
group = dist.distributed_c10d._get_default_group()  # as a wrapped model refers to it
if dist.get_rank() == 0:
    Path(params["output"]).write_text(json.dumps({"world_size": dist.get_world_size()}))
sys.setswitchinterval(100.0)  # no other thread gets the GIL unless this one waits
tensor = torch.ones(100_000)
for _ in range(3):
    dist.all_reduce(tensor)
dist.destroy_process_group()
