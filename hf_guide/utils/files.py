"""Write files and folders atomically: readers see the old content or the new one, never a part."""

import contextlib
import errno
import functools
import os
import platform
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator
from hashlib import blake2b
from pathlib import Path

from safetensors import SafetensorError

from hf_guide.errors import OptionError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

_PARTIAL = re.compile(r"^[._].+\.(?P<host>[0-9a-f]{8})-(?P<boot>[0-9a-f]{8})-[0-9a-f]{8}\.partial$")

_OS_ERROR = re.compile(r"os error (\d+)")

_CONFIGS = ("config.json", "adapter_config.json")
_WEIGHTS = re.compile(
    r"^(model|pytorch_model|adapter_model)(?:\.(?P<variant>[\w.-]+?))?(?:-\d{5}-of-\d{5})?\.(?:safetensors|bin)$"
)
_INDEX = re.compile(
    r"^(model|pytorch_model|adapter_model)\.(?:safetensors|bin)\.index(?:\.(?P<variant>[\w.-]+))?\.json$"
)


class DiskError(OSError):
    """The disk is full, or failed during a write."""


def check_output_folder(output: Path) -> None:
    """Check that an output is a new or empty folder; unfinished folders of earlier runs are ignored.

    Raises:
        FileExistsError: It is a file, or a folder that is not empty.
        NotADirectoryError, PermissionError: It can be neither written to nor replaced.
    """
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"The output {output} is a file; it must be a new or empty folder.")
    if not (output.is_dir() and _can_be_renamed(output.resolve())):
        check_can_create(output)
    if output.is_dir() and any(not is_partial(path) for path in output.iterdir()):
        raise FileExistsError(f"The output folder {output} is not empty; name a new one, or empty it first.")


def check_output_file(output: Path) -> None:
    """Check that a file can be written, before what it is to contain is computed; one that exists is replaced.

    Raises:
        OptionError: It is a folder, or its folder does not exist.
        PermissionError: Its folder is not writable.
    """
    folder = output.absolute().parent
    if output.is_dir():
        raise OptionError(f"The output {output} must be a file; it is a folder. Add the name of the file.")
    if not folder.is_dir():
        raise OptionError(f"There is no folder {folder} to write {output.name} into: make it, or choose another.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(
            f"The output {output} cannot be created: {folder} is not writable. Choose another folder."
        )


def check_can_create(output: Path) -> None:
    """Check that an output that does not exist can be created, and that one that is a folder can be written into.

    Raises:
        NotADirectoryError: A parent is a file.
        PermissionError: The folder, or the parent of a new one, is not writable.
    """
    if output.exists():
        if output.is_dir() and not os.access(output, os.W_OK | os.X_OK):
            raise PermissionError(f"The folder {output} is not writable. Make it writable, or choose another folder.")
        return
    parent = next(path for path in output.absolute().parents if path.exists())
    if not parent.is_dir():
        raise NotADirectoryError(f"The output {output} cannot be created: {parent} is a file. Choose another folder.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(
            f"The output {output} cannot be created: {parent} is not writable. Choose another folder."
        )


