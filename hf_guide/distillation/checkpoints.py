"""Checkpoints that are whole or not there: found, checked, and given their names once every process has written its part.

A checkpoint is written in a folder of another name, `_checkpoint-8.<...>.partial/checkpoint-8`, and renamed when it is whole.
Those of a stock `Trainer` are written in place, `trainer_state.json` last, so one without that file is unfinished.
"""

import contextlib
import errno
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from hf_guide.errors import HfGuideError, OptionError
from hf_guide.utils.checksums import DamagedFileError, read_json, safetensors_defect, torch_file_defect, write_json
from hf_guide.utils.files import (
    DiskError,
    is_partial,
    move_entries,
    remove_stale_partials,
    staging_folder,
    sync_to_disk,
)

STATE_NAME = "trainer_state.json"
PROGRESS_NAME = "distillation_progress.json"

_CHECKPOINT_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
_INCOMPLETE_MARKER = "checkpoint-is-incomplete.txt"  # of Trainer's checkpoints on SIGTERM
_OPTIMIZER_FILES = ("optimizer*", "global_step*")
_WEIGHT_FILES = ("*.safetensors", "*.bin", "pytorch_model_fsdp_*", "global_step*")

logger = logging.getLogger(__name__)


def reason_incomplete(folder: Path) -> str | None:
    """Return why a checkpoint was not written to its end, by the file that is written last; None if it was."""
    if (folder / _INCOMPLETE_MARKER).exists():
        return f"{_INCOMPLETE_MARKER} is still there"
    path = folder / STATE_NAME
    if not path.is_file():
        return f"it has no {STATE_NAME}, which is written last"
    try:
        step = json.loads(path.read_text(encoding="utf-8"))["global_step"]
    except (ValueError, KeyError, TypeError) as error:
        return f"its {STATE_NAME} cannot be read ({type(error).__name__}: {error})"
    return None if isinstance(step, int) else f"its {STATE_NAME} has global_step {step!r}"


def checkpoint_defect(folder: Path) -> str | None:
    """Return why training cannot go on from a checkpoint: unfinished, a file missing, truncated or damaged; None if it can.

    Weights are checked by their size, what `torch.save` wrote by the checksums in it.
    """
    reason = reason_incomplete(folder)
    if reason is not None:
        return reason
    try:
        listed = read_json(folder / PROGRESS_NAME)[0]["files"] if (folder / PROGRESS_NAME).is_file() else []
    except DamagedFileError as error:
        return str(error)
    missing = sorted(name for name in listed if not (folder / name).exists())
    if missing:
        return f"{missing[0]} is missing"
    if not any(any(folder.glob(pattern)) for pattern in _WEIGHT_FILES):
        return "it has no weights"
    for index in folder.glob("*.safetensors.index.json"):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return f"{index.name} cannot be read ({type(error).__name__}: {error})"
        missing = sorted(shard for shard in shards if not (folder / shard).is_file())
        if missing:
            return f"{missing[0]} is missing"
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        reason = _file_defect(path)
        if reason is not None:
            return f"{path.name} is truncated or damaged: {reason}"
    return None


def _file_defect(path: Path) -> str | None:
    if path.suffix == ".safetensors":
        return safetensors_defect(path)
    if path.suffix in (".pt", ".pth", ".bin"):
        return torch_file_defect(path)
    if path.suffix == ".json":
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            return str(error)
    return None


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the folders in `output_dir` that have a checkpoint's name, the latest first."""
    folder = Path(output_dir)
    found = {
        path: _CHECKPOINT_NAME.fullmatch(path.name)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.is_dir()
    }
    steps = {path: int(match[1]) for path, match in found.items() if match}
    return sorted(steps, key=lambda path: steps[path], reverse=True)


