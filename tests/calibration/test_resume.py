"""A calibrated start that was killed goes on where it was, to the same bits, and refuses what another call has left."""

import dataclasses
import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_guide import OptionError, from_teacher
from hf_guide.calibration import reconstruction as repair
from hf_guide.calibration import resume as checkpoint
from hf_guide.calibration import statistics
from hf_guide.calibration.sequential import SequentialBlocks
from hf_guide.cli.main import main
from hf_guide.utils import files as folders
from tests.calibration.test_calibrated import SMALLER, batches_for, data
from tests.tiny import KINDS, same_bits


class Killed(BaseException):
    """Stands for the end of a process."""


def die_after(count: int, monkeypatch: pytest.MonkeyPatch, *, halfway: bool) -> None:
    """Let a run die once it has written `count` files: right after the last, or, halfway, before that has its name."""
    written: list[Path] = []
    publish = getattr(folders.sync_and_rename, "__wrapped__", folders.sync_and_rename)

    def dying(partial: Path, path: Path) -> None:
        if halfway and len(written) == count:
            raise Killed
        publish(partial, path)
        written.append(path)
        if not halfway and len(written) == count:
            raise Killed

    dying.__wrapped__ = publish  # type: ignore[attr-defined]
    monkeypatch.setattr(folders, "sync_and_rename", dying)


def made(name: str, folder: Path | None, **method: Any) -> Any:
    kind = KINDS[name]
    return from_teacher(
        kind.teacher(),
        method={"method": "calibrated", **method},
        calibration_dataset=batches_for(kind),
        calibration_cache_dir=folder,
        show_progress=False,
        **kind.smaller,
    )


def said(student: Any) -> dict[str, Any]:
    report = dataclasses.asdict(student.initialization_report)
    return {name: value for name, value in report.items() if name not in ("seconds", "peak_memory_bytes")}


