"""`hf-guide distill`, killed at random moments and resumed each time, ends as a run that was never interrupted.

By hand, with more kills and what each run went through:

    python -m tests.distillation.test_resuming FOLDER --runs 45 --seed 0
"""

import argparse
import json
import logging
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from tqdm import tqdm

from tests.tiny import run_python

TIMES = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos"}
TIMES |= {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}

OPTIONS: dict[str, Any] = {
    "losses": {"ce": 0.5, "kd": 0.5, "hidden_states": 0.1},
    "max_steps": 16,
    "save_strategy": "steps",
    "save_steps": 2,
    "logging_steps": 3,
    "eval_strategy": "steps",
    "eval_steps": 8,
    "save_total_limit": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.01,
    "lr_scheduler_type": "cosine",
    "max_length": 32,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "resume_from_checkpoint": True,
}


def prepare(folder: Path) -> None:
    """Write a teacher, a student with dropout that is narrower, and texts."""
    from tests.examples.local import make_model, write_text

    write_text(folder / "text.txt")
    make_model(folder / "teacher", "llama", "ForCausalLM")
    student = make_model(folder / "student", "llama", "ForCausalLM", width=16, blocks=1)
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))


def distil(folder: Path, name: str) -> None:
    """Run the command as a shell would; its output is in a file."""
    from hf_guide.cli.main import main

    given = {
        "teacher": str(folder / "teacher"),
        "model_name_or_path": str(folder / "student"),
        "data_files": str(folder / "text.txt"),
        "output_dir": str(folder / name),
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(OPTIONS | given))
    code = main(["distill", str(path)])
    sys.stdout.flush()
    os._exit(code)


def start(folder: Path, name: str) -> int:
    """Run the command in a process of its own, which needs not import anything, and return the process's number."""
    child = os.fork()
    if child == 0:
        # The lock of the progress bars is one that all processes share: one that was killed may have held it.
        tqdm.set_lock(threading.RLock())
        output = os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        try:
            distil(folder, name)
        except BaseException:
            logging.exception("failed")
        os._exit(99)
    return child


def run(folder: Path, name: str) -> float:
    """Run the command to its end and return how long it took."""
    begun = time.monotonic()
    code = os.waitstatus_to_exitcode(os.waitpid(start(folder, name), 0)[1])
    assert code == 0, (folder / f"{name}.log").read_text()[-4000:]
    return time.monotonic() - begun


def killed(folder: Path, name: str, seconds: float) -> bool:
    """Run the command and kill it after some time; return whether it was still running."""
    child = start(folder, name)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def ending(folder: Path) -> dict[str, Any]:
    """Return everything that a run has ended with, but for how long it took."""
    from safetensors.torch import load_file

    from hf_guide.distillation.checkpoints import list_checkpoints, reason_incomplete

    state = json.loads((folder / "trainer_state.json").read_text())
    last = list_checkpoints(folder)[0]
    assert reason_incomplete(last) is None and not [
        path for path in folder.iterdir() if path.name.endswith(".partial")
    ]
    return {
        "curve": [{key: value for key, value in entry.items() if key not in TIMES} for entry in state["log_history"]],
        "weights": load_file(folder / "model.safetensors"),
        "checkpoint": load_file(last / "model.safetensors"),
        "projections": load_file(last / "distillation_projections.safetensors"),
        "optimizer": _loaded(last / "optimizer.pt"),
        "schedule": _loaded(last / "scheduler.pt"),
        "random": _loaded(last / "rng_state.pth"),
        "checkpoints": sorted(path.name for path in list_checkpoints(folder)),
    }


def _loaded(path: Path) -> Any:
    import torch
    from transformers.trainer_pt_utils import safe_globals

    with safe_globals():
        return torch.load(path, weights_only=True)


def equal(one: Any, other: Any) -> bool:
    """Whether two nests of numbers and tensors are the same, bit for bit."""
    import numpy
    import torch

    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return bool(numpy.array_equal(one, other))


def main() -> None:
    """Kill runs as often as is asked for, and print how many were resumed to the same ending."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=45)
    parser.add_argument("--kills", type=int, help="of each run; by default one or two")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tqdm.monitor_interval = 0  # its thread would be forked in the middle of anything
    draw, kills, same = random.Random(args.seed), 0, 0
    prepare(args.folder)
    import hf_guide.scripts.distill  # noqa: F401  here, so that the children need not import anything

    run(args.folder, "warm")
    length = run(args.folder, "whole")
    expected = ending(args.folder / "whole")
    for number in range(args.runs):
        name, mine = f"run{number}", 0
        for _ in range(args.kills or draw.choice([1, 1, 1, 2])):
            mine += killed(args.folder, name, draw.uniform(0.1, 0.9) * length)
        run(args.folder, name)
        found = ending(args.folder / name)
        differing = [key for key in expected if not equal(expected[key], found[key])]
        kills, same = kills + mine, same + (not differing)
        print(
            f"{name}: killed {mine} times, {'differs in ' + ', '.join(differing) if differing else 'the same'}",
            flush=True,
        )
    print(f"{args.runs} runs, {kills} kills, {same} ended as the uninterrupted run")
    assert same == args.runs


def killed_runs(folder: Path, *words: object) -> str:
    """Run this file as a program and return the last line of what it prints."""
    script = "import tests.distillation.test_resuming as kills; kills.main()"
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return run_python(script, folder, *words, seconds=3600, **environment).splitlines()[-1]


@pytest.mark.extended
def test_runs_that_are_killed_at_random_moments_end_as_an_uninterrupted_one(tmp_path: Path) -> None:
    assert killed_runs(tmp_path, "--runs", 1, "--kills", 3).endswith("1 ended as the uninterrupted run")


@pytest.mark.slow
def test_forty_five_runs_that_are_killed_at_random_moments_end_as_an_uninterrupted_one(tmp_path: Path) -> None:
    assert killed_runs(tmp_path, "--runs", 45).endswith("45 ended as the uninterrupted run")


if __name__ == "__main__":
    main()
