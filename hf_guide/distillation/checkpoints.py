"""Atomic checkpoints: written in full or not at all, found, verified, and selected for resuming.

A checkpoint is written into a folder of another name, `_checkpoint-8.<...>.partial/checkpoint-8`, and renamed once every
process has written its part. A stock `Trainer` writes checkpoints in place, `trainer_state.json` last, so one without that
file is incomplete.
"""

import contextlib
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from hf_guide.errors import HfGuideError, OptionError
from hf_guide.utils.checksums import DamagedFileError, read_json, safetensors_defect, torch_file_defect, write_json
from hf_guide.utils.files import (
    is_partial,
    is_write_error,
    move_entries,
    remove_stale_partials,
    staging_folder,
    sync_to_disk,
    write_limit_advice,
)

STATE_NAME = "trainer_state.json"
PROGRESS_NAME = "distillation_progress.json"

_CHECKPOINT_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
_INCOMPLETE_MARKER = "checkpoint-is-incomplete.txt"  # Trainer writes it first on SIGTERM
_OPTIMIZER_FILES = ("optimizer*", "global_step*")
_WEIGHT_FILES = ("*.safetensors", "*.bin", "pytorch_model_fsdp_*", "global_step*")

logger = logging.getLogger(__name__)


def reason_incomplete(folder: Path) -> str | None:
    """Return why a checkpoint is incomplete, judged by the file that is written last; None if it is complete."""
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
    """Return why training cannot resume from a checkpoint: incomplete, a file missing, truncated or damaged; None if it can.

    Weights are checked by their size, files of `torch.save` by the checksums in them.
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
    """Return the folders in `output_dir` with a checkpoint's name, the latest first."""
    folder = Path(output_dir)
    matches = {
        path: _CHECKPOINT_NAME.fullmatch(path.name)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.is_dir()
    }
    steps = {path: int(match[1]) for path, match in matches.items() if match}
    return sorted(steps, key=lambda path: steps[path], reverse=True)


def has_checkpoints(output_dir: str | Path) -> bool:
    """Return whether a run has written checkpoints into `output_dir`, or begun to."""
    folder = Path(output_dir)
    partial = [path for path in folder.iterdir() if is_partial(path)] if folder.is_dir() else []
    return bool(list_checkpoints(folder) or any(_CHECKPOINT_NAME.search(path.name) for path in partial))


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the latest checkpoint that training can resume from; log which later ones are skipped, and why.

    Of several runs in one folder, the run that wrote a checkpoint last counts: an earlier run may have left later steps.
    """
    skipped, run = 0, _last_run_id(output_dir)
    for path in list_checkpoints(output_dir):
        reason = checkpoint_defect(path)
        if reason is None and read_run_id(path) not in (run, None):
            logger.warning("The checkpoint %s belongs to an earlier run in the same output_dir and is skipped.", path)
            skipped += 1
            continue
        if reason is None:
            if skipped:
                logger.warning("Training resumes from %s, the last complete checkpoint.", path)
            return path
        logger.warning("The checkpoint %s is incomplete or damaged and is skipped: %s.", path, reason)
        skipped += 1
    return None


def read_run_id(folder: Path) -> str | None:
    """Return the id of the run that wrote a checkpoint; None if it has none or it cannot be read."""
    try:
        return next((each.get("run") for each in read_progress(folder)), None)
    except DamagedFileError:
        return None


def _last_run_id(output_dir: str | Path) -> str | None:
    """Return the id of the run whose checkpoint was written last."""
    complete = [
        path
        for path in list_checkpoints(output_dir)
        if read_run_id(path) is not None and reason_incomplete(path) is None
    ]
    last = max(complete, key=lambda path: (path / PROGRESS_NAME).stat().st_mtime_ns, default=None)
    return None if last is None else read_run_id(last)


def warn_about_earlier_run(output_dir: str | Path) -> None:
    """Log that a run starts from the beginning although an earlier one has left checkpoints."""
    earlier = list_checkpoints(output_dir)
    if earlier:
        logger.warning(
            "Training starts from the beginning in %s, which has checkpoints of an earlier run, up to %s. Until this run has "
            "saved one, resume_from_checkpoint=True would resume from those. Remove them, or choose another output_dir.",
            output_dir,
            earlier[0].name,
        )


def validate_checkpoint(folder: str | Path) -> None:
    """Check that training can resume from a checkpoint.

    Raises:
        OptionError: It cannot; the message states why, and which other checkpoint to use.
    """
    path = Path(folder)
    reason = checkpoint_defect(path) if path.is_dir() else "there is no such folder"
    if reason is None:
        return
    others = (other for other in list_checkpoints(path.resolve().parent) if other.resolve() != path.resolve())
    other = next((other for other in others if checkpoint_defect(other) is None), None)
    advice = (
        f"The last complete one there is {other}." if other else "There is no complete one; train from the beginning."
    )
    raise OptionError(f"Training cannot resume from the checkpoint {folder}: {reason}. {advice}")


def select_checkpoint(resume: "str | bool | None", output_dir: str, accelerator: Accelerator) -> "str | bool | None":
    """Return the checkpoint to resume from, the same in all processes: the main process decides.

    Args:
        resume: As in `Trainer.train`. True means the last complete checkpoint in `output_dir`; where a run has begun there and
            there is none, training starts from the beginning.

    Returns:
        A folder; None to start from the beginning; True if there is no trace of a run, for which `Trainer` raises.

    Raises:
        OptionError: The named folder is not a complete checkpoint.
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
        checkpoint: Path | None = Path(resume)
    elif not has_checkpoints(output_dir):
        return True
    else:
        checkpoint = last_complete_checkpoint(output_dir)
    if checkpoint is None:
        logger.warning("No checkpoint in %s is complete: training starts from the beginning.", output_dir)
        return None
    if not any(any(checkpoint.glob(pattern)) for pattern in _OPTIMIZER_FILES):
        logger.warning(
            "%s was saved with save_only_model: the optimizer and the learning rate schedule start from the beginning.",
            checkpoint,
        )
    return str(checkpoint)


