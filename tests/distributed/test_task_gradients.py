"""The law of several processes for every row of the task table: two of four examples are one of eight."""

from pathlib import Path

import pytest
import torch

from tests.distillation.task_cases import CASES, mixed_losses
from tests.distributed.launch import run_processes

FAST = ("question-answering", "ctc")
"""What the default run has; the others are slow only because each process trains them all."""


@pytest.mark.extended
@pytest.mark.parametrize("names", [FAST, pytest.param(tuple(CASES), marks=pytest.mark.slow)], ids=["some", "all"])
def test_two_processes_of_four_are_one_of_eight(names: tuple[str, ...], tmp_path: Path) -> None:
    # The rows of image-text pairs compare the examples of a batch: four of them are another question than eight.
    cases = {name: CASES[name] for name in names if not CASES[name].compares_examples}
    losses = {name: mixed_losses(case, invariant=True) for name, case in cases.items()}
    one, two = (
        run_processes("task_gradients.py", count, {"losses": losses, "batch_size": 8 // count}, tmp_path)["cases"]
        for count in (1, 2)
    )
    for name in cases:
        vectors = [torch.tensor(found[name]["gradient"]) for found in (one, two)]
        assert vectors[0].norm() > 1e-3, name
        assert (vectors[0] - vectors[1]).norm() < 1e-4 * vectors[0].norm(), name
        assert two[name]["log"] == pytest.approx(one[name]["log"], rel=1e-4), name
