"""An output is whole or absent, whichever process is killed, and one run never touches what another one writes."""

import ctypes
import os
import re
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from hf_guide import from_teacher
from hf_guide.cli import main as cli
from hf_guide.signal_cache.manifest import signal_cache_folder
from hf_guide.utils import files as folders
from hf_guide.utils.checksums import check_written_model, weights_defect
from hf_guide.utils.files import (
    atomic_folder,
    atomic_write,
    check_can_create,
    check_output_folder,
    remove_stale_partials,
    staged_update,
)
from tests.tiny import KINDS, same_bits

SMALLER = ["--hidden-size", "24", "--num-hidden-layers", "1", "--intermediate-size", "32", "--no-progress"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    KINDS["llama"].teacher().save_pretrained(folder)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Partial files and folders


def killed_while_it_writes(output: Path) -> None:
    """Leave what a process leaves that is killed within `atomic_folder` and within `atomic_write`."""
    child = os.fork()
    if child == 0:
        with atomic_folder(output) as folder, atomic_write(output.parent / "file.json") as partial:
            (folder / "model.safetensors").write_text("half")
            partial.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_two_runs_into_one_output_do_not_touch_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second in a container has the number of the first: the process's number must not be what distinguishes them."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with pytest.raises(FileExistsError, match="not empty"), atomic_folder(tmp_path / "student") as first:
        (first / "weights").write_text("first")
        with atomic_folder(tmp_path / "student") as second:
            (second / "weights").write_text("second")
            assert first != second
        assert (first / "weights").read_text() == "first"
    assert (tmp_path / "student" / "weights").read_text() == "second" and names(tmp_path) == ["student"]


def test_what_killed_runs_left_is_removed_and_what_living_ones_write_is_not(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "living") as living, atomic_write(tmp_path / "living.json") as file:
        (living / "weights").write_text("living")
        killed_while_it_writes(tmp_path / "student")
        assert len(names(tmp_path)) == 4
        with atomic_folder(tmp_path / "student") as folder:
            (folder / "weights").write_text("whole")
            assert sorted(tmp_path.iterdir()) == sorted([living, file, folder])
        file.write_text("living")
    assert names(tmp_path) == ["living", "living.json", "student"]


def test_partial_folders_of_other_machines_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "_machine_id", lambda: ("01234567", "89abcdef"))
    killed_while_it_writes(tmp_path / "student")
    monkeypatch.undo()
    (tmp_path / ".mine.partial").write_text("not ours")
    before = names(tmp_path)
    remove_stale_partials(tmp_path)
    assert names(tmp_path) == before and len(before) == 3


def test_a_folder_that_someone_removed_is_not_published(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="was removed by another process"):
        with atomic_folder(tmp_path / "student") as folder:
            shutil.rmtree(folder)
            folder.mkdir()
    assert names(tmp_path) == []


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json", "a shard", "half of the weights"])
def test_a_student_without_all_of_its_weights_is_not_published(missing: str, tmp_path: Path) -> None:
    model = KINDS["llama"].teacher()
    with (
        pytest.raises(OSError, match="is incomplete"),
        atomic_folder(tmp_path / "s", check=check_written_model) as folder,
    ):
        model.save_pretrained(folder, max_shard_size="20KB" if missing == "a shard" else "1GB")
        assert weights_defect(folder) is None
        if missing == "a shard":
            next(folder.glob("model-00002*")).unlink()
        elif missing == "half of the weights":
            weights = folder / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
        else:
            (folder / missing).unlink()
    assert names(tmp_path) == []


def test_outputs_have_the_permissions_of_what_is_made_plainly(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain.txt").write_text("")
    with atomic_folder(tmp_path / "student"), atomic_write(tmp_path / "file.txt") as partial:
        partial.write_text("")
    assert (tmp_path / "student").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "file.txt").stat().st_mode == (tmp_path / "plain.txt").stat().st_mode


