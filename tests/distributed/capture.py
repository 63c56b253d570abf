"""Capture under torchrun, and tell how large the world was and which process ran the teacher on how many examples."""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from hf_guide.signal_cache.writer import capture_teacher
from tests.signal_cache.tiny_teachers import TEACHERS, Pad, count_forwards, examples_for

given = json.loads(sys.argv[1])
heard = {}
for task, config in given["configs"].items():
    model, forwards = TEACHERS[task].teacher(), []
    count_forwards(model, forwards)
    dataset, folder, runs = examples_for(task, given["examples"]), Path(given["folder"], task), []
    for _ in range(2):  # the second finds all done, and runs no more than what shows the shapes
        made = capture_teacher(model, dataset, folder, data_collator=Pad(), config=config, show_progress=False)
        assert len(made) == given["examples"]
        runs.append(sum(forwards))
        forwards.clear()
    everyone = [0] * dist.get_world_size()
    dist.all_gather_object(everyone, runs[0] - runs[1])
    heard[task] = everyone
if dist.get_rank() == 0:
    Path(given["output"]).write_text(json.dumps({"world_size": dist.get_world_size(), "heard": heard}))
dist.destroy_process_group()
