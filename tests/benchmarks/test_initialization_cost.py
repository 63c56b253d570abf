"""The cost benchmark: figures are of the student made, points over the limit are reported, none is measured twice."""

import importlib
import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "examples" / "benchmarks"))
initialization_cost, larger_than_memory = map(importlib.import_module, ("initialization_cost", "larger_than_memory"))

VOCABULARY, WIDTH = 4096, 64


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_each_point_is_measured_once_and_one_that_is_too_large_is_reported_as_left_out(tmp_path, capsys):
    output = tmp_path / "cost.jsonl"
    words = ["--widths", str(WIDTH), "--rounds", "1", "--output", str(output)]
    initialization_cost.main([*words, "--vocabularies", str(VOCABULARY)])
    first, second = read(output)

    in_block = 2 * WIDTH * WIDTH + 2 * 2 * 32 * WIDTH + 3 * 2 * WIDTH * WIDTH + 2 * WIDTH
    half = WIDTH // 2
    student = VOCABULARY * half + half + 2 * (2 * half * half + 2 * 32 * half + 3 * 2 * half * half + 2 * half)
    assert initialization_cost.shapes_of(initialization_cost.teacher_config(VOCABULARY, WIDTH))[0].keys() >= {
        ".mlp.up_proj.weight"
    }
    assert (
        sum(x.numel() for x in initialization_cost.shapes_of(initialization_cost.teacher_config(9, WIDTH))[0].values())
        == in_block
    )
    assert second["student_bytes"] == 2 * student
    assert second["bound_bytes"] == 2 * (student + 3 * VOCABULARY * WIDTH)
    assert second["peak_bytes"] >= second["student_bytes"]
    assert (first["measurement"], second["measurement"]) == ("basis", "transfer")

    with output.open("a") as file:
        file.write(json.dumps(first | {"vocabulary": 2 * VOCABULARY}) + "\n")
    for _ in range(2):
        initialization_cost.main(
            [*words, "--vocabularies", str(VOCABULARY), str(2 * VOCABULARY), "--gigabytes", "0.003"]
        )
    rows = read(output)
    assert rows[:2] == [first, second] and len(rows) == 4, "what was there is not made again"
    assert rows[3]["left_out"] == "more than 0.003 GB"
    assert "more than 0.003 GB" in capsys.readouterr().out


@pytest.mark.slow
def test_a_measurement_that_takes_too_long_is_left_out_and_one_that_fails_is_not_taken_for_it(tmp_path):
    assert initialization_cost.measured("basis", 512, 16, 1, 0) == {"left_out": "more than 0 minutes"}
    with pytest.raises(RuntimeError, match="failed"):
        larger_than_memory.in_fresh_process("raise SystemExit(3)")


def test_the_table_has_medians_and_their_ratio_to_the_bounds():
    key = {"vocabulary": 1000, "width": 128}
    times = {"moment": [9.0, 2.0, 3.0], "fit": [1.0] * 3, "products": [3.0] * 3, "eigen": [1.0] * 3}
    rows = [key | times | {"measurement": "basis", "peak_bytes": 8 * 8 * 128**2}]
    rows.append(
        key
        | {
            "measurement": "transfer",
            "seconds": [10.0],
            "projection": [1.0],
            "peak_bytes": 3 * 2**20,
            "bound_bytes": 6 * 2**20,
        }
    )
    line = initialization_cost.table(rows).splitlines()[-1].split()
    assert line == "1000 128 3 3.00 1.00 4.00 1.00 1 8.0 10.00 5.00 2.00 3 6 0.50".split()
    assert "not measured" in initialization_cost.table(rows[:1])
