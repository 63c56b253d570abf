"""The direction of imports, held from the import graph: function-level and type-checking imports included.

A package may import itself and the rows of `LAYERS` before its own; no modules import each other in a cycle.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_guide

ROOT = Path(hf_guide.__file__).parent
LAYERS = (
    ("errors", "version"),
    ("validation", "utils", "metrics"),
    ("chat",),
    ("tasks", "models"),
    ("teachers",),
    ("layouts",),
    ("initialization",),
    ("calibration",),
    ("methods",),
    ("shapes",),
    ("visualization",),
    ("hub",),
    ("modeling", "modeling_auto"),
    ("data",),
    ("signal_cache",),
    ("distillation",),
    ("lelp",),
    ("scripts",),
    ("cli",),
)
"""From the bottom to the top. Packages in one row may import each other, module by module."""

RANKS = {name: rank for rank, row in enumerate(LAYERS) for name in row}


def module_names() -> dict[str, Path]:
    """Return every module of the package, by its dotted name without `hf_guide`."""
    names = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] == "metrics" and len(parts) == 3:
            continue  # modules of `evaluate`, loaded by path
        names[".".join(parts).removesuffix("__init__").removesuffix(".")] = path
    return names


MODULES = module_names()


def imports_of(module: str) -> Iterator[str]:
    """Yield the modules of the package that `module` imports, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name == "hf_guide" or name.startswith("hf_guide."):
                parts = name.split(".")[1:]
                while parts and ".".join(parts) not in MODULES:
                    parts.pop()
                yield ".".join(parts)


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_a_module_imports_only_from_the_layers_below_it(module):
    package = module.split(".")[0]
    assert package in RANKS, f"{package} has no layer: add it to LAYERS"
    for name in imports_of(module):
        assert name, f"{module} imports hf_guide itself: import the module that defines the name"
        target = name.split(".")[0]
        assert RANKS[target] < RANKS[package] or target == package or target in LAYERS[RANKS[package]], (
            f"{module} imports {name}, which is in a layer above it: move what both need down"
        )


def test_no_modules_import_each_other_in_a_cycle():
    graph = {name: {target for target in imports_of(name) if target and target != name} for name in MODULES if name}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"import cycle: {' -> '.join([*path[path.index(name) :], name])}"
        if name in done:
            return
        for target in sorted(graph[name]):
            visit(target, (*path, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def test_models_without_initialized_weights_are_built_with_the_random_state_restored():
    """By `without_initialization`, or with a seed in `build_student`: some constructors draw numbers all the same."""
    using = {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.rglob("*.py")
        if re.search(r"\bno_init_weights\b", path.read_text(encoding="utf-8"))
    }
    assert using == {"models/modes.py", "initialization/build.py"}
