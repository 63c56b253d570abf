"""A calibrated start on its way, kept in a folder: killed at any moment, the same call goes on where it was.

`calibration.json` says which call it is; `hearing-*.safetensors` are what each process has heard so far, and of how many
batches; `fitted-*.safetensors` are the weights that one step of the repair fitted; `text.safetensors` is what the teacher
wrote, where it writes its own. But for that sizes do not depend on how many tokens there are: the streams between blocks are
not kept, the blocks that are repaired already are run over them again.
"""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_guide.calibration.data import Batch
from hf_guide.errors import OptionError
from hf_guide.initialization.config import InitializationConfig
from hf_guide.teachers.checkpoint import TeacherCheckpoint
from hf_guide.utils.checksums import DamagedFileError, read_json, read_tensors, write_json, write_tensors
from hf_guide.utils.distributed import all_reduce_scalar, barrier, rank_and_world_size
from hf_guide.utils.files import is_partial, remove_stale_partials
from hf_guide.utils.fingerprint import comparable_config, weights_fingerprint
from hf_guide.version import __version__

MANIFEST_NAME = "calibration.json"
TEXT_NAME = "text.safetensors"
FORMAT = 2
FORMAT_WITHOUT_CHECKSUMS = 1

SECONDS_BETWEEN_SAVES = 60.0
"""While a teacher is heard its sums, which are as large as a few of its weights, are written no more often than this."""

CachedStep = tuple[dict[str, Tensor], dict[str, Any]]


def check_calibration_dir(folder: Path) -> None:
    """Refuse a file, or a folder that holds something else than a calibration.

    Raises:
        OptionError: names what is there.
    """
    if folder.exists() and not folder.is_dir():
        raise OptionError(
            f"calibration_dir {folder} is a file; name a folder that is new, empty, or of this calibration."
        )
    if folder.is_dir() and not (folder / MANIFEST_NAME).exists():
        others = sorted(path.name for path in folder.iterdir() if not is_partial(path))
        if others:
            raise OptionError(
                f"calibration_dir {folder} holds something else: {', '.join(others[:5])}. Name one that is new or empty."
            )


def describe_call(
    teacher: TeacherCheckpoint,
    student_class: type[PreTrainedModel],
    student_config: PreTrainedConfig,
    student_dtype: torch.dtype,
    options: InitializationConfig,
) -> dict[str, Any]:
    """Return what a call asks for, by which it is known again."""
    return {
        "teacher_class": teacher.model_class.__name__,
        "teacher_config": comparable_config(teacher.config),
        "teacher_dtype": str(teacher.dtype),
        "student_class": student_class.__name__,
        "student_config": comparable_config(student_config),
        "student_dtype": str(student_dtype),
        "options": dataclasses.asdict(options),
    }


def describe_data(model: nn.Module, batches: Sequence[Batch]) -> dict[str, Any]:
    """Return what a calibration's sums depend on besides: the teacher's weights, the data, and how they are shared."""
    data = blake2b(digest_size=16)
    for batch in batches:
        for name, tensor in sorted(batch.items()):
            data.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            data.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return {
        "teacher_weights": weights_fingerprint(model),
        "calibration_data": data.hexdigest(),
        "batches": len(batches),
        "processes": rank_and_world_size()[1],
        "hf_guide_version": __version__,
    }


