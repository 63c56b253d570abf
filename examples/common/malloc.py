"""Keep freed memory in the process instead of returning it to the kernel.

Logits over a large vocabulary are hundreds of megabytes and live for milliseconds. By default glibc takes them from
the kernel and returns them every time, and the kernel clears every page of them: on a CPU that was half of a training
step.
"""

import ctypes
import sys

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_INT_MAX = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let this process reuse large freed blocks instead of returning them to the kernel.

    Peak memory is unchanged; memory once used is held until the process ends.

    Returns:
        Whether the allocator accepted the settings: `True` with glibc, `False` (and nothing changed) anywhere else.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _INT_MAX) and mallopt(_M_TRIM_THRESHOLD, _INT_MAX))