def check_disk_space(folder: Path, needed: int) -> None:
    """Check that the disk of `folder`, which need not exist yet, has `needed` bytes free.

    Raises:
        DiskError: It has less.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise DiskError(
            f"The student takes {needed / 2**20:.1f} MiB, but {folder.parent} has only {free / 2**20:.1f} MiB free. "
            "Free some space or choose another disk."
        )


def is_write_error(error: BaseException) -> bool:
    """Return whether an error means that a file could not be written.

    torch, safetensors and tokenizers have no class for it; tokenizers raises a bare `Exception`.

    Example:
        >>> is_write_error(Exception("No space left on device (os error 28)")), is_write_error(ValueError("os error 28"))
        (True, False)
    """
    if isinstance(error, OSError):
        return isinstance(error, DiskError) or error.errno in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EFBIG,
            errno.EIO,
            errno.EROFS,
        )
    message = str(error)
    if isinstance(error, SafetensorError) or type(error) is Exception:
        return "I/O error" in message or "os error" in message.lower()
    return any(words in message for words in ("PytorchStreamWriter", "inline_container", "file write failed"))


def write_limit_advice(error: BaseException) -> str | None:
    """Return which limit to raise where a write failed by one that more free space does not lift; None for other errors.

    Example:
        >>> write_limit_advice(OSError(errno.EFBIG, "File too large"))
        "Raise the process's limit on the size of a file (`ulimit -f`)"
        >>> write_limit_advice(Exception("No space left on device (os error 28)"))
    """
    number = _error_number(error)
    if number == errno.EFBIG:
        return "Raise the process's limit on the size of a file (`ulimit -f`)"
    return "Raise the disk quota, or remove files that count toward it" if number == errno.EDQUOT else None


def write_advice(error: BaseException, folder: Path) -> str:
    """Return what to do so that a file can be written into a folder, where that failed.

    Example:
        >>> write_advice(OSError(errno.EROFS, "Read-only file system"), Path("cache"))
        'Make the folder writable'
    """
    number = _error_number(error)
    if number == errno.ENOENT and not folder.exists():
        return "Put back the folder, which was removed meanwhile"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "Make the folder writable"
    if number == errno.ENOSPC:
        return "Free some space"
    return write_limit_advice(error) or "Remove the cause"


def _error_number(error: BaseException) -> int | None:
    stated = _OS_ERROR.search(str(error))  # safetensors and tokenizers raise no OSError
    return error.errno if isinstance(error, OSError) else int(stated[1]) if stated else None


def is_partial(path: Path) -> bool:
    """Return whether a name was created by `atomic_write` or `staging_folder`."""
    return _PARTIAL.match(path.name) is not None


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; it is renamed to `path` if the block succeeds, and removed if it fails.

    The path is unique, and locked while the block runs, so that `remove_stale_partials` of another process skips it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_write(Path(folder) / "a.txt") as partial:
        ...         _ = partial.write_text("content")
        ...     (Path(folder) / "a.txt").read_text()
        'content'
    """
    partial, descriptor = _new_partial_file(path)
    try:
        yield partial
        sync_and_rename(partial, path)
    finally:
        partial.unlink(missing_ok=True)
        os.close(descriptor)


