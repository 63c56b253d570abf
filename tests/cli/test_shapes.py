"""`hf-guide shapes` prints what `hf-guide init` takes, and `init` and `distill` take the same budget."""

import argparse
import dataclasses
import json
import re
import shlex

import pytest
import torch

from hf_guide import find_shapes, from_teacher
from hf_guide.cli import main as cli
from hf_guide.cli.init import SIZES, read_texts
from hf_guide.cli.shapes import init_command
from hf_guide.initialization.report import InitializationReport
from tests.small_tokenizers import KINDS as TOKENIZER_KINDS
from tests.tiny import KINDS


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    KINDS["llama"].teacher().save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"its": "own"}')
    return folder


def printed_command(printed):
    """Return the arguments of the command that `hf-guide shapes` printed, without its output."""
    return shlex.split(re.search(r"Take the first: hf-guide (.*) -o student/", printed).group(1))


def test_the_command_that_shapes_prints_makes_the_first_shape(teacher, tmp_path, capsys):
    plot = tmp_path / "shapes.png"
    assert cli.main(["shapes", str(teacher), "--num-parameters", "40%", "--limit", "2", "-o", str(plot)]) == 0
    printed = capsys.readouterr().out
    best = find_shapes(teacher, num_parameters="40%", limit=2, show_progress=False)[0]
    assert re.search(r"num_hidden_layers +hidden_size.* parameters +memory +FLOPs a token +rule score", printed)
    assert plot.stat().st_size > 1000
    command = printed_command(printed)
    output = tmp_path / "student"
    assert cli.main([*command, "--no-progress", "-o", str(output)]) == 0
    assert InitializationReport.load(output).student_parameters == best.parameters


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["shapes", "{teacher}", "--num-parameters", "40%", "-o", "{home}/shapes.txt"],
            "shapes.txt must end in one of",
        ),
        (["shapes", "{teacher}", "--num-parameters", "40%", "-o", "{home}"], "must be a file; it is a folder"),
        (["shapes", "{teacher}", "--num-parameters", "40%", "-o", "{home}/none/a.png"], "There is no folder"),
        (["inspect", "{teacher}", "--plot", "{home}/curve.txt"], "curve.txt must end in one of"),
        (["inspect", "{teacher}", "--plot", "{home}/none/curve"], "There is no folder"),
        (["init", "{teacher}", "--license", "my own", "-o", "{home}/student"], "my own"),
    ],
)
def test_an_output_that_cannot_be_written_is_an_error_before_the_teacher_is_read(
    words, message, teacher, tmp_path, capsys, monkeypatch
):
    for module in ("shapes.search", "teachers.checkpoint", "modeling"):
        monkeypatch.setattr(f"hf_guide.{module}.open_teacher", lambda *args, **kwargs: pytest.fail("it was read"))
    (tmp_path / "output.png").mkdir()
    words = [word.format(teacher=teacher, home=tmp_path / "output.png") for word in words]
    assert cli.main(words) == 2
    assert message in capsys.readouterr().err and list(tmp_path.rglob("*")) == [tmp_path / "output.png"]


def test_another_tokenizers_vocabulary_counts_and_is_in_the_command(tmp_path, capsys):
    kind = TOKENIZER_KINDS["Llama BPE"]
    wide = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    dataclasses.replace(kind, config={**kind.config, **wide}).teacher(tmp_path / "teacher")
    TOKENIZER_KINDS["GPT-2"].make().save_pretrained(tmp_path / "other")
    words = [str(tmp_path / "teacher"), "--tokenizer", str(tmp_path / "other"), "--num-parameters", "50%"]
    assert cli.main(["shapes", *words, "--limit", "1"]) == 0
    command = printed_command(capsys.readouterr().out)
    assert cli.main([*command, "--no-progress", "-o", str(tmp_path / "student")]) == 0
    best = find_shapes(words[0], tokenizer=words[2], num_parameters="50%", limit=1, show_progress=False)[0]
    report = InitializationReport.load(tmp_path / "student")
    assert report.student_parameters == best.parameters and report.vocabulary


def test_the_command_of_calibrated_shapes_makes_the_student_that_was_ranked(tmp_path, capsys):
    folder = tmp_path / "the teacher"  # a path that a shell must quote
    TOKENIZER_KINDS["Llama BPE"].teacher(folder)
    texts = tmp_path / "some texts.txt"
    texts.write_text(
        "\n\n".join(f"text {number} of the model, and {number + 1} of the others" for number in range(80))
    )
    budget = {"num_parameters": "70%", "rms_norm_eps": 1e-4, "dtype": "float64"}
    options = {"method": "calibrated", "calibration_tokens": 512, "calibration_seq_length": 32, "seed": 3}
    words = ["shapes", str(folder), "--num-parameters", "70%", "--config", "rms_norm_eps=1e-4", "--dtype", "float64"]
    words += [word for name, value in list(options.items())[1:] for word in ("--option", f"{name}={value}")]
    words += ["--calibration-dataset", str(texts), "--calibration-cache-dir", str(tmp_path / "cache")]
    assert cli.main([*words, "--no-progress"]) == 0
    command = printed_command(capsys.readouterr().out)
    assert cli.main([*command, "-o", str(tmp_path / "student")]) == 0
    best = from_teacher(folder, method=options, calibration_dataset=read_texts([texts]), show_progress=False, **budget)
    student = type(best).from_pretrained(tmp_path / "student", dtype="auto")
    for name, weight in best.state_dict().items():
        assert torch.equal(weight, student.state_dict()[name]), name


def test_the_command_has_every_flag_that_init_has_too():
    commands = {name: cli.build_parser().parse_args([name, "teacher"]) for name in ("shapes", "init")}
    budget = {"num_parameters", "active_parameters", "memory", "cache_length", "search_steps"}
    common = {*vars(commands["shapes"])} & {*vars(commands["init"])} - budget
    common -= {"teacher", "output", "token", "command", "run", "parser", "renamed_flags", "config", *SIZES}
    args: argparse.Namespace = commands["shapes"]
    for name in common:
        value = ["a b"] if isinstance(getattr(args, name), list) or name == "calibration_dataset" else "a b"
        setattr(args, name, True if getattr(args, name) is False else value)
    args.dtype, args.token = "bfloat16", "secret"
    command = init_command(args, {"hidden_size": 8, "act": "gelu", "kinds": ["a", "b"]})
    parsed = cli.build_parser().parse_args(shlex.split(command)[1:])
    assert {name for name in common if not getattr(parsed, name)} == set() and "secret" not in command
    assert parsed.hidden_size == 8 and parsed.config == ['act="gelu"', f"kinds={json.dumps(['a', 'b'])}"]


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
