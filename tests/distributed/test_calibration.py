"""Several processes make the calibrated student that one makes."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_guide.teachers.tensor_source import SafetensorsTensors
from tests.calibration.small_students import make_student, token_batches
from tests.distributed.images_and_text import image_batches, text_influence
from tests.distributed.launch import run_processes
from tests.tiny import KINDS


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_processes("calibrate.py", 2, {}, tmp_path_factory.mktemp("uninterrupted"))


def test_two_processes_make_the_student_of_one(uninterrupted: dict[str, Any]) -> None:
    result = uninterrupted
    one = make_student(KINDS["llama"].teacher().double())
    vector = torch.cat([parameter.detach().flatten() for parameter in one.parameters()])
    assert result["equal"] and result["tokens"] == one.initialization_report.calibration["tokens"]
    assert (torch.tensor(result["vector"], dtype=torch.float64) - vector).abs().max() < 1e-9 * vector.abs().max()


def test_one_batch_is_split_between_processes(tmp_path: Path) -> None:
    """As where `calibration_tokens` end the reading within the first batch."""
    result = run_processes("calibrate.py", 3, {"batches": 1}, tmp_path)
    one = make_student(KINDS["llama"].teacher().double(), token_batches()[:1])
    vector = torch.cat([parameter.detach().flatten() for parameter in one.parameters()])
    assert result["equal"] and result["tokens"] == one.initialization_report.calibration["tokens"]
    assert (torch.tensor(result["vector"], dtype=torch.float64) - vector).abs().max() < 1e-9 * vector.abs().max()


@pytest.mark.extended
@pytest.mark.parametrize("layer_selection", ["block_influence", "local_search"])
def test_a_process_without_images_runs_blocks_as_those_with_images_do(layer_selection: str, tmp_path: Path) -> None:
    """The first process begins with text, whose blocks could run one by one; the other has images alone."""
    given = {"batches": 7, "layer_selection": layer_selection}
    result = run_processes("images_and_text.py", 2, given, tmp_path)
    assert result["influence"] == pytest.approx(text_influence(image_batches(7), layer_selection), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_that_read_a_folder_make_the_student_of_one_with_as_many_reads_each(
    processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process has one block at a time, in the same order, so that the system reads the files once for all of them."""
    KINDS["llama"].teacher().double().save_pretrained(tmp_path / "teacher")
    result = run_processes("calibrate.py", processes, {"teacher": str(tmp_path / "teacher")}, tmp_path)
    reads: Counter[str] = Counter()
    read = SafetensorsTensors._read

    def counting(self: SafetensorsTensors, name: str, rows: "slice | None") -> torch.Tensor:
        reads[name] += 1
        return read(self, name, rows)

    monkeypatch.setattr(SafetensorsTensors, "_read", counting)
    one = make_student(tmp_path / "teacher")
    vector = torch.cat([parameter.detach().flatten() for parameter in one.parameters()])
    assert result["equal"] and result["tokens"] == one.initialization_report.calibration["tokens"]
    assert (torch.tensor(result["vector"], dtype=torch.float64) - vector).abs().max() < 1e-9 * vector.abs().max()
    assert result["reads"] == [dict(reads)] * processes


@pytest.mark.slow
def test_two_processes_generate_the_text_of_one(tmp_path: Path) -> None:
    result = run_processes("calibrate.py", 2, {"dataset": "self_generated"}, tmp_path)
    one = make_student(KINDS["llama"].teacher().double(), "self_generated")
    vector = torch.cat([parameter.detach().flatten() for parameter in one.parameters()])
    assert result["equal"] and result["tokens"] == one.initialization_report.calibration["tokens"] == 8192
    assert (torch.tensor(result["vector"], dtype=torch.float64) - vector).abs().max() < 1e-9 * vector.abs().max()


@pytest.mark.slow  # one process that was killed is in tests/calibration/test_resume.py
def test_two_processes_that_were_killed_continue_to_the_same_bits(
    uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    """Rank 1 dies while it collects statistics, then rank 0 between two blocks; each time the other is ended."""
    given = {"folder": str(tmp_path / "kept")}
    for kill in ("statistics-00001-of-00002.safetensors", "step-layers.1.safetensors"):
        with pytest.raises(AssertionError, match="SIGKILL"):
            run_processes("calibrate.py", 2, given | {"kill": kill}, tmp_path)
        assert not (tmp_path / "kept" / kill).exists()
    assert (tmp_path / "kept" / "step-layers.0.safetensors").exists()
    result = run_processes("calibrate.py", 2, given, tmp_path)
    assert result["equal"] and result["vector"] == uninterrupted["vector"]
