"""Commands are listed, and the names of the previous release work with a warning."""

import sys
from pathlib import Path

import pytest

from hf_guide.cli import main as cli
from hf_guide.initialization import config, registry
from hf_guide.methods import list_methods


def test_methods_are_listed_with_every_option_its_default_and_help(capsys):
    assert cli.main(["methods"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for name, options in list_methods().items():
        for option in options:
            assert name in printed and f"{option.name}={option.default}" in printed
            assert " ".join(option.help.split()) in printed


def test_one_method_is_described_and_a_misspelt_one_names_the_nearest(capsys):
    assert cli.main(["methods", "uniform"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("uniform\n") and "calibrated\n" not in printed
    assert cli.main(["methods", "unifrom"]) == 2
    assert "Did you mean 'uniform'" in capsys.readouterr().err


def test_the_old_name_of_a_command_warns_with_the_new_one(capsys):
    with pytest.warns(FutureWarning, match="'subclasses' is deprecated; use 'analyze-subclasses'"):
        assert cli.main(["subclasses", "projector", "missing.jsonl"]) == 2
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
    assert "analyze-subclasses" in listed and "subclasses" not in listed


def test_the_home_folder_is_expanded_in_every_path(tmp_path, monkeypatch, capsys):
    """A shell leaves `~` as it is in `--output=~/student`, and Python's callers of `main` have none."""
    home = tmp_path / "home"
    (home / "teacher").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    seen = {}
    monkeypatch.setattr("hf_guide.cli.init.run", lambda args: seen.update(vars(args)) or 0)
    data = ["--calibration-dataset", "~/a.txt", "b.txt", "--calibration-cache-dir=~/cal", "--config", "a=~/x"]
    assert cli.main(["init", "~/teacher", "-o", "~/student", *data]) == 0
    assert seen["teacher"] == str(home / "teacher") and seen["output"] == home / "student"
    assert seen["calibration_dataset"] == [home / "a.txt", Path("b.txt")]
    assert seen["calibration_cache_dir"] == home / "cal" and seen["config"] == ["a=~/x"]


@pytest.mark.parametrize(
    ("words", "new"),
    [
        (["--finer-column", "fine"], "--fine-label-column"),
        (["--nearest", "3"], "--num-examples"),
        (["--no-forecast"], "--no-probe"),
        (["--max-examples", "3"], "--max-samples"),
        (["--processor", "org/model"], "--processing-class-name-or-path"),
    ],
)
def test_an_old_flag_warns_with_the_new_one(words, new, capsys):
    with pytest.warns(FutureWarning, match=f"use '{new}'"):
        assert cli.main(["analyze-subclasses", "projector", "missing.jsonl", *words]) == 2
    assert "There is no file missing.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "new"),
    [
        (["--dataset", "org/data"], "--dataset-name"),
        (["--validation-share", "0.2"], "--validation-split-percentage"),
        (["--no-pack"], "--packing"),
        (["--num-workers", "2"], "--dataloader-num-workers"),
        (["--examples-per-shard", "4"], "--shard-size"),
    ],
)
def test_an_old_flag_of_capture_warns_with_the_new_one(words, new, tmp_path):
    with pytest.warns(FutureWarning, match=f"use '{new}'"):
        assert cli.main(["capture", "-o", str(tmp_path / "cache"), *words]) == 2


@pytest.mark.parametrize("words", [[], ["--task", "lelp", "--steps", "3"]])
def test_the_quickstart_command_points_to_the_example(words, capsys):
    assert cli.main(["quickstart", *words]) == 0
    assert "examples/quickstart/run.py" in capsys.readouterr().out


def test_an_unknown_flag_is_wrong_usage(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["card", "student", "--licence", "mit"])
    assert stopped.value.code == 2 and "unrecognized arguments: --licence" in capsys.readouterr().err


MODULE = """
from dataclasses import dataclass
from hf_guide import InitializationConfig, register_method
from hf_guide.methods import UniformMethod

@dataclass
class ImportedConfig(InitializationConfig):
    method: str = "imported"

register_method("imported", ImportedConfig, UniformMethod)
"""


def test_a_module_is_imported_before_the_command_runs(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_method.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.setattr(registry, "_METHOD_CLASSES", dict(registry._METHOD_CLASSES))
    monkeypatch.setattr(config, "CONFIG_CLASSES", dict(config.CONFIG_CLASSES))
    monkeypatch.setattr(registry, "CONFIG_CLASSES", config.CONFIG_CLASSES)
    assert cli.main(["methods", "imported"]) == 2
    assert cli.main(["--import", "my_method", "methods", "imported"]) == 0
    assert capsys.readouterr().out.startswith("imported\n")


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("my_method.py", 2, "--import must be the name of a module"),
        ("./my_method", 2, "--import must be the name of a module"),
        ("no_such_module", 1, "No module named 'no_such_module'"),
    ],
)
def test_a_module_that_cannot_be_imported_is_an_error(name, code, message, capsys):
    assert cli.main(["--import", name, "methods"]) == code
    assert message in capsys.readouterr().err
