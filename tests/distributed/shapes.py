"""Search shapes in a world of processes; rank 0 writes the losses, or the errors, of all.

`calls` has for each name how many `rows` of one batch are passed, by rank ("self_generated" for that), and options of the
`method`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hf_guide import HfGuideError, find_shapes
from tests.calibration.small_students import token_batches
from tests.tiny import KINDS

params = json.loads(sys.argv[1])
dist.init_process_group("gloo")
teacher = KINDS["llama"].teacher().double()
found: dict[str, Any] = {}
for name, call in params["calls"].items():
    rows = call["rows"][dist.get_rank()]
    dataset = rows if rows == "self_generated" else token_batches(16, rows)[:1]
    method = {"method": "calibrated", "calibration_batch_size": 32, **call.get("method", {})}
    result: Any
    try:
        shapes = find_shapes(
            teacher, num_parameters="40%", limit=1, method=method, calibration_dataset=dataset, show_progress=False
        )
        result = [[shape.overrides, shape.quick_loss, shape.loss] for shape in shapes]
    except HfGuideError as error:
        result = f"{type(error).__name__}: {error}"
    found[name] = [None] * dist.get_world_size()
    dist.all_gather_object(found[name], result)
if dist.get_rank() == 0:
    Path(params["output"]).write_text(json.dumps({"world_size": dist.get_world_size(), "found": found}))
dist.destroy_process_group()
