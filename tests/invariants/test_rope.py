"""The RoPE law: where head sizes divide, a student attends as its teacher does through the selected pairs alone.

A smaller head keeps every r-th pair, r = l_T / l_S, and every r-th of the dimensions that are not rotated. Its logits
are then those of the teacher's selected dimensions times r, since the sum has r times fewer terms.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from hf_guide.initialization.planning import merge_tied_axes
from hf_guide.layouts.grammar import Axis, AxisName, AxisProduct
from hf_guide.layouts.registry import config_sizes, registered_layouts, variant_for
from hf_guide.modeling import from_teacher
from tests.invariants.case import TOKENS, tokens
from tests.invariants.embed_small_in_large import random_orthonormal, randomize, relative_name

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
GROUPED = SIZES | {"num_key_value_heads": 2}
GPT = {"n_layer": 2, "n_head": 4, "n_inner": 24, "n_positions": 32}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
HEAD = {"hidden_size": 40, "head_dim": 16}
HALF_HEAD = {"head_dim": 8}
WIDTH = {"hidden_size": 64}
HALF_WIDTH = {"hidden_size": 32}


@dataclass(frozen=True)
class Rope:
    """A teacher with heads of 16, what makes a student with heads of 8, and how many dimensions are rotated how."""

    model_class: str
    teacher: dict[str, Any]
    student: dict[str, Any]
    interleaved: bool = False
    rotated: int = 16
    name: str = field(default="")

    def __str__(self) -> str:
        return self.name or self.model_class.removesuffix("ForCausalLM").lower()


PARTIAL = {"partial_rotary_factor": 0.5}
ROPES = [
    Rope("LlamaForCausalLM", GROUPED | HEAD | {"attention_bias": True}, HALF_HEAD),
    Rope("MistralForCausalLM", GROUPED | HEAD | {"sliding_window": 4}, HALF_HEAD),
    Rope("Qwen2ForCausalLM", GROUPED | WIDTH, HALF_WIDTH),
    Rope("SmolLM3ForCausalLM", GROUPED | HEAD, HALF_HEAD),
    Rope("GraniteForCausalLM", GROUPED | WIDTH | {"attention_multiplier": 0.2}, HALF_WIDTH),
    Rope("GemmaForCausalLM", GROUPED | HEAD, HALF_HEAD),
    Rope("Gemma2ForCausalLM", GROUPED | HEAD | {"query_pre_attn_scalar": 24}, HALF_HEAD),
    Rope("Phi3ForCausalLM", GROUPED | WIDTH | PARTIAL, HALF_WIDTH, rotated=8),
    Rope("PhiForCausalLM", GROUPED | WIDTH | PARTIAL, HALF_WIDTH, rotated=8),
    Rope("StableLmForCausalLM", GROUPED | WIDTH, HALF_WIDTH, rotated=4),
    Rope("NemotronForCausalLM", GROUPED | HEAD | PARTIAL, HALF_HEAD, rotated=8),
    Rope("Starcoder2ForCausalLM", GROUPED | WIDTH, HALF_WIDTH),
    Rope("OlmoForCausalLM", GROUPED | WIDTH, HALF_WIDTH),
    Rope("GPTNeoXForCausalLM", SIZES | WIDTH | {"rotary_pct": 0.25}, HALF_WIDTH, rotated=4),
    Rope("FalconForCausalLM", SIZES | WIDTH, HALF_WIDTH),
    Rope(
        "FalconForCausalLM",
        SIZES | WIDTH | {"new_decoder_architecture": True, "num_kv_heads": 2},
        HALF_WIDTH,
        name="falcon-grouped",
    ),
    Rope("CohereForCausalLM", GROUPED | WIDTH, HALF_WIDTH, interleaved=True),
    Rope("HeliumForCausalLM", GROUPED | WIDTH | {"head_dim": 16}, HALF_WIDTH | HALF_HEAD, interleaved=True),
    Rope("GlmForCausalLM", GROUPED | HEAD, HALF_HEAD, interleaved=True, rotated=8),
    Rope("Glm4ForCausalLM", GROUPED | HEAD, HALF_HEAD, interleaved=True, rotated=8),
    Rope(
        "GPTJForCausalLM",
        GPT | {"n_embd": 64, "rotary_dim": 8},
        {"n_embd": 32, "rotary_dim": 4},
        interleaved=True,
        rotated=8,
    ),
    Rope(
        "CodeGenForCausalLM",
        GPT | {"n_embd": 64, "rotary_dim": 8},
        {"n_embd": 32, "rotary_dim": 4},
        interleaved=True,
        rotated=8,
    ),
    Rope("MixtralForCausalLM", GROUPED | HEAD | EXPERTS, HALF_HEAD),
    Rope("GraniteMoeForCausalLM", GROUPED | WIDTH | EXPERTS, HALF_WIDTH),
    Rope("PhimoeForCausalLM", GROUPED | WIDTH | EXPERTS, HALF_WIDTH),
    Rope("GptOssForCausalLM", GROUPED | HEAD | EXPERTS, HALF_HEAD),
]


def make_teacher(rope: Rope) -> PreTrainedModel:
    """Return a teacher, float64, whose embeddings span as many directions as the student has: none is lost.

    So do its norms' biases, which weights without a bias could not absorb otherwise.
    """
    model_class = getattr(transformers, rope.model_class)
    ids = {"vocab_size": TOKENS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
    teacher = model_class._from_config(model_class.config_class(**ids, **rope.teacher), dtype=torch.float64).eval()
    layout = variant_for(registered_layouts()[teacher.config.model_type], teacher.config)
    randomize(teacher, layout, seed=1, length=100.0)  # a long stream hides the eps of the norms
    width = teacher.config.hidden_size
    kept = rope.student.get("hidden_size", rope.student.get("n_embd", width))
    if kept < width:
        directions = random_orthonormal(width, kept, seed=2, keep_mean=layout.norm == "layer")
        table = teacher.get_input_embeddings().weight
        with torch.no_grad():
            table.copy_(table @ directions @ directions.T)
            for module in teacher.modules():
                if isinstance(module, torch.nn.LayerNorm) and len(module.weight) == width and module.bias is not None:
                    gain = module.weight + layout.norm_offset
                    module.bias.copy_(gain * (directions @ directions.T @ (module.bias / gain)))
    return teacher


def kept_places(rope: Rope) -> list[int]:
    """Return the dimensions of a head that one of half the size keeps: every other pair, every other of the rest."""
    pairs = range(0, rope.rotated // 2, 2)
    if rope.interleaved:
        rotated = [2 * pair + part for pair in pairs for part in (0, 1)]
    else:
        rotated = [pair + part * rope.rotated // 2 for part in (0, 1) for pair in pairs]
    return rotated + list(range(rope.rotated, 16, 2))


@torch.no_grad()
def attention_of(model: PreTrainedModel) -> Tensor:
    """Return the first block's attention weights, (batch, heads, query, key)."""
    model.set_attn_implementation("eager")
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the others multiply no float64
    return model(**tokens(), output_attentions=True).attentions[0]


