"""Write and read the files of a signal cache: shards in Arrow's file format, mapped when read, and an index of keys.

A shard has one row per example: its key and its arrays, flattened. It is written under a temporary name and renamed once it is
whole, so a file with its name is complete. Until the capture is complete, the checksum of each shard is in a file of its own;
then all are in the manifest. `FORMAT.md` defines the files.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from hf_guide.errors import CaptureError
from hf_guide.signal_cache.keys import KEY_BYTES
from hf_guide.utils.checksums import DamagedFileError, file_checksum, read_json, verify_checksum, write_json
from hf_guide.utils.files import atomic_write

INDEX_NAME = "index.arrow"
LOW_BITS = 16
OLD_COLUMN_NAMES = {"embedding": "features"}
"""The name in this format of columns of formats 1 and 2."""

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Column:
    """The dtype and shape of one array of each example; -1 is its number of tokens."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes_per_token(self) -> int:
        """The bytes of one token, or of one example where the shape has no -1."""
        return int(
            np.dtype(self.dtype).itemsize * np.prod([size for size in self.shape if size != -1], dtype=np.int64)
        )


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{number:06d}.arrow"


def checksum_path(shard: Path) -> Path:
    """Return the file that holds a shard's checksum until the manifest does."""
    return shard.with_name(f".{shard.name}.json")


def shard_checksum(shard: Path, listed: str | None) -> str:
    """Return the checksum that a shard was written with.

    Args:
        listed: the manifest's, which holds unless the shard was written after it. Of a shard of an earlier version, which
            has neither, that of its bytes is taken.

    Raises:
        DamagedFileError: the file that holds it is damaged.
    """
    path = checksum_path(shard)
    return str(read_json(path)[0].get(shard.name)) if path.exists() else listed or file_checksum(shard)


def shard_defect(shard: Path, listed: str | None) -> str | None:
    """Return what is wrong with a shard by its checksum, None if nothing; `listed` as in `shard_checksum`."""
    try:
        verify_checksum(shard, shard_checksum(shard, listed))
    except DamagedFileError as error:
        return str(error)
    return None


def high_bits(classes: int) -> int:
    """Return how many bits an index below `classes` has beyond the low 16."""
    return max(0, (classes - 1).bit_length() - LOW_BITS)


def pack_indices(indices: np.ndarray, classes: int) -> Arrays:
    """Split indices (tokens, k) below `classes` into their low 16 bits and their packed high bits."""
    columns: Arrays = {"indices_low": (indices & 0xFFFF).astype(np.uint16)}
    bits = high_bits(classes)
    if bits:
        high = (indices.reshape(-1, 1) >> (LOW_BITS + np.arange(bits))) & 1
        columns["indices_high"] = np.packbits(high.astype(np.uint8), axis=None)
    return columns


def unpack_indices(columns: Mapping[str, np.ndarray], classes: int) -> np.ndarray:
    """Return the indices, int64 (tokens, k), that `pack_indices` split."""
    indices = columns["indices_low"].astype(np.int64)
    bits = high_bits(classes)
    if bits:
        high = np.unpackbits(columns["indices_high"], count=indices.size * bits).reshape(-1, bits).astype(np.int64)
        indices += (high << (LOW_BITS + np.arange(bits))).sum(1).reshape(indices.shape)
    return indices


class ShardWriter:
    """A context in which one shard is written; it gets its name if the block succeeds."""

    def __init__(self, path: Path, columns: Mapping[str, Column]):
        self._path, self._columns = path, columns
        self.bytes_written = 0

    def __enter__(self) -> "ShardWriter":
        fields = [pa.field("key", pa.binary(KEY_BYTES), nullable=False)]
        for name, column in self._columns.items():
            item = pa.field("item", pa.from_numpy_dtype(np.dtype(column.dtype)), nullable=False)
            fields.append(pa.field(name, pa.large_list(item), nullable=False))
        self._schema = pa.schema(fields)
        with contextlib.ExitStack() as stack:
            self._partial = stack.enter_context(atomic_write(self._path))
            self._sink = pa.OSFile(str(self._partial), "wb")
            self._writer = pa.ipc.new_file(self._sink, self._schema)
            self._unfinished = stack.pop_all()
        return self

    def write(self, keys: Sequence[bytes], examples: Sequence[Arrays]) -> None:
        """Append examples; each has every column."""
        arrays: list[Any] = [pa.array(keys, pa.binary(KEY_BYTES))]
        for field in list(self._schema)[1:]:
            column = self._columns[field.name]
            parts = [example[field.name].reshape(-1).astype(column.dtype, copy=False) for example in examples]
            offsets = np.cumsum([0, *map(len, parts)], dtype=np.int64)
            arrays.append(pa.LargeListArray.from_arrays(offsets, pa.array(np.concatenate(parts)), type=field.type))
        batch = pa.record_batch(arrays, schema=self._schema)
        self._writer.write_batch(batch)
        self.bytes_written += batch.nbytes

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._unfinished:
            self._writer.close()
            self._sink.close()
            if error is not None:
                raise error
            write_json(checksum_path(self._path), {self._path.name: file_checksum(self._partial)})


