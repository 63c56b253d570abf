"""Fit projectors under torchrun; rank 0 saves them and tells whether all processes have the same."""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from hf_guide import HfGuideError, fit_subclasses
from tests.lelp.test_fitting import examples, teacher_of
from tests.signal_cache.tiny_teachers import Pad

given = json.loads(sys.argv[1])
rows = [row | {"fine": 2 * (number % 3) + number % 2} for number, row in enumerate(examples())]
alike, errors = {}, []
for splitter, capture in given["runs"]:
    found = fit_subclasses(
        teacher_of(),
        rows if capture else iter(rows),
        4,
        splitter=splitter,
        fine_label_column="fine",
        data_collator=Pad(),
        batch_size=9,
        capture=given["folder"] + "/capture" if capture else None,
        show_progress=False,
    )
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [tensor.tolist() for tensor in found.scores.tensors().values()])
    alike[splitter] = all(each == everyone[0] for each in everyone)
    if dist.get_rank() == 0:
        found.save_pretrained(Path(given["folder"], f"{splitter}-{bool(capture)}"))
try:  # the last batch is another process's: an error there is one of all
    fit_subclasses(
        teacher_of(), [*rows[:9], rows[9] | {"label": 9}], 2, data_collator=Pad(), batch_size=9, show_progress=False
    )
except HfGuideError as error:
    errors = [None] * dist.get_world_size()
    dist.all_gather_object(errors, str(error))
if dist.get_rank() == 0:
    Path(given["output"]).write_text(
        json.dumps({"world_size": dist.get_world_size(), "alike": alike, "errors": errors})
    )
dist.destroy_process_group()
