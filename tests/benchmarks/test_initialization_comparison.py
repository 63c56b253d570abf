"""The initialization benchmark: baselines drop inactive units, and its figures agree with the curves."""

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_guide import from_teacher

sys.path.append(str(Path(__file__).parents[2] / "examples" / "benchmarks"))
names = ("published_methods", "curves", "blockwise_distillation", "initialization_comparison")
published, curves, blockwise, comparison = map(importlib.import_module, names)

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
def test_minitron_drops_dead_units(teacher):
    student = published.pruned_as_minitron(teacher, config(**SMALL), texts()).eval()
    (batch, *_) = texts()
    torch.testing.assert_close(student(batch).logits, teacher(batch).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_subcloning_drops_dead_units_and_scales_the_rest(teacher):
    student = published.subcloned(teacher, config(**SMALL), texts())
    first = teacher.model.layers[0]
    own = student.model.layers[0].mlp.down_proj.weight
    torch.testing.assert_close(own, first.mlp.down_proj.weight[:, 1::2] * math.sqrt(2))
    torch.testing.assert_close(
        student.model.layers[1].input_layernorm.weight, teacher.model.layers[3].input_layernorm.weight
    )


@torch.no_grad()
def test_both_select_the_same_channels_in_every_weight(teacher):
    student = published.subcloned(teacher, config(hidden_size=16, **SMALL), texts())
    assert student.num_parameters() == LlamaForCausalLM(config(hidden_size=16, **SMALL)).num_parameters()
    activity = published.collect_activity(teacher, texts(), published.mean_magnitude)
    channels = published.most_active(activity.stream, 16)
    torch.testing.assert_close(student.model.embed_tokens.weight, teacher.model.embed_tokens.weight[:, channels])
    assert torch.isfinite(student(texts()[0]).logits).all()


@torch.no_grad()
def test_dropped_blocks_are_those_named(teacher):
    (batch, *_) = texts()
    torch.testing.assert_close(published.with_blocks(teacher, [0, 3])(batch).logits, teacher(batch).logits)


def test_tokens_until_reads_between_the_points():
    curve = [[0, 8.0], [100, 6.0], [200, 5.0]]
    assert curves.tokens_until(curve, 8.5) == 0.0
    assert curves.tokens_until(curve, 5.5) == pytest.approx(150)
    assert curves.tokens_until(curve, 4.0) == math.inf


def row(arm: str, seed: int, end: float, objective: str = "labels", **more: object) -> dict:
    """A run that begins at a perplexity of 100, with a teacher at 10."""
    key = {"shape": "half width", "arm": arm, "objective": objective, "tokens_per_parameter": 20.0, "seed": seed}
    key |= {"learning_rate": 6e-3, "tuning": False, "curve": [[0, math.log(100.0)], [1000, math.log(end)]]}
    return key | {"teacher": math.log(10.0), "parameters": 5, "initialization_seconds": 1.0, "seconds": 50.0} | more


def test_the_table_and_the_plot_agree_with_the_curves(tmp_path):
    rows = [row("random", 0, 30.0), row("random", 1, 30.0), row("guide", 0, 20.0), row("guide", 1, 25.0)]
    assert "37.50 ± 17.68" in curves.table(rows)  # halfway from 30 to 10, and a quarter of the way
    assert "2.0%" in curves.table(rows), "a second of fifty"
    assert "0 of 1" in curves.table([*rows, row("uniform", 0, 40.0)]), "it never came to random's loss"
    assert "37.50 ± 17.68" in curves.table([*rows, row("guide", 0, 11.0, tokens_per_parameter=2.0)]), "another budget"
    assert "overtook" in curves.table([*rows, row("guide", 0, 9.0)]) and "overtook" not in curves.table(rows)
    curves.plot([*rows, row("guide", 0, 15.0, "KD")], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    curves.plot_interaction(rows, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists(), "without a second objective there is nothing to draw"
    curves.plot_interaction([*rows, row("guide", 0, 15.0, "KD")], tmp_path / "objectives.png")
    assert (tmp_path / "objectives.png").stat().st_size > 1000


def test_a_plot_has_the_arms_that_were_run_with_every_objective():
    rows = [row("random", 0, 20.0), row("guide", 0, 15.0), row("guide, first and last blocks", 0, 14.0)]
    assert curves._run_with(rows, ["labels"]) == ["random", "guide", "guide, first and last blocks"]
    rows += [row("guide", 0, 13.0, "KD"), row("random", 0, 19.0, "KD")]
    assert curves._run_with(rows, ["labels", "KD"]) == ["random", "guide"]


def test_the_interaction_is_what_is_left_of_the_sum_of_a_start_and_an_objective():
    rows = [row("random", 0, 30.0), row("guide", 0, 20.0), row("random", 0, 25.0, "KD"), row("guide", 0, 18.0, "KD")]
    found = curves.interaction(rows)
    assert "60.00 (0.80)" in found, "60 % of the gap, where 50 % and 25 % are 75 %"
    assert curves.interaction(rows[:2]) == "", "one objective interacts with nothing"


def test_the_learning_rate_is_searched_until_the_best_has_worse_ones_on_both_sides():
    def losses(best: float) -> dict[float, float]:
        tried: dict[float, float] = {}
        while (rate := comparison.next_rate(tried)) is not None:
            tried[rate] = abs(math.log(rate / best))
        return tried

    assert sorted(losses(6e-3)) == [2e-3, 6e-3, 2e-2], "the middle one was best at once"
    assert sorted(losses(2e-2)) == [2e-3, 6e-3, 2e-2, 6e-2]
    assert sorted(losses(1e-4)) == [2e-4, 6e-4, 2e-3, 6e-3, 2e-2]


def test_other_objectives_take_the_rate_that_kd_chose_and_seeds_follow():
    key = {"shape": "half width", "arm": "guide", "objective": "JSD", "tokens_per_parameter": 20.0}
    with pytest.raises(SystemExit, match="run this first"):
        comparison.next_job([], key, [0])
    short = [
        row("guide", 1000, end, "KD", tuning=True, learning_rate=rate) for rate, end in ((2e-3, 40.0), (6e-3, 30.0))
    ]
    assert comparison.next_job(short, key, [0, 1]) == {"seed": 0, "learning_rate": 6e-3, "tuning": False}
    done = [*short, row("guide", 0, 20.0, "JSD")]
    assert comparison.next_job(done, key, [0, 1]) == {"seed": 1, "learning_rate": 6e-3, "tuning": False}
    assert comparison.next_job(done, key, [0]) is None
    assert comparison.next_job(short, key | {"objective": "KD"}, [0]) == {
        "seed": 1000,
        "learning_rate": 2e-2,
        "tuning": True,
    }


def test_blockwise_distillation_brings_a_students_blocks_nearer_to_the_teacher_and_leaves_the_teacher_alone(teacher):
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    made = from_teacher(
        teacher,
        method={"method": "guide", "layer_selection": [0, 3]},
        hidden_size=24,
        num_hidden_layers=2,
        show_progress=False,
    )
    matrix = blockwise.projection_matrix(teacher, made)
    torch.testing.assert_close(matrix.T @ matrix, torch.eye(24), rtol=0, atol=1e-4)
    torch.testing.assert_close(teacher.model.embed_tokens.weight @ matrix, made.model.embed_tokens.weight)
    table = made.model.embed_tokens.weight.clone()
    losses = blockwise.distill_blockwise(made, teacher, matrix, [0, 3], texts() * 40)
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    torch.testing.assert_close(made.model.embed_tokens.weight, table, rtol=0, atol=0)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in made.model.layers)
    for name, tensor in teacher.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
