"""BLOOM, Falcon and MPT: decoders with ALiBi, or that once had it."""

from tests.invariants.case import STREAM_RESIDUAL, TIED_RESIDUAL, TOKENS, Case
from tests.invariants.shapes import TIED, UNTIED

BLOOM = {"vocab_size": TOKENS, "layer_norm_epsilon": 1e-12, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BLOOM_SMALL = {"hidden_size": 24, "n_layer": 2, "n_head": 4}
BLOOM_BIG = {"hidden_size": 48, "n_layer": 4, "n_head": 8}
FALCON_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 20}
FALCON_BIG = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8, "ffn_hidden_size": 60}
FALCON = BLOOM | {"max_position_embeddings": 32}
MPT = {"vocab_size": TOKENS, "layer_norm_epsilon": 1e-12, "max_seq_len": 32}
CASES: list[Case] = [
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
