"""Layouts of decoders. Nothing but tables: `layouts.py` says how they are read."""

from hf_guide.initialization.layouts import register_layout

register_layout(
    "llama",
    """
    embed_tokens: table vocab embed
    layers.{block}
      .input_layernorm: norm embed
      .self_attn.q_proj: (kv_heads group q_dim) embed < .input_layernorm
      .self_attn.k_proj: (kv_heads k_dim) embed < .input_layernorm
      .self_attn.v_proj: (kv_heads head_dim) embed < .input_layernorm
      .self_attn.o_proj: embed (kv_heads group head_dim)
      .self_attn.q_norm: norm q_dim
      .self_attn.k_norm: norm k_dim
      .post_attention_layernorm: norm embed
      .mlp.gate_proj: mlp embed < .post_attention_layernorm
      .mlp.up_proj: mlp embed < .post_attention_layernorm
      .mlp.down_proj: embed mlp
    norm: norm embed
    lm_head: vocab embed < norm
    score: labels embed < norm
    """,
    rope="half",
)
register_layout("qwen3", like="llama")

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
    """,
    norm="layer",
)