@contextlib.contextmanager
def staging_folder(parent: Path, name: str, *, prefix: str = ".") -> Iterator[Path]:
    """Yield a new, locked folder in `parent`, named after `name`; remove it after the block if it still exists."""
    folder, descriptor = _partial_name(parent, name, prefix), None
    try:
        descriptor = _create_and_lock(folder)  # inside the try: an interruption would leave the folder
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def remove_stale_partials(folder: Path) -> None:
    """Remove the partial files and folders in `folder` that killed processes left behind.

    A partial is stale if this machine created it, by the host or boot id in its name, and no process has locked it. On file
    systems without locks nothing is removed.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _PARTIAL.match(path.name)
        if match is None or not {match["host"], match["boot"]} & set(_machine_id()):
            continue
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                if _try_lock(descriptor):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            finally:
                os.close(descriptor)


def sync_and_rename(partial: Path, path: Path) -> None:
    """Flush a complete file to disk, then rename it."""
    sync_to_disk(partial)
    partial.replace(path)


def atomic_write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sync_to_disk(path: Path) -> None:
    """Flush a file, or all files below a folder, to disk."""
    for each in path.rglob("*") if path.is_dir() else [path]:
        if each.is_file():
            with each.open("rb") as file:
                os.fsync(file.fileno())


@contextlib.contextmanager
def atomic_folder(
    output: Path, *, replaces: bool = False, check: Callable[[Path], None] | None = None
) -> Iterator[Path]:
    """Yield a folder to write into; it is renamed to `output` if the block succeeds, and removed if it fails.

    If `output` exists and cannot be replaced by a rename (a mount point, the current directory, a parent that is not
    writable), the folder is created inside it and its entries are moved up at the end, `config.json` last: without it
    nothing loads.

    Args:
        output: New or empty folder.
        replaces: Remove the content of `output` once the block has succeeded.
        check: Called with the folder at the end of the block; if it raises, the block fails.

    Raises:
        FileExistsError: `output` is a file or is not empty, before the block or after it.
        FileNotFoundError: Another process removed the folder.
    """
    output = output.resolve()
    if not replaces:
        check_output_folder(output)
    inside = output.is_dir() and not _can_be_renamed(output)
    staging_parent = output if inside else next(parent for parent in output.parents if parent.exists())
    remove_stale_partials(staging_parent)
    with staging_folder(staging_parent, output.name) as folder:
        created = folder.stat()
        yield folder
        if not folder.is_dir() or not os.path.samestat(folder.stat(), created):
            raise FileNotFoundError(
                f"{folder}, which the output was written to, was removed by another process. Run the command again."
            )
        if check is not None:
            check(folder)
        if replaces:
            _clear(output)
        else:
            check_output_folder(output)
        output.parent.mkdir(parents=True, exist_ok=True)
        if inside or not _try_rename(folder, output):
            move_entries(folder, output, last=("config.json",))


@contextlib.contextmanager
def staged_update(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to save a model into; if the block succeeds, its files replace those in `folder`.

    `folder` keeps its other files, weights of another variant included, except the previous weights of this variant. If the
    block fails, it is unchanged. It has no config while files are replaced: after a kill it does not load, instead of mixing
    two models.

    Raises:
        NotADirectoryError: `folder` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; it must be a folder.")
    missing = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_stale_partials(folder)
        with staging_folder(folder, "saved", prefix="_") as new:
            yield new
            for name in _CONFIGS:
                if (new / name).exists():
                    (folder / name).unlink(missing_ok=True)
            kinds = {_weights_kind(path) for path in new.iterdir()} - {None}
            for path in folder.iterdir():
                if _weights_kind(path) in kinds and not (new / path.name).exists():
                    path.unlink()
            move_entries(new, folder, last=_CONFIGS)
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def _weights_kind(path: Path) -> tuple[str, str | None] | None:
    """Return the name and variant of which a file has the weights, some of them, or the index; None for other files.

    Transformers saves the variant fp16 as model.fp16.safetensors, or as model.fp16-00001-of-00002.safetensors and so on with
    model.safetensors.index.fp16.json.
    """
    match = _WEIGHTS.match(path.name) or _INDEX.match(path.name)
    return (match[1], match["variant"]) if match and not path.is_dir() else None


def move_entries(folder: Path, output: Path, *, last: Collection[str] = ()) -> None:
    """Move all entries of a folder into another one, those named in `last` at the end.

    If a move fails, new entries are removed again; replaced ones stay replaced.
    """
    entries = sorted(folder.iterdir(), key=lambda path: (path.name in last, path.name))
    added: list[Path] = []
    try:
        for entry in entries:
            target = output / entry.name
            if not target.exists():
                added.append(target)
            if target.is_dir():
                shutil.rmtree(target)
            try:
                entry.replace(target)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                shutil.move(entry, target)
    except BaseException:
        for target in added:
            shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
        raise


def _try_rename(folder: Path, output: Path) -> bool:
    """Rename a folder to `output`, which is empty or does not exist; return False if it cannot be renamed."""
    try:
        folder.rename(output)
    except OSError as error:
        if error.errno in (errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM) and output.is_dir():
            return False
        raise
    return True


def _can_be_renamed(output: Path) -> bool:
    return not (
        os.path.ismount(output)
        or output in _mount_points()
        or output.samefile(Path.cwd())
        or not os.access(output.parent, os.W_OK | os.X_OK)
    )


def _mount_points() -> set[Path]:
    """Return all mount points: `os.path.ismount` does not detect bind mounts from the same file system."""
    table = Path("/proc/self/mountinfo")
    if not table.exists():
        return set()
    names = (line.split()[4] for line in table.read_text(encoding="utf-8", errors="replace").splitlines())
    return {Path(re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), name)) for name in names}


def _clear(output: Path) -> None:
    for path in output.iterdir() if output.is_dir() else ():
        if not is_partial(path):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _new_partial_file(path: Path) -> tuple[Path, int]:
    while True:
        partial = _partial_name(path.parent, path.name)
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        _try_lock(descriptor, wait=True)
        if partial.exists():
            return partial, descriptor
        os.close(descriptor)  # removed as stale before it was locked


def _partial_name(parent: Path, name: str, prefix: str = ".") -> Path:
    return parent / f"{prefix}{name[:100]}.{'-'.join(_machine_id())}-{secrets.token_hex(4)}.partial"


@functools.cache
def _machine_id() -> tuple[str, str]:
    """Return short hashes of the host name and of the boot id: containers on one machine share only the boot id."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    names = (platform.node(), boot.read_text() if boot.exists() else platform.node())
    return tuple(blake2b(name.encode(), digest_size=4).hexdigest() for name in names)  # type: ignore[return-value]


def _create_and_lock(folder: Path) -> int | None:
    """Create a folder and return a descriptor that locks it; None if folders cannot be opened."""
    while True:
        folder.mkdir()
        if fcntl is None:
            return None
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(folder, os.O_RDONLY)
            _try_lock(descriptor, wait=True)
            if folder.exists():
                return descriptor
            os.close(descriptor)  # removed as stale before it was locked


def _try_lock(descriptor: int, *, wait: bool = False) -> bool:
    """Lock an open file or folder; return False if another process has locked it, or the file system has no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True
