"""The modules of examples/benchmarks, which are scripts and not a package. `lelp_splitters` registers its splitters."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


def import_benchmark(name: str) -> ModuleType:
    """Import a module of examples/benchmarks, and those that it imports."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))
