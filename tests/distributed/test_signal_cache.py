"""Several processes capture what one does, and share the work."""

import pytest

from hf_guide.signal_cache.writer import capture_teacher
from tests.distributed.launch import run_processes
from tests.signal_cache.tiny_teachers import TEACHERS, Pad, examples_for

SHARDS = {"shard_size": 6, "batch_size": 4, "hidden_layers": [2]}
CONFIGS = {"causal-lm": {**SHARDS, "top_k": 8}, "sequence-classification": SHARDS}


@pytest.mark.extended
def test_two_processes_write_the_same_files_as_one(tmp_path):
    given = {"configs": CONFIGS, "examples": 29, "folder": str(tmp_path / "two")}
    found = run_processes("write_cache.py", 2, given, tmp_path)
    assert found["world_size"] == 2
    for task, config in CONFIGS.items():
        one, two = tmp_path / "one" / task, tmp_path / "two" / task
        dataset, model = examples_for(task, 29), TEACHERS[task].teacher()
        capture_teacher(model, dataset, one, data_collator=Pad(), config=config, show_progress=False)
        files = {path.name: path.read_bytes() for path in one.iterdir()}
        assert len([name for name in files if name.startswith("shard-")]) == 5
        assert files == {path.name: path.read_bytes() for path in two.iterdir()}
        assert found["examples_per_rank"][task] == [6 + 6 + 5, 6 + 6]  # shards 0, 2, 4 and 1, 3