class Shard:
    """One shard, mapped into memory; only the requested rows are read.

    Raises:
        CaptureError: The file is missing, truncated or damaged, or has other columns.
    """

    def __init__(self, path: Path, columns: Mapping[str, Column]):
        try:
            self._reader = pa.ipc.open_file(pa.memory_map(str(path), "r"))
            batches = [self._reader.get_batch(number) for number in range(self._reader.num_record_batches)]
        except (OSError, pa.ArrowInvalid) as error:
            raise CaptureError(
                f"{path} is missing or damaged ({error}). Remove it and capture again: {RESUME_HINT}"
            ) from error
        names = [OLD_COLUMN_NAMES.get(name, name) for name in self._reader.schema.names]
        if names != ["key", *columns]:
            raise CaptureError(
                f"{path} has the columns {names}; they must be {['key', *columns]}. It is of another capture."
            )
        self._columns = columns
        self._batches = batches
        self._starts = np.cumsum([0, *(batch.num_rows for batch in batches)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def keys(self) -> np.ndarray:
        """Return all keys, uint8 (rows, 16)."""
        parts = [_key_bytes(batch.column(0)) for batch in self._batches]
        return np.concatenate(parts) if parts else np.empty((0, KEY_BYTES), np.uint8)

    def key(self, row: int) -> bytes:
        """Return the key of a row."""
        batch, position = self._find(row)
        return bytes(batch.column(0)[position].as_py())

    def arrays(self, row: int) -> Arrays:
        """Return the arrays of a row, read-only and mapped: they are read from disk when they are used."""
        batch, position = self._find(row)
        arrays = {}
        for number, (name, column) in enumerate(self._columns.items(), start=1):
            lists = batch.column(number)
            start, end = lists.offsets[position].as_py(), lists.offsets[position + 1].as_py()
            arrays[name] = lists.values[start:end].to_numpy(zero_copy_only=True).reshape(column.shape)
        return arrays

    def _find(self, row: int) -> tuple[Any, int]:
        batch = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._batches[batch], row - int(self._starts[batch])


RESUME_HINT = "finished shards are kept."
DAMAGED_HINT = "Run the same capture again; it writes what is damaged anew, and that alone."


def write_index(path: Path, keys: Sequence[np.ndarray]) -> None:
    """Write the rows of all keys, uint8 (rows, 16) each, in the order of the keys' first eight bytes.

    Needs 16 bytes of memory per example in addition to the keys.
    """
    prefixes = np.concatenate([_prefixes(part) for part in keys])
    order = np.argsort(prefixes, kind="stable")
    table = pa.record_batch({"prefix": prefixes[order], "row": order.astype(np.uint64)})
    with atomic_write(path) as partial:
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_batch(table)


class KeyIndex:
    """Finds the rows of a key by bisection in a mapped file.

    Raises:
        CaptureError: The file is missing or damaged.
    """

    def __init__(self, path: Path):
        try:
            batch = pa.ipc.open_file(pa.memory_map(str(path), "r")).get_batch(0)
            self._prefixes = batch.column("prefix").to_numpy(zero_copy_only=True)
            self._rows = batch.column("row").to_numpy(zero_copy_only=True)
        except (OSError, KeyError, pa.ArrowInvalid) as error:
            raise CaptureError(f"{path} is missing or damaged ({error}). Capture again: {RESUME_HINT}") from error

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, key: bytes) -> list[int]:
        """Return the rows whose key has the same first 8 bytes: usually one, or none."""
        prefix = _prefixes(np.frombuffer(key, np.uint8).reshape(1, KEY_BYTES))[0]
        first = int(np.searchsorted(self._prefixes, prefix))
        rows = []
        while first < len(self._prefixes) and self._prefixes[first] == prefix:
            rows.append(int(self._rows[first]))
            first += 1
        return rows


def _prefixes(keys: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(keys[:, :8]).view("<u8").reshape(-1)


def _key_bytes(keys: Any) -> np.ndarray:
    return np.frombuffer(keys.buffers()[1], np.uint8)[keys.offset * KEY_BYTES :][: len(keys) * KEY_BYTES].reshape(
        -1, KEY_BYTES
    )
