"""The benchmark of a larger teacher goes on where it stopped, and begins no run that would end too late."""

import argparse
import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.append(str(Path(__file__).parents[2] / "examples" / "benchmarks"))
curves, larger_teacher, package_text, comparison = map(
    importlib.import_module, ("curves", "larger_teacher", "debian_text", "initialization_comparison")
)

SIZES = {"hidden_size": 16, "head_dim": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture
def args(tmp_path, monkeypatch):
    monkeypatch.setattr(larger_teacher, "LENGTH", 16)
    monkeypatch.setattr(larger_teacher, "SHAPES", {larger_teacher.FIRST: SIZES})
    monkeypatch.setattr(larger_teacher, "LEADING", ("random", "calibrated, 8,192 tokens"))
    monkeypatch.setattr(larger_teacher, "OTHERS", ("subcloning",))
    monkeypatch.setattr(larger_teacher, "MODELS", {})
    monkeypatch.setattr(larger_teacher, "STARTED", {})
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, intermediate_size=32, tie_word_embeddings=True, **(SIZES | {"hidden_size": 32})
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "teacher")
    rows = torch.randint(40, (300, 17), dtype=torch.int32)
    save_file({"learned": rows[:260], "held_out": rows[260:].clone()}, tmp_path / "tokens.safetensors")
    return argparse.Namespace(
        output=tmp_path / "rows.jsonl", teacher=str(tmp_path / "teacher"), tokens=tmp_path / "tokens.safetensors",
        millions=0.001, seeds=[0], points=2, batch=2, eager=True, held_out_blocks=8, minutes=math.inf, device="cpu",
        tuning_share=15, calibration_blocks=256,
        shapes=[larger_teacher.FIRST], arms=["random", "calibrated, 8,192 tokens", "subcloning"], objectives=["labels", "KD"],
    )  # fmt: skip


@pytest.mark.extended
def test_runs_go_on_and_have_their_rates_chosen(args):
    bench = larger_teacher.Bench.prepare(args)
    larger_teacher.run(bench, args)
    rows = comparison.read_rows(args.output)
    args.output.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    larger_teacher.run(bench, args)
    again = comparison.read_rows(args.output)
    kept = [key for key in rows[-1] if "seconds" not in key]
    assert [[row[key] for key in kept] for row in again] == [[row[key] for key in kept] for row in rows]
    runs = [(row["arm"], row["objective"]) for row in rows if not row["tuning"]]
    arms = ["random", "calibrated, 8,192 tokens", "subcloning"]
    assert runs == [*((arm, "labels") for arm in arms), ("random", "KD"), ("calibrated, 8,192 tokens", "KD")]
    for row in rows:
        tried = {each["learning_rate"] for each in rows if each["arm"] == row["arm"] and each["tuning"]}
        assert tried >= set(larger_teacher.RATES) and row["learning_rate"] in tried
        assert row["curve"][-1][0] == (2 if row["tuning"] else 31) * 2 * 16


def test_no_run_is_begun_that_would_end_too_late(args):
    args.minutes = 0.0
    larger_teacher.run(larger_teacher.Bench.prepare(args), args)
    assert comparison.read_rows(args.output) == []


def test_only_the_runs_that_are_asked_for_are_made(args):
    args.arms, args.objectives = ["random"], ["KD"]
    larger_teacher.run(larger_teacher.Bench.prepare(args), args)
    rows = comparison.read_rows(args.output)
    assert [(row["arm"], row["objective"]) for row in rows if not row["tuning"]] == [("random", "KD")]
    assert {(row["arm"], row["objective"]) for row in rows if row["tuning"]} == {("random", "labels")}
    curves.plot(rows, args.output.with_suffix(".png"))
    assert args.output.with_suffix(".png").exists()


def test_every_arm_is_run_at_every_shape_and_seed_on_as_many_tokens_as_are_asked_for(args, monkeypatch):
    other = "half of that"
    monkeypatch.setattr(
        larger_teacher, "SHAPES", {larger_teacher.FIRST: SIZES, other: SIZES | {"num_hidden_layers": 1}}
    )
    text_sizes = []
    subcloning = larger_teacher.ARMS["subcloning"]
    monkeypatch.setitem(
        larger_teacher.ARMS, "subcloning", lambda bench: text_sizes.append(len(bench.text)) or subcloning(bench)
    )
    args.arms, args.objectives, args.seeds = ["subcloning"], ["labels"], [0, 1]
    args.shapes, args.tuning_share, args.calibration_blocks = [larger_teacher.FIRST, other], 5, 4
    larger_teacher.run(larger_teacher.Bench.prepare(args), args)
    rows = comparison.read_rows(args.output)
    runs = [(row["shape"], row["seed"]) for row in rows if not row["tuning"]]
    assert runs == [(shape, seed) for seed in (0, 1) for shape in (larger_teacher.FIRST, other)]
    assert {row["curve"][-1][0] for row in rows if row["tuning"]} == {31 // 5 * 2 * 16}
    assert set(text_sizes) == {4}


def test_nothing_is_drawn_of_runs_that_choose_a_rate(args):
    row = {"shape": larger_teacher.FIRST, "objective": "labels", "tokens_per_parameter": 1.0, "tuning": True}
    curves.plot([row], args.output.with_suffix(".png"))
    assert not args.output.with_suffix(".png").exists()


def test_pages_are_read_without_their_markup(tmp_path):
    page = tmp_path / "html" / "page.html"
    page.parent.mkdir()
    page.write_text(
        "<html><head><title>no</title></head><nav>no</nav><p>A &amp; b.</p>" + "<p>word</p>" * 200 + "</html>"
    )
    (tmp_path / "html" / "de").mkdir()
    (tmp_path / "html" / "de" / "page.html").write_text(page.read_text())
    (text,) = package_text.documents(tmp_path)
    assert text.split() == ["A", "&", "b.", *["word"] * 200]
