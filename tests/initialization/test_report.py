"""A report survives saving and loading, and its text states the values of its fields."""

import dataclasses
import json

import pytest

from hf_guide.errors import HfGuideError
from hf_guide.initialization.report import REPORT_NAME, InitializationReport, ParameterRecord, format_count


def some_report(**changes) -> InitializationReport:
    layers = [
        ParameterRecord(
            f"model.layers.{block}.self_attn.q_proj.weight",
            [32, 16],
            f"model.layers.{2 * block}.self_attn.q_proj.weight",
            [64, 32],
            ["heads: 2 of 4", "embed: projection 32 -> 16"],
            [f"gain of model.layers.{2 * block}.input_layernorm folded"],
        )
        for block in range(3)
    ]
    report = InitializationReport(
        teacher="someone/teacher",
        revision="0123456789abcdef",
        teacher_class="LlamaForCausalLM",
        student_class="LlamaForCausalLM",
        options={"method": "guide", "seed": 0},
        hf_guide_version="0.1.0",
        transformers_version="5.0.0",
        teacher_parameters=134_515_008,
        student_parameters=33_400_000,
        blocks={"model.layers": [0, 2, 4]},
        explained_variance={"embed": [0.25, 0.5, 0.8, 1.0]},
        variance_explained={"embed": 0.5},
        sizes={"embed": [4, 2], "mlp": [8, 4]},
        parameters=[ParameterRecord("model.norm.weight", [16], None, None), *layers],
        approximations=["the final gain was fitted in the logits"],
        randomly_initialized=[f"model.extra.{block}.weight" for block in range(7)],
        seconds={"basis": 1.25, "transfer": 0.5},
        peak_memory_bytes=2**30,
    )
    return dataclasses.replace(report, **changes)


def test_what_is_saved_is_what_is_loaded(tmp_path):
    report = some_report()
    path = report.save(tmp_path / "new")
    assert path == tmp_path / "new" / REPORT_NAME
    assert InitializationReport.load(path) == report == InitializationReport.load(tmp_path / "new")
    assert json.loads(path.read_text())["parameters"][1]["maps"] == ["heads: 2 of 4", "embed: projection 32 -> 16"]


def test_summary_has_five_lines_with_the_facts():
    lines = some_report().summary().splitlines()
    assert len(lines) == 5
    assert (
        "33.4 M parameters, 4.0 times fewer than its teacher someone/teacher at 0123456789ab (134.5 M), by guide"
        in lines[0]
    )
    assert "embed 4 -> 2 (50.0% of variance explained), mlp 8 -> 4" in lines[1]
    assert "model.layers from the teacher's 0 2 4" in lines[2]
    assert "1 approximated, 7 parameters at random" in lines[3]
    assert "1.8 s (basis 1.2, transfer 0.5), peak memory 1.00 GiB" in lines[4]


def test_summary_of_an_empty_report_still_has_five_lines():
    report = InitializationReport("t", None, "A", "A", {}, "0", "0", 0, 0)
    assert len(report.summary().splitlines()) == 5 and "nothing" in report.summary()


def test_the_table_merges_blocks_into_one_row():
    table = str(some_report()).splitlines()
    rows = [line for line in table if "q_proj" in line]
    assert len(rows) == 1
    assert rows[0].split("  ")[0] == "model.layers.*.self_attn.q_proj.weight 32x16"
    assert rows[0].split()[2] == "3"
    assert "gain of model.layers.*.input_layernorm folded" in rows[0]
    assert sum("model.extra" in line for line in table) == 1
    assert "Approximated: the final gain was fitted in the logits" in table


def test_blocks_made_differently_keep_their_own_rows():
    report = some_report()
    report.parameters[-1].steps = []
    assert sum("q_proj" in line for line in str(report).splitlines()) == 2


def test_consecutive_blocks_are_written_as_a_range():
    assert "0-3 8 10-11" in some_report(blocks={"layers": [0, 1, 2, 3, 8, 10, 11]}).summary()


def test_a_folder_is_published_by_its_bare_name(tmp_path):
    report = some_report(teacher=str(tmp_path / "my-teacher"))
    assert report.teacher_name == "my-teacher"
    assert str(tmp_path) not in str(report)
    assert some_report(teacher="org/name").teacher_name == "org/name"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"parameters": [{"colour": "red"}]}', '{"parameters": []}'])
def test_a_file_that_is_not_a_report_is_an_error(tmp_path, content):
    (tmp_path / REPORT_NAME).write_text(content)
    with pytest.raises(HfGuideError, match="is not an initialization report"):
        InitializationReport.load(tmp_path)


def test_a_missing_report_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        InitializationReport.load(tmp_path)


@pytest.mark.parametrize(
    "number,text", [(0, "0"), (576, "576"), (1500, "1.5 K"), (134_515_008, "134.5 M"), (10**9, "1.0 B")]
)
def test_counts_read_as_people_write_them(number, text):
    assert format_count(number) == text
