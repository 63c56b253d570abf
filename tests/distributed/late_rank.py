"""Let rank 1 begin a collective only once rank 0 warns of it, and be late for another; rank 0 writes what it logged."""

import json
import logging
import sys
import time
from pathlib import Path

import torch.distributed as dist

from hf_guide.utils import distributed

params = json.loads(sys.argv[1])
distributed.STARTUP_WARNING_TIME = distributed.HEARTBEAT_INTERVAL = 0.5
messages: list[str] = []
warned = Path(params["output"]).with_suffix(".warned")


class Recorder(logging.Handler):
    """Keeps messages, and creates the file that rank 1 waits for."""

    def emit(self, record: logging.LogRecord) -> None:
        messages.append(record.getMessage())
        warned.touch()


logging.getLogger("hf_guide").addHandler(Recorder())
dist.init_process_group("gloo")
if dist.get_rank() == 1:
    while not warned.exists():
        time.sleep(0.1)
first = distributed.all_reduce_scalar(dist.get_rank() + 1)
if dist.get_rank() == 1:
    time.sleep(2.0)  # a rank that has begun and is slow
second = distributed.all_reduce_scalar(10)
if dist.get_rank() == 0:
    result = {"world_size": dist.get_world_size(), "sums": [first, second], "messages": messages}
    Path(params["output"]).write_text(json.dumps(result))
dist.destroy_process_group()
