"""Several processes label what one does, and share the work."""

import json
from pathlib import Path

import pytest

from tests.distributed.launch import run_processes
from tests.scripts.test_label import NO_EVALUATION, SAMPLING, content, run, saved
from tests.small_speech import whisper, whisper_processor, write_dataset


@pytest.mark.slow
def test_two_processes_write_the_labels_of_one(tmp_path: Path) -> None:
    processor = whisper_processor()
    teacher, file = saved(tmp_path / "teacher", whisper(processor), processor), write_dataset(tmp_path / "data", 10)
    flags = (*SAMPLING, *NO_EVALUATION, "--language", "german", "--speech-task", "transcribe")
    assert run(teacher, tmp_path / "one", file, *flags) == 0
    words = ["label", teacher, "-o", str(tmp_path / "two"), "--data-files", str(file), "--no-progress", *flags]
    for _ in range(2):  # the second finds all files
        run_processes("label.py", 2, {"words": words}, tmp_path)
        shares = [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(2)]
        assert content(tmp_path / "two") == content(tmp_path / "one")
        for path in (tmp_path / "two").glob("train-00000*"):
            path.unlink()
    assert [len(share) for share in shares] == [1, 0], "the file that was missing, and no other"
