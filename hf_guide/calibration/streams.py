"""Keep activations of all calibration tokens: in memory, and beyond a budget in a temporary file.

The file has no name, so that the system removes it however the process ends. It is read and written rather than mapped,
because mapped pages count as the process's memory.
"""

import errno
import io
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from hf_guide.errors import OptionError
from hf_guide.utils.files import write_limit_advice

GIGABYTE = 10**9
OPTION = "activation_memory"


class StreamStore:
    """The memory and the files of a process's activations.

    Args:
        gigabytes: How much is kept in memory, in GB (10^9 bytes); what is beyond is written to files.
        folder: Of the files; None is the system's temporary folder (`TMPDIR`).

    Example:
        >>> store = StreamStore(gigabytes=0)
        >>> streams = Streams(store)
        >>> streams.append(torch.ones(2, 3))
        >>> streams[0] = 2 * streams[0]
        >>> streams[0].sum().item(), store.bytes_in_memory
        (12.0, 0)
    """

    def __init__(self, gigabytes: float, folder: Path | None = None):
        self.budget, self.folder = round(gigabytes * GIGABYTE), folder
        self.bytes_in_memory = self.expected_bytes = 0

    def reserve(self, size: int) -> bool:
        """Return whether that many bytes are still within the budget, and count them if so."""
        fits = self.bytes_in_memory + size <= self.budget
        self.bytes_in_memory += size if fits else 0
        return fits

    def check_space(self, size: int) -> None:
        """Raise if the files of that many bytes, less the budget, do not fit on their disk.

        Raises:
            OptionError: States how much there is, and what helps.
        """
        self.expected_bytes = max(0, size - self.budget)
        if self.expected_bytes > self.free_bytes():
            raise self.write_error()

    def free_bytes(self) -> int:
        """Return how many bytes are free where the files are."""
        return shutil.disk_usage(self.folder or tempfile.gettempdir()).free

    def write_error(self, error: OSError | None = None, written: int = 0) -> OptionError:
        """Return the error for files that do not fit on their disk, or that cannot be written for another reason.

        Args:
            error: What the system raised, if a write failed.
            written: How many bytes the file has that could not be written to.
        """
        needed, free = max(self.expected_bytes, written) / GIGABYTE, self.free_bytes() / GIGABYTE
        folder = self.folder or tempfile.gettempdir()
        found, advice = "do not fit into", "Set TMPDIR to a folder with more space"
        if error is not None and error.errno != errno.ENOSPC:
            found, advice = "cannot be written to", write_limit_advice(error) or "Set TMPDIR to another folder"
        reason = os.strerror(error.errno or 0) if error is not None else ""
        cause = f" ({reason} after {written / GIGABYTE:.3g} GB of one file)" if reason else ""
        return OptionError(
            f"{needed:.3g} GB of activations {found} temporary files in {folder}, where {free:.3g} GB are free{cause}. "
            f"{advice}, raise {OPTION}, or pass fewer calibration_tokens; with a calibration_cache_dir the call continues "
            "from the last block that was finished."
        )

    def open_file(self) -> io.FileIO:
        """Return a new temporary file.

        Raises:
            OptionError: It cannot be created, as where a quota is used up.
        """
        try:
            return tempfile.TemporaryFile(dir=self.folder, prefix="hf-guide-activations-", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise self.write_error(error) from error


class Streams:
    """One tensor for each batch, such as the hidden states before a block; a list that may be on the disk.

    Args:
        store: Where they are kept; None is in memory.
        tensors: The first ones.
    """

    def __init__(self, store: StreamStore | None = None, tensors: Iterable[Tensor] = ()):
        self._store = store
        self._entries: list[Tensor | _Stored] = []
        self._file: io.FileIO | None = None
        self._size = self._reserved = 0
        for tensor in tensors:
            self.append(tensor)

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(entry.nbytes for entry in self._entries)

    def __getitem__(self, index: int) -> Tensor:
        entry = self._entries[index]
        if isinstance(entry, Tensor):
            return entry
        assert self._file is not None
        return entry.read(self._file)

    def __setitem__(self, index: int, value: Tensor) -> None:
        entry = self._entries[index]
        if isinstance(entry, _Stored) and entry.nbytes == value.nbytes:
            self._entries[index] = self._write(value, entry.offset)
        elif isinstance(entry, Tensor) and entry.nbytes == value.nbytes:
            self._entries[index] = value
        else:  # a block changes the size
            self._entries[index] = self._kept(value)

    def append(self, value: Tensor) -> None:
        """Add the tensor of the next batch.

        Raises:
            OptionError: There is no space for it on the disk.
        """
        self._entries.append(self._kept(value))

    def __del__(self) -> None:
        if self._store is not None:
            self._store.bytes_in_memory -= self._reserved
        if self._file is not None:
            self._file.close()

    def _kept(self, value: Tensor) -> "Tensor | _Stored":
        if self._store is None or self._store.reserve(value.nbytes):
            self._reserved += value.nbytes
            return value
        if self._file is None:
            self._file = self._store.open_file()
        offset, self._size = self._size, self._size + value.nbytes
        return self._write(value, offset)

    def _write(self, value: Tensor, offset: int) -> "_Stored":
        assert self._file is not None and self._store is not None
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        try:
            position = 0
            self._file.seek(offset)
            while position < len(raw):
                position += self._file.write(raw[position:])
        except OSError as error:
            raise self._store.write_error(error, offset) from error
        return _Stored(offset, value.nbytes, value.shape, value.dtype, value.device)


class _Stored:
    """The position of one tensor in a file."""

    def __init__(self, offset: int, nbytes: int, shape: torch.Size, dtype: torch.dtype, device: torch.device):
        self.offset, self.nbytes, self.shape, self.dtype, self.device = offset, nbytes, shape, dtype, device

    def read(self, file: io.FileIO) -> Tensor:
        raw = torch.empty(self.nbytes, dtype=torch.uint8)
        view, position = memoryview(raw.numpy().data), 0
        file.seek(self.offset)
        while position < self.nbytes:
            count = file.readinto(view[position:])
            if not count:
                raise OSError(f"The temporary file of activations ends after {self.offset + position} bytes.")
            position += count
        return raw.view(self.dtype).view(self.shape).to(self.device)
