"""Phi and Phi-3."""

from hf_guide.layouts.registry import register_layout

register_layout(
    "phi",
    """
    layers.{block}
      .self_attn.dense: embed (kv_heads group head_dim)
      .self_attn.q_layernorm: norm q_dim
      .self_attn.k_layernorm: norm k_dim
      .mlp.fc1: mlp embed < .input_layernorm
      .mlp.fc2: embed mlp
    final_layernorm: norm embed
    lm_head: vocab embed < final_layernorm
    score: labels embed < final_layernorm
    """,
    like="llama",
    norm="layer",
)

register_layout(
    "phi3",
    """
    layers.{block}
      .self_attn.qkv_proj: (kv_heads group q_dim + kv_heads k_dim + kv_heads head_dim) embed < .input_layernorm
      .mlp.gate_up_proj: (2 mlp) embed < .post_attention_layernorm
    """,
    like="llama",
)
