"""The command line does what its help describes, reports what failed, and leaves nothing half-written."""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_guide import find_shapes
from hf_guide.cli import main as cli
from hf_guide.cli.arguments import parse_key_value
from hf_guide.hub import model_card as hub
from hf_guide.initialization.report import REPORT_NAME, InitializationReport
from hf_guide.modeling import plan_student
from hf_guide.utils import files as folders
from tests.chat.small import CONVERSATIONS, PLAIN, TOOLS, VOCABULARY, tokenizer
from tests.examples.local import make_model

SMALLER = ["--hidden-size", "32", "--num-hidden-layers", "2", "--intermediate-size", "48", "--no-progress"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=200,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"its": "own"}')
    (folder / "notes.txt").write_text("not a tokenizer's")
    return folder


def hf_guide(*words: object, **options) -> subprocess.CompletedProcess[str]:
    """Run the real program in a process of its own."""
    command = [sys.executable, "-m", "hf_guide.cli", *map(str, words)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=300, **options)


def test_a_dry_run_prints_what_the_run_makes_and_reads_no_weights(teacher, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hf_guide.teachers.tensor_source.SafetensorsTensors.get", None)
    output = ["-o", str(tmp_path / "new" / "student")]
    for words in ([], ["--method", "random"], ["--task", "base"]):
        assert cli.main(["init", str(teacher), *SMALLER, "--dry-run", *output, *words]) == 0
        printed = capsys.readouterr().out
        assert ("LlamaModel" if "base" in words else "LlamaForCausalLM") in printed.splitlines()[0]
        assert "Estimated: about" in printed and "layers.*.mlp.down_proj.weight 32x48" in printed
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    assert cli.main(["init", str(teacher), *SMALLER, "--dry-run", *output]) != 0
    assert "Free some space or choose another disk" in capsys.readouterr().err


def test_a_dry_run_of_a_budget_has_the_shape_that_is_made_of_it_and_needs_no_output(teacher, capsys):
    budget = ["--num-parameters", "40%", "--no-progress"]
    assert cli.main(["init", str(teacher), *budget, "--dry-run"]) == 0
    *_, shapes = capsys.readouterr().out.partition("how\n")
    best = find_shapes(teacher, num_parameters="40%", show_progress=False)[0]
    assert shapes and str(plan_student(teacher, **best.overrides)).endswith(shapes.rstrip("\n"))
    assert cli.main(["init", str(teacher), *budget, "--dry-run", "--method", "calibrated"]) == 2
    assert "depends on its data: run find_shapes (`hf-guide shapes`) with it" in capsys.readouterr().err
    assert cli.main(["init", str(teacher), *budget]) == 2
    assert "Set -o/--output, the folder for the student" in capsys.readouterr().err


def test_init_makes_a_stock_student_with_all_its_files(teacher, tmp_path):
    output = tmp_path / "runs" / "student"
    done = hf_guide("init", teacher, *SMALLER, "--config", "rms_norm_eps=1e-4", "--license", "mit", "-o", output)
    assert done.returncode == 0, done.stderr
    student = AutoModelForCausalLM.from_pretrained(output)
    assert type(student) is LlamaForCausalLM
    config = student.config
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size, config.head_dim) == (32, 2, 48, 16)
    assert config.rms_norm_eps == 1e-4
    report = InitializationReport.load(output / REPORT_NAME)
    assert report.summary() in done.stdout and report.options["method"] == "guide"
    assert (output / "tokenizer.json").read_text() == '{"its": "own"}'
    assert not (output / "notes.txt").exists()
    assert "license: mit" in (output / "README.md").read_text()
    assert (output / hub.PLOT_NAME).read_bytes().startswith(b"\x89PNG")
    assert os.listdir(tmp_path) == ["runs"] and os.listdir(tmp_path / "runs") == ["student"]


