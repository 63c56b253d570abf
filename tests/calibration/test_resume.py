"""A calibration that was killed continues to the same bits; a folder of another call is an error."""

import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_guide import OptionError, find_shapes, from_teacher
from hf_guide.calibration import reconstruction, resume, statistics
from hf_guide.calibration.modules import find_modules
from hf_guide.calibration.sequential import SequentialBlocks, SequentialModel
from hf_guide.cli.main import main
from hf_guide.utils import files
from hf_guide.utils.checksums import write_json
from hf_guide.utils.fingerprint import SAMPLES_PER_TENSOR, tensors_fingerprint
from hf_guide.utils.resumable import MAX_LISTED
from tests.calibration.small_students import SMALLER, kind_batches, token_batches
from tests.calibration.small_students import make_student as make_small_student
from tests.invariants.test_laws import layout_of
from tests.tiny import KINDS, same_bits


class Killed(BaseException):
    """Raised in place of the end of a process."""


def kill_after(count: int, monkeypatch: pytest.MonkeyPatch, *, halfway: bool) -> None:
    """Kill a run once it has written `count` files: right after the last, or, halfway, before that is renamed."""
    written: list[Path] = []
    rename = getattr(files.sync_and_rename, "__wrapped__", files.sync_and_rename)

    def dying(partial: Path, path: Path) -> None:
        if halfway and len(written) == count:
            raise Killed
        rename(partial, path)
        written.append(path)
        if not halfway and len(written) == count:
            raise Killed

    dying.__wrapped__ = rename  # type: ignore[attr-defined]
    monkeypatch.setattr(files, "sync_and_rename", dying)


def make_student(name: str, folder: Path | None, *, keeps_width: bool = False, **method: Any) -> Any:
    kind = KINDS[name]
    shape = {field: size for field, size in kind.smaller.items() if not keeps_width or "layer" in field}
    return from_teacher(
        kind.teacher(),
        method={"method": "calibrated", **method},
        calibration_dataset=kind_batches(kind),
        calibration_cache_dir=folder,
        show_progress=False,
        **shape,
    )


