"""Mixtures of experts: as many experts in both shapes, since a router would send tokens to added ones."""

from tests.invariants.case import TIED_RESIDUAL, Case
from tests.invariants.shapes import (
    ALTERNATING,
    BIG,
    BIG_ALTERNATING,
    DECODER,
    GRANITE,
    NARROW,
    RMS,
    SLIDING,
    SMALL,
    TIED,
    UNTIED,
    WIDE,
)

LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
MANY = {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
MOE_SMALL, MOE_BIG = {"moe_intermediate_size": 10}, {"moe_intermediate_size": 16}
SHARED = {"shared_expert_intermediate_size": 14}
LATENT = {
    "q_lora_rank": 10,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
CASES: list[Case] = [
    Case("mixtral", "MixtralForCausalLM", SMALL, BIG, RMS | UNTIED | LOCAL),
    Case(
        "mixtral",
        "MixtralForCausalLM",
        SMALL,
        BIG,
        RMS | TIED | LOCAL | SLIDING,
        "mixtral-tied",
        residual=TIED_RESIDUAL,
    ),
    Case("qwen3_moe", "Qwen3MoeForCausalLM", SMALL | MOE_SMALL, BIG | MOE_BIG, RMS | UNTIED | MANY),
    Case(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        SMALL | MOE_SMALL | {"mlp_only_layers": [1]},
        BIG | MOE_BIG | {"mlp_only_layers": [2, 3]},
        RMS | TIED | MANY | {"attention_bias": True},
        "qwen3_moe-tied-partly-dense",
        residual=TIED_RESIDUAL,
    ),
    Case(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        NARROW | MOE_SMALL | SHARED,
        WIDE | MOE_BIG | {"shared_expert_intermediate_size": 28},
        RMS | UNTIED | MANY,
    ),
    Case(
        "phimoe",
        "PhimoeForCausalLM",
        NARROW,
        WIDE,
        DECODER | UNTIED | LOCAL | {"rms_norm_eps": 1e-12, "attention_bias": True, "lm_head_bias": True},
    ),
    Case("granitemoe", "GraniteMoeForCausalLM", NARROW, WIDE, RMS | UNTIED | LOCAL | GRANITE),
    Case("gpt_oss", "GptOssForCausalLM", SMALL | ALTERNATING, BIG | BIG_ALTERNATING, RMS | UNTIED | LOCAL | SLIDING),
    Case(
        "gpt_oss",
        "GptOssForCausalLM",
        SMALL | ALTERNATING,
        BIG | BIG_ALTERNATING,
        RMS | TIED | LOCAL,
        "gpt_oss-tied",
        residual=TIED_RESIDUAL,
    ),
    Case(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        NARROW | MOE_SMALL | {"first_k_dense_replace": 1},
        WIDE | MOE_BIG | {"first_k_dense_replace": 2},
        RMS | UNTIED | LATENT,
    ),
    Case(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        NARROW | MOE_SMALL,
        WIDE | MOE_BIG,
        RMS | TIED | LATENT | {"q_lora_rank": None, "first_k_dense_replace": 0},
        "deepseek_v3-tied-direct-queries",
        residual=TIED_RESIDUAL,
    ),
]
