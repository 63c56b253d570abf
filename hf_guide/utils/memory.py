"""How much memory this process has taken and may still take, by the system and by its control group."""

import ctypes
import functools
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_GROUPS = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Return the bytes that this process can take without swapping: of the system, or fewer by a limit of its control group.

    Example:
        >>> available_memory() > 2**20
        True
    """
    import psutil  # of accelerate

    return int(min([psutil.virtual_memory().available, *_group_limits(Path("/proc/self/cgroup"), _GROUPS)]))


def peak_memory() -> int:
    """Return the most bytes that this process ever had resident."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def return_freed_memory() -> None:
    """Return what was freed to the system, with glibc; tensors of up to 32 MiB stay in its heap otherwise."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Any:
    """Return the function of glibc; None with another allocator or system."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None


def _group_limits(membership: Path, root: Path) -> Iterator[int]:
    """Yield the bytes left to this process's control group and to each one above it, of version 2 and of version 1.

    Args:
        membership: The file that names the process's groups.
        root: Where the groups are mounted.
    """
    lines = membership.read_text().splitlines() if membership.exists() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        is_memory = "memory" in controllers.split(",")
        if controllers and not is_memory:
            continue
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if is_memory else ("memory.max", "memory.current")
        mount = root / "memory" if is_memory else root
        folder = mount / path.strip("/")
        for group in (folder, *folder.parents):
            if group != mount and mount not in group.parents:
                break
            limit, used = (_number(group / name) for name in names)
            if limit is not None and used is not None:
                yield max(0, limit - used + _page_cache(group / "memory.stat"))


def _number(file: Path) -> int | None:
    """Return the number in a file of a control group; None for "max", and where there is no such file."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _page_cache(file: Path) -> int:
    """Return the bytes of cached files that are counted as used, and given up when memory is needed."""
    try:
        lines = dict(line.split()[:2] for line in file.read_text().splitlines())
    except OSError:
        return 0
    return sum(int(lines.get(name, 0)) for name in ("active_file", "inactive_file"))
