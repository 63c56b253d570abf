"""What is documented can be imported from hf_guide: every error, and every function and class that the README names."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

import hf_guide
from hf_guide import errors

ROOT = Path(hf_guide.__file__).parent
README = (ROOT.parent / "README.md").read_text(encoding="utf-8")


def public_definitions() -> dict[str, str]:
    """Return the public functions and classes of the package, each with its module."""
    found: dict[str, str] = {}
    for path in ROOT.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                found.setdefault(node.name, str(path.relative_to(ROOT)))
    return found


def test_every_error_is_exported() -> None:
    raised = {name for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, Exception)}
    assert raised == {name for name in hf_guide.__all__ if name.endswith("Error")}
    assert {"TaskError", "CaptureError"} <= raised


def test_every_exported_name_is_defined_in_its_stated_module() -> None:
    for name in hf_guide.__all__:
        home = hf_guide._HOMES.get(name)
        if home is not None:
            assert getattr(importlib.import_module(f"hf_guide.{home}"), name) is getattr(hf_guide, name)
    assert {*hf_guide._HOMES} | {"__version__"} == {*hf_guide.__all__} == {*dir(hf_guide)}


def test_every_function_and_class_that_the_readme_names_is_exported() -> None:
    spans = re.findall(r"`([^`\n]+)`", README)
    # A class, or a function that is called; a word alone may be an option's value or a command.
    named = {
        name for span in spans for name in re.findall(r"(?<![\w./-])([A-Z][a-z]\w+|[a-z]\w+(?=\())(?![./-])", span)
    }
    named |= {name for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) for name in _imported(block)}
    definitions = public_definitions()
    missing = {name: definitions[name] for name in named & definitions.keys() if name not in hf_guide.__all__}
    assert missing == {}


def _imported(block: str) -> set[str]:
    nodes = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
    return {alias.name for node in nodes if node.module == "hf_guide" for alias in node.names}


@pytest.mark.parametrize("name", sorted(n for n in hf_guide.__all__ if n.endswith("Error")))
def test_an_error_can_be_caught_by_its_exported_name(name: str) -> None:
    error = getattr(hf_guide, name)
    with pytest.raises(ValueError, match="what happened"):
        raise error("what happened")
    assert issubclass(error, hf_guide.HfGuideError)
