"""Layouts of encoder-decoders. Nothing but tables: `layouts.py` says how they are read.

Encoder and decoder that share a table share its directions; those of Whisper are two streams, `enc_embed` and `embed`.
"""

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
"""Sizes of families whose encoder and decoder may have other numbers of heads."""

register_layout(
    "t5",
    """
    shared: table vocab embed
    encoder.embed_tokens: table vocab embed
    encoder.block.0.layer.0.SelfAttention.relative_attention_bias: buckets heads
    encoder.block.{block}
      .layer.0.layer_norm: norm embed
      .layer.0.SelfAttention.q: (heads q_dim) embed < .layer.0.layer_norm
      .layer.0.SelfAttention.k: (heads k_dim) embed < .layer.0.layer_norm
      .layer.0.SelfAttention.v: (heads head_dim) embed < .layer.0.layer_norm
      .layer.0.SelfAttention.o: embed (heads head_dim)
      .layer.1.layer_norm: norm embed
      .layer.1.DenseReluDense.wi: mlp embed < .layer.1.layer_norm
      .layer.1.DenseReluDense.wi_0: mlp embed < .layer.1.layer_norm
      .layer.1.DenseReluDense.wi_1: mlp embed < .layer.1.layer_norm
      .layer.1.DenseReluDense.wo: embed mlp
    encoder.final_layer_norm: norm embed
    decoder.embed_tokens: table vocab embed
    decoder.block.0.layer.0.SelfAttention.relative_attention_bias: buckets heads
    decoder.block.{block}
      .layer.0.layer_norm: norm embed
      .layer.0.SelfAttention.q: (heads q_dim) embed < .layer.0.layer_norm
      .layer.0.SelfAttention.k: (heads k_dim) embed < .layer.0.layer_norm
      .layer.0.SelfAttention.v: (heads head_dim) embed < .layer.0.layer_norm
      .layer.0.SelfAttention.o: embed (heads head_dim)
      .layer.1.layer_norm: norm embed
      .layer.1.EncDecAttention.q: (heads q_dim) embed < .layer.1.layer_norm
      .layer.1.EncDecAttention.k: (heads k_dim) embed < encoder.final_layer_norm
      .layer.1.EncDecAttention.v: (heads head_dim) embed < encoder.final_layer_norm
      .layer.1.EncDecAttention.o: embed (heads head_dim)
      .layer.2.layer_norm: norm embed
      .layer.2.DenseReluDense.wi: mlp embed < .layer.2.layer_norm
      .layer.2.DenseReluDense.wi_0: mlp embed < .layer.2.layer_norm
      .layer.2.DenseReluDense.wi_1: mlp embed < .layer.2.layer_norm
      .layer.2.DenseReluDense.wo: embed mlp
    decoder.final_layer_norm: norm embed
    lm_head: vocab embed < decoder.final_layer_norm
    classification_head.dense: pooled embed < decoder.final_layer_norm
    classification_head.out_proj: labels pooled
    classifier: labels embed < encoder.final_layer_norm
    qa_outputs: 2 embed < decoder.final_layer_norm
    """,
    sizes={"heads": "num_heads", "head_dim": "d_kv"},
    attention_scale=lambda config: 1.0,
    tied_head_scale=lambda config: config.d_model**-0.5 if config.scale_decoder_outputs else 1.0,
)
register_layout("mt5", like="t5", tied_head_scale=lambda config: 1.0)
register_layout(
    "umt5",
    """
    encoder.block.{block}.layer.0.SelfAttention.relative_attention_bias: buckets heads
    decoder.block.{block}.layer.0.SelfAttention.relative_attention_bias: buckets heads
    """,
    like="t5",
    tied_head_scale=lambda config: config.d_model**-0.5 if config.tie_word_embeddings else 1.0,
)

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
    scales={  # a norm follows the sum; the table itself is tied to a head with no norm before it
        "encoder.embed_positions": _positions_against_tokens,
        "decoder.embed_positions": _positions_against_tokens,
    },
    exactness="post-norm: gains become diagonals: logits off by 44 % on a turned stream, gains being 1 +- 0.3",
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
    exactness="gains of the embeddings' norms become diagonals: logits off by 18 % on a turned stream, gains being "
    "1 +- 0.3",
)
for family in ("pegasus", "blenderbot"):
    register_layout(family, like="mbart", exactness="exact")

register_layout(
    "whisper",
    """
    encoder.conv1: filters channels kernel
    encoder.conv2: table enc_embed filters kernel
    encoder.embed_positions: table positions enc_embed
    encoder.layers.{block}
      .self_attn.q_proj: (enc_heads enc_q_dim) enc_embed < .self_attn_layer_norm
      .self_attn.k_proj: (enc_heads enc_k_dim) enc_embed < .self_attn_layer_norm
      .self_attn.v_proj: (enc_heads enc_head_dim) enc_embed < .self_attn_layer_norm
      .self_attn.out_proj: enc_embed (enc_heads enc_head_dim)
      .self_attn_layer_norm: norm enc_embed
      .fc1: mlp enc_embed < .final_layer_norm
      .fc2: enc_embed mlp
      .final_layer_norm: norm enc_embed
    encoder.layer_norm: norm enc_embed
    decoder.layers.{block}
      .encoder_attn.k_proj: (heads k_dim) enc_embed < encoder.layer_norm
      .encoder_attn.v_proj: (heads head_dim) enc_embed < encoder.layer_norm
    proj_out: vocab embed < decoder.layer_norm
    projector: pooled enc_embed < encoder.layer_norm
    classifier: labels pooled
    """,
    like="mbart",
    embedding_scale=lambda config: 1.0,  # which it has, and does not use
    exactness="exact but for GELU on the encoder's stream after the second convolution",
)
