"""Capture under torchrun; record the number of processes and how many examples each ran the teacher on."""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from hf_guide.signal_cache.writer import capture_teacher
from tests.signal_cache.tiny_teachers import TEACHERS, Pad, count_forwards, examples_for

settings = json.loads(sys.argv[1])
examples_per_rank = {}
for task, config in settings["configs"].items():
    model, forwards = TEACHERS[task].teacher(), []
    count_forwards(model, forwards)
    dataset, folder, runs = examples_for(task, settings["examples"]), Path(settings["folder"], task), []
    for _ in range(2):  # the second finds all shards and runs only the example for the shapes
        capture = capture_teacher(model, dataset, folder, data_collator=Pad(), config=config, show_progress=False)
        assert len(capture) == settings["examples"]
        runs.append(sum(forwards))
        forwards.clear()
    per_rank = [0] * dist.get_world_size()
    dist.all_gather_object(per_rank, runs[0] - runs[1])
    examples_per_rank[task] = per_rank
if dist.get_rank() == 0:
    Path(settings["output"]).write_text(
        json.dumps({"world_size": dist.get_world_size(), "examples_per_rank": examples_per_rank})
    )
dist.destroy_process_group()
