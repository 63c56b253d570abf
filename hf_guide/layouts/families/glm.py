"""GLM and GLM-4."""

from hf_guide.layouts.families.exactness import SANDWICH_NORM_NOTE
from hf_guide.layouts.registry import register_layout

register_layout(
    "glm",
    "layers.{block}.mlp.gate_up_proj: (2 mlp) embed < layers.{block}.post_attention_layernorm",
    like="llama",
    rope="interleaved",
)
register_layout(
    "glm4",
    """
    layers.{block}
      .self_attn.o_proj: embed (kv_heads group head_dim) >> .post_self_attn_layernorm
      .post_self_attn_layernorm: norm embed
      .mlp.down_proj: embed mlp >> .post_mlp_layernorm
      .post_mlp_layernorm: norm embed
    """,
    like="glm",
    exactness=SANDWICH_NORM_NOTE.format("9 %"),
)
