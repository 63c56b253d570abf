"""Run `hf-guide label` under torchrun; record the number of processes and the files that each wrote."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from hf_guide.cli.main import main
from hf_guide.scripts import label

settings = json.loads(sys.argv[1])
written: list[str] = []
write = label.atomic_write_text


def record(path: Path, text: str, **options: Any) -> None:
    written.append(path.name)
    write(path, text, **options)


label.atomic_write_text = record
assert main(settings["words"]) == 0
rank = int(os.environ["RANK"])
output = Path(settings["output"])
output.with_name(f"rank_{rank}.json").write_text(json.dumps(written))
if rank == 0:
    output.write_text(json.dumps({"world_size": int(os.environ["WORLD_SIZE"])}))
