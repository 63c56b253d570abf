"""Mixtures of experts: Mixtral, Qwen MoE, PhiMoE, Granite MoE, gpt-oss and DeepSeek V3.

A student may have fewer experts than its teacher, and its router their rows: evenly spaced ones, or, with `calibrated`, those
of the highest importance.
"""

from hf_guide.layouts.registry import register_layout

register_layout(
    "mixtral",
    """
    layers.{block}
      .mlp.gate: experts embed < .post_attention_layernorm
      .mlp.experts.gate_up_proj: experts (2 expert_mlp) embed < .post_attention_layernorm
      .mlp.experts.down_proj: experts embed expert_mlp
    """,
    like="llama",
)
register_layout("qwen3_moe", like="mixtral")
register_layout(
    "qwen2_moe",
    """
    layers.{block}
      .mlp.shared_expert.gate_proj: shared_mlp embed < .post_attention_layernorm
      .mlp.shared_expert.up_proj: shared_mlp embed < .post_attention_layernorm
      .mlp.shared_expert.down_proj: embed shared_mlp
      .mlp.shared_expert_gate: 1 embed < .post_attention_layernorm
    """,
    like="mixtral",
)
register_layout(
    "phimoe",
    "layers.{block}.mlp.router: experts embed < layers.{block}.post_attention_layernorm",
    like="mixtral",
    norm="layer",
)

register_layout(
    "granitemoe",
    """
    layers.{block}
      .block_sparse_moe.router: experts embed < .post_attention_layernorm
      .block_sparse_moe.experts.gate_up_proj: experts (2 expert_mlp) embed < .post_attention_layernorm
      .block_sparse_moe.experts.down_proj: experts embed expert_mlp
    """,
    like="granite",
)

register_layout(
    "gpt_oss",
    """
    layers.{block}
      .self_attn.sinks: (kv_heads group)
      .mlp.router: experts embed < .post_attention_layernorm
      .mlp.experts.gate_up_proj: experts embed -> (expert_mlp 2) < .post_attention_layernorm
      .mlp.experts.gate_up_proj_bias: experts (expert_mlp 2)
      .mlp.experts.down_proj: experts expert_mlp -> embed
      .mlp.experts.down_proj_bias: experts embed
    """,
    like="llama",
)

register_layout(
    "deepseek_v3",
    """
    layers.{block}
      .self_attn.q_proj: (heads (nope_dim + rotary)) embed < .input_layernorm
      .self_attn.q_a_proj: q_rank embed < .input_layernorm
      .self_attn.q_a_layernorm: norm q_rank
      .self_attn.q_b_proj: (heads (nope_dim + rotary)) q_rank
      .self_attn.kv_a_proj_with_mqa: (kv_rank + rotary) embed < .input_layernorm
      .self_attn.kv_a_layernorm: norm kv_rank
      .self_attn.kv_b_proj: (heads (nope_dim + head_dim)) kv_rank
      .self_attn.o_proj: embed (heads head_dim)
      .mlp.gate.e_score_correction_bias: experts
      .mlp.shared_experts.gate_proj: shared_mlp embed < .post_attention_layernorm
      .mlp.shared_experts.up_proj: shared_mlp embed < .post_attention_layernorm
      .mlp.shared_experts.down_proj: embed shared_mlp
    """,
    like="mixtral",
    sizes={
        "head_dim": "v_head_dim",
        "nope_dim": "qk_nope_head_dim",
        "rotary": "qk_rope_head_dim",
        "kv_rank": "kv_lora_rank",
    },
)