def has_checkpoints(output_dir: str | Path) -> bool:
    """Whether a run has written checkpoints into `output_dir`, or begun to."""
    folder = Path(output_dir)
    begun = [path for path in folder.iterdir() if is_partial(path)] if folder.is_dir() else []
    return bool(list_checkpoints(folder) or any(_CHECKPOINT_NAME.search(path.name) for path in begun))


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the latest checkpoint that training can go on from, and log which later ones it cannot go on from, and why.

    Of several runs in one folder, the one that wrote a checkpoint last counts: an earlier run may have left later steps.
    """
    skipped, run = 0, _last_run_id(output_dir)
    for path in list_checkpoints(output_dir):
        reason = checkpoint_defect(path)
        if reason is None and read_run_id(path) not in (run, None):
            logger.warning("The checkpoint %s is of an earlier run in the same output_dir and is skipped.", path)
            skipped += 1
            continue
        if reason is None:
            if skipped:
                logger.warning("Training goes on from %s, the last checkpoint that is whole.", path)
            return path
        logger.warning("The checkpoint %s is unfinished or damaged and is skipped: %s.", path, reason)
        skipped += 1
    return None


def read_run_id(folder: Path) -> str | None:
    """Return what tells the run that wrote a checkpoint from others; None where it is not noted or cannot be read."""
    try:
        return next((each.get("run") for each in read_progress(folder)), None)
    except DamagedFileError:
        return None


def _last_run_id(output_dir: str | Path) -> str | None:
    """Return the run whose checkpoint was written last."""
    whole = [
        path
        for path in list_checkpoints(output_dir)
        if read_run_id(path) is not None and reason_incomplete(path) is None
    ]
    last = max(whole, key=lambda path: (path / PROGRESS_NAME).stat().st_mtime_ns, default=None)
    return None if last is None else read_run_id(last)


def warn_about_earlier_run(output_dir: str | Path) -> None:
    """Log that a run begins anew where an earlier one has left checkpoints."""
    found = list_checkpoints(output_dir)
    if found:
        logger.warning(
            "Training begins anew in %s, which holds checkpoints of an earlier run, up to %s. Until this run has saved one, "
            "resume_from_checkpoint=True would go on from those. Remove them, or choose another output_dir.",
            output_dir,
            found[0].name,
        )


def validate_checkpoint(folder: str | Path) -> None:
    """Refuse a checkpoint that training cannot go on from.

    Raises:
        OptionError: says why, and which other one to take.
    """
    path = Path(folder)
    reason = checkpoint_defect(path) if path.is_dir() else "there is no such folder"
    if reason is None:
        return
    others = (other for other in list_checkpoints(path.resolve().parent) if other.resolve() != path.resolve())
    other = next((other for other in others if checkpoint_defect(other) is None), None)
    advice = f"The last whole one there is {other}." if other else "No whole one is beside it; train anew."
    raise OptionError(f"Training cannot go on from the checkpoint {folder}: {reason}. {advice}")


def select_checkpoint(resume: "str | bool | None", output_dir: str, accelerator: Accelerator) -> "str | bool | None":
    """Return the checkpoint to go on from, the same in all processes: the first of them decides.

    Args:
        resume: as for `Trainer.train`. True is the last checkpoint in `output_dir` that is whole; where a run has begun there
            and none is, training begins anew.

    Returns:
        A folder; None to begin; True where there is no trace of a run, which `Trainer` refuses.

    Raises:
        OptionError: a folder was named that is not a whole checkpoint.
    """
    if resume is None or resume is False:
        return None
    chosen: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            chosen[0] = _select_checkpoint(resume, output_dir)
        except HfGuideError as error:
            chosen[1] = str(error)
    if accelerator.num_processes > 1:
        broadcast_object_list(chosen)
    if chosen[1] is not None:
        raise OptionError(chosen[1])
    return chosen[0]


def _select_checkpoint(resume: "str | bool", output_dir: str) -> "str | bool | None":
    if not isinstance(resume, bool):
        validate_checkpoint(resume)
        found: Path | None = Path(resume)
    elif not has_checkpoints(output_dir):
        return True
    else:
        found = last_complete_checkpoint(output_dir)
    if found is None:
        logger.warning("No checkpoint in %s is whole: training begins anew.", output_dir)
        return None
    if not any(any(found.glob(pattern)) for pattern in _OPTIMIZER_FILES):
        logger.warning("%s was saved with save_only_model: the optimizer and the learning rate begin anew.", found)
    return str(found)


@contextlib.contextmanager
def atomic_checkpoint(
    run_folder: Path, step: int, accelerator: Accelerator, progress: Mapping[str, Any], *, on_each_node: bool = False
) -> Iterator[Path]:
    """Yield a folder to write `checkpoint-N` into, in all processes; it gets its place in `run_folder` when all have.

    Args:
        progress: what this process is to find again when it resumes (`read_progress`).
        on_each_node: every node writes a whole checkpoint of its own.

    Raises:
        OSError: the disk is full; the checkpoints that were there are as they were.
    """
    name = f"{PREFIX_CHECKPOINT_DIR}-{step}"
    writes = accelerator.is_main_process or (on_each_node and accelerator.is_local_main_process)
    everyone = gather_object([dict(progress)])
    with contextlib.ExitStack() as stack:
        home: list[Any] = [None]
        if accelerator.is_main_process:
            run_folder.mkdir(parents=True, exist_ok=True)
            remove_stale_partials(run_folder)
            home = [str(stack.enter_context(staging_folder(run_folder, name, prefix="_")))]
        if accelerator.num_processes > 1:
            broadcast_object_list(home)
        folder = Path(home[0])
        with explain_write_errors(f"The checkpoint of step {step}", run_folder):
            yield folder
            accelerator.wait_for_everyone()
            if writes:
                _finalize_checkpoint(folder / name, run_folder / name, everyone)
        accelerator.wait_for_everyone()
        if accelerator.is_local_main_process and not writes and (folder / name).is_dir():
            # A node whose disk is its own has the random states of its processes here.
            (run_folder / name).mkdir(exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                move_entries(folder / name, run_folder / name)
                shutil.rmtree(folder)
    accelerator.wait_for_everyone()


def _finalize_checkpoint(written: Path, final: Path, progress: list[dict[str, Any]]) -> None:
    """Note what a checkpoint consists of, and put it in the place of an older or unfinished one of its step."""
    files = sorted(path.relative_to(written).as_posix() for path in written.rglob("*") if path.is_file())
    write_json(written / PROGRESS_NAME, {"files": files, "processes": progress})
    sync_to_disk(written)
    if final.exists():
        final.rename(written.with_name("replaced"))
    written.rename(final)


def read_progress(folder: str | Path) -> list[dict[str, Any]]:
    """Return what each process noted of its progress in a checkpoint; nothing where it is a stock `Trainer`'s."""
    path = Path(folder) / PROGRESS_NAME
    return read_json(path)[0]["processes"] if path.is_file() else []


