"""Save the finished parts of a calibration in a folder, so that the same call continues after being killed.

The folder holds `calibration.json`, which records the call; `statistics-*.safetensors`, the activation statistics that each
process has summed so far, and over how many blocks; `step-*.safetensors`, the weights that one step of the refit solved
for; and `generated_text.safetensors` where the teacher generated the calibration text. Apart from that text, no size depends
on the number of tokens: hidden states between blocks are not saved, blocks that are refitted already are run again.

A teacher in memory is recognised by all of its values; one in files by a sample of its values and by the files' sizes and
times, because reading all of a large one takes as long as a pass.
"""

import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_guide.calibration.batches import Batch
from hf_guide.calibration.config import CalibratedConfig
from hf_guide.errors import OptionError
from hf_guide.teachers.checkpoint import TeacherCheckpoint
from hf_guide.teachers.tensor_source import TensorSource
from hf_guide.utils.checksums import DamagedFileError, read_json, read_tensors, write_json, write_tensors
from hf_guide.utils.distributed import all_gather_values, all_reduce_scalar, rank_and_world_size
from hf_guide.utils.fingerprint import comparable_config, exact_fingerprint, tensors_fingerprint
from hf_guide.utils.resumable import ResumableFolder, resumable_write
from hf_guide.version import __version__

OPTION = "calibration_cache_dir"
MANIFEST_NAME = "calibration.json"
TEXT_NAME = "generated_text.safetensors"
FORMAT = 8

SECONDS_BETWEEN_SAVES = 60.0
"""Statistics, as large as a few of the teacher's weights, are saved no more often than this."""

CachedStep = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors by name, and JSON values by name."""


def calibration_cache_folder(folder: Path) -> ResumableFolder:
    """Return the folder of a calibration."""
    return ResumableFolder(folder, MANIFEST_NAME, OPTION, OptionError)


def describe_call(
    teacher: TeacherCheckpoint,
    student_class: type[PreTrainedModel],
    student_config: PreTrainedConfig,
    student_dtype: torch.dtype,
    options: CalibratedConfig,
) -> dict[str, Any]:
    """Return what a calibration depends on before its data are read: both models' configs and the options."""
    return {
        "teacher_class": teacher.model_class.__name__,
        "teacher_config": comparable_config(teacher.config),
        "teacher_dtype": str(teacher.dtype),
        "student_class": student_class.__name__,
        "student_config": comparable_config(student_config),
        "student_dtype": str(student_dtype),
        "options": {name: value for name, value in dataclasses.asdict(options).items() if name != "activation_memory"},
    }


def describe_data(teacher: TeacherCheckpoint, batches: Sequence[Batch]) -> dict[str, Any]:
    """Return what the statistics depend on in addition: the teacher's weights, the data, and the number of processes."""
    weights, files = teacher.weights, _describe_files(teacher.weights)
    names = sorted(weights.keys())
    return {
        "teacher_weights": tensors_fingerprint((name, weights.get(name)) for name in names),
        "teacher_values": "in files" if files else exact_fingerprint((name, weights.get(name)) for name in names),
        "teacher_files": files,
        "calibration_data": data_fingerprint(batches),
        "batches": len(batches),
        "processes": rank_and_world_size()[1],
        "hf_guide_version": __version__,
    }


def data_fingerprint(batches: Sequence[Batch]) -> str:
    """Return a hash of all values of all batches, in their order."""
    return exact_fingerprint(item for batch in batches for item in sorted(batch.items()))


def _describe_files(weights: TensorSource) -> dict[str, list[list[int]]]:
    """Return the teacher's weight files by name, each with its size and time; several where processes read copies of it."""
    here = {(os.path.basename(each.file), each.size, each.modified) for each in weights.file_states()}
    found: dict[str, list[list[int]]] = {}
    for name, size, modified in sorted(set().union(*all_gather_values(here))):
        found.setdefault(name, []).append([size, modified])
    return found