@dataclass
class CalibrationCheckpoint:
    """What an earlier run of the same call has left in `folder`, and where this one leaves what it does.

    Every process sees the folder. `steps` are those whose weights were there when this run began, the same in all processes.
    """

    folder: Path
    steps: set[str] = field(default_factory=set)
    _saved: float = field(default_factory=time.monotonic)

    @classmethod
    def begin(cls, folder: Path, call: Mapping[str, Any]) -> "CalibrationCheckpoint":
        """Write what the call is, or agree with what is there.

        Args:
            call: all that the student depends on, as JSON has it.

        Raises:
            OptionError: the folder is of another call, and what differs; or it is damaged, or not seen by all processes.
        """
        check_calibration_dir(folder)
        wanted = json.loads(json.dumps({"format": FORMAT, **call}, default=str))
        if rank_and_world_size()[0] == 0:
            folder.mkdir(parents=True, exist_ok=True)
            remove_stale_partials(folder)
            if not (folder / MANIFEST_NAME).exists():
                write_json(folder / MANIFEST_NAME, wanted)
        barrier()
        differing = differences(_read_manifest(folder), wanted)
        if differing:
            raise OptionError(
                f"calibration_dir {folder} is of another call: {'; '.join(differing)}. Repeat that call, or name a new folder."
            )
        steps = {path.name[len("fitted-") : -len(".safetensors")] for path in folder.glob("fitted-*.safetensors")}
        if all_reduce_scalar(len(steps)) != len(steps) * rank_and_world_size()[1]:
            raise OptionError(
                f"calibration_dir {folder} is not the same folder in all processes; name one that all see."
            )
        return cls(folder, steps)

    def save_text(self, ids: Tensor) -> None:
        """Keep what the teacher has written, (rows, tokens): a GPU may write something else the next time."""
        if rank_and_world_size()[0] == 0 and not (self.folder / TEXT_NAME).exists():
            _write(self.folder / TEXT_NAME, {"input_ids": ids}, {})

    def heard(self) -> CachedStep | None:
        """Return the sums of this process, and their facts, as they were last kept."""
        return _read(self._statistics_path) if self._statistics_path.exists() else None

    def save_statistics(self, sums: Mapping[str, Tensor], facts: Mapping[str, Any], *, complete: bool) -> None:
        """Keep the sums of this process, if they are complete or have not been kept for a while."""
        if complete or time.monotonic() - self._saved >= SECONDS_BETWEEN_SAVES:
            _write(self._statistics_path, sums, facts)
            self._saved = time.monotonic()

    def fitted(self, step: str) -> CachedStep | None:
        """Return the weights that a step fitted, and its facts; None where no earlier run came to its end."""
        return _read(self._step_path(step)) if step in self.steps else None

    def save_step(self, step: str, weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Keep the weights that a step has fitted, which are the same in all processes."""
        if rank_and_world_size()[0] == 0:
            _write(self._step_path(step), weights, facts)

    @property
    def _statistics_path(self) -> Path:
        rank, size = rank_and_world_size()
        return self.folder / f"hearing-{rank:05d}-of-{size:05d}.safetensors"

    def _step_path(self, step: str) -> Path:
        return self.folder / f"fitted-{step}.safetensors"


def load_text(folder: Path) -> Tensor | None:
    """Return what the teacher has written in an earlier run, (rows, tokens), if all processes see it."""
    path = folder / TEXT_NAME
    return _read(path)[0]["input_ids"] if all_reduce_scalar(float(path.exists())) == rank_and_world_size()[1] else None


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Return what differs between two calls, entry by entry."""
    found = []
    for name in dict.fromkeys([*there, *here]):
        mine, theirs = there.get(name), here.get(name)
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            found += [f"{name}.{each}" for each in differences(mine, theirs)]
        elif mine != theirs:
            found.append(f"{name} is {_short_repr(mine)} there and {_short_repr(theirs)} here")
    return found


def _short_repr(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST_NAME
    try:
        # One without a checksum is of an earlier version, which its format says: it differs from what is wanted.
        found, has_checksum = read_json(path, required=False)
    except FileNotFoundError:
        raise OptionError(
            f"calibration_dir {folder} is not the same folder in all processes; name one that all see."
        ) from None
    except DamagedFileError as error:
        raise OptionError(f"{error} Name a new folder.") from error
    if not has_checksum and found.get("format") != FORMAT_WITHOUT_CHECKSUMS:
        raise OptionError(f"{path} is damaged: it has no checksum of its own. Name a new folder.")
    return found


def _read(path: Path) -> CachedStep:
    try:
        tensors, metadata, _ = read_tensors(path)
        return tensors, json.loads(metadata["facts"])
    except DamagedFileError as error:
        raise OptionError(f"{error} Remove it, and what it holds is worked out again.") from error


def _write(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    try:
        write_tensors(path, tensors, {"facts": json.dumps(facts)})
    except (SafetensorError, OSError) as error:
        raise OSError(
            f"{path} could not be written: {error}. Make room; the same call then goes on from here."
        ) from error
