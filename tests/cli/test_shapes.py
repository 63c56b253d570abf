"""`hf-guide shapes` prints what `hf-guide init` takes, and `init` and `distill` take the same budget."""

import dataclasses
import re

import pytest

from hf_guide import find_shapes
from hf_guide.cli import main as cli
from hf_guide.initialization.report import InitializationReport
from tests.small_tokenizers import KINDS as TOKENIZER_KINDS
from tests.tiny import KINDS


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    KINDS["llama"].teacher().save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"its": "own"}')
    return folder


def test_the_command_that_shapes_prints_makes_the_first_shape(teacher, tmp_path, capsys):
    plot = tmp_path / "shapes.png"
    assert cli.main(["shapes", str(teacher), "--num-parameters", "40%", "--limit", "2", "-o", str(plot)]) == 0
    printed = capsys.readouterr().out
    best = find_shapes(teacher, num_parameters="40%", limit=2, show_progress=False)[0]
    assert re.search(r"num_hidden_layers +hidden_size.* parameters +memory +FLOPs a token +rule score", printed)
    assert plot.stat().st_size > 1000
    command = re.search(r"Take the first: hf-guide (.*) -o student/", printed).group(1).split()
    output = tmp_path / "student"
    assert cli.main([*command, "--no-progress", "-o", str(output)]) == 0
    assert InitializationReport.load(output).student_parameters == best.parameters


def test_another_tokenizers_vocabulary_counts_and_is_in_the_command(tmp_path, capsys):
    kind = TOKENIZER_KINDS["Llama BPE"]
    wide = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    dataclasses.replace(kind, config={**kind.config, **wide}).teacher(tmp_path / "teacher")
    TOKENIZER_KINDS["GPT-2"].make().save_pretrained(tmp_path / "other")
    words = [str(tmp_path / "teacher"), "--tokenizer", str(tmp_path / "other"), "--num-parameters", "50%"]
    assert cli.main(["shapes", *words, "--limit", "1"]) == 0
    command = re.search(r"Take the first: hf-guide (.*) -o student/", capsys.readouterr().out).group(1).split()
    assert cli.main([*command, "--no-progress", "-o", str(tmp_path / "student")]) == 0
    best = find_shapes(words[0], tokenizer=words[2], num_parameters="50%", limit=1, show_progress=False)[0]
    report = InitializationReport.load(tmp_path / "student")
    assert report.student_parameters == best.parameters and report.vocabulary


def test_init_takes_a_budget_and_reports_the_shape(teacher, tmp_path, capsys):
    output = tmp_path / "student"
    words = [
        "init",
        str(teacher),
        "--num-parameters",
        "40%",
        "--num-hidden-layers",
        "2",
        "--no-progress",
        "-o",
        str(output),
    ]
    assert cli.main(words) == 0
    choice = InitializationReport.load(output).shape_choice
    assert "num_hidden_layers=2" in choice and "was chosen for num_parameters='40%'" in choice
    assert choice in capsys.readouterr().out
    assert "- Shape: num" in (output / "README.md").read_text()


def test_the_help_describes_every_budget(capsys):
    with pytest.raises(SystemExit):
        cli.main(["shapes", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for flag in (
        "--num-parameters N",
        "--active-parameters N",
        "--memory SIZE",
        "--cache-length N",
        "--search-steps N",
    ):
        usage, _, described = printed.partition("positional arguments")
        assert flag in usage and flag in described


def test_shapes_without_a_budget_and_options_without_data_are_errors(teacher, capsys):
    assert cli.main(["shapes", str(teacher)]) == 2
    assert "Set what the student may cost" in capsys.readouterr().err
    assert cli.main(["shapes", str(teacher), "--num-parameters", "40%", "--search-steps", "5"]) == 2
    assert "search_steps distils calibrated starts" in capsys.readouterr().err
    assert cli.main(["shapes", str(teacher), "--memory", "1MB", "--option", "refit=none"]) == 2
    assert "needs --calibration-dataset" in capsys.readouterr().err
