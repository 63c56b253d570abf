"""OLMo to OLMo 3, and EXAONE 4, whose blocks are OLMo 2's."""

from hf_guide.layouts.families.exactness import SANDWICH_NORM_NOTE
from hf_guide.layouts.registry import register_layout

register_layout("olmo", like="llama", norm="layer")

register_layout(
    "olmo2",
    """
    layers.{block}
      .self_attn.o_proj: embed (kv_heads group head_dim) >> .post_attention_layernorm
      .mlp.down_proj: embed mlp >> .post_feedforward_layernorm
      .self_attn.q_proj: (kv_heads group q_dim) embed
      .self_attn.k_proj: (kv_heads k_dim) embed
      .self_attn.v_proj: (kv_heads head_dim) embed
      .self_attn.q_norm: norm (kv_heads group q_dim)
      .self_attn.k_norm: norm (kv_heads k_dim)
      .mlp.gate_proj: mlp embed
      .mlp.up_proj: mlp embed
      .post_feedforward_layernorm: norm embed
    """,
    like="llama",
    exactness=SANDWICH_NORM_NOTE.format("12 %"),
)
register_layout("olmo3", like="olmo2", exactness=SANDWICH_NORM_NOTE.format("12 %"))

register_layout(
    "exaone4",
    """
    layers.{block}
      .self_attn.q_norm: norm q_dim
      .self_attn.k_norm: norm k_dim
    """,
    like="olmo2",
    exactness=SANDWICH_NORM_NOTE.format("16 %"),
)
