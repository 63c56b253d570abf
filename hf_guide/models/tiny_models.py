"""Tiny models: of the same family and with the same switches as a config, small enough to test a law in a second."""

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel, ResNetConfig

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
    "projection_size": 64,
    "pooler_hidden_size": 64,
    "image_size": 16,
    "patch_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
"""The sizes of a tiny model, by the names that Transformers' configs give them."""


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
"""What a family may raise for a config that it does not support."""


DEPTH_FIELDS = (
    *("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "encoder_layers", "decoder_layers"),
    *("num_encoder_layers", "num_decoder_layers"),
)
"""The names that configs give the number of blocks in a stack."""


def tiny_config(config: PreTrainedConfig, **sizes: Any) -> PreTrainedConfig:
    """Return a config of the same class and switches with `TINY_SIZES` (and `sizes`) for its sizes.

    Lists with an entry per block are cut to the tiny model's blocks, one of every kind; nested configs are shrunk likewise.

    Raises:
        what the family's config raises for sizes that it does not support.

    Example:
        >>> from transformers import LlamaConfig
        >>> config = tiny_config(LlamaConfig(), num_hidden_layers=2)
        >>> config.hidden_size, config.num_hidden_layers
        (64, 2)
    """
    return _shrink(config, sizes, keep_depth=False)


def tiny_config_of_same_depth(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a config as `tiny_config` does, but with the depths of `config` and its lists by block unchanged.

    Raises:
        what the family's config raises for sizes that it does not support.
    """
    return _shrink(config, {}, keep_depth=True)


_NOT_COPIED = (
    *("quantization_config", "transformers_version", "model_type", "dtype", "architectures", "id2label", "label2id"),
    *("out_features", "out_indices", "stage_names"),  # of backbones: stages follow from the depth
)


def _shrink(config: PreTrainedConfig, sizes: Mapping[str, Any], *, keep_depth: bool) -> PreTrainedConfig:
    if config.model_type == "timm_backbone":  # its networks have no config, and timm may be missing
        tiny_resnet = ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], layer_type="basic"
        )
        tiny_resnet.set_output_features_output_indices(out_features=None, out_indices=list(config.out_indices or [4]))
        return tiny_resnet
    values = config.to_dict()
    tiny_sizes = TINY_SIZES | dict(sizes)
    if "qk_rope_head_dim" in values:  # there head_dim is the size of the rotary embedding
        tiny_sizes = tiny_sizes | {"head_dim": tiny_sizes["qk_rope_head_dim"]}
    blocks = (
        [*range(_num_blocks(values) or 0)] if keep_depth else _select_blocks(values, tiny_sizes["num_hidden_layers"])
    )
    tiny: dict[str, Any] = {}
    for key, value in values.items():
        if key in _NOT_COPIED:
            continue
        if isinstance(value, dict) and key in config.sub_configs:
            tiny[key] = _shrink(getattr(config, key), sizes, keep_depth=keep_depth)
        elif keep_depth and key in DEPTH_FIELDS:
            tiny[key] = value
        elif isinstance(value, list) and value and len(value) == _num_blocks(values):
            tiny[key] = copy.deepcopy([value[block] for block in blocks])
        elif key in _STACK_DEPTH_FIELDS and isinstance(value, int):
            tiny[key] = len(blocks)
        elif key in sizes:
            tiny[key] = sizes[key]
        elif key == "image_size" and isinstance(value, (list, tuple)):
            tiny[key] = [min(tiny_sizes[key], side) for side in value]
        elif isinstance(value, int) and not isinstance(value, bool) and key in tiny_sizes:
            tiny[key] = min(tiny_sizes[key], value)
        elif value is None and key == "head_dim" and {"hidden_size", "num_attention_heads"} <= values.keys():
            tiny[key] = tiny_sizes["hidden_size"] // tiny_sizes["num_attention_heads"]
        elif key == "per_layer_config" and value:
            entries = {int(block): changes for block, changes in value.items()}
            tiny[key] = {
                index: {name: _shrink_value(size, tiny_sizes.get(name)) for name, size in entries[block].items()}
                for index, block in enumerate(blocks)
                if block in entries
            }
        elif key == "rope_parameters" and isinstance(value, dict) and value.get("mrope_section"):
            tiny[key] = copy.deepcopy(value) | {
                "mrope_section": _shrink_mrope_sections(value["mrope_section"], values, tiny_sizes)
            }
        else:
            tiny[key] = copy.deepcopy(value)
    if values.get("num_key_value_heads") is not None and values["num_key_value_heads"] == values.get(
        "num_attention_heads"
    ):
        tiny["num_key_value_heads"] = tiny["num_attention_heads"]
    if {"expand", "num_heads", "head_dim", "hidden_size"} <= tiny.keys() and isinstance(tiny["expand"], int):
        tiny["num_heads"] = tiny["expand"] * tiny["hidden_size"] // tiny["head_dim"]  # Mamba 2's
    return type(config)(**tiny)


def _shrink_value(value: Any, limit: Any) -> Any:
    return min(value, limit) if type(value) is int and type(limit) is int else copy.deepcopy(value)


def _shrink_mrope_sections(sections: list[int], values: dict[str, Any], tiny_sizes: dict[str, Any]) -> list[int]:
    """Return the rotary pairs of each axis of a multi-axis rotary embedding in a tiny model's heads."""
    heads = values.get("num_attention_heads") or 1
    head_dim = values.get("head_dim") or (values.get("hidden_size") or 0) // heads
    tiny = (
        tiny_sizes["head_dim"]
        if values.get("head_dim")
        else tiny_sizes["hidden_size"] // tiny_sizes["num_attention_heads"]
    )
    total = sum(sections) * min(tiny, head_dim) // max(head_dim, 1)
    shares = [section * total // sum(sections) for section in sections]
    return [*shares[:-1], total - sum(shares[:-1])]


_STACK_DEPTH_FIELDS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")


def _num_blocks(values: dict[str, Any]) -> int | None:
    return next((values[key] for key in _STACK_DEPTH_FIELDS if isinstance(values.get(key), int)), None)


def _select_blocks(values: dict[str, Any], count: int) -> list[int]:
    """Return at least `count` blocks, one of every kind that the lists with an entry per block distinguish."""
    blocks = _num_blocks(values) or count
    lists = [value for value in values.values() if isinstance(value, list) and len(value) == blocks]
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
    """Return a float64 model of `config` in evaluation mode, its parameters drawn with `seed`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> build_tiny_model(LlamaForCausalLM, tiny_config(LlamaConfig())).dtype
        torch.float64
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class._from_config(config, dtype=torch.float64)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")  # the grouped kernels do not support float64
    return model.eval()


def randomize_parameters(model: PreTrainedModel, seed: int) -> None:
    """Move every floating parameter away from its default, so that no law holds by chance: gains around 1, others around 0."""
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
