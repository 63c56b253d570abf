"""Fit projectors under torchrun; rank 0 saves them and reports whether all ranks have the same."""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from hf_guide import HfGuideError, fit_subclasses
from tests.lelp.test_fitting import examples, teacher_of
from tests.signal_cache.tiny_teachers import Pad

params = json.loads(sys.argv[1])
rows = [row | {"fine": 2 * (number % 3) + number % 2} for number, row in enumerate(examples())]
alike, errors = {}, []
for splitter, capture in params["runs"]:
    actual = fit_subclasses(
        teacher_of(),
        rows if capture else iter(rows),
        4,
        splitter=splitter,
        fine_label_column="fine",
        data_collator=Pad(),
        batch_size=9,
        capture=params["folder"] + "/capture" if capture else None,
        show_progress=False,
    )
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, [tensor.tolist() for tensor in actual.scores.tensors().values()])
    alike[splitter] = all(each == gathered[0] for each in gathered)
    if dist.get_rank() == 0:
        actual.save_pretrained(Path(params["folder"], f"{splitter}-{bool(capture)}"))
try:  # the last batch is another process's: its error is raised on all
    fit_subclasses(
        teacher_of(), [*rows[:9], rows[9] | {"label": 9}], 2, data_collator=Pad(), batch_size=9, show_progress=False
    )
except HfGuideError as error:
    errors = [None] * dist.get_world_size()
    dist.all_gather_object(errors, str(error))
if dist.get_rank() == 0:
    Path(params["output"]).write_text(
        json.dumps({"world_size": dist.get_world_size(), "alike": alike, "errors": errors})
    )
dist.destroy_process_group()
