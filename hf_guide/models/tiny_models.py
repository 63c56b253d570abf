"""Tiny twins: a config of the same family and the same switches, small enough to try a law on in a second."""

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

TINY_SIZES = {
    "hidden_size": 64,
    "d_model": 64,
    "n_embd": 64,
    "dim": 64,
    "emb_dim": 64,
    "word_embed_proj_dim": 64,
    "embedding_size": 64,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "d_ff": 96,
    "n_inner": 96,
    "ffn_hidden_size": 96,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "moe_intermediate_size": 32,
    "intermediate_size_mlp": 96,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "shared_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 16,
    "rotary_dim": 8,
    "d_head": 16,
    "d_inner": 96,
    "num_mem_blocks": 1,
    "attention_hidden_size": 64,
    "zero_expert_num": 2,
    "attention_head_dim": 16,
    "global_head_dim": 16,
    "vocab_size": 99,
    "vocab_size_per_layer_input": 99,
    "hidden_size_per_layer_input": 16,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "max_source_positions": 20,
    "max_target_positions": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_groups": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 4,
    "sliding_window": 32,
    "state_size": 8,
    "mamba_d_state": 8,
    "ssm_state_size": 8,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "time_step_rank": 4,
    "mamba_dt_rank": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "lru_width": 64,
    "attention_window_size": 32,
    "image_size": 16,
    "patch_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
"""What a twin's sizes are, by the names that Transformers' configs give them."""


MODEL_ERRORS = (
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    IndexError,
    RuntimeError,
    AssertionError,
    ImportError,
    ZeroDivisionError,
    StrictDataclassError,
)
"""What a family may raise that refuses a twin's sizes: then nothing is certain, and only that is concluded."""


DEPTH_FIELDS = (
    *("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "encoder_layers", "decoder_layers"),
    *("num_encoder_layers", "num_decoder_layers"),
)
"""What configs call the number of blocks in a stack."""


def tiny_config(config: PreTrainedConfig, **sizes: Any) -> PreTrainedConfig:
    """Return a config of the same class and switches with `TINY_SIZES` (and `sizes`) for its sizes.

    Lists with an entry per block are cut to the twin's blocks; nested configs are shrunk likewise.

    Raises:
        whatever the family's config raises for a shape that it refuses.
    """
    return _shrink(config, sizes, keep_depth=False)


def tiny_config_of_same_depth(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a config as `tiny_config` does, but with as many blocks in each stack as `config`, and every list by block whole.

    Raises:
        whatever the family's config raises for a shape that it refuses.
    """
    return _shrink(config, {}, keep_depth=True)


def _shrink(config: PreTrainedConfig, sizes: Mapping[str, Any], *, keep_depth: bool) -> PreTrainedConfig:
    stated = config.to_dict()
    wanted = TINY_SIZES | dict(sizes)
    if "qk_rope_head_dim" in stated:  # there the rotary embedding takes head_dim for its own size
        wanted = wanted | {"head_dim": wanted["qk_rope_head_dim"]}
    kept = [*range(_num_blocks(stated) or 0)] if keep_depth else _select_blocks(stated, wanted["num_hidden_layers"])
    tiny: dict[str, Any] = {}
    for key, value in stated.items():
        if key in (
            "quantization_config",
            "transformers_version",
            "model_type",
            "dtype",
            "architectures",
            "id2label",
            "label2id",
            *(
                "out_features",
                "out_indices",
                "stage_names",
            ),  # of backbones; they name stages, which follow from the depth
        ):
            continue
        if isinstance(value, dict) and key in config.sub_configs:
            tiny[key] = _shrink(getattr(config, key), sizes, keep_depth=keep_depth)
        elif keep_depth and key in DEPTH_FIELDS:
            tiny[key] = value
        elif isinstance(value, list) and value and len(value) == _num_blocks(stated):
            tiny[key] = copy.deepcopy([value[block] for block in kept])
        elif key in _STACK_DEPTH_FIELDS and isinstance(value, int):
            tiny[key] = len(kept)
        elif key in sizes:
            tiny[key] = sizes[key]
        elif isinstance(value, int) and not isinstance(value, bool) and key in wanted:
            tiny[key] = min(wanted[key], value)
        elif value is None and key == "head_dim" and {"hidden_size", "num_attention_heads"} <= stated.keys():
            tiny[key] = wanted["hidden_size"] // wanted["num_attention_heads"]
        elif key == "per_layer_config" and value:
            entries = {int(block): changes for block, changes in value.items()}
            tiny[key] = {
                place: {name: _shrink_value(size, wanted.get(name)) for name, size in entries[block].items()}
                for place, block in enumerate(kept)
                if block in entries
            }
        elif key == "rope_parameters" and isinstance(value, dict) and value.get("mrope_section"):
            tiny[key] = copy.deepcopy(value) | {
                "mrope_section": _shrink_mrope_sections(value["mrope_section"], stated, wanted)
            }
        else:
            tiny[key] = copy.deepcopy(value)
    if stated.get("num_key_value_heads") is not None and stated["num_key_value_heads"] == stated.get(
        "num_attention_heads"
    ):
        tiny["num_key_value_heads"] = tiny["num_attention_heads"]
    if {"expand", "num_heads", "head_dim", "hidden_size"} <= tiny.keys() and isinstance(tiny["expand"], int):
        tiny["num_heads"] = tiny["expand"] * tiny["hidden_size"] // tiny["head_dim"]  # Mamba 2's
    return type(config)(**tiny)


def _shrink_value(value: Any, wanted: Any) -> Any:
    return min(value, wanted) if type(value) is int and type(wanted) is int else copy.deepcopy(value)


def _shrink_mrope_sections(sections: list[int], stated: dict[str, Any], wanted: dict[str, Any]) -> list[int]:
    """Return how many rotary pairs each axis of a multi-axis rotary embedding has where heads are the twin's."""
    heads = stated.get("num_attention_heads") or 1
    head_dim = stated.get("head_dim") or (stated.get("hidden_size") or 0) // heads
    tiny = wanted["head_dim"] if stated.get("head_dim") else wanted["hidden_size"] // wanted["num_attention_heads"]
    total = sum(sections) * min(tiny, head_dim) // max(head_dim, 1)
    shares = [section * total // sum(sections) for section in sections]
    return [*shares[:-1], total - sum(shares[:-1])]


_STACK_DEPTH_FIELDS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")


def _num_blocks(stated: dict[str, Any]) -> int | None:
    return next((stated[key] for key in _STACK_DEPTH_FIELDS if isinstance(stated.get(key), int)), None)


def _select_blocks(stated: dict[str, Any], count: int) -> list[int]:
    """Return at least `count` blocks, one of every kind that the lists with an entry per block tell apart among them."""
    blocks = _num_blocks(stated) or count
    lists = [value for value in stated.values() if isinstance(value, list) and len(value) == blocks]
    kinds = [
        repr(
            [
                value[block]
                for value in lists
                if not isinstance(value[block], (float, int)) or isinstance(value[block], bool)
            ]
        )
        for block in range(blocks)
    ]
    firsts = [block for block in range(blocks) if kinds.index(kinds[block]) == block][: 2 * count]
    others = [block for block in range(blocks) if block not in firsts]
    return sorted(firsts + others[: max(0, count - len(firsts))])


def build_tiny_model(model_class: type[PreTrainedModel], config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Return a float64 model of a twin's config in evaluation mode, its parameters drawn with `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class._from_config(config, dtype=torch.float64)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")  # the grouped kernels know no float64
    return model.eval()


def randomize_parameters(model: PreTrainedModel, seed: int) -> None:
    """Draw every floating parameter anew, so that a law that holds holds not by chance: gains around 1, the rest around 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if tensor.ndim < 2:
                tensor.add_(0.2 * noise.clamp(-2, 2))
            else:
                tensor.copy_(noise if "embed" in name else noise / math.sqrt(tensor.shape[-1]))
