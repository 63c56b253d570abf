"""The tensors of a teacher by name: in memory, or read from safetensors files one tensor, or some rows of it, at a time."""

import itertools
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from hf_guide.errors import TeacherError

STEP_BYTES = 2**26
"""So many bytes of a tensor of experts are made of stored ones at a time, or one expert."""


class TensorSource(Protocol):
    """The tensors of a model by their names in the state dict; of tied ones only one (see `TeacherCheckpoint.tied`).

    Extend it: what a source does not define is that of a model in memory.
    """

    def keys(self) -> Collection[str]:
        """Return the names."""

    def shape(self, name: str) -> torch.Size:
        """Return a tensor's shape without reading it."""

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype a tensor is stored in without reading it."""

    def get(self, name: str) -> torch.Tensor:
        """Return one tensor, detached, in its stored dtype; it may share memory with the teacher, so never write."""

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return the entries `start` to `stop` of one tensor's first axis, as `get` does; a file's others are not read."""
        return self.get(name)[start:stop]

    def reads_rows(self, name: str) -> bool:
        """Return whether `rows` reads nothing else of a tensor."""
        return False

    def maps(self, name: str) -> bool:
        """Return whether `get` maps a tensor from its file, and does not copy it."""
        return False

    def prefetch(self, name: str) -> None:
        """Have the system read a tensor that is needed soon, and return at once."""
        return

    def in_file_order(self, names: Iterable[str]) -> list[str]:
        """Return names in the order in which their tensors are read fastest: that of a file."""
        return list(names)

    def file_states(self) -> "Collection[FileState]":
        """Return the files that are read, as they were opened; none of a model in memory."""
        return ()

    def check_unchanged(self) -> None:
        """Check that the files are still those that were opened.

        Raises:
            TeacherError: One was replaced or written to since; it is named.
        """
        for state in self.file_states():
            state.check_unchanged()


class OtherVocabularyTensors(TensorSource):
    """The tensors of another source, of which those with an entry for each token have other entries.

    Extend it: `get` and `rows` are of the source that changes entries.

    Args:
        weights: The other source.
        axes: By name, the axis of the tokens.
        vocab_size: The number of entries there.
    """

    def __init__(self, weights: TensorSource, axes: Mapping[str, int], vocab_size: int):
        self.weights, self.axes, self.vocab_size = weights, axes, vocab_size

    def keys(self) -> Collection[str]:
        """Return the names of the other source."""
        return self.weights.keys()

    def shape(self, name: str) -> torch.Size:
        """Return a tensor's shape, with the other number of tokens."""
        shape = list(self.weights.shape(name))
        if name in self.axes:
            shape[self.axes[name]] = self.vocab_size
        return torch.Size(shape)

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype in the other source."""
        return self.weights.dtype(name)

    def prefetch(self, name: str) -> None:
        """Have the system read a tensor of the other source."""
        self.weights.prefetch(name)

    def file_states(self) -> "Collection[FileState]":
        """Return the files of the other source."""
        return self.weights.file_states()


class InMemoryTensors(TensorSource):
    """The tensors of a model in memory, shared with it and not copied.

    `factor`, called at each read, returns the number that a tensor is multiplied by to undo a rescaling by the model.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], factor: "Callable[[str], float] | None" = None):
        self._tensors = tensors
        self._factor = factor

    def keys(self) -> Collection[str]:
        """Return the names, as in the model's `state_dict`."""
        return self._tensors.keys()

    def shape(self, name: str) -> torch.Size:
        """Return a tensor's shape."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype."""
        return self._tensors[name].dtype

    def get(self, name: str) -> torch.Tensor:
        """Return the model's own tensor, detached; never write to it."""
        tensor = self._tensors[name]
        factor = 1.0 if self._factor is None else self._factor(name)
        return tensor if factor == 1.0 else tensor * factor


