"""Cohere Command-R and Command-R7B."""

from hf_guide.layouts.registry import register_layout

register_layout(
    "cohere",
    """
    layers.{block}
      .self_attn.q_norm: norm (kv_heads group) q_dim
      .self_attn.k_norm: norm kv_heads k_dim
      .mlp.gate_proj: mlp embed < .input_layernorm
      .mlp.up_proj: mlp embed < .input_layernorm
    """,
    like="llama",
    norm="layer",
    rope="interleaved",
    tied_head_scale=lambda config: config.logit_scale,
)
register_layout("cohere2", like="cohere")
