"""Keep workers to a thread each, and decide which of a test's parameters are part of the default run.

Two workers share two processor cores, and so do the processes that they start.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, which reads it once
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the Hub, and without a network each would wait for it


def default_parameters(names: Iterable[str], count: int) -> set[str]:
    """Return so many of the names of a test's parameters, as good as drawn at random, but the same ones in every run."""
    return set(sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())[:count])


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as `extended` all parameters of a test with `sampled(n)` but n of them."""
    tests: defaultdict[str, dict[str, pytest.Item]] = defaultdict(dict)
    for item in items:
        if item.get_closest_marker("sampled") and not item.get_closest_marker("slow"):
            test, _, parameters = item.nodeid.partition("[")
            tests[test][parameters] = item
    for parameters in tests.values():
        marker = next(iter(parameters.values())).get_closest_marker("sampled")
        assert marker is not None
        for name in parameters.keys() - default_parameters(parameters, *marker.args):
            parameters[name].add_marker("extended")