class OffloadedTensors(InMemoryTensors):
    """The tensors of a model that accelerate has spread over devices, the CPU's memory and a disk; read one at a time.

    Those on the meta device are read from where the hooks of their module load them.

    Raises:
        TeacherError: Some are on the meta device, and no hook loads them.
    """

    def __init__(self, model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]):
        super().__init__(tensors)
        self._maps: dict[str, tuple[Mapping[str, torch.Tensor], str]] = {}
        offloaded = [name for name, tensor in tensors.items() if tensor.is_meta]
        for name in offloaded:
            found = _weights_map(model, name)
            if found is None:
                raise TeacherError(
                    f"{len(offloaded)} weights of {type(model).__name__} are not in memory ({name} is on the meta device), "
                    "and no hook of accelerate loads them. Pass its folder or Hub id instead of the loaded model."
                )
            self._maps[name] = found

    def get(self, name: str) -> torch.Tensor:
        """Return the model's own tensor, or read it from where it was offloaded to; never write to it.

        Raises:
            TeacherError: The folder that it was offloaded to has changed.
        """
        if name not in self._maps:
            return super().get(name)
        tensors, key = self._maps[name]
        try:
            return tensors[key].detach()
        except (KeyError, OSError, SafetensorError) as error:
            raise TeacherError(
                f"{name} cannot be read from where accelerate has offloaded it to ({error}). Load the model again, or pass "
                "its folder or Hub id."
            ) from error


