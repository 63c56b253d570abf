"""GPT-2 and its descendants."""

from tests.invariants.case import STREAM_RESIDUAL, TIED_RESIDUAL, TOKENS, Case
from tests.invariants.cases.decoders import DECODER, TIED, UNTIED

GPT = {"vocab_size": TOKENS, "n_positions": 32, "layer_norm_epsilon": 1e-12, "bos_token_id": 1, "eos_token_id": 2}
GPT_SMALL = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_inner": 20}
GPT_BIG = {"n_embd": 48, "n_layer": 4, "n_head": 8, "n_inner": 60}
NEOX_SMALL = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3}
NEOX_BIG = {"hidden_size": 48, "intermediate_size": 60, "num_hidden_layers": 4, "num_attention_heads": 6}
# Transformers makes their rotations in float64 where it builds a float64 model, in float32 where it loads one.
FLOAT32_ROTATION = 1e-6
EPS = {"layer_norm_eps": 1e-12}

CASES = [
    Case("gpt2", "GPT2LMHeadModel", GPT_SMALL, GPT_BIG, GPT, residual=TIED_RESIDUAL),
    Case("gpt2", "GPT2LMHeadModel", GPT_SMALL, GPT_BIG, GPT | UNTIED, "gpt2-untied"),
    Case("gpt_bigcode", "GPTBigCodeForCausalLM", GPT_SMALL, GPT_BIG, GPT | UNTIED),
    Case(
        "gpt_bigcode",
        "GPTBigCodeForCausalLM",
        GPT_SMALL,
        GPT_BIG,
        GPT | {"multi_query": False},
        "gpt_bigcode-tied-multihead",
        residual=TIED_RESIDUAL,
    ),
    Case(
        "gptj",
        "GPTJForCausalLM",
        GPT_SMALL | {"n_head": 3},
        GPT_BIG | {"n_head": 6},
        GPT | {"rotary_dim": 4},
        identity=FLOAT32_ROTATION,
    ),
    Case(
        "gptj",
        "GPTJForCausalLM",
        GPT_SMALL | {"n_head": 3},
        GPT_BIG | {"n_head": 6},
        GPT | {"rotary_dim": 8} | TIED,
        "gptj-tied",
        residual=TIED_RESIDUAL,
        identity=FLOAT32_ROTATION,
    ),
    Case(
        "codegen",
        "CodeGenForCausalLM",
        GPT_SMALL | {"n_embd": 32},
        GPT_BIG | {"n_embd": 64},
        GPT | {"n_ctx": 32, "rotary_dim": 4},
        identity=FLOAT32_ROTATION,
    ),
    Case(
        "codegen",
        "CodeGenForCausalLM",
        GPT_SMALL | {"n_embd": 32},
        GPT_BIG | {"n_embd": 64},
        GPT | {"n_ctx": 32, "rotary_dim": 4} | TIED,
        "codegen-tied",
        residual=TIED_RESIDUAL,
        identity=FLOAT32_ROTATION,
    ),
    Case("gpt_neox", "GPTNeoXForCausalLM", NEOX_SMALL, NEOX_BIG, DECODER | EPS | {"rotary_pct": 0.25}),
    Case(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        NEOX_SMALL,
        NEOX_BIG,
        DECODER | EPS | TIED | {"use_parallel_residual": False, "attention_bias": False},
        "gpt_neox-tied-sequential",
        residual=TIED_RESIDUAL,
    ),
]

NEO = {
    "vocab_size": TOKENS,
    "max_position_embeddings": 32,
    "layer_norm_epsilon": 1e-12,
    "window_size": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NEO_SMALL = {
    "hidden_size": 24,
    "num_layers": 2,
    "num_heads": 4,
    "intermediate_size": 20,
    "attention_types": [[["global", "local"], 1]],
}
NEO_BIG = {
    "hidden_size": 48,
    "num_layers": 4,
    "num_heads": 8,
    "intermediate_size": 60,
    "attention_types": [[["global", "global", "local", "local"], 1]],
}
CASES += [
    Case("gpt_neo", "GPTNeoForCausalLM", NEO_SMALL, NEO_BIG, NEO | UNTIED),
    Case("gpt_neo", "GPTNeoForCausalLM", NEO_SMALL, NEO_BIG, NEO | TIED, "gpt_neo-tied", residual=TIED_RESIDUAL),
]

BLOOM = {"vocab_size": TOKENS, "layer_norm_epsilon": 1e-12, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BLOOM_SMALL = {"hidden_size": 24, "n_layer": 2, "n_head": 4}
BLOOM_BIG = {"hidden_size": 48, "n_layer": 4, "n_head": 8}
FALCON_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 20}
FALCON_BIG = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8, "ffn_hidden_size": 60}
FALCON = BLOOM | {"max_position_embeddings": 32}
MPT = {"vocab_size": TOKENS, "layer_norm_epsilon": 1e-12, "max_seq_len": 32}
CASES += [
    Case("bloom", "BloomForCausalLM", BLOOM_SMALL, BLOOM_BIG, BLOOM | UNTIED, residual=STREAM_RESIDUAL),
    Case("bloom", "BloomForCausalLM", BLOOM_SMALL, BLOOM_BIG, BLOOM | TIED, "bloom-tied", residual=STREAM_RESIDUAL),
    Case(
        "bloom",
        "BloomForCausalLM",
        BLOOM_SMALL,
        BLOOM_BIG | {"n_layer": 2},
        BLOOM | UNTIED | {"apply_residual_connection_post_layernorm": True},
        "bloom-normed-residual",
        residual=STREAM_RESIDUAL,
    ),
    Case("falcon", "FalconForCausalLM", FALCON_SMALL, FALCON_BIG, FALCON | UNTIED),
    Case(
        "falcon",
        "FalconForCausalLM",
        FALCON_SMALL,
        FALCON_BIG,
        FALCON | TIED | {"bias": True, "parallel_attn": False},
        "falcon-tied-biased-sequential",
        residual=TIED_RESIDUAL,
    ),
    Case(
        "falcon",
        "FalconForCausalLM",
        FALCON_SMALL | {"num_kv_heads": 2},
        FALCON_BIG | {"num_kv_heads": 4},
        FALCON | UNTIED | {"new_decoder_architecture": True},
        "falcon-two-norms",
    ),
    Case(
        "falcon",
        "FalconForCausalLM",
        FALCON_SMALL | {"num_kv_heads": 2},
        FALCON_BIG | {"num_kv_heads": 4},
        FALCON | UNTIED | {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
        "falcon-one-norm",
    ),
    Case(
        "falcon",
        "FalconForCausalLM",
        FALCON_SMALL,
        FALCON_BIG,
        FALCON | UNTIED | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
        "falcon-alibi",
    ),
    Case(
        "mpt",
        "MptForCausalLM",
        {"d_model": 24, "n_layers": 2, "n_heads": 4},
        {"d_model": 48, "n_layers": 4, "n_heads": 8},
        MPT | UNTIED,
    ),
    Case(
        "mpt",
        "MptForCausalLM",
        {"d_model": 24, "n_layers": 2, "n_heads": 4},
        {"d_model": 48, "n_layers": 4, "n_heads": 8},
        MPT | TIED,
        "mpt-tied",
        residual=TIED_RESIDUAL,
    ),
]
