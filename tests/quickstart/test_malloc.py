"""Freed memory is kept, so that it need not be cleared again."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource, torch
from examples.common.malloc import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.zeros(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
understood = keep_freed_memory()
faults()  # the allocator takes what it will keep
print(int(understood), before, faults())
"""


@pytest.mark.extended
def test_large_blocks_are_taken_from_the_system_once():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    understood, before, after = map(int, done.stdout.split())
    if not understood:
        pytest.skip("the C library of this system is not glibc")
    assert after < before / 5
