"""GPT-2, GPT Neo, GPT BigCode, GPT-J and CodeGen."""

from transformers import PreTrainedConfig

from hf_guide.layouts.registry import register_layout


def inverse_block_scale(config: PreTrainedConfig, block: int) -> float:
    """Return the factor on a block's attention logits of GPT-2 and its relatives (for half precision)."""
    return 1 / (block + 1) if getattr(config, "scale_attn_by_inverse_layer_idx", False) else 1.0


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
    classifier: labels embed < ln_f
    qa_outputs: 2 embed < ln_f
    """,
    norm="layer",
    block_attention_scale=inverse_block_scale,
)

register_layout(
    "gpt_neo",
    """
    h.{block}
      .attn.attention.q_proj: (heads q_dim) embed < .ln_1
      .attn.attention.k_proj: (heads k_dim) embed < .ln_1
      .attn.attention.v_proj: (heads head_dim) embed < .ln_1
      .attn.attention.out_proj: embed (heads head_dim)
      .mlp.c_fc: mlp embed < .ln_2
      .mlp.c_proj: embed mlp
    """,
    like="gpt2",
    attention_scale=lambda config: 1.0,
)


def _gpt_bigcode(config: PreTrainedConfig) -> str:
    return "gpt_bigcode" if config.multi_query else "gpt_bigcode (multi-head)"


register_layout(
    "gpt_bigcode",
    """
    h.{block}
      .attn.c_attn: (kv_heads group q_dim + kv_heads k_dim + kv_heads head_dim) embed < .ln_1
      .attn.c_proj: embed (kv_heads group head_dim)
      .mlp.c_fc: mlp embed < .ln_2
      .mlp.c_proj: embed mlp
    """,
    like="gpt2",
    sizes={"kv_heads": lambda config: 1 if config.multi_query else config.n_head},
    attention_scale=lambda config: (config.n_embd // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0,
    variant=_gpt_bigcode,
)
register_layout(
    "gpt_bigcode (multi-head)",
    "h.{block}.attn.c_attn: (heads (q_dim + k_dim + head_dim)) embed < h.{block}.ln_1",
    like="gpt_bigcode",
    variant=_gpt_bigcode,
)

register_layout(
    "gptj",
    """
    h.{block}
      .attn.q_proj: (heads q_dim) embed < .ln_1
      .attn.k_proj: (heads k_dim) embed < .ln_1
      .attn.v_proj: (heads head_dim) embed < .ln_1
      .attn.out_proj: embed (heads head_dim)
      .mlp.fc_in: mlp embed < .ln_1
      .mlp.fc_out: embed mlp
    qa_outputs: labels embed < ln_f
    """,
    like="gpt2",
    rope="interleaved",
    rotary_size=lambda config: config.rotary_dim,
)
register_layout(
    "codegen",
    """
    h.{block}
      .attn.qkv_proj: (4 (share q_dim + share head_dim + share k_dim)) embed < .ln_1
      .attn.out_proj: embed (4 share head_dim)
    """,
    like="gptj",
    sizes={"share": lambda config: config.n_head // 4},
)
