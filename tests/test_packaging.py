"""What is installed is what is in the repository."""

import configparser
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata, resources
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def test_every_package_is_listed(setup):
    found = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "hf_guide").glob("**/__init__.py")}
    assert set(setup["options"]["packages"].split()) == found | {"hf_guide.model_cards"}


def test_the_tree_in_the_readme_of_the_tests_is_the_tree_on_disk():
    (tree,) = re.findall(r"```text\n(.*?)```", (ROOT / "tests/README.md").read_text(encoding="utf-8"), re.DOTALL)
    documented: dict[str, list[str]] = {}
    for line in tree.splitlines():
        if not line.startswith(" "):
            folder = line.split("#")[0].strip().rstrip("/")
            documented[folder] = []
        else:
            documented[folder] += line.split()
    actual: dict[str, list[str]] = {}
    for package in sorted(file.parent for file in (ROOT / "hf_guide").rglob("__init__.py")):
        modules = [file.stem for file in package.glob("*.py") if file.stem != "__init__"]
        if package.name == "metrics":
            modules = [file.parent.name for file in package.glob("*/*.py")]
        actual[package.relative_to(ROOT).as_posix()] = sorted(modules)
    assert {folder: sorted(modules) for folder, modules in documented.items()} == actual


def test_the_card_templates_are_installed():
    folder = resources.files("hf_guide.model_cards")
    names = {file.name for file in (ROOT / "model_cards").glob("*.md")}
    assert names
    assert names <= {file.name for file in folder.iterdir()}


def test_a_wheel_holds_every_file(tmp_path):
    pytest.importorskip("setuptools")
    for name in ("hf_guide", "model_cards"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    build = "from setuptools.build_meta import build_wheel; build_wheel('wheel')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    files = {*(tmp_path / "hf_guide").rglob("*"), *(tmp_path / "model_cards").rglob("*")}
    expected = {file.relative_to(tmp_path).as_posix().removeprefix("model_cards/") for file in files if file.is_file()}
    held = {name.removeprefix("hf_guide/model_cards/") for name in zipfile.ZipFile(wheel).namelist()}
    assert {"student.md", "hf_guide/py.typed", "hf_guide/metrics/gap_closed/gap_closed.py"} <= expected
    assert expected <= held


def test_the_command_is_installed():
    (command,) = metadata.entry_points(group="console_scripts", name="hf-guide")
    assert callable(command.load())


def test_every_requirement_has_the_version_it_is_tested_with(setup):
    pinned = [line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    assert pinned[0] == "torch"
    known = {name.lower().replace("_", "-") for name in pinned}
    extras = setup["options.extras_require"]
    wanted = " ".join([setup["options"]["install_requires"], *extras.values()]).split()
    assert {name.split(">")[0].lower().replace("_", "-") for name in wanted} <= known
