"""Several processes make the calibrated student that one makes."""

import torch

from tests.calibration.test_calibrated import student_of
from tests.distributed.worlds import run_world
from tests.tiny import KINDS


def test_two_processes_make_the_student_of_one(tmp_path):
    found = run_world("calibration.py", 2, {}, tmp_path)
    one = student_of(KINDS["llama"].teacher().double())
    vector = torch.cat([parameter.detach().flatten() for parameter in one.parameters()])
    assert found["alike"] and found["tokens"] == one.initialization_report.calibration["tokens"]
    assert (torch.tensor(found["vector"], dtype=torch.float64) - vector).abs().max() < 1e-9 * vector.abs().max()
