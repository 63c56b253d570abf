"""The benchmark of starting points: others' starts keep what is active, and its figures are what the curves say."""

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_guide import from_teacher

sys.path.append(str(Path(__file__).parents[2] / "examples" / "benchmarks"))
competitors, curves, healing = map(importlib.import_module, ("competitors", "curves", "healing"))

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24}


def config(**more: int) -> LlamaConfig:
    shape = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(
        vocab_size=60, head_dim=8, max_position_embeddings=64, **({"intermediate_size": 48} | shape | more)
    )


@pytest.fixture
def teacher() -> LlamaForCausalLM:
    """A model of which blocks 1 and 2, a key/value head and half of the neurons in each block do nothing."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config()).eval()
    with torch.no_grad():
        for number, block in enumerate(model.model.layers):
            dead = number % 2
            block.self_attn.v_proj.weight.view(2, 8, 32)[dead] = 0
            block.mlp.gate_proj.weight[number % 2 :: 2] = 0
            if number in (1, 2):
                block.self_attn.o_proj.weight.zero_()
                block.mlp.down_proj.weight.zero_()
    return model


def texts() -> list[torch.Tensor]:
    return list(torch.randint(60, (4, 3, 17), generator=torch.Generator().manual_seed(1)))


@torch.no_grad()
def test_minitron_finds_what_is_dead(teacher):
    student = competitors.pruned_as_minitron(teacher, config(**SMALL), texts()).eval()
    (batch, *_) = texts()
    torch.testing.assert_close(student(batch).logits, teacher(batch).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_subcloning_finds_what_is_dead_and_scales_what_is_left(teacher):
    student = competitors.subcloned(teacher, config(**SMALL), texts())
    first = teacher.model.layers[0]
    own = student.model.layers[0].mlp.down_proj.weight
    torch.testing.assert_close(own, first.mlp.down_proj.weight[:, 1::2] * math.sqrt(2))
    torch.testing.assert_close(
        student.model.layers[1].input_layernorm.weight, teacher.model.layers[3].input_layernorm.weight
    )


@torch.no_grad()
def test_both_keep_the_whole_stream_on_the_same_places(teacher):
    student = competitors.subcloned(teacher, config(hidden_size=16, **SMALL), texts())
    assert student.num_parameters() == LlamaForCausalLM(config(hidden_size=16, **SMALL)).num_parameters()
    activity = competitors.listen(teacher, texts(), competitors.mean_magnitude)
    kept = competitors.most(activity.stream, 16)
    torch.testing.assert_close(student.model.embed_tokens.weight, teacher.model.embed_tokens.weight[:, kept])
    assert torch.isfinite(student(texts()[0]).logits).all()


@torch.no_grad()
def test_dropped_blocks_are_those_named(teacher):
    (batch, *_) = texts()
    torch.testing.assert_close(competitors.with_blocks(teacher, [0, 3])(batch).logits, teacher(batch).logits)


def test_tokens_until_reads_between_the_points():
    curve = [[0, 8.0], [100, 6.0], [200, 5.0]]
    assert curves.tokens_until(curve, 8.5) == 0.0
    assert curves.tokens_until(curve, 5.5) == pytest.approx(150)
    assert curves.tokens_until(curve, 4.0) == math.inf


def test_the_table_and_the_plot_say_what_the_curves_do(tmp_path):
    def row(arm: str, seed: int, end: float) -> dict:
        points = [[0, math.log(100.0)], [1000, math.log(end)]]
        key = {"shape": "half width", "arm": arm, "objective": "labels", "seed": seed, "rate": 1e-3, "tuning": False}
        return key | {"curve": points, "teacher": math.log(10.0), "parameters": 5, "start_seconds": 1.0}

    rows = [row("random", 0, 30.0), row("random", 1, 30.0), row("guide", 0, 20.0), row("guide", 1, 25.0)]
    assert "37.50 ± 17.68" in curves.table(rows)  # halfway from 30 to 10, and a quarter of the way
    assert "0 of 1" in curves.table([*rows, row("uniform", 0, 40.0)]), "it never came to random's loss"
    assert "overtook" in curves.table([*rows, row("guide", 0, 9.0)]) and "overtook" not in curves.table(rows)
    curves.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_healing_brings_a_students_blocks_nearer_to_the_teacher_and_leaves_the_teacher_alone(teacher):
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    made = from_teacher(
        teacher, method={"method": "guide", "layers": [0, 3]}, hidden_size=24, num_hidden_layers=2, show_progress=False
    )
    matrix = healing.carrying_matrix(teacher, made)
    torch.testing.assert_close(matrix.T @ matrix, torch.eye(24), rtol=0, atol=1e-4)
    torch.testing.assert_close(teacher.model.embed_tokens.weight @ matrix, made.model.embed_tokens.weight)
    table = made.model.embed_tokens.weight.clone()
    losses = healing.heal(made, teacher, matrix, [0, 3], texts() * 40)
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    torch.testing.assert_close(made.model.embed_tokens.weight, table, rtol=0, atol=0)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in made.model.layers)
    for name, tensor in teacher.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
