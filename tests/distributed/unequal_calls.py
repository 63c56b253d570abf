"""Call `from_teacher` in a world of processes that do not pass the same; rank 0 writes the errors of all.

`calls` has for each name what each rank passes besides the teacher: how many `batches` of data (or "self_generated"), from
which on (`start`), their `rows`, options of the `method`, and fields of the student's config.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hf_guide import HfGuideError, from_teacher
from tests.calibration.small_students import SMALLER, token_batches
from tests.tiny import KINDS

params = json.loads(sys.argv[1])
dist.init_process_group("gloo")
rank = dist.get_rank()
teacher = KINDS["llama"].teacher().double()
errors: dict[str, Any] = {}
for name, of_ranks in params["calls"].items():
    found, own = None, {"batches": 8, "start": 0, "rows": 4, "method": {}, **of_ranks[rank]}
    start, count, rows = (own.pop(key) for key in ("start", "batches", "rows"))
    dataset = count if count == "self_generated" else token_batches(16, rows)[start:][:count]
    method = {"method": "calibrated", **own.pop("method")}
    try:
        from_teacher(teacher, method=method, calibration_dataset=dataset, show_progress=False, **{**SMALLER, **own})
    except HfGuideError as error:
        found = f"{type(error).__name__}: {error}"
    errors[name] = [None] * dist.get_world_size()
    dist.all_gather_object(errors[name], found)
if rank == 0:
    Path(params["output"]).write_text(json.dumps({"world_size": dist.get_world_size(), "errors": errors}))
dist.destroy_process_group()