@contextlib.contextmanager
def atomic_checkpoint(
    run_folder: Path, step: int, accelerator: Accelerator, progress: Mapping[str, Any], *, on_each_node: bool = False
) -> Iterator[Path]:
    """Yield a folder to write `checkpoint-N` into, in all processes; it is moved into `run_folder` when all have written.

    Args:
        progress: What this process reads again when it resumes (`read_progress`).
        on_each_node: Whether every node writes a complete checkpoint.

    Raises:
        OSError: The disk is full; the earlier checkpoints are unchanged.
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
            # A node with a disk of its own has the random states of its processes here.
            (run_folder / name).mkdir(exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                move_entries(folder / name, run_folder / name)
                shutil.rmtree(folder)
    accelerator.wait_for_everyone()


def _finalize_checkpoint(written: Path, final: Path, progress: list[dict[str, Any]]) -> None:
    """Record the files of a checkpoint, and replace an older or incomplete one of the same step with it."""
    files = sorted(path.relative_to(written).as_posix() for path in written.rglob("*") if path.is_file())
    write_json(written / PROGRESS_NAME, {"files": files, "processes": progress})
    sync_to_disk(written)
    if final.exists():
        final.rename(written.with_name("replaced"))
    written.rename(final)


def read_progress(folder: str | Path) -> list[dict[str, Any]]:
    """Return the progress that each process recorded in a checkpoint; empty for one of a stock `Trainer`."""
    path = Path(folder) / PROGRESS_NAME
    return read_json(path)[0]["processes"] if path.is_file() else []


def remove_old_checkpoints(run_folder: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints beyond `limit`, and before them the incomplete ones."""
    if limit is None or limit <= 0:
        return
    for path in list_checkpoints(run_folder):
        reason = reason_incomplete(path)
        if reason is not None:
            logger.warning("The checkpoint %s is incomplete and is removed: %s.", path, reason)
            shutil.rmtree(path, ignore_errors=True)
    rotate_checkpoints(str(run_folder), save_total_limit=limit, best_model_checkpoint=best, use_mtime=True)


@contextlib.contextmanager
def explain_write_errors(what: str, folder: Path) -> Iterator[None]:
    """Convert the various errors of a failed write into one that names the folder, and the free space or the limit.

    Args:
        what: What is written, the beginning of a sentence.
        folder: The run's, which has the earlier checkpoints.
    """
    try:
        yield
    except Exception as error:
        if not is_write_error(error):
            raise
        existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
        free = shutil.disk_usage(existing).free / 2**20
        complete = next((path for path in list_checkpoints(folder) if reason_incomplete(path) is None), None)
        remaining = (
            f"The last complete checkpoint is {complete}: resume_from_checkpoint resumes from there"
            if complete
            else "There is no complete checkpoint yet"
        )
        limit = write_limit_advice(error)
        disk = "" if limit else f", whose disk has {free:,.0f} MiB free"
        advice = limit or "Free space on that disk, or choose another output_dir"
        raise OSError(
            f"{what} could not be written to {folder}{disk}: {error}. What was written of it is removed. {advice}. "
            f"{remaining}."
        ) from error
