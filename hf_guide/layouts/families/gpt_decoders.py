"""Layouts of GPT-2 and its descendants. Nothing but tables: `layouts.py` says how they are read."""

from transformers import PreTrainedConfig

from hf_guide.layouts.registry import register_layout

STREAM_NORM_NOTE = "the gains of {} become diagonals: logits off by {} on a turned stream, gains being 1 +- 0.3"


def _inverse_index(config: PreTrainedConfig, block: int) -> float:
    """By what GPT-2 may divide a block's attention, so that it is not lost in half precision."""
    return 1 / (block + 1) if getattr(config, "scale_attn_by_inverse_layer_idx", False) else 1.0


register_layout(
    "gpt2",
    """
    wte: table vocab embed
    wpe: positions embed
    h.{block}
      .ln_1: norm embed
      .attn.c_attn: embed -> (heads q_dim + heads k_dim + heads head_dim) < .ln_1 | .ln_1 | .ln_1
      .attn.c_proj: (heads head_dim) -> embed
      .ln_2: norm embed
      .mlp.c_fc: embed -> mlp < .ln_2
      .mlp.c_proj: mlp -> embed
    ln_f: norm embed
    lm_head: vocab embed < ln_f
    score: labels embed < ln_f
    classifier: labels embed < ln_f
    qa_outputs: 2 embed < ln_f
    """,
    norm="layer",
    block_attention_scale=_inverse_index,
)

register_layout(
    "gpt_neo",
    """
    h.{block}
      .attn.attention.q_proj: (heads q_dim) embed < .ln_1
      .attn.attention.k_proj: (heads k_dim) embed < .ln_1
      .attn.attention.v_proj: (heads head_dim) embed < .ln_1
      .attn.attention.out_proj: embed (heads head_dim)
      .mlp.c_fc: mlp embed < .ln_2
      .mlp.c_proj: embed mlp
    """,
    like="gpt2",
    attention_scale=lambda config: 1.0,
)


def _gpt_bigcode(config: PreTrainedConfig) -> str:
    return "gpt_bigcode" if config.multi_query else "gpt_bigcode (multi-head)"


