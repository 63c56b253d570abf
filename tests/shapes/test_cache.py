"""The cache that a budget of memory counts is the one that the student keeps, to the byte, for every way of keeping one."""

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BloomConfig,
    DeepseekV3Config,
    FalconConfig,
    FalconH1Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    Qwen3NextConfig,
    T5Config,
)

from hf_guide import find_shapes, from_teacher
from hf_guide.shapes.cache import CacheMeter
from hf_guide.shapes.counting import ParameterCounter
from hf_guide.shapes.fields import ModelProbe, find_size_fields
from hf_guide.teachers.checkpoint import open_teacher

POSITIONS = 40
"""More than the windows."""

DECODER = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
ALL_HEADS = {name: size for name, size in DECODER.items() if name != "num_key_value_heads"}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
ROUTED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "num_hidden_layers": 8,
}
MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
CONFIGS = [
    LlamaConfig(**DECODER),
    Phi3Config(**DECODER, pad_token_id=0),
    MixtralConfig(**DECODER, **LOCAL),
    GPT2Config(vocab_size=200, n_embd=64, n_layer=4, n_head=4, n_positions=64),
    BloomConfig(vocab_size=200, hidden_size=64, n_layer=4, n_head=4),
    FalconConfig(**ALL_HEADS),  # all heads share keys and values
    Gemma3TextConfig(
        **DECODER, head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2
    ),
    GptOssConfig(**DECODER, **LOCAL, head_dim=16, sliding_window=8),
    DeepseekV3Config(**{**DECODER, "num_key_value_heads": 4}, **LATENT, **ROUTED),
    Qwen3NextConfig(**DECODER | LINEAR, head_dim=16),
    FalconH1Config(**DECODER, **MAMBA, head_dim=16),
    T5Config(vocab_size=200, d_model=64, d_kv=16, d_ff=96, num_layers=3, num_decoder_layers=2, num_heads=4),
    BartConfig(vocab_size=200, d_model=64, encoder_layers=3, decoder_layers=2, max_position_embeddings=64),
]


def teacher_of(config):
    torch.manual_seed(0)
    if config.is_encoder_decoder:
        config.decoder_start_token_id = 0
    if config.model_type == "bart":
        config.encoder_attention_heads = config.decoder_attention_heads = 4
        config.encoder_ffn_dim = config.decoder_ffn_dim = 96
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return auto.from_config(config).eval()


def bytes_of(value):
    """Return the bytes of all tensors in a cache, however it keeps them."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, (list, tuple, dict)):
        return sum(map(bytes_of, value.values() if isinstance(value, dict) else value))
    if hasattr(value, "cross_attention_cache"):
        return bytes_of([value.self_attention_cache, value.cross_attention_cache])
    if hasattr(value, "layers"):
        return sum(bytes_of(vars(layer)) for layer in value.layers)
    return 0


@torch.no_grad()
def kept_bytes(student):
    """Return the bytes of the cache after a forward on `POSITIONS` tokens."""
    tokens = torch.ones(1, POSITIONS, dtype=torch.long)
    decoded = {"decoder_input_ids": tokens} if student.config.is_encoder_decoder else {}
    return bytes_of(student(tokens, use_cache=True, **decoded).past_key_values)


# BLOOM's MLP is four times its width, so that small shapes are too far apart.
@pytest.mark.parametrize(
    "config", [each for each in CONFIGS if each.model_type != "bloom"], ids=lambda each: each.model_type
)
def test_the_memory_of_a_shape_is_that_of_its_weights_and_cache(config):
    teacher = teacher_of(config)
    size = 7 * sum(each.nbytes for each in teacher.parameters()) // 10
    shapes = find_shapes(teacher, memory=size, cache_length=POSITIONS, limit=2, show_progress=False)
    for shape in shapes:
        student = from_teacher(teacher, show_progress=False, **shape.overrides).eval()
        assert shape.memory == kept_bytes(student) + sum(each.nbytes for each in student.parameters()) <= size


@pytest.mark.parametrize("config", CONFIGS, ids=lambda each: each.model_type)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_is_measured_as_the_model_keeps_it_and_the_rule_of_shapes_gives_it(config, dtype):
    teacher = teacher_of(config).to(dtype)
    opened = open_teacher(teacher)
    probe = ModelProbe(opened, opened.model_class)
    fields = find_size_fields(probe)
    meter = CacheMeter(dtype, POSITIONS, POSITIONS if config.is_encoder_decoder else 0)
    assert meter.num_bytes(probe.build({})[1]) == kept_bytes(teacher)
    sizes = {each.name: np.array([float(each.size)]) for each in fields.fields}
    assert ParameterCounter(probe, fields, meter).count_cache(sizes)[0] == pytest.approx(
        kept_bytes(teacher), rel=1e-12
    )
