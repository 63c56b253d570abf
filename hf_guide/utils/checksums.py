"""Checksums of the files that this package writes, so that damage raises an error instead of giving wrong numbers.

The checksum is 128-bit xxHash3: a guard against faulty disks, memory and copies, not against deliberate changes. Arrow files
have theirs in the manifest. JSON and safetensors files contain their own in the entry `checksum`, computed with that entry's
32 digits as zeros, so that it covers every byte.
"""

import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from hf_guide.errors import HfGuideError
from hf_guide.utils.files import atomic_write

CHECKSUM_KEY = "checksum"

_ZEROS = "0" * 32
_BLOCK_BYTES = 1 << 20
_CAUSE = "The disk, the memory or a copy has damaged it, or someone has edited it."


class DamagedFileError(HfGuideError):
    """A file's bytes differ from those that were written."""


class Checksum:
    """Incremental checksum of bytes."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()

    def update(self, part: "bytes | memoryview | bytearray") -> None:
        """Add bytes."""
        self._state.update(part)

    def hexdigest(self) -> str:
        """Return the checksum of all bytes so far, 32 hexadecimal digits."""
        return self._state.hexdigest()


def file_checksum(path: str | os.PathLike[str]) -> str:
    """Return the checksum of a file."""
    return _checksum_excluding(Path(path), "", 0)


def verify_checksum(path: Path, expected: str) -> None:
    """Compare a file's checksum with the expected one.

    Raises:
        DamagedFileError: They differ.
    """
    _raise_on_mismatch(path, expected, file_checksum(path))


def write_json(path: Path, entries: Mapping[str, Any]) -> None:
    """Write a JSON file that contains its own checksum, atomically."""
    text = json.dumps({**entries, CHECKSUM_KEY: _ZEROS}, indent=2, default=str) + "\n"
    data = text.encode("utf-8")
    checksum = xxhash.xxh3_128_hexdigest(data)
    before, _, after = data.rpartition(_ZEROS.encode())
    with atomic_write(path) as partial:
        partial.write_bytes(before + checksum.encode() + after)


def read_json(path: Path, *, required: bool = True) -> tuple[dict[str, Any], bool]:
    """Return the entries of a JSON file without its checksum, and whether it had one.

    Args:
        path: The file.
        required: Whether a missing checksum is an error.

    Raises:
        DamagedFileError: Invalid JSON, not a mapping, or a missing or wrong checksum.
        FileNotFoundError: There is no such file.
    """
    data = path.read_bytes()
    try:
        entries = json.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DamagedFileError(f"{path} is damaged: {error}.") from error
    if not isinstance(entries, dict):
        raise DamagedFileError(f"{path} is damaged: it must be a mapping; found a {type(entries).__name__}.")
    checksum = entries.pop(CHECKSUM_KEY, None)
    if checksum is None:
        if required:
            raise DamagedFileError(f"{path} is damaged: it has no entry {CHECKSUM_KEY!r}.")
        return entries, False
    before, digits, after = data.rpartition(str(checksum).encode())
    _raise_on_mismatch(
        path, str(checksum), xxhash.xxh3_128_hexdigest(before + _ZEROS.encode() + after) if digits else "none"
    )
    return entries, True


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Write a safetensors file that contains its own checksum, atomically, and return the checksum.

    Raises:
        SafetensorError, OSError: The file could not be written.
    """
    with atomic_write(path) as partial:
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
            partial,
            metadata={**metadata, CHECKSUM_KEY: _ZEROS},
        )
        checksum = file_checksum(partial)
        with partial.open("r+b") as file:
            offset = _checksum_offset(file.read(8 + _header_size(partial)), _ZEROS)
            file.seek(offset)
            file.write(checksum.encode())
    return checksum


