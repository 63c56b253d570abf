"""What the README shows works as it stands there."""

import ast
import re
import shlex
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

import hf_guide
from hf_guide.cli.main import build_parser
from hf_guide.initialization.equivalence import check_equivalence
from hf_guide.layouts import registry as layouts
from hf_guide.models.tiny_models import build_tiny_model, randomize_parameters, tiny_config

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_layout_it_registers_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "_LAYOUTS", dict(layouts.registered_layouts()))
    (block,) = (code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "persimmon" in code)
    exec(block, {})
    config = CONFIG_MAPPING["persimmon"]()
    twin = build_tiny_model(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], tiny_config(config))
    randomize_parameters(twin, seed=0)
    assert check_equivalence(layouts.registered_layouts()["persimmon"], twin).passed


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
