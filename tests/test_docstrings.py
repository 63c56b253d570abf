"""Every example in a docstring runs and prints what it says."""

import doctest
import importlib
import pkgutil

import pytest

import hf_guide
from hf_guide.layouts import registry

MODULES = [
    module.name
    for module in pkgutil.walk_packages(hf_guide.__path__, "hf_guide.")
    if not module.name.startswith("hf_guide.metrics.") and not module.name.endswith(".__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.registered_layouts()
    monkeypatch.setattr(registry, "_LAYOUTS", dict(registry._LAYOUTS))  # an example registers a family
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert not failed