@pytest.mark.parametrize(
    ("name", "halfway"), [("llama tied", False), ("llama tied", True), ("gpt2", False), ("t5", False)]
)
def test_killed_after_every_file_it_ends_with_the_same_bits(
    name: str, halfway: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run dies one file further on; that there is an end shows that each goes on from what the others left."""
    expected = made(name, None)
    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN_SAVES", 0.0)
    heard: list[int] = []
    run = statistics.forward_no_cache
    monkeypatch.setattr(statistics, "forward_no_cache", lambda *given: heard.append(len(deaths)) or run(*given))
    deaths: list[None] = []
    while True:
        with monkeypatch.context() as within:
            die_after(1, within, halfway=halfway)
            try:
                student = made(name, tmp_path / "kept")
                break
            except Killed:
                deaths.append(None)
    steps = len(list((tmp_path / "kept").glob("step-*")))
    assert steps == 1 + (4 if name == "t5" else 2) + 1, "the table, each block, and what is behind the last"
    assert len(deaths) == 1 + 5 + steps - halfway, "as many as there were files to write"
    if not halfway:
        assert heard == [1, 2, 3, 4, 5], "each run but the first heard one batch, until there were no more"
    assert same_bits(student, expected) and said(student) == said(expected)
    assert not list((tmp_path / "kept").glob("*.partial"))


def test_what_was_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = made("llama", tmp_path)
    files = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert "step-layers.1.safetensors" in files

    def never(*given: Any, **more: Any) -> None:
        raise AssertionError("this was done before")

    monkeypatch.setattr(statistics, "forward_no_cache", never)
    monkeypatch.setattr(repair, "select_ridge", never)
    monkeypatch.setattr(SequentialBlocks, "__init__", never)
    assert same_bits(made("llama", tmp_path), expected)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files


@pytest.mark.parametrize("removed", ["table", "layers.0", "layers.1", "heads"])
def test_a_step_that_was_removed_is_worked_out_again_and_all_after_it(removed: str, tmp_path: Path) -> None:
    expected = made("llama tied", tmp_path)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    (tmp_path / f"step-{removed}.safetensors").unlink()
    assert same_bits(made("llama tied", tmp_path), expected)
    steps = ["table", "layers.0", "layers.1", "heads"]
    again = [
        step for step in steps if (path := tmp_path / f"step-{step}.safetensors").stat().st_mtime_ns != written[path]
    ]
    assert again == steps[steps.index(removed) :]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"ridge": 0.3}, "options.ridge is None there and 0.3 here"),
        ({"dtype": "bfloat16"}, "student_dtype is 'torch.float32' there and 'torch.bfloat16' here"),
        ({"hidden_size": 32}, "student_config.hidden_size is 24 there and 32 here"),
        ({"dataset": data(7)}, "batches is 8 there and 7 here"),
        ({"dataset": list(reversed(data()))}, "calibration_data is"),
        ({"teacher": KINDS["llama"].teacher(rms_norm_eps=1e-3)}, "teacher_config.rms_norm_eps is"),
    ],
    ids=str,
)
def test_another_call_is_refused_with_what_differs(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    teacher = KINDS["llama"].teacher()

    def make(ridge: float | None = None, dataset: Any = None, teacher: Any = teacher, **shape: Any) -> Any:
        return from_teacher(
            teacher,
            method={"method": "calibrated", "ridge": ridge},
            calibration_dataset=dataset or data(),
            calibration_cache_dir=tmp_path,
            show_progress=False,
            **SMALLER | shape,
        )

    make()
    with pytest.raises(OptionError, match="was begun with other settings") as found:
        make(**change)
    assert named in str(found.value)
    with torch.no_grad():
        teacher.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(OptionError, match="teacher_weights is"):
        make()


def test_folders_that_cannot_serve(tmp_path: Path) -> None:
    teacher = KINDS["llama"].teacher()

    def refused(folder: Path, word: str, method: str = "calibrated") -> None:
        drawn = iter(data())
        with pytest.raises(OptionError, match=word):
            from_teacher(
                teacher,
                method=method,
                calibration_dataset=drawn if method == "calibrated" else None,
                calibration_cache_dir=folder,
                show_progress=False,
                **SMALLER,
            )
        assert len(list(drawn)) == 8 or folder.joinpath("calibration.json").exists()

    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "is a file")
    refused(tmp_path, "holds something else: file")
    refused(tmp_path / "new", "uses no data", method="guide")
    assert not (tmp_path / "new").exists()
    kept = tmp_path / "kept"
    from_teacher(
        teacher,
        method="calibrated",
        calibration_dataset=data(),
        calibration_cache_dir=kept,
        show_progress=False,
        **SMALLER,
    )
    hearing = next(kept.glob("statistics-*"))
    hearing.write_bytes(hearing.read_bytes()[:100])
    refused(kept, "damaged")
    (kept / "calibration.json").write_text("{")
    refused(kept, "damaged")


def test_a_process_that_gets_sigkill_while_it_repairs(tmp_path: Path) -> None:
    script = """
        import os, signal, sys
        from pathlib import Path
        from hf_guide.utils import files
        from tests.calibration.test_resume import made
        publish = files.sync_and_rename
        def dying(partial, path):
            if path.name == "step-layers.1.safetensors":
                os.kill(os.getpid(), signal.SIGKILL)
            publish(partial, path)
        files.sync_and_rename = dying
        made("llama", Path(sys.argv[1]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), tmp_path],
        cwd=Path(__file__).parents[2],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = {path.name for path in tmp_path.iterdir()}
    assert "step-layers.0.safetensors" in left and "step-layers.1.safetensors" not in left
    assert any(name.endswith(".partial") for name in left)
    assert same_bits(made("llama", tmp_path), made("llama", None))
    assert not any(path.name.endswith(".partial") for path in tmp_path.iterdir())


def test_the_command_line_takes_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    given: dict[str, Any] = {}

    def stopped(teacher: str, **options: Any) -> None:
        given.update(options)
        if options.get("calibration_cache_dir"):
            options["calibration_cache_dir"].mkdir()
            (options["calibration_cache_dir"] / "calibration.json").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_guide.modeling.from_teacher", stopped)
    command = ["init", "teacher", "-o", str(tmp_path / "out"), "--method", "calibrated"]
    assert main([*command, "--calibration-cache-dir", str(tmp_path / "kept")]) == 130
    assert given["calibration_cache_dir"] == tmp_path / "kept"
    assert f"the same command goes on from {tmp_path / 'kept'}" in capsys.readouterr().err
    assert main(command) == 130 and "nothing was left behind" in capsys.readouterr().err


def test_the_manifest_is_json_and_the_rest_safetensors(tmp_path: Path) -> None:
    made("llama", tmp_path)
    manifest = json.loads((tmp_path / "calibration.json").read_text())
    assert manifest["options"]["method"] == "calibrated" and manifest["processes"] == 1
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
