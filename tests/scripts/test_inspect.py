"""The sizes and variances that inspection predicts for a width hold for the student made at that width."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_guide.initialization.infer_layout import layout_for
from hf_guide.modeling import from_teacher
from hf_guide.scripts.inspect import count_parameters, suggest_widths, variance_curves
from hf_guide.teachers.checkpoint import open_teacher


def small_model(family: str):
    torch.manual_seed(0)
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=96, n_layer=3, n_head=4, vocab_size=150, n_positions=32))
    sizes = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "vocab_size": 150}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_suggested_students_can_be_made_with_the_predicted_size_and_variance(family):
    model = small_model(family)
    teacher = open_teacher(model)
    layout = layout_for(teacher.config, teacher.model_class)
    curve = variance_curves(teacher, layout)["embed"]
    suggestions = suggest_widths(teacher, layout, curve)
    assert suggestions and len(curve) == 96 and curve[-1] == pytest.approx(1)
    for results in suggestions:
        width = results.overrides["hidden_size"]
        assert width % 32 == 0 and curve[results.min_width - 1] >= results.target > (
            curve[results.min_width - 2] if results.min_width > 1 else 0
        )
        student = from_teacher(model, show_progress=False, **results.overrides)
        assert student.num_parameters() == results.parameters
        assert (
            results.explained_variance == pytest.approx(curve[width - 1])
            and results.explained_variance >= results.target
        )
        assert student.initialization_report.explained_variance["embed"] == pytest.approx(curve)
        half = from_teacher(model, show_progress=False, num_hidden_layers=2, **results.overrides)
        assert half.num_parameters() == results.parameters_half


def test_what_cannot_be_made_is_not_counted():
    teacher = open_teacher(small_model("llama"))
    layout = layout_for(teacher.config, teacher.model_class)
    assert count_parameters(teacher, layout, {}) == sum(p.numel() for p in small_model("llama").parameters())
    assert count_parameters(teacher, layout, {"hidden_size": 128}) is None