# Outputs that cannot be replaced by a rename


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, 2 MiB."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, b"size=2m") != 0:
        pytest.skip(f"this user may not mount: {os.strerror(ctypes.get_errno())}")
    yield folder
    libc.umount2(bytes(folder), 2)


def test_a_mount_point_is_written_into(teacher: Path, mounted: Path) -> None:
    assert cli.main(["init", str(teacher), *SMALLER, "-o", str(mounted)]) == 0
    AutoModelForCausalLM.from_pretrained(mounted)
    assert os.path.ismount(mounted) and not [name for name in names(mounted) if name.endswith(".partial")]
    assert names(mounted.parent) == ["mounted"]
    assert cli.main(["init", str(teacher), *SMALLER, "-o", str(mounted)]) == 1  # it is not empty any more


def test_a_folder_bound_from_the_same_file_system_is_written_into(tmp_path: Path) -> None:
    for name in ("source", "bound"):
        (tmp_path / name).mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(bytes(tmp_path / "source"), bytes(tmp_path / "bound"), None, 4096, None) != 0:
        pytest.skip(f"this user may not mount: {os.strerror(ctypes.get_errno())}")
    try:
        with atomic_folder(tmp_path / "bound") as folder:
            assert folder.parent == tmp_path / "bound"
            (folder / "config.json").write_text("{}")
        assert names(tmp_path / "source") == ["config.json"]
    finally:
        libc.umount2(bytes(tmp_path / "bound"), 2)


@pytest.mark.parametrize("kind", ["current", "link", "busy"])
def test_other_outputs_that_are_there(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "student"
    output.mkdir()
    if kind == "current":
        monkeypatch.chdir(output)
        output = Path()
    elif kind == "link":
        (tmp_path / "link").symlink_to(output)
        output = tmp_path / "link"
    else:  # seen only when it is renamed

        def busy(self: Path, target: Path) -> None:
            raise OSError(16, "Device or resource busy")

        monkeypatch.setattr(Path, "rename", busy)
    with atomic_folder(output) as folder:
        for name in ("config.json", "model.safetensors"):
            (folder / name).write_text(name)
    assert names(output) == ["config.json", "model.safetensors"]
    assert names(tmp_path) == (["link", "student"] if kind == "link" else ["student"])


def test_contents_that_cannot_be_moved_in_are_removed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "_can_be_renamed", lambda output: False)
    replace, moved = Path.replace, []

    def failing(self: Path, target: Path) -> Any:
        moved.append(self.name)
        if len(moved) == 2:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    (tmp_path / "student").mkdir()
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "student") as folder:
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (folder / name).write_text(name)
    assert moved == ["model.safetensors", "tokenizer.json"] and names(tmp_path / "student") == []


# A student saved over another one


