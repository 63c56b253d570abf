"""Layouts of decoders with RMSNorm. Nothing but tables: `layouts.py` says how they are read."""

from hf_guide.layouts.registry import register_layout

SANDWICH_NORM_NOTE = (
    "gains after each branch are folded in before their norm, which they lengthen: "
    "logits off by {} on a turned stream 40 wide, gains being 1 +- 0.3"
)

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

register_layout(
    "phi3",
    """
    layers.{block}
      .self_attn.qkv_proj: (kv_heads group q_dim + kv_heads k_dim + kv_heads head_dim) embed < .input_layernorm
      .mlp.gate_up_proj: (2 mlp) embed < .post_attention_layernorm
    """,
    like="llama",
)

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