def test_options_of_the_method_and_the_task_reach_the_student(teacher, tmp_path):
    words = ["init", str(teacher), *SMALLER, "-o", str(tmp_path / "s"), "--task", "sequence-classification"]
    options = [
        "--option",
        "layer_selection=[3,1]",
        "--option",
        "logit_scale=0.5",
        "--dtype",
        "bfloat16",
        "--config",
        "num_labels=3",
    ]
    assert cli.main([*words, *options]) == 0
    config = json.loads((tmp_path / "s" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"] and config["dtype"] == "bfloat16"
    assert len(config["id2label"]) == 3
    report = InitializationReport.load(tmp_path / "s")
    assert report.options["logit_scale"] == 0.5
    assert list(report.blocks.values()) == [[3, 1]]


def test_an_option_of_the_method_arrives_as_what_it_is(monkeypatch):
    def stop(teacher, **options):
        received.append(options["method"])
        raise KeyboardInterrupt

    received = []
    monkeypatch.setattr("hf_guide.modeling.from_teacher", stop)
    words = ["--option", "layer_selection=[3,1]", "--option", "basis=channels", "--option", "ridge=0.25"]
    words += ["--option", "fit_logit_scale=false", "--option", "seed=7", "--method", "calibrated"]
    assert cli.main(["init", "teacher", "-o", "student", *words]) == 130
    expected = {"layer_selection": [3, 1], "basis": "channels", "ridge": 0.25, "fit_logit_scale": False, "seed": 7}
    assert {name: getattr(received[0], name) for name in expected} == expected


def test_the_help_fits_one_screen():
    """40 lines of 100 columns."""
    done = hf_guide("init", "--help", env={**os.environ, "COLUMNS": "100"})
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) <= 40 and max(map(len, lines)) <= 100
    for flag in ("--hidden-size", "--config", "--method", "--option", "--calibration-dataset", "--output"):
        assert flag in done.stdout
    assert "--later-blocks" not in done.stdout and "--set" not in done.stdout, "deprecated flags are hidden"


@pytest.mark.parametrize(
    ("words", "option", "expected"),
    [
        (["--layers", "3,1"], "layer_selection", [3, 1]),
        (["--layers", "even"], "layer_selection", "uniform"),
        (["--later-blocks", "select"], "subsequent_layers", "uniform"),
        (["--logit-gain", "0.5"], "logit_scale", 0.5),
        (["--basis", "places", "--method", "calibrated"], "basis", "channels"),
        (["--calibration-length", "64", "--method", "calibrated"], "calibration_seq_length", 64),
    ],
)
def test_an_old_flag_of_a_method_warns_with_the_new_option(words, option, expected, monkeypatch):
    def stop(teacher, **options):
        configs.append(options["method"])
        raise KeyboardInterrupt

    configs = []
    monkeypatch.setattr("hf_guide.modeling.from_teacher", stop)
    with pytest.warns(FutureWarning, match=f"use --option {option}=VALUE|'{option}'|{option}="):
        assert cli.main(["init", "teacher", "-o", "student", *words]) == 130
    assert getattr(configs[0], option) == expected


@pytest.mark.parametrize(
    "words", [["--pooling", "norm"], ["--no-turn-values"], ["--heads", "even"], ["--token-weights", "weights.txt"]]
)
def test_a_removed_flag_is_an_error_with_the_reason(words, tmp_path, capsys):
    assert cli.main(["init", "teacher", "-o", str(tmp_path / "student"), "--method", "calibrated", *words]) == 2
    assert "was removed" in capsys.readouterr().err


def test_old_flags_of_the_command_warn_with_the_new_ones(tmp_path, capsys):
    words = ["init", str(tmp_path / "nowhere"), "-o", str(tmp_path / "student")]
    with pytest.warns(FutureWarning, match="'--set' is deprecated; use '--config'"):
        assert cli.main([*words, "--set", "rms_norm_eps"]) == 2
    with pytest.warns(FutureWarning, match="'--calibration-dir' is deprecated; use '--calibration-cache-dir'"):
        assert cli.main([*words, "--calibration-dir", str(tmp_path / "cache")]) == 1


@pytest.mark.parametrize(
    "words", [["--help"], ["inspect", "--help"], ["families", "--help"], ["quickstart", "--help"]]
)
def test_help_comes_without_importing_torch(words):
    code = (
        "import sys\nfrom hf_guide.cli.main import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "hf-guide" in done.stdout


@pytest.mark.parametrize("occupied", ["folder", "file"])
def test_an_output_that_is_not_empty_is_an_error_before_any_work(tmp_path, occupied, capsys):
    output = tmp_path / "student"
    if occupied == "folder":
        output.mkdir()
        (output / "mine").write_text("mine")
    else:
        output.write_text("mine")
    assert cli.main(["init", "no/such-teacher", "-o", str(output)]) == 1
    assert str(output) in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["student"]
    assert (output / "mine" if occupied == "folder" else output).read_text() == "mine"


def test_an_empty_output_folder_is_used(teacher, tmp_path):
    (tmp_path / "student").mkdir()
    assert cli.main(["init", str(teacher), *SMALLER, "-o", str(tmp_path / "student")]) == 0
    assert (tmp_path / "student" / "config.json").exists()


@pytest.mark.parametrize(
    "words,code,message",
    [
        (["--hidden-size", "128"], 1, "128"),
        (["--hidden-size", "30", "--num-attention-heads", "4"], 1, "30"),
        (["--config", "hiden_size=32"], 2, "hidden_size"),
        (["--config", "rms_norm_eps"], 2, "key=value"),
        (["--hidden-size", "32", "--config", "hidden_size=16"], 2, "twice"),
        (["--method", "giude"], 2, "guide"),
        (["--method", "random", "--option", "basis=auto"], 2, "basis"),
    ],
)
def test_bad_input_is_one_clear_message_and_leaves_nothing(teacher, tmp_path, capsys, words, code, message):
    assert cli.main(["init", str(teacher), "--no-progress", "-o", str(tmp_path / "student"), *words]) == code
    error = capsys.readouterr().err
    assert message in error and "hf-guide: error:" in error and "Traceback" not in error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("words", [[], ["initialise"], ["init"], ["init", "t", "-o", "s", "--seed", "x"]])
def test_wrong_usage_exits_with_two(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 2 and "usage: hf-guide" in capsys.readouterr().err


def test_a_missing_teacher_is_one_clear_message(tmp_path, capsys):
    assert cli.main(["init", str(tmp_path / "nowhere"), "-o", str(tmp_path / "student")]) == 1
    error = capsys.readouterr().err
    assert "nowhere" in error and "Traceback" not in error
    assert os.listdir(tmp_path) == []


@pytest.mark.extended
def test_a_disk_that_runs_full_leaves_nothing(teacher, tmp_path):
    """A limit on the length of files stands in for the full disk: both fail in the middle of a write."""

    def limit_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = hf_guide("init", teacher, *SMALLER, "-o", tmp_path / "student", preexec_fn=limit_files)
    assert done.returncode == 1, done.stderr
    assert "hf-guide: error:" in done.stderr and "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == []


def test_a_student_larger_than_the_free_disk_is_an_error(tmp_path):
    with pytest.raises(OSError, match="Free some space"):
        folders.check_disk_space(tmp_path, 2**60)
    folders.check_disk_space(tmp_path, 1)


# Ctrl-C when the student's files have been written, but not yet brought to where they were asked for.
INTERRUPTED = """
import os, signal, sys
from transformers import PreTrainedModel
from hf_guide.cli.main import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # a process started in the background ignores it
save = PreTrainedModel.save_pretrained

def save_and_be_interrupted(self, folder, *args, **kwargs):
    save(self, folder, *args, **kwargs)
    print(*os.listdir(folder))
    os.kill(os.getpid(), signal.SIGINT)

PreTrainedModel.save_pretrained = save_and_be_interrupted
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.extended
def test_ctrl_c_leaves_nothing(teacher, tmp_path):
    command = [sys.executable, "-c", INTERRUPTED, "init", str(teacher), *SMALLER, "-o", str(tmp_path / "student")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "model.safetensors" in done.stdout
    assert done.returncode == 130 and "interrupted" in done.stderr and "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == []


def test_the_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), folders.atomic_folder(tmp_path / "a" / "b") as folder:
        (folder / "half").write_text("half")
        raise RuntimeError
    assert os.listdir(tmp_path) == []
    with folders.atomic_folder(tmp_path / "a" / "b") as folder:
        (folder / "whole").write_text("whole")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a" / "b" / "whole").read_text() == "whole" and os.listdir(tmp_path) == ["a"]


@pytest.mark.extended
def test_inspect_shows_the_curve_and_widths_that_can_be_made(teacher, tmp_path):
    done = hf_guide("inspect", teacher, "--plot", tmp_path / "curve.png")
    assert done.returncode == 0, done.stderr
    table = AutoModelForCausalLM.from_pretrained(teacher).model.embed_tokens.weight.double()
    shares = torch.linalg.svdvals(table).square().cumsum(0)
    needed = int((shares / shares[-1] < 0.5).sum()) + 1
    rows = [
        line.split() for line in done.stdout.splitlines() if line.strip().startswith("50%") and "--hidden-size" in line
    ]
    assert len(rows) == 1 and int(rows[0][1]) == needed
    for share in ("80%", "90%", "95%", "99%"):
        assert any(line.strip().startswith(share) for line in done.stdout.splitlines())
    words = rows[0][2 : rows[0].index("--intermediate-size") + 2]
    assert int(words[1]) >= needed
    assert cli.main(["init", str(teacher), *words, "--no-progress", "-o", str(tmp_path / "student")]) == 0
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_families_are_listed_with_how_exact_they_are(capsys):
    assert cli.main(["families", "llama"]) == 0
    assert any(line.split()[0] == "llama" for line in capsys.readouterr().out.splitlines())
    assert cli.main(["families", "no-such-family"]) == 2
    assert "hf-guide families" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text,value",
    [("a=1", 1), ("a=1e5", 1e5), ("a=true", True), ("a=True", True), ("a=null", None), ("a=None", None)]
    + [
        ("a=[1, 2]", [1, 2]),
        ("a=1,2", [1, 2]),
        ('a={"b": 1}', {"b": 1}),
        ("a=silu", "silu"),
        ("a=", ""),
        ("a=b=c", "b=c"),
    ],
)
def test_overrides_are_read_as_json_or_python_or_text(text, value):
    assert parse_key_value(text, "--config") == ("a", value)


# Calibration data


@pytest.fixture(scope="module")
def chat_teacher(tmp_path_factory) -> Path:
    folder = make_model(tmp_path_factory.mktemp("chat") / "teacher", "llama", "ForCausalLM", vocab_size=VOCABULARY)
    tokenizer(PLAIN).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_student_is_calibrated_on_files_of_conversations(suffix, chat_teacher, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = datasets.Dataset.from_dict({"messages": CONVERSATIONS * 8, "tools": TOOLS * 8})
    file = tmp_path / f"chat.{suffix}"
    rows.to_json(file) if suffix == "jsonl" else rows.to_parquet(file)
    words = ["--method", "calibrated", "--calibration-dataset", str(file), "--option", "calibration_tokens=256"]
    sizes = ["--hidden-size", "16", "--num-hidden-layers", "1", "--intermediate-size", "32", "--no-progress"]
    assert cli.main(["init", str(chat_teacher), *sizes, *words, "-o", str(tmp_path / "student")]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "student").config.hidden_size == 16


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["a.jsonl", "b.txt"], "must have one format; found .jsonl, .txt"),
        (["missing.jsonl"], "There is no file .*missing.jsonl: --calibration-dataset takes"),
        (["missing"], "There is no file .*missing: --calibration-dataset takes"),
        (["a.jsonl"], "not those of one format"),
    ],
)
def test_calibration_files_of_another_form_are_an_error(names, text, chat_teacher, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("a.jsonl", "b.txt"):
        (tmp_path / name).write_text('{"prompt": "w1", "messages": []}\n')
    files = [str(tmp_path / name) for name in names]
    words = ["--method", "calibrated", "--hidden-size", "16", "--calibration-dataset", *files, "--no-progress"]
    assert cli.main(["init", str(chat_teacher), "-o", str(tmp_path / "student"), *words]) != 0
    assert re.search(text, capsys.readouterr().err)
