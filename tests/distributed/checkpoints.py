"""Distil under torchrun, damage the last checkpoint, resume, and report whether both runs end alike."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from hf_guide.distillation import checkpoints
from tests.distillation.test_checkpoints import curve, trainer

given = json.loads(sys.argv[1])
folder = Path(given["folder"])
whole = trainer(folder, max_steps=6)
whole.train()
named = [path.name for path in checkpoints.list_checkpoints(folder)]
files = sorted(path.name for path in (folder / "checkpoint-3").iterdir())
dist.barrier()
if dist.get_rank() == 0:
    os.remove(folder / "checkpoint-6" / "rng_state_1.pth")
dist.barrier()
again = trainer(folder, max_steps=6)
again.train(resume_from_checkpoint=True)
same = all(torch.equal(tensor, again.model.state_dict()[name]) for name, tensor in whole.model.state_dict().items())
found = {"same": same, "curves": [curve(whole), curve(again)], "checkpoints": named, "files": files}
finished = trainer(folder, max_steps=6)
found["finished"] = finished.train(resume_from_checkpoint=True).global_step
if dist.get_rank() == 0:
    found |= {"world_size": dist.get_world_size(), "left": sorted(os.listdir(folder))}
    Path(given["output"]).write_text(json.dumps(found))
dist.destroy_process_group()
