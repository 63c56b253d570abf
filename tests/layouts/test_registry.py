"""A family's config selects its variant of the layout, and a student must have its teacher's."""

import pytest
import torch
from transformers import FalconConfig, FalconForCausalLM, OPTConfig, StableLmConfig, StableLmForCausalLM

from hf_guide.errors import ShapeError
from hf_guide.layouts.registry import registered_layouts, variant_for
from hf_guide.modeling import from_teacher

STABLELM = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
FALCON = {"vocab_size": 60, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8}


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (OPTConfig(), "opt"),
        (OPTConfig(hidden_size=1024, word_embed_proj_dim=512), "opt (projected embeddings)"),
        (OPTConfig(hidden_size=1024, word_embed_proj_dim=512, do_layer_norm_before=False), "opt (post-norm)"),
        (FalconConfig(), "falcon"),
        (FalconConfig(parallel_attn=False), "falcon (sequential)"),
        (FalconConfig(new_decoder_architecture=True), "falcon (two norms)"),
        (FalconConfig(new_decoder_architecture=True, num_ln_in_parallel_attn=1), "falcon"),
    ],
)
def test_a_config_selects_its_variant(config: OPTConfig | FalconConfig, name: str) -> None:
    assert variant_for(registered_layouts()[config.model_type], config).family == name


def test_a_student_of_another_variant_is_an_error_with_both_names() -> None:
    teacher = StableLmForCausalLM(StableLmConfig(**STABLELM))
    with pytest.raises(ShapeError, match=r"stablelm \(parallel\).*'stablelm'"):
        from_teacher(teacher, use_parallel_residual=True, show_progress=False)


@torch.no_grad()
def test_heads_are_selected_by_their_alibi_slopes() -> None:
    """Head i of n has the slope 2 ** (-8 (i + 1) / n): of 8 heads, the second of each pair has a slope of 4 heads'."""
    config = FalconConfig(**FALCON, alibi=True, multi_query=False, parallel_attn=False)
    teacher = FalconForCausalLM(config)
    dense = teacher.transformer.h[0].self_attention.dense.weight
    dense.copy_(torch.arange(8).repeat_interleave(8).float().expand_as(dense))  # each head's columns hold its number
    student = from_teacher(teacher, hidden_size=32, num_attention_heads=4, method="uniform", show_progress=False)
    selected = student.transformer.h[0].self_attention.dense.weight[0, ::8]
    assert selected.tolist() == [1.0, 3.0, 5.0, 7.0]