@torch.no_grad()
def restrict(teacher: PreTrainedModel, rope: Rope) -> None:
    """Restrict the products of `teacher`'s queries and keys to the selected dimensions, times 2: other queries become zero."""
    layout = variant_for(registered_layouts()[teacher.config.model_type], teacher.config)
    layout = merge_tied_axes(layout, [relative_name(name, teacher) for name in teacher.state_dict()])
    mask = torch.zeros(16, dtype=torch.float64)
    mask[kept_places(rope)] = 2.0

    def multipliers(axis: Axis, sizes: dict[str, int]) -> Tensor:
        if isinstance(axis, AxisName):
            return (
                mask
                if axis.name == "q_dim"
                else torch.ones(int(axis.name) if axis.name.isdigit() else sizes[axis.name])
            )
        parts = [
            multipliers(part, sizes).double()
            for part in (axis.factors if isinstance(axis, AxisProduct) else axis.terms)
        ]
        if not isinstance(axis, AxisProduct):
            return torch.cat(parts)
        found = parts[0]
        for part in parts[1:]:
            found = torch.kron(found, part)
        return found

    changed = 0
    for name, tensor in teacher.state_dict(keep_vars=True).items():
        match = layout.find(relative_name(name, teacher))
        if match is None or match.row.kind != "weight" or "q_dim" not in str(match.row.output_axis):
            continue
        found = multipliers(match.row.output_axis, config_sizes(layout, teacher.config))
        tensor.mul_(found.view(-1, *[1] * (tensor.ndim - 1)))
        changed += 1
    assert changed >= teacher.config.num_hidden_layers, "the layout names no queries"


