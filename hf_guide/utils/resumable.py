"""A folder in which a long computation leaves finished files, so that the same call continues after being killed.

A manifest, written first, records what the call depends on; another call is an error that names what differs. Files are
written under a temporary name and renamed once they are on the disk (`hf_guide.utils.files`), so none is ever half-written.
The calibration cache and the signal cache are such folders.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from hf_guide.errors import HfGuideError
from hf_guide.utils.distributed import barrier, rank_and_world_size
from hf_guide.utils.files import check_can_create, is_partial, remove_stale_partials, write_advice

MAX_LISTED = 5
MAX_REPR = 60
TEACHER_ENTRIES = ("teacher_class", "teacher_config", "teacher_weights", "teacher_values")
"""Entries of manifests that are of the teacher itself; if they differ, so do others that depend on it."""


@dataclass(frozen=True)
class ResumableFolder:
    """A folder of one computation.

    Args:
        path: The folder; every process must see it.
        manifest_name: The file in it that records what the computation depends on.
        label: What errors call the folder, such as the option that names it.
        error: The class of the errors.
    """

    path: Path
    manifest_name: str
    label: str
    error: type[HfGuideError]

    def check(self) -> None:
        """Raise if the folder cannot be used, before anything is computed; create nothing.

        One with a manifest may be complete, so it need not be writable; `check_can_create` checks whether it is.

        Raises:
            HfGuideError: (as `error`) It is a file, or holds files and no manifest.
            OSError: It cannot be created, or is empty and not writable.
        """
        if self.path.exists() and not self.path.is_dir():
            raise self.error(
                f"{self.label} {self.path} is a file; it must be a folder that is new, empty, or of the same call."
            )
        if (self.path / self.manifest_name).exists():
            return
        if self.path.is_dir():
            others = sorted(path.name for path in self.path.iterdir() if not is_partial(path))
            if others:
                raise self.error(
                    f"{self.label} {self.path} holds something else: {', '.join(others[:MAX_LISTED])}. It must be a folder "
                    "that is new, empty, or of the same call."
                )
        check_can_create(self.path)

    def create(self, save_manifest: Callable[[], None]) -> None:
        """Create the folder, remove what killed processes left half-written, and call `save_manifest` if there is none.

        Raises:
            HfGuideError: (as `error`) The folder cannot be created, as on a file system that takes none.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self.error(f"{self.label} {self.path} cannot be created: {error}. Name another folder.") from error
        remove_stale_partials(self.path)
        if not (self.path / self.manifest_name).exists():
            save_manifest()

    def begin(self, save_manifest: Callable[[], None]) -> None:
        """Call `create` in rank 0, and return in all ranks once it is done."""
        if rank_and_world_size()[0] == 0:
            self.create(save_manifest)
        barrier()

    def check_same_call(self, recorded: Mapping[str, Any], requested: Mapping[str, Any]) -> None:
        """Raise if the folder was begun by a call that differs, naming each entry.

        Raises:
            HfGuideError: (as `error`) Entries differ; names the first of them, those of the teacher before others.
        """
        differing = differences(recorded, requested)
        if differing:
            is_other = any(
                name in TEACHER_ENTRIES and recorded.get(name) != value for name, value in requested.items()
            )
            raise self.error(
                f"{self.label} {self.path} was begun with {'another teacher' if is_other else 'other settings'}: "
                f"{list_differences(differing)}. Repeat the call with {'that' if is_other else 'those'}, or name a new folder."
            )


@contextlib.contextmanager
def resumable_write(path: Path, error: type[Exception]) -> Iterator[None]:
    """Raise what prevents a file from being written as `error`, which states that the same call continues from here."""
    try:
        yield
    except (SafetensorError, OSError) as cause:
        advice = write_advice(cause, path.parent)
        raise error(
            f"{path} could not be written: {cause}. {advice}; the same call then continues from here."
        ) from cause


def differences(
    recorded: Mapping[str, Any], requested: Mapping[str, Any], there: str = "there", here: str = "here"
) -> list[str]:
    """Return one clause for each entry that differs, nested mappings entry by entry.

    Args:
        recorded: One mapping.
        requested: The other.
        there: Where the first one is, in the clauses.
        here: Where the second one is.

    Example:
        >>> differences({"top_k": 8, "config": {"hidden_size": 4}}, {"top_k": 9, "config": {"hidden_size": 6}})
        ['top_k is 8 there and 9 here', 'config.hidden_size is 4 there and 6 here']
    """
    clauses = []
    for name in dict.fromkeys([*recorded, *requested]):
        first, second = recorded.get(name), requested.get(name)
        if isinstance(first, Mapping) and isinstance(second, Mapping):
            clauses += [f"{name}.{clause}" for clause in differences(first, second, there, here)]
        elif first != second:
            clauses.append(f"{name} is {_short_repr(first)} {there} and {_short_repr(second)} {here}")
    return clauses


def list_differences(clauses: Sequence[str]) -> str:
    """Return the clauses of `differences` in one line: the first `MAX_LISTED`, those of the teacher before others.

    Example:
        >>> list_differences([f"ridge_{index} is 0 there and 1 here" for index in range(7)]).rpartition("; ")[2]
        'and 2 more'
    """
    first = sorted(clauses, key=lambda clause: not clause.startswith(TEACHER_ENTRIES))
    more = len(clauses) - MAX_LISTED
    return "; ".join([*first[:MAX_LISTED], *([f"and {more} more"] if more > 0 else [])])


def _short_repr(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_REPR else text[: MAX_REPR - 3] + "..."
