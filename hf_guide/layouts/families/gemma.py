"""Gemma to Gemma 3."""

from hf_guide.layouts.families.exactness import SANDWICH_NORM_NOTE
from hf_guide.layouts.registry import register_layout

register_layout("gemma", like="llama", norm_offset=1.0, embedding_scale=lambda config: config.hidden_size**0.5)
register_layout(
    "gemma2",
    """
    layers.{block}
      .self_attn.o_proj: embed (kv_heads group head_dim) >> .post_attention_layernorm
      .mlp.down_proj: embed mlp >> .post_feedforward_layernorm
      .pre_feedforward_layernorm: norm embed
      .mlp.gate_proj: mlp embed < .pre_feedforward_layernorm
      .mlp.up_proj: mlp embed < .pre_feedforward_layernorm
      .post_feedforward_layernorm: norm embed
    """,
    like="gemma",
    attention_scale=lambda config: config.query_pre_attn_scalar**-0.5,
    exactness=SANDWICH_NORM_NOTE.format("5 %"),
)
register_layout("gemma3_text", like="gemma2", exactness=SANDWICH_NORM_NOTE.format("5 %"))