def read_tensors(path: Path, *, required: bool = True) -> tuple[dict[str, Tensor], dict[str, str], str | None]:
    """Return the tensors, metadata and checksum of a file of `write_tensors`; the checksum is None if it has none.

    Args:
        path: The file.
        required: Whether a missing checksum is an error.

    Raises:
        DamagedFileError: Not a safetensors file, or a missing or wrong checksum.
        FileNotFoundError: There is no such file.
    """
    defect = safetensors_defect(path)
    if defect is not None:
        raise DamagedFileError(f"{path} is damaged: {defect}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            checksum = metadata.pop(CHECKSUM_KEY, None)
            # Early versions wrote no checksum; a damaged key must not count as such a file.
            if checksum is None and (required or set(metadata) - {"format"}):
                raise DamagedFileError(f"{path} is damaged: its header has no entry {CHECKSUM_KEY!r}.")
            if checksum is not None:
                with path.open("rb") as raw:
                    offset = _checksum_offset(raw.read(8 + _header_size(path)), checksum)
                _raise_on_mismatch(
                    path, checksum, _checksum_excluding(path, checksum, offset) if offset >= 0 else "none"
                )
            return {name: file.get_tensor(name) for name in file.keys()}, metadata, checksum  # noqa: SIM118
    except (SafetensorError, UnicodeDecodeError) as error:
        raise DamagedFileError(f"{path} is damaged: {error}.") from error


def safetensors_defect(path: Path) -> str | None:
    """Return why a safetensors file is incomplete, without reading its tensors; None if it seems complete."""
    size = path.stat().st_size
    if size < 8:
        return f"it has {size} bytes"
    header = _header_size(path)
    if 8 + header > size:
        return f"it has {size} bytes, less than its header"
    try:
        with path.open("rb") as file:
            file.seek(8)
            entries = json.loads(file.read(header))
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        return f"its header cannot be read ({type(error).__name__}: {error})"
    expected = 8 + header + max(ends, default=0)
    return None if size == expected else f"it has {size} bytes and should have {expected}"


def weights_defect(folder: Path) -> str | None:
    """Return why a model's folder cannot be loaded; None if its weights are complete."""
    weights = [path for path in folder.iterdir() if path.suffix == ".safetensors"]
    for index in folder.glob("*.safetensors.index.json"):
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return f"{index.name} cannot be read ({type(error).__name__}: {error})"
        missing = sorted(name for name in names if not (folder / name).is_file())
        if missing:
            return f"{missing[0]} is missing, which {index.name} names"
    for path in weights:
        defect = safetensors_defect(path)
        if defect is not None:
            return f"{path.name} is truncated or damaged: {defect}"
    names = {path.name for path in weights}
    if (
        not names & {"model.safetensors", "adapter_model.safetensors"}
        and not (folder / SAFE_WEIGHTS_INDEX_NAME).is_file()
    ):
        return "it has no weights"
    return None


def check_written_model(folder: Path) -> None:
    """Check that a folder contains a complete model.

    Raises:
        OSError: A file is missing or damaged; names it.
    """
    defect = weights_defect(folder) or (None if (folder / "config.json").is_file() else "it has no config.json")
    if defect is not None:
        raise OSError(f"The model that was written to {folder} is incomplete: {defect}. Run the command again.")


def torch_file_defect(path: Path) -> str | None:
    """Return what is wrong with a file of `torch.save`, by its own checksums and without running code; None if nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError) as error:
        return f"it cannot be read ({error})"
    return None if damaged is None else f"the checksum of its part {damaged} is wrong"


def _raise_on_mismatch(path: Path, expected: str, actual: str) -> None:
    if actual != expected:
        raise DamagedFileError(f"{path} is damaged: its checksum must be {expected}; found {actual}. {_CAUSE}")


def _header_size(path: Path) -> int:
    with path.open("rb") as file:
        return int.from_bytes(file.read(8), "little")


def _checksum_offset(header: bytes, checksum: str) -> int:
    """Return the offset of the checksum's digits; -1 if they are not in the header."""
    key = f'"{CHECKSUM_KEY}":"'.encode()
    index = header.find(key + checksum.encode())
    return index + len(key) if index >= 0 else -1


def _checksum_excluding(path: Path, checksum: str, offset: int) -> str:
    """Return the checksum of a file with zeros instead of its own checksum at `offset`."""
    state = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        if checksum:
            state.update(file.read(offset))
            state.update(b"0" * len(checksum))
            file.seek(offset + len(checksum))
        block = memoryview(bytearray(_BLOCK_BYTES))
        while size := file.readinto(block):
            state.update(block[:size])
    return state.hexdigest()
