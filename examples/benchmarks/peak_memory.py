"""The most memory this process ever had resident."""

import resource
import sys
from pathlib import Path


def peak_memory() -> int:
    """Return it in bytes. On Linux it is read from /proc, because `ru_maxrss` starts at the parent process's value there."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
