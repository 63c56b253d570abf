"""Llama and the decoders with its rows: Mistral, Qwen, SmolLM3, Helium, Granite, Nemotron, StarCoder 2."""

from hf_guide.layouts.registry import register_layout

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
    qa_outputs: 2 embed < norm
    """,
    rope="half",
)
register_layout("mistral", like="llama")
register_layout("qwen2", like="llama")
register_layout("qwen3", like="llama")
register_layout("smollm3", like="llama")
register_layout("helium", like="llama", rope="interleaved")

register_layout(
    "granite",
    like="llama",
    embedding_scale=lambda config: config.embedding_multiplier,
    attention_scale=lambda config: config.attention_multiplier,
    tied_head_scale=lambda config: 1 / config.logits_scaling,
)

register_layout("nemotron", like="llama", norm="layer", norm_offset=1.0)

register_layout(
    "starcoder2",
    """
    layers.{block}
      .mlp.c_fc: mlp embed < .post_attention_layernorm
      .mlp.c_proj: embed mlp
    """,
    like="llama",
    norm="layer",
)
