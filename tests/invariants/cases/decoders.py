"""Decoders with RMSNorm."""

from tests.invariants.case import SANDWICH_RESIDUAL, TIED_RESIDUAL, TOKENS, Case

DECODER = {
    "vocab_size": TOKENS,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
RMS = DECODER | {"rms_norm_eps": 1e-12}
UNTIED, TIED = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}
BIASED = {"attention_bias": True, "mlp_bias": True}

SMALL = {
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
}
BIG = {
    "hidden_size": 40,
    "intermediate_size": 60,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 6,
}
# Heads as wide together as the stream, as families without a head size of their own need.
NARROW = {
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
}
WIDE = {
    "hidden_size": 48,
    "intermediate_size": 60,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
}
# A norm over all heads together sees how many there are, so these two have as many.
OLMO_SMALL = {
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
}
OLMO_BIG = OLMO_SMALL | {"hidden_size": 40, "intermediate_size": 60, "num_hidden_layers": 4}

SLIDING = {"sliding_window": 4}
TURNS = {"layer_types": ["sliding_attention", "full_attention"]}
BIG_TURNS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]}
CASES = [
    Case("llama", "LlamaForCausalLM", SMALL, BIG, RMS | UNTIED),
    Case("llama", "LlamaForCausalLM", SMALL, BIG, RMS | TIED | BIASED, "llama-tied-biased", residual=TIED_RESIDUAL),
    Case("mistral", "MistralForCausalLM", SMALL, BIG, RMS | UNTIED | SLIDING),
    Case("mistral", "MistralForCausalLM", SMALL, BIG, RMS | TIED | SLIDING, "mistral-tied", residual=TIED_RESIDUAL),
    Case("qwen2", "Qwen2ForCausalLM", SMALL, BIG, RMS | UNTIED),
    Case(
        "qwen2",
        "Qwen2ForCausalLM",
        NARROW,
        WIDE,
        RMS | TIED | SLIDING | {"use_sliding_window": True, "max_window_layers": 1},
        "qwen2-tied-sliding",
        residual=TIED_RESIDUAL,
    ),
    Case("qwen3", "Qwen3ForCausalLM", SMALL, BIG, RMS | UNTIED),
    Case(
        "qwen3",
        "Qwen3ForCausalLM",
        SMALL,
        BIG,
        RMS | TIED | {"attention_bias": True},
        "qwen3-tied-biased",
        residual=TIED_RESIDUAL,
    ),
    Case(
        "smollm3",
        "SmolLM3ForCausalLM",
        SMALL | {"no_rope_layers": [1, 0]},
        BIG | {"no_rope_layers": [1, 1, 0, 0]},
        RMS | UNTIED | BIASED,
    ),
    Case(
        "smollm3",
        "SmolLM3ForCausalLM",
        SMALL | {"no_rope_layers": [1, 1]},
        BIG | {"no_rope_layers": [1, 0, 0, 1]},
        RMS | TIED,
        "smollm3-tied",
        residual=TIED_RESIDUAL,
    ),
    Case(
        "helium",
        "HeliumForCausalLM",
        NARROW | {"head_dim": 8},
        WIDE | {"head_dim": 8},
        RMS | UNTIED | {"attention_bias": True},
    ),
    Case(
        "helium",
        "HeliumForCausalLM",
        NARROW | {"head_dim": 8},
        WIDE | {"head_dim": 8},
        RMS | TIED,
        "helium-tied",
        residual=TIED_RESIDUAL,
    ),
]

