"""Generated texts and losses are evaluated together on several processes, as on one."""

from pathlib import Path

import pytest

from tests.distributed.launch import run_processes
from tests.distributed.test_gradients import vector


@pytest.mark.slow
def test_an_evaluation_with_generation_does_not_depend_on_the_number_of_processes(
    tmp_path: Path,
) -> None:
    found = []
    for processes in (1, 2):
        arguments = {
            "per_device_train_batch_size": 2 if processes == 2 else 8,
            "gradient_accumulation_steps": processes,
            "per_device_eval_batch_size": 2,
        }
        found.append(run_processes("seq2seq.py", processes, {"arguments": arguments}, tmp_path))
    one, two = map(vector, found)
    assert one.norm() > 1e-3 and (one - two).norm() < 1e-5 * one.norm()
    metrics = [each["metrics"] for each in found]
    # Seven examples: what the dataloader fills the last batches up with counts for nothing in the losses.
    for name in ("loss", "ce", "kd", "teacher_agreement", "length"):
        assert metrics[1][f"eval_{name}"] == pytest.approx(metrics[0][f"eval_{name}"], rel=1e-4), name
    assert metrics[1]["eval_length"] == 7 and metrics[1]["eval_texts"] >= 7