def _weights_map(model: torch.nn.Module, name: str) -> "tuple[Mapping[str, torch.Tensor], str] | None":
    """Return the mapping from which a hook loads a tensor, and the tensor's key there."""
    path = name.split(".")
    for length in range(len(path) - 1, -1, -1):
        hook: Any = getattr(model.get_submodule(".".join(path[:length])), "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            tensors = getattr(each, "weights_map", None)
            if tensors is not None and (length == len(path) - 1 or each.place_submodules):
                return tensors, ".".join(path[length:])
    return None


@dataclass(frozen=True)
class FileState:
    """Which file a path named when it was opened."""

    file: str
    size: int
    modified: int  # nanoseconds
    inode: int

    @classmethod
    def of(cls, file: str) -> "FileState":
        """Return the state of a file now."""
        status = os.stat(file)
        return cls(file, status.st_size, status.st_mtime_ns, status.st_ino)

    def check_unchanged(self) -> None:
        """Raise a TeacherError if the path names another file now, or the file was written to."""
        try:
            now = FileState.of(self.file)
        except OSError as error:
            raise unreadable_file_error(self.file, error) from error
        if now != self:
            what = f"from {self.size} to {now.size}" if now.size != self.size else f"though it still has {now.size}"
            raise TeacherError(
                f"{self.file} has changed since it was opened, {what} bytes: a student would be made of two checkpoints. "
                "Wait until the checkpoint is written, then run the call again."
            )


@dataclass(frozen=True)
class StoredTensor:
    """The location of one tensor in a safetensors file.

    Attributes:
        dtype: None for a format that only quantised checkpoints use.
        start, stop: Its bytes in the file.
    """

    state: FileState
    key: str
    shape: torch.Size
    dtype: torch.dtype | None
    start: int
    stop: int

    @property
    def file(self) -> str:
        """The path of the file."""
        return self.state.file

    @property
    def has_rows(self) -> bool:
        """Whether some entries of its first axis can be read by themselves."""
        return True

    def parts(self, rows: "slice | None") -> "list[tuple[StoredTensor, slice | None]]":
        """Return the stored tensors of which it is made, and the entries of the first axis that are needed of each."""
        return [(self, rows)]

    def assemble(self, tensors: Sequence[torch.Tensor], rows: "slice | None") -> torch.Tensor:
        """Return the tensor, or some rows of it, made of its parts."""
        return tensors[0]


class LocatedTensor(Protocol):
    """A tensor of the model that is made of one or more stored ones."""

    @property
    def shape(self) -> torch.Size:
        """Its shape in the model."""

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype in which it is returned."""

    @property
    def has_rows(self) -> bool:
        """Whether some entries of its first axis can be read by themselves."""

    def parts(self, rows: "slice | None") -> "list[tuple[StoredTensor, slice | None]]":
        """Return the stored tensors of which it is made, and the entries of the first axis that are needed of each."""

    def assemble(self, tensors: Sequence[torch.Tensor], rows: "slice | None") -> torch.Tensor:
        """Return the tensor, or some rows of it, made of its parts."""


class SafetensorsTensors(TensorSource):
    """The tensors of a model in safetensors files, read one at a time; no file stays open."""

    def __init__(self, tensors: Mapping[str, LocatedTensor]):
        self._tensors = tensors

    def keys(self) -> Collection[str]:
        """Return the names, as in the model's `state_dict`."""
        return self._tensors.keys()

    def shape(self, name: str) -> torch.Size:
        """Return a tensor's shape without reading it."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype a tensor is stored in without reading it."""
        dtype = self._tensors[name].dtype
        assert dtype is not None  # `match_stored_tensors` lets no other through
        return dtype

    def get(self, name: str) -> torch.Tensor:
        """Read one tensor from its file, mapped read-only where the system can; one that is made of others, in steps.

        Raises:
            TeacherError: The file has changed or been damaged since it was opened; it is named.
        """
        shape, dtype = self.shape(name), self.dtype(name)
        step = max(1, shape[0] * STEP_BYTES // max(1, shape.numel() * dtype.itemsize)) if shape else 1
        if isinstance(self._tensors[name], StoredTensor) or not self.reads_rows(name) or step >= shape[0]:
            return self._read(name, None)
        tensor = torch.empty(shape, dtype=dtype)
        for start in range(0, shape[0], step):
            tensor[start : start + step] = self._read(name, slice(start, start + step))
        return tensor

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read some entries of one tensor's first axis, as `get`."""
        return self._read(name, slice(start, stop))

    def reads_rows(self, name: str) -> bool:
        """Return whether some rows of a tensor are stored by themselves."""
        return self._tensors[name].has_rows

    def maps(self, name: str) -> bool:
        """Return whether a tensor is stored as it is in the model."""
        return isinstance(self._tensors[name], StoredTensor)

    def prefetch(self, name: str) -> None:
        """Have the system read a tensor into its page cache."""
        if not hasattr(os, "posix_fadvise"):  # only Linux and some other Unixes have it
            return
        for stored, _ in self._tensors[name].parts(None):
            try:
                descriptor = os.open(stored.file, os.O_RDONLY)
                try:
                    os.posix_fadvise(descriptor, stored.start, stored.stop - stored.start, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(descriptor)
            except OSError as error:
                raise unreadable_file_error(stored.file, error) from error

    def file_states(self) -> Collection[FileState]:
        """Return every file that has a tensor of the model, with the size, the time and the inode of when it was opened."""
        return {stored.state for each in self._tensors.values() for stored, _ in each.parts(None)}

    def in_file_order(self, names: Iterable[str]) -> list[str]:
        """Return names in the order in which their tensors are stored."""
        return sorted(names, key=lambda name: min(_position(part) for part, _ in self._tensors[name].parts(None)))

    def _read(self, name: str, rows: "slice | None") -> torch.Tensor:
        located = self._tensors[name]
        parts = located.parts(rows)
        tensors: dict[int, torch.Tensor] = {}
        by_position = sorted(range(len(parts)), key=lambda index: _position(parts[index][0]))
        for path, indices in itertools.groupby(by_position, key=lambda index: parts[index][0].file):
            try:
                with safe_open(path, framework="pt") as file:
                    for index in indices:
                        stored, some = parts[index]
                        tensors[index] = (
                            file.get_tensor(stored.key) if some is None else file.get_slice(stored.key)[some]
                        )
            except (SafetensorError, OSError) as error:
                raise unreadable_file_error(path, error) from error
            stored.state.check_unchanged()
        return located.assemble([tensors[index] for index in range(len(parts))], rows)


def _position(stored: StoredTensor) -> tuple[str, int]:
    return stored.file, stored.start


def unreadable_file_error(file: str, error: Exception) -> TeacherError:
    """Return the error for a file that cannot be read: removed since its teacher was opened, or damaged."""
    found = "was removed while it was read" if isinstance(error, FileNotFoundError) else "is truncated or corrupted"
    return TeacherError(f"{file} {found} ({error}). Fetch it again.")