GRANITE = {"embedding_multiplier": 3.0, "logits_scaling": 5.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2}
CASES += [
    Case("granite", "GraniteForCausalLM", NARROW, WIDE, RMS | UNTIED | GRANITE | BIASED),
    Case(
        "granite",
        "GraniteForCausalLM",
        NARROW | {"embedding_multiplier": 2.0, "logits_scaling": 8.0},
        WIDE | {"embedding_multiplier": 3.0, "logits_scaling": 5.0},
        RMS | TIED | {"residual_multiplier": 0.4, "attention_multiplier": 0.2},
        "granite-tied",
        residual=TIED_RESIDUAL,
    ),
    Case("phi3", "Phi3ForCausalLM", NARROW, WIDE, RMS | UNTIED),
    Case(
        "phi3",
        "Phi3ForCausalLM",
        NARROW,
        WIDE,
        RMS | TIED | {"partial_rotary_factor": 0.5},
        "phi3-tied-partial",
        residual=TIED_RESIDUAL,
    ),
    Case(
        "glm",
        "GlmForCausalLM",
        SMALL | {"head_dim": 8},
        BIG | {"head_dim": 8},
        RMS | UNTIED | {"attention_bias": True},
    ),
    Case(
        "glm",
        "GlmForCausalLM",
        SMALL | {"head_dim": 8},
        BIG | {"head_dim": 8},
        RMS | TIED,
        "glm-tied",
        residual=TIED_RESIDUAL,
    ),
    Case(
        "glm4",
        "Glm4ForCausalLM",
        SMALL | {"head_dim": 8},
        BIG | {"head_dim": 8},
        RMS | UNTIED | {"attention_bias": True},
        residual=SANDWICH_RESIDUAL,
    ),
    Case("gemma", "GemmaForCausalLM", SMALL, BIG, RMS | UNTIED),
    Case(
        "gemma",
        "GemmaForCausalLM",
        SMALL,
        BIG,
        RMS | TIED | {"attention_bias": True},
        "gemma-tied-biased",
        residual=TIED_RESIDUAL,
    ),
    Case(
        "gemma2",
        "Gemma2ForCausalLM",
        SMALL | TURNS,
        BIG | BIG_TURNS,
        RMS | UNTIED | SLIDING | {"query_pre_attn_scalar": 16},
        residual=SANDWICH_RESIDUAL,
    ),
    Case(
        "gemma2",
        "Gemma2ForCausalLM",
        SMALL | TURNS,
        BIG | BIG_TURNS,
        RMS | TIED | {"attention_bias": True, "attn_logit_softcapping": None},
        "gemma2-tied-biased",
        residual=TIED_RESIDUAL,
    ),
    Case(
        "gemma3_text",
        "Gemma3ForCausalLM",
        SMALL | TURNS,
        BIG | BIG_TURNS,
        RMS | UNTIED | SLIDING,
        residual=SANDWICH_RESIDUAL,
    ),
    Case(
        "gemma3_text",
        "Gemma3ForCausalLM",
        SMALL | TURNS,
        BIG | BIG_TURNS,
        RMS | TIED | {"attention_bias": True},
        "gemma3_text-tied-biased",
        residual=TIED_RESIDUAL,
    ),
    Case(
        "olmo2",
        "Olmo2ForCausalLM",
        OLMO_SMALL,
        OLMO_BIG,
        RMS | UNTIED | {"attention_bias": True},
        residual=SANDWICH_RESIDUAL,
    ),
    Case("olmo2", "Olmo2ForCausalLM", OLMO_SMALL, OLMO_BIG, RMS | TIED, "olmo2-tied", residual=TIED_RESIDUAL),
    Case(
        "olmo3",
        "Olmo3ForCausalLM",
        OLMO_SMALL | TURNS,
        OLMO_BIG | BIG_TURNS,
        RMS | UNTIED | SLIDING,
        residual=SANDWICH_RESIDUAL,
    ),
    Case(
        "exaone4",
        "Exaone4ForCausalLM",
        SMALL | TURNS,
        BIG | BIG_TURNS,
        RMS | UNTIED | SLIDING,
        residual=SANDWICH_RESIDUAL,
    ),
    Case(
        "exaone4",
        "Exaone4ForCausalLM",
        SMALL | TURNS,
        BIG | BIG_TURNS,
        RMS | TIED | SLIDING,
        "exaone4-tied",
        residual=TIED_RESIDUAL,
    ),
]