def report_of(student: Any) -> dict[str, Any]:
    report = dataclasses.asdict(student.initialization_report)
    return {name: value for name, value in report.items() if name not in ("seconds", "peak_memory_bytes")}


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("name", "halfway", "keeps_width"),
    [
        ("llama tied", False, True),
        ("llama tied", True, False),
        ("gpt2", False, False),
        ("t5", False, True),
        ("t5", False, False),
    ],
)
def test_killed_after_every_file_it_ends_with_the_same_bits(
    name: str, halfway: bool, keeps_width: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run is killed one file later; that one ends shows that each continues from what the others saved."""
    expected = make_student(name, None, keeps_width=keeps_width)
    monkeypatch.setattr(resume, "SECONDS_BETWEEN_SAVES", 0.0)
    collected: list[int] = []
    register = statistics._StatisticsCollector.register_hooks
    monkeypatch.setattr(
        statistics._StatisticsCollector,
        "register_hooks",
        lambda self, handles, stack, index: (
            collected.extend([] if stack is None else [len(deaths)]) or register(self, handles, stack, index)
        ),
    )
    deaths: list[None] = []
    while True:
        with monkeypatch.context() as within:
            kill_after(1, within, halfway=halfway)
            try:
                student = make_student(name, tmp_path / "cache", keeps_width=keeps_width)
                break
            except Killed:
                deaths.append(None)
    steps = len(list((tmp_path / "cache").glob("step-*")))
    stacks = 2 if name == "t5" else 1
    of_stack = 3 if keeps_width else 2
    assert steps == 1 + of_stack * stacks + 1, (
        "the table, of each stack two blocks and what a search chose, and the head"
    )
    blocks = sum(map(len, find_modules(teacher := KINDS[name].teacher(), layout_of(teacher)).blocks.values()))
    assert len(deaths) == 1 + blocks + 1 + steps - halfway, "as many as there were files to write"
    if not halfway:
        collected_each_once = list(range(1, 1 + blocks))
        assert collected == collected_each_once, "each run but the first collected one block, until there were no more"
    assert same_bits(student, expected) and report_of(student) == report_of(expected)
    assert not list((tmp_path / "cache").glob("*.partial"))


@pytest.mark.extended
@pytest.mark.parametrize("name", ["llama tied", "t5"])
def test_killed_at_random_moments_it_ends_with_the_same_bits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four runs are killed before a product of matrices, each continues from what the others saved, and the fifth ends."""
    expected = make_student(name, None)
    monkeypatch.setattr(resume, "SECONDS_BETWEEN_SAVES", 0.0)
    draw, linear, deaths, left = random.Random(0), torch.nn.functional.linear, 0, 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed
        return linear(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "linear", dying)
    while True:
        left = draw.randint(20, 250) if deaths < 4 else 0
        try:
            student = make_student(name, tmp_path / "cache")
            break
        except Killed:
            deaths += 1
    assert deaths == 4
    assert same_bits(student, expected) and report_of(student) == report_of(expected)


def test_what_was_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = make_student("llama", tmp_path)
    files = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert "step-layers.1.safetensors" in files

    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("this was done before")

    monkeypatch.setattr(SequentialModel, "visit", never)
    monkeypatch.setattr(reconstruction, "fit_weights", never)
    monkeypatch.setattr(SequentialBlocks, "__init__", never)
    assert same_bits(make_student("llama", tmp_path), expected)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files


@pytest.mark.sampled(1)
@pytest.mark.parametrize("removed", ["tied_embedding", "layers.0", "layers.1", "lm_head"])
def test_a_step_that_was_removed_is_computed_again_with_all_after_it(removed: str, tmp_path: Path) -> None:
    expected = make_student("llama tied", tmp_path)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    (tmp_path / f"step-{removed}.safetensors").unlink()
    assert same_bits(make_student("llama tied", tmp_path), expected)
    steps = ["tied_embedding", "layers.0", "layers.1", "lm_head"]
    again = [
        step for step in steps if (path := tmp_path / f"step-{step}.safetensors").stat().st_mtime_ns != written[path]
    ]
    assert again == steps[steps.index(removed) :]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"ridge": 0.3}, "options.ridge is None there and 0.3 here"),
        ({"dtype": "bfloat16"}, "student_dtype is 'torch.float32' there and 'torch.bfloat16' here"),
        ({"hidden_size": 32}, "student_config.hidden_size is 24 there and 32 here"),
        ({"dataset": token_batches(7)}, "batches is 8 there and 7 here"),
        ({"dataset": list(reversed(token_batches()))}, "calibration_data is"),
        ({"teacher": KINDS["llama"].teacher(rms_norm_eps=1e-3)}, "another teacher: teacher_config.rms_norm_eps is"),
        (
            {"teacher": KINDS["llama"].teacher(num_hidden_layers=3, max_position_embeddings=64, rms_norm_eps=1e-3)},
            "another teacher: teacher_config.",
        ),
    ],
    ids=str,
)
def test_another_call_is_an_error_that_names_what_differs(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    teacher = KINDS["llama"].teacher()

    def make(ridge: float | None = None, dataset: Any = None, teacher: Any = teacher, **shape: Any) -> Any:
        return from_teacher(
            teacher,
            method={"method": "calibrated", "ridge": ridge},
            calibration_dataset=dataset or token_batches(),
            calibration_cache_dir=tmp_path,
            show_progress=False,
            **SMALLER | shape,
        )

    make()
    with pytest.raises(OptionError, match="was begun with") as found:
        make(**change)
    assert named in str(found.value) and str(found.value).count(" there and ") <= MAX_LISTED
    with torch.no_grad():
        teacher.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(OptionError, match="another teacher: teacher_weights is"):
        make()


def edit(tensors: dict[str, torch.Tensor], name: str) -> None:
    """Change values between two that fingerprints sample, as training a few rows does in a large tensor."""
    sampled = torch.linspace(0, tensors[name].numel() - 1, SAMPLES_PER_TENSOR, dtype=torch.float64).long()
    with torch.no_grad():
        tensors[name].view(-1)[sampled[30] + 1 : sampled[31]] *= 1.25


EDITED = ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"]


@pytest.mark.parametrize("name", EDITED)
def test_an_edited_file_of_the_teacher_is_an_error(name: str, tmp_path: Path) -> None:
    """The former file continues once it has its former time, as the error advises."""
    KINDS["llama"].teacher().save_pretrained(tmp_path / "teacher")
    path = tmp_path / "teacher" / "model.safetensors"
    weights, size, time = tensors_fingerprint(load_file(path).items()), path.stat().st_size, path.stat().st_mtime_ns

    def make() -> Any:
        return make_small_student(tmp_path / "teacher", folder=tmp_path / "cache")

    expected, content, tensors = make(), path.read_bytes(), load_file(path)
    edit(tensors, name)
    assert tensors_fingerprint(tensors.items()) == weights, "no sampled value is of the edit"
    save_file(tensors, path, {"format": "pt"})
    os.utime(path, ns=(time, time + 1))
    assert path.stat().st_size == size
    with pytest.raises(
        OptionError, match=r"another model\.safetensors of the teacher: \d+ bytes of .* UTC then"
    ) as found:
        make()
    path.write_bytes(content)
    with pytest.raises(OptionError, match="another model.safetensors"):
        make()
    command = re.search(r"touch -d '.*' model.safetensors", str(found.value))
    assert command is not None
    subprocess.run(command[0], cwd=path.parent, shell=True, check=True)
    assert same_bits(make(), expected)


@pytest.mark.parametrize("name", EDITED)
def test_an_edited_teacher_in_memory_is_an_error(name: str, tmp_path: Path) -> None:
    teacher = KINDS["llama"].teacher()
    make_small_student(teacher, folder=tmp_path)
    edit(teacher.state_dict(), name)
    with pytest.raises(OptionError, match="another teacher: teacher_values is '"):
        make_small_student(teacher, folder=tmp_path)


def test_a_moved_folder_of_the_teacher_continues_and_a_loaded_teacher_does_not(tmp_path: Path) -> None:
    KINDS["llama"].teacher().save_pretrained(tmp_path / "teacher", max_shard_size="40KB")
    expected = make_small_student(tmp_path / "teacher", folder=tmp_path / "cache")
    (tmp_path / "teacher").rename(tmp_path / "moved")
    assert same_bits(make_small_student(tmp_path / "moved", folder=tmp_path / "cache"), expected)
    with pytest.raises(OptionError, match="teacher_values is 'in files' there and "):
        make_small_student(KINDS["llama"].teacher(), folder=tmp_path / "cache")
    KINDS["llama"].teacher().save_pretrained(tmp_path / "whole")
    with pytest.raises(OptionError, match=r"another model-00001-of-\d+\.safetensors .* then, no such file now"):
        make_small_student(tmp_path / "whole", folder=tmp_path / "cache")


@pytest.mark.parametrize("sizes", [SMALLER, {"num_parameters": "40%"}], ids=["sizes", "budget"])
def test_a_folder_in_the_home_folder(sizes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(find_shapes.__kwdefaults__, "limit", 1)
    from_teacher(
        KINDS["llama"].teacher(),
        method="calibrated",
        calibration_dataset=token_batches(),
        calibration_cache_dir="~/kept",
        show_progress=False,
        **sizes,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["home"] and any((tmp_path / "home" / "kept").iterdir())


def test_folders_that_cannot_serve(tmp_path: Path) -> None:
    teacher = KINDS["llama"].teacher()

    def check_error(folder: Path, word: str, method: str = "calibrated") -> None:
        drawn = iter(token_batches())
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
    check_error(tmp_path / "file", "is a file")
    check_error(tmp_path, "holds something else: file")
    check_error(tmp_path / "new", "uses no data", method="guide")
    assert not (tmp_path / "new").exists()
    cache = tmp_path / "cache"
    from_teacher(
        teacher,
        method="calibrated",
        calibration_dataset=token_batches(),
        calibration_cache_dir=cache,
        show_progress=False,
        **SMALLER,
    )
    statistics_file = next(cache.glob("statistics-*"))
    statistics_file.write_bytes(statistics_file.read_bytes()[:100])
    check_error(cache, "damaged")
    (cache / "calibration.json").write_text("{")
    check_error(cache, "damaged")


def test_a_folder_that_is_not_writable_is_an_error_before_the_teacher_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "calibration.json").touch()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and not mode & os.W_OK)  # as for no root
    monkeypatch.setattr("hf_guide.methods.calibrated.collect_calibration", None)
    with pytest.raises(PermissionError, match=f"{tmp_path} is not writable. Make it writable"):
        make_student("llama", tmp_path)


@pytest.mark.extended
def test_a_process_that_gets_sigkill_while_it_refits(tmp_path: Path) -> None:
    script = """
        import os, signal, sys
        from pathlib import Path
        from hf_guide.utils import files
        from tests.calibration.test_resume import make_student
        rename = files.sync_and_rename
        def dying(partial, path):
            if path.name == "step-layers.1.safetensors":
                os.kill(os.getpid(), signal.SIGKILL)
            rename(partial, path)
        files.sync_and_rename = dying
        make_student("llama", Path(sys.argv[1]))
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
    assert same_bits(make_student("llama", tmp_path), make_student("llama", None))
    assert not any(path.name.endswith(".partial") for path in tmp_path.iterdir())


def test_the_command_line_takes_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    received: dict[str, Any] = {}

    def interrupted(teacher: str, **options: Any) -> None:
        received.update(options)
        if options.get("calibration_cache_dir"):
            options["calibration_cache_dir"].mkdir()
            (options["calibration_cache_dir"] / "calibration.json").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_guide.modeling.from_teacher", interrupted)
    command = ["init", "teacher", "-o", str(tmp_path / "out"), "--method", "calibrated"]
    assert main([*command, "--calibration-cache-dir", str(tmp_path / "cache")]) == 130
    assert received["calibration_cache_dir"] == tmp_path / "cache"
    assert f"run the same command again to continue from {tmp_path / 'cache'}" in capsys.readouterr().err
    assert main(command) == 130 and "nothing was written" in capsys.readouterr().err


def test_the_manifest_is_json_and_the_rest_safetensors(tmp_path: Path) -> None:
    make_student("llama", tmp_path)
    manifest = json.loads((tmp_path / "calibration.json").read_text())
    assert manifest["options"]["method"] == "calibrated" and manifest["processes"] == 1
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


def test_a_folder_of_an_earlier_format_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    write_json(tmp_path / "calibration.json", {"format": 3})
    with pytest.raises(
        OptionError, match="has format 3.*reads format 8.*Finish it with that version, or remove the folder"
    ):
        make_student("llama", tmp_path)
    (tmp_path / "calibration.json").write_text('{"format": 8}')
    with pytest.raises(OptionError, match="damaged: it has no checksum"):
        make_student("llama", tmp_path)