@dataclass
class CalibrationCheckpoint:
    """The parts of a calibration that are finished, in a folder that every process sees.

    Attributes:
        path: The folder.
        steps: Names of the steps whose weights an earlier run saved, the same in all processes.
    """

    path: Path
    steps: set[str] = field(default_factory=set)
    _last_save: float = field(default_factory=time.monotonic)

    @classmethod
    def begin(cls, path: Path, call: Mapping[str, Any]) -> "CalibrationCheckpoint":
        """Record the call in the folder, or check that the folder records the same one.

        Args:
            call: All that the student depends on, as JSON values.

        Raises:
            OptionError: The folder is of another call (names what differs), of another version, damaged, or not seen by
                all processes.
        """
        folder = calibration_cache_folder(path)
        folder.check()
        manifest = json.loads(json.dumps({"format": FORMAT, **call}, default=str))
        folder.begin(lambda: write_json(path / MANIFEST_NAME, manifest))
        recorded = _read_manifest(path)
        files_then, files_now = recorded.pop("teacher_files", {}), manifest.pop("teacher_files", {})
        folder.check_same_call(recorded, manifest)
        _check_same_files(path, files_then, files_now)
        steps = {each.name[len("step-") : -len(".safetensors")] for each in path.glob("step-*.safetensors")}
        if all_reduce_scalar(len(steps)) != len(steps) * rank_and_world_size()[1]:
            raise _not_shared(path)
        return cls(path, steps)

    def save_text(self, ids: Tensor) -> None:
        """Save the tokens that the teacher generated, (rows, length): on a GPU, sampling again may give others."""
        if rank_and_world_size()[0] == 0 and not (self.path / TEXT_NAME).exists():
            _write(self.path / TEXT_NAME, {"input_ids": ids}, {})

    def load_statistics(self) -> CachedStep | None:
        """Return the sums that this process saved last, and its progress; None if there are none."""
        return _read(self._statistics_path) if self._statistics_path.exists() else None

    def save_statistics(self, sums: Mapping[str, Tensor], progress: Mapping[str, Any], *, complete: bool) -> None:
        """Save the sums of this process if they are complete, or were not saved for `SECONDS_BETWEEN_SAVES`."""
        if complete or time.monotonic() - self._last_save >= SECONDS_BETWEEN_SAVES:
            _write(self._statistics_path, sums, progress)
            self._last_save = time.monotonic()

    def load_step(self, step: str) -> CachedStep | None:
        """Return the weights that an earlier run saved for a step, and its facts; None if it did not finish the step."""
        return _read(self._step_path(step)) if step in self.steps else None

    def save_step(self, step: str, weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Save the weights of a finished step, which are the same in all processes."""
        if rank_and_world_size()[0] == 0:
            _write(self._step_path(step), weights, facts)

    @property
    def _statistics_path(self) -> Path:
        rank, world_size = rank_and_world_size()
        return self.path / f"statistics-{rank:05d}-of-{world_size:05d}.safetensors"

    def _step_path(self, step: str) -> Path:
        return self.path / f"step-{step}.safetensors"


def load_text(path: Path) -> Tensor | None:
    """Return the tokens that the teacher generated in an earlier run, (rows, length), if all processes see them."""
    file = path / TEXT_NAME
    seen_by = all_reduce_scalar(float(file.exists()))
    return _read(file)[0]["input_ids"] if seen_by == rank_and_world_size()[1] else None


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST_NAME
    try:
        manifest, has_checksum = read_json(file, required=False)
    except FileNotFoundError:
        raise _not_shared(path) from None
    except DamagedFileError as error:
        raise OptionError(f"{error} Name a new folder.") from error
    version = manifest.get("format")
    if version != FORMAT:
        raise OptionError(
            f"{OPTION} {path} has format {version}, and this version of hf_guide reads format {FORMAT}: it was begun by "
            "another version. Finish it with that version, or remove the folder and start again."
        )
    if not has_checksum:
        raise OptionError(f"{file} is damaged: it has no checksum of its own. Name a new folder.")
    return manifest


def _check_same_files(path: Path, recorded: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Check that the teacher's files were not written since the folder was begun.

    Raises:
        OptionError: One was, or is a copy that has another time; states both times, and what to do.
    """
    name = next((name for name in sorted({*recorded, *found}) if recorded.get(name) != found.get(name)), None)
    if name is None:
        return
    advice = "Repeat the call with that file, or name a new folder."
    if name in recorded and name in found:
        time_then = _format_time(recorded[name][0][1])
        advice += f" If it has the same values, as a copy has, set its time: touch -d '{time_then}' {name}."
    raise OptionError(
        f"{OPTION} {path} was begun with another {name} of the teacher: {_format_states(recorded.get(name))} then, "
        f"{_format_states(found.get(name))} now, so that a student would be made of two teachers. {advice}"
    )


def _format_states(states: Sequence[Sequence[int]] | None) -> str:
    return " and ".join(f"{size} bytes of {_format_time(time)}" for size, time in states) if states else "no such file"


def _format_time(nanoseconds: int) -> str:
    seconds, rest = divmod(nanoseconds, 10**9)
    return f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%d %H:%M:%S}.{rest:09d} UTC"


def _not_shared(path: Path) -> OptionError:
    return OptionError(f"{OPTION} {path} is not the same folder in all processes; name one that all of them see.")


def _read(file: Path) -> CachedStep:
    try:
        tensors, metadata, _ = read_tensors(file)
        return tensors, json.loads(metadata["facts"])
    except DamagedFileError as error:
        raise OptionError(f"{error} Remove it; what it holds is computed again.") from error


def _write(file: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    with resumable_write(file, OSError):
        write_tensors(file, tensors, {"facts": json.dumps(facts)})