@pytest.mark.sampled(12)
@pytest.mark.parametrize("rope", ROPES, ids=str)
def test_attention_is_the_teachers_through_the_selected_pairs(rope: Rope) -> None:
    teacher = make_teacher(rope)
    full = attention_of(teacher)
    student = attention_of(from_teacher(teacher, **rope.student, show_progress=False))
    restrict(teacher, rope)
    restricted = attention_of(teacher)
    assert (student - restricted).abs().max() <= 1e-6
    assert (student - full).abs().max() > 1e-2, "nothing was lost, so nothing was tried"


def pattern(rope: Rope, queries: Tensor, keys: Tensor, theta: float, scale: float) -> Tensor:
    """Return the causal attention of the selected dimensions, (batch, heads, query, key), by complex numbers.

    queries, keys: (batch, heads, tokens, l_T), before their rotation; theta: the base of the teacher's frequencies.
    """
    half = rope.rotated // 2
    firsts = [2 * pair if rope.interleaved else pair for pair in range(half)]
    seconds = [2 * pair + 1 if rope.interleaved else pair + half for pair in range(half)]
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64) * 2 / rope.rotated)
    rotations = torch.outer(torch.arange(queries.shape[2], dtype=torch.float64), frequencies)
    rotated = [
        torch.complex(part[..., firsts], part[..., seconds]) * torch.polar(torch.ones_like(rotations), rotations)
        for part in (queries, keys)
    ]
    of_pairs = torch.einsum("bhqp,bhkp->bhqkp", rotated[0], rotated[1].conj()).real[..., ::2].sum(-1)
    rest = list(range(rope.rotated, queries.shape[-1], 2))
    logits = scale * (of_pairs + queries[..., rest] @ keys[..., rest].mT)
    later = torch.ones(logits.shape[-2:]).triu(1).bool()
    return logits.masked_fill(later, -math.inf).softmax(-1)


def first_block(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Return queries and keys of the first block before their rotation, (batch, heads, tokens, head size)."""
    base = model.base_model
    stream = model.get_input_embeddings()(tokens()["input_ids"])
    if model.config.model_type == "gpt_neox":
        block = base.layers[0]
        fused = block.attention.query_key_value(block.input_layernorm(stream))
        return fused.unflatten(-1, (4, 48)).transpose(1, 2).split(16, dim=-1)[:2]
    block = base.h[0] if model.config.model_type == "gptj" else base.layers[0]
    read = block.ln_1(stream) if model.config.model_type == "gptj" else block.input_layernorm(stream)
    attention = block.attn if model.config.model_type == "gptj" else block.self_attn
    queries, keys = (
        linear(read).unflatten(-1, (-1, 16)).transpose(1, 2) for linear in (attention.q_proj, attention.k_proj)
    )
    return queries, keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("model_class", ["LlamaForCausalLM", "GPTJForCausalLM", "GPTNeoXForCausalLM"])
def test_attention_is_the_formulas_on_the_teachers_scale(model_class: str) -> None:
    rope = next(rope for rope in ROPES if rope.model_class == model_class)
    teacher = make_teacher(rope)
    student = from_teacher(teacher, **rope.student, show_progress=False)
    scale = 2 * 16**-0.5
    expected = pattern(rope, *first_block(teacher), theta=10000.0, scale=scale)
    assert (attention_of(student) - expected).abs().max() <= 1e-6
