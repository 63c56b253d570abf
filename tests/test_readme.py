"""What the README shows works as it stands there."""

import ast
import re
import shlex
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

import hf_guide
from hf_guide.cli import build_parser
from hf_guide.initialization import layouts
from hf_guide.initialization.certify import certify
from hf_guide.initialization.twins import build_twin, move_from_defaults, tiny_twin

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_layout_it_registers_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "_LAYOUTS", dict(layouts.registered_layouts()))
    (block,) = (code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "persimmon" in code)
    exec(block, {})
    config = CONFIG_MAPPING["persimmon"]()
    twin = build_twin(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], tiny_twin(config))
    move_from_defaults(twin, seed=0)
    assert certify(layouts.registered_layouts()["persimmon"], twin).passed


def test_its_commands_parse() -> None:
    commands = [
        line.split("#")[0] for line in re.sub(r"\\\n", " ", README).splitlines() if line.startswith("hf-guide ")
    ]
    assert len(commands) >= 4
    for command in commands:
        build_parser().parse_args(shlex.split(command)[1:])


def test_its_imports_exist() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    imports = [node for block in blocks for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
    names = {alias.name for node in imports if node.module == "hf_guide" for alias in node.names}
    assert names and [name for name in sorted(names) if not hasattr(hf_guide, name)] == []
