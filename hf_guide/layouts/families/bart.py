"""BART, mBART, Pegasus, Blenderbot, PLBart and MVP. Encoder and decoder share the embedding and its directions."""

import math
from collections.abc import Callable

from transformers import PreTrainedConfig

from hf_guide.layouts.registry import register_layout


def _scaled_embedding(config: PreTrainedConfig) -> float:
    return math.sqrt(config.d_model) if config.scale_embedding else 1.0


def _positions_against_tokens(config: PreTrainedConfig) -> float:
    return 1 / _scaled_embedding(config)


TWO_SIDED_SIZES: dict[str, str | Callable[[PreTrainedConfig], int]] = {
    "heads": "decoder_attention_heads",
    "head_dim": lambda config: config.d_model // config.decoder_attention_heads,
    "enc_heads": "encoder_attention_heads",
    "enc_q_dim": lambda config: config.d_model // config.encoder_attention_heads,
    "enc_k_dim": lambda config: config.d_model // config.encoder_attention_heads,
    "enc_head_dim": lambda config: config.d_model // config.encoder_attention_heads,
}

register_layout(
    "bart",
    """
    shared: table vocab embed
    encoder.embed_tokens: table vocab embed
    encoder.embed_positions: positions embed
    encoder.layernorm_embedding: norm embed
    encoder.layers.{block}
      .self_attn.q_proj: (enc_heads enc_q_dim) embed
      .self_attn.k_proj: (enc_heads enc_k_dim) embed
      .self_attn.v_proj: (enc_heads enc_head_dim) embed
      .self_attn.out_proj: embed (enc_heads enc_head_dim)
      .self_attn_layer_norm: norm embed
      .fc1: mlp embed
      .fc2: embed mlp
      .final_layer_norm: norm embed
    decoder.embed_tokens: table vocab embed
    decoder.embed_positions: positions embed
    decoder.layernorm_embedding: norm embed
    decoder.layers.{block}
      .self_attn.q_proj: (heads q_dim) embed
      .self_attn.k_proj: (heads k_dim) embed
      .self_attn.v_proj: (heads head_dim) embed
      .self_attn.out_proj: embed (heads head_dim)
      .self_attn_layer_norm: norm embed
      .encoder_attn.q_proj: (heads q_dim) embed
      .encoder_attn.k_proj: (heads k_dim) embed
      .encoder_attn.v_proj: (heads head_dim) embed
      .encoder_attn.out_proj: embed (heads head_dim)
      .encoder_attn_layer_norm: norm embed
      .fc1: mlp embed
      .fc2: embed mlp
      .final_layer_norm: norm embed
    lm_head: vocab embed
    final_logits_bias: 1 vocab
    classification_head.dense: pooled embed
    classification_head.out_proj: labels pooled
    qa_outputs: 2 embed
    """,
    norm="layer",
    sizes=TWO_SIDED_SIZES,
    scales={  # a norm follows the sum; the embedding itself is tied to a head without a norm
        "encoder.embed_positions": _positions_against_tokens,
        "decoder.embed_positions": _positions_against_tokens,
    },
    exactness="post-norm: gains become diagonals: logits off by 44 % on a rotated residual stream, gains at 1 +- 0.3",
)

for family in ("plbart", "mvp"):
    register_layout(family, like="bart")
# Its decoder norms tokens before it adds positions.
register_layout("blenderbot-small", like="bart", scales={"encoder.embed_positions": _positions_against_tokens})

register_layout(
    "mbart",
    """
    encoder.layers.{block}
      .self_attn.q_proj: (enc_heads enc_q_dim) embed < .self_attn_layer_norm
      .self_attn.k_proj: (enc_heads enc_k_dim) embed < .self_attn_layer_norm
      .self_attn.v_proj: (enc_heads enc_head_dim) embed < .self_attn_layer_norm
      .fc1: mlp embed < .final_layer_norm
    encoder.layer_norm: norm embed
    decoder.layers.{block}
      .self_attn.q_proj: (heads q_dim) embed < .self_attn_layer_norm
      .self_attn.k_proj: (heads k_dim) embed < .self_attn_layer_norm
      .self_attn.v_proj: (heads head_dim) embed < .self_attn_layer_norm
      .encoder_attn.q_proj: (heads q_dim) embed < .encoder_attn_layer_norm
      .encoder_attn.k_proj: (heads k_dim) embed < encoder.layer_norm
      .encoder_attn.v_proj: (heads head_dim) embed < encoder.layer_norm
      .fc1: mlp embed < .final_layer_norm
    decoder.layer_norm: norm embed
    lm_head: vocab embed < decoder.layer_norm
    classification_head.dense: pooled embed < decoder.layer_norm
    qa_outputs: 2 embed < decoder.layer_norm
    """,
    like="bart",
    embedding_scale=_scaled_embedding,
    scales={},
    exactness="gains of the embeddings' norms become diagonals: logits off by 18 % on a rotated residual stream, gains at "
    "1 +- 0.3",
)
for family in ("pegasus", "blenderbot"):
    register_layout(family, like="mbart", exactness="exact")