@pytest.mark.parametrize("moment", range(1, 5))
def test_a_student_saved_over_another_is_whole_or_does_not_load(
    moment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between any two of the files that take their places, and of as many shards as there were or fewer."""
    old, new = KINDS["llama"].teacher(), KINDS["llama"].teacher(num_hidden_layers=3)
    old.save_pretrained(tmp_path, max_shard_size="40KB")
    replace, moved = Path.replace, []

    def dying(self: Path, target: Path) -> Any:
        moved.append(self.name)
        if len(moved) == moment:
            os._exit(7)
        return replace(self, target)

    child = os.fork()
    if child == 0:
        Path.replace = dying  # type: ignore[method-assign]
        with staged_update(tmp_path) as folder:
            new.save_pretrained(folder)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == 7:
        with pytest.raises((OSError, ValueError), match="config|model_type"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
        remove_stale_partials(tmp_path)
        assert not [name for name in names(tmp_path) if name.endswith(".partial")]
    else:
        assert same_bits(AutoModelForCausalLM.from_pretrained(tmp_path), new)
        assert not [name for name in names(tmp_path) if name.startswith("model-")]


@pytest.mark.parametrize("variants", [(None, "fp16"), ("fp16", None), ("fp16", "fp16.v2")])
@pytest.mark.parametrize("shard_size", ["50GB", "20KB"])
def test_a_student_saved_over_another_replaces_the_weights_of_its_variant_alone(
    variants: tuple[str | None, str | None], shard_size: str, tmp_path: Path
) -> None:
    old, new = (KINDS["llama"].teacher() for _ in range(2))
    with torch.no_grad():
        new.model.norm.weight.fill_(3.0)
    student, (kept, saved) = from_teacher(old, show_progress=False), variants
    student.load_state_dict(old.state_dict())
    for variant in variants:
        student.save_pretrained(tmp_path, variant=variant, max_shard_size="30KB")
    student.load_state_dict(new.state_dict())
    student.save_pretrained(tmp_path, variant=saved, max_shard_size=shard_size)
    new.save_pretrained(tmp_path / "new", variant=saved, max_shard_size=shard_size)
    old.save_pretrained(tmp_path / "old", variant=kept, max_shard_size="30KB")
    weights = {name for folder in ("new", "old") for name in names(tmp_path / folder) if name.startswith("model")}
    assert {name for name in names(tmp_path) if name.startswith("model")} == weights
    for variant, model in ((kept, old), (saved, new)):
        assert same_bits(AutoModelForCausalLM.from_pretrained(tmp_path, variant=variant), model)


def test_a_save_that_fails_leaves_the_student_that_was_there(tmp_path: Path) -> None:
    student = KINDS["llama"].teacher()
    student.save_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RuntimeError), staged_update(tmp_path) as folder:
        KINDS["llama"].teacher(num_hidden_layers=1).save_pretrained(folder)
        raise RuntimeError
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with staged_update(tmp_path) as folder:
        student.save_pretrained(folder, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists() and (tmp_path / "notes.txt").read_text() == "mine"
    assert same_bits(AutoModelForCausalLM.from_pretrained(tmp_path), student)


# What an interruption or a full disk in `hf-guide distill` leaves, and its message


@pytest.fixture
def distil(tmp_path: Path, teacher_with_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs the command on two blocks of text, with options of its own."""
    import datasets

    from tests.examples import local

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    text = local.write_text(tmp_path / "text.txt")

    def run(output: Path, **options: Any) -> int:
        received = {
            "teacher": str(teacher_with_tokenizer),
            "student_init_kwargs": local.SMALLER["llama"],
            "data_files": str(text),
            "output_dir": str(output),
            "max_length": 32,
            "save_strategy": "steps",
            "save_steps": 1,
            "max_steps": 8,
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(local.QUICK | received | options))
        return cli.main(["distill", str(tmp_path / "run.yaml")])

    return run


@pytest.fixture(scope="module")
def teacher_with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.examples.local import make_model

    return make_model(tmp_path_factory.mktemp("teacher") / "teacher", "llama", "ForCausalLM")


@pytest.mark.extended
def test_the_message_of_an_interrupted_distillation_is_true(
    distil: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hf_guide import DistillationMixin

    compute, steps = DistillationMixin.compute_loss, []

    def interrupted(*received: Any, **named: Any) -> Any:
        steps.append(1)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)
        return compute(*received, **named)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process started in the background ignores it
    try:
        monkeypatch.setattr(DistillationMixin, "compute_loss", interrupted)
        assert distil(tmp_path / "out") == 130
        message = capsys.readouterr().err
        assert (
            f"to continue from {tmp_path / 'out' / 'checkpoint-2'}, run the same command with --resume_from_checkpoint true."
            in message
        )
        steps.clear()
        assert distil(tmp_path / "none", save_steps=5) == 130
        assert "nothing was written" in capsys.readouterr().err
        assert not (tmp_path / "none").exists() or names(tmp_path / "none") == []
    finally:
        signal.signal(signal.SIGINT, before)
    monkeypatch.undo()
    assert distil(tmp_path / "out", resume_from_checkpoint=True) == 0


def test_a_full_disk_is_recognised_in_every_file_of_a_model(mounted: Path, teacher_with_tokenizer: Path) -> None:
    """Each library that writes one raises an error of its own."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer

    from hf_guide.utils.files import is_write_error

    (mounted / "fill").write_bytes(b"0" * shutil.disk_usage(mounted).free)
    tokenizer = Tokenizer.from_file(str(teacher_with_tokenizer / "tokenizer.json"))
    writers = {
        "tokenizers": lambda path: tokenizer.save(str(path)),
        "safetensors": lambda path: save_file({"a": torch.zeros(1 << 20)}, path),
        "torch": lambda path: torch.save(torch.zeros(1 << 20), path),
        "python": lambda path: path.write_bytes(b"0" * (1 << 20)),
    }
    for name, write in writers.items():
        with pytest.raises(Exception) as found:
            write(mounted / name)
        assert is_write_error(found.value), (name, found.value)


@pytest.mark.extended
def test_a_full_disk_in_distill_is_an_error_and_leaves_the_whole_checkpoints(
    distil: Any, mounted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from hf_guide.distillation.checkpoints import checkpoint_defect, list_checkpoints
    from hf_guide.scripts.run_record import RECORD_NAME

    output = mounted / "out"
    assert distil(output, max_steps=40) == 1
    message = capsys.readouterr().err
    assert re.search(
        r"error: The checkpoint of step \d+ could not be written to .*out, whose disk has \d+ MiB free", message
    )
    kept = list_checkpoints(output)
    assert f"The last complete checkpoint is {kept[0]}" in message and "Free space" in message
    assert (
        kept
        and all(checkpoint_defect(path) is None for path in kept)
        and names(output) == sorted([RECORD_NAME, *(path.name for path in kept)])
    )
    for path in kept[1:]:
        shutil.rmtree(path)
    steps = int(kept[0].name.partition("-")[2]) + 1
    assert distil(output, max_steps=steps, save_total_limit=1, resume_from_checkpoint=True) == 0
    AutoModelForCausalLM.from_pretrained(output)


@pytest.mark.extended
@pytest.mark.parametrize("limit", [1_000, 35_000])
def test_a_limit_on_file_sizes_in_distill_is_reported_as_a_full_disk_is(
    limit: int, distil: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the weights, safetensors', to the optimizer, torch's: each library fails in a way of its own."""
    distil(tmp_path / "out", max_steps=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    capsys.readouterr()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        assert distil(tmp_path / "out", max_steps=3, resume_from_checkpoint=True) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "could not be written" in capsys.readouterr().err
    assert [name for name in names(tmp_path / "out") if "checkpoint" in name] == ["checkpoint-1"]
    assert distil(tmp_path / "out", max_steps=3, resume_from_checkpoint=True) == 0


@pytest.mark.parametrize("output", ["file/student", "file/a/student"])
def test_an_output_dir_within_a_file_is_an_error(output: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for check in (check_output_folder, lambda folder: signal_cache_folder(folder).check()):
        with pytest.raises(NotADirectoryError, match=r"cannot be created: .*file is a file"):
            check(tmp_path / output)


def lock(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a folder that is not writable, also to root, who may write anywhere."""
    folder.mkdir(mode=0o500)
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: access(path, mode) and not (mode & os.W_OK and Path(path) == folder)
    )


def test_an_output_that_is_not_writable_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = tmp_path / "locked"
    lock(locked, monkeypatch)
    for check in (check_output_folder, check_can_create, lambda folder: signal_cache_folder(folder).check()):
        with pytest.raises(PermissionError, match="locked is not writable"):
            check(locked / "student")
    check_output_folder(locked)  # which is replaced
    for check in (check_can_create, lambda folder: signal_cache_folder(folder).check()):
        with pytest.raises(PermissionError, match="locked is not writable. Make it writable"):
            check(locked)
    (locked / "capture.json").touch()
    signal_cache_folder(locked).check()  # it may be complete