register_layout(
    "gpt_bigcode",
    """
    h.{block}
      .attn.c_attn: (kv_heads group q_dim + kv_heads k_dim + kv_heads head_dim) embed < .ln_1
      .attn.c_proj: embed (kv_heads group head_dim)
      .mlp.c_fc: mlp embed < .ln_2
      .mlp.c_proj: embed mlp
    """,
    like="gpt2",
    sizes={"kv_heads": lambda config: 1 if config.multi_query else config.n_head},
    attention_scale=lambda config: (config.n_embd // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0,
    variant=_gpt_bigcode,
)
register_layout(
    "gpt_bigcode (multi-head)",
    "h.{block}.attn.c_attn: (heads (q_dim + k_dim + head_dim)) embed < h.{block}.ln_1",
    like="gpt_bigcode",
    variant=_gpt_bigcode,
)

register_layout(
    "gptj",
    """
    h.{block}
      .attn.q_proj: (heads q_dim) embed < .ln_1
      .attn.k_proj: (heads k_dim) embed < .ln_1
      .attn.v_proj: (heads head_dim) embed < .ln_1
      .attn.out_proj: embed (heads head_dim)
      .mlp.fc_in: mlp embed < .ln_1
      .mlp.fc_out: embed mlp
    qa_outputs: labels embed < ln_f
    """,
    like="gpt2",
    rope="interleaved",
    rotary_size=lambda config: config.rotary_dim,
)
register_layout(
    "codegen",
    """
    h.{block}
      .attn.qkv_proj: (4 (share q_dim + share head_dim + share k_dim)) embed < .ln_1
      .attn.out_proj: embed (4 share head_dim)
    """,
    like="gptj",
    sizes={"share": lambda config: config.n_head // 4},
)

register_layout(
    "gpt_neox",
    """
    embed_in: table vocab embed
    layers.{block}
      .input_layernorm: norm embed
      .attention.query_key_value: (heads (q_dim + k_dim + head_dim)) embed < .input_layernorm
      .attention.dense: embed (heads head_dim)
      .post_attention_layernorm: norm embed
      .mlp.dense_h_to_4h: mlp embed < .post_attention_layernorm
      .mlp.dense_4h_to_h: embed mlp
    final_layer_norm: norm embed
    lm_head: vocab embed < final_layer_norm
    score: labels embed < final_layer_norm
    classifier: labels embed < final_layer_norm
    qa_outputs: 2 embed < final_layer_norm
    """,
    norm="layer",
    rope="half",
)


def _bloom(config: PreTrainedConfig) -> str:
    return "bloom (normed residual)" if config.apply_residual_connection_post_layernorm else "bloom"


register_layout(
    "bloom",
    """
    word_embeddings: table vocab embed
    word_embeddings_layernorm: norm embed
    h.{block}
      .input_layernorm: norm embed
      .self_attention.query_key_value: (heads (q_dim + k_dim + head_dim)) embed < .input_layernorm
      .self_attention.dense: embed (heads head_dim)
      .post_attention_layernorm: norm embed
      .mlp.dense_h_to_4h: mlp embed < .post_attention_layernorm
      .mlp.dense_4h_to_h: embed mlp
    ln_f: norm embed
    lm_head: vocab embed < ln_f
    score: labels embed < ln_f
    classifier: labels embed < ln_f
    qa_outputs: 2 embed < ln_f
    """,
    norm="layer",
    alibi=lambda config: True,
    variant=_bloom,
    exactness=STREAM_NORM_NOTE.format("the embeddings' norm", "22 %"),
)
register_layout(
    "bloom (normed residual)",
    """
    h.{block}
      .self_attention.query_key_value: (heads (q_dim + k_dim + head_dim)) embed
      .mlp.dense_h_to_4h: mlp embed
    """,
    like="bloom",
    variant=_bloom,
    exactness=STREAM_NORM_NOTE.format("all norms but the last", "48 %"),
)


def _falcon(config: PreTrainedConfig) -> str:
    if config.new_decoder_architecture and config.num_ln_in_parallel_attn != 1:
        return "falcon (two norms)"
    return "falcon" if config.parallel_attn else "falcon (sequential)"


register_layout(
    "falcon",
    """
    h.{block}
      .self_attention.query_key_value: (kv_heads (group q_dim + k_dim + head_dim)) embed < .input_layernorm
      .self_attention.dense: embed (kv_heads group head_dim)
      .mlp.dense_h_to_4h: mlp embed < .input_layernorm
    """,
    like="bloom",
    exactness="exact",
    rope="half",
    sizes={
        "kv_heads": lambda config: (
            config.num_kv_heads
            if config.new_decoder_architecture
            else 1
            if config.multi_query
            else config.num_attention_heads
        )
    },
    alibi=lambda config: config.alibi,
    variant=_falcon,
)
register_layout(
    "falcon (sequential)",
    "h.{block}.mlp.dense_h_to_4h: mlp embed < h.{block}.post_attention_layernorm",
    like="falcon",
    variant=_falcon,
)
register_layout(
    "falcon (two norms)",
    """
    h.{block}
      .ln_attn: norm embed
      .self_attention.query_key_value: (kv_heads (group q_dim + k_dim + head_dim)) embed < .ln_attn
      .ln_mlp: norm embed
      .mlp.dense_h_to_4h: mlp embed < .ln_mlp
    """,
    like="falcon",
    variant=_falcon,
)

register_layout(
    "mpt",
    """
    wte: table vocab embed
    blocks.{block}
      .norm_1: norm embed
      .attn.Wqkv: (heads q_dim + heads k_dim + heads head_dim) embed < .norm_1
      .attn.out_proj: embed (heads head_dim)
      .norm_2: norm embed
      .ffn.up_proj: mlp embed < .norm_2
      .ffn.down_proj: embed mlp
    norm_f: norm embed
    lm_head: vocab embed < norm_f
    score: labels embed < norm_f
    classifier: labels embed < norm_f
    qa_outputs: 2 embed < norm_f
    """,
    norm="layer",
    attention_scale=lambda config: config.attn_config.softmax_scale or (config.d_model / config.n_heads) ** -0.5,
    alibi=lambda config: True,
)