def remove_old_checkpoints(run_folder: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints beyond `limit`, and before them those that were never finished."""
    if limit is None or limit <= 0:
        return
    for path in list_checkpoints(run_folder):
        reason = reason_incomplete(path)
        if reason is not None:
            logger.warning("The checkpoint %s is unfinished and is removed: %s.", path, reason)
            shutil.rmtree(path, ignore_errors=True)
    rotate_checkpoints(str(run_folder), save_total_limit=limit, best_model_checkpoint=best, use_mtime=True)


@contextlib.contextmanager
def explain_write_errors(what: str, folder: Path) -> Iterator[None]:
    """Turn the errors of a full disk, each library's own, into one that names the disk and what is left on it.

    Args:
        what: what is written, the beginning of a sentence.
        folder: the run's, in which earlier checkpoints are.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not is_write_error(error):
            raise
        home = next(path for path in (folder, *folder.resolve().parents) if path.exists())
        free = shutil.disk_usage(home).free / 2**20
        whole = next((path for path in list_checkpoints(folder) if reason_incomplete(path) is None), None)
        left = (
            f"{whole} is whole: with resume_from_checkpoint training goes on from there"
            if whole
            else "There is none yet"
        )
        raise OSError(
            f"{what} could not be written to {folder}, whose disk has {free:,.0f} MiB free: {error}. What was written of it "
            f"is removed. Make room on that disk, or choose another output_dir. Of the checkpoints before: {left}."
        ) from error


def is_write_error(error: BaseException) -> bool:
    """Whether an error says that a file could not be written: torch and safetensors have no class for it."""
    if isinstance(error, OSError):
        return isinstance(error, DiskError) or error.errno in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EFBIG,
            errno.EIO,
            errno.EROFS,
        )
    said = str(error)
    if isinstance(error, SafetensorError):
        return "I/O error" in said or "os error" in said.lower()
    return any(words in said for words in ("PytorchStreamWriter", "inline_container", "file write failed"))
