"""BLOOM, Falcon and MPT: decoders whose first versions have ALiBi."""

from transformers import PreTrainedConfig

from hf_guide.layouts.families.exactness import STREAM_NORM_NOTE
from hf_guide.layouts.registry import register_layout


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
