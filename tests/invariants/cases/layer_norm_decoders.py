"""Decoders with LayerNorm: OPT's, and those with Llama's rows."""

from tests.invariants.case import STREAM_RESIDUAL, TIED_RESIDUAL, Case
from tests.invariants.cases.decoders import (
    BIASED,
    BIG,
    BIG_TURNS,
    DECODER,
    NARROW,
    SLIDING,
    SMALL,
    TIED,
    TURNS,
    UNTIED,
    WIDE,
)

# LayerNorm's eps is 1e-5 in them whatever the config, a larger share of a wider model's smaller variance.
FIXED_EPS = 1e-4
EPS = {"layer_norm_eps": 1e-12}
SIMPLE_SMALL = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3}
SIMPLE_BIG = {"hidden_size": 48, "intermediate_size": 60, "num_hidden_layers": 4, "num_attention_heads": 6}
OPT_SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 20}
OPT_BIG = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 8, "ffn_dim": 60}
SAME_DEPTH = {"num_hidden_layers": 2}  # a post-norm block that writes nothing still norms the stream
POST_NORM = {"do_layer_norm_before": False}
CASES = [
    Case("opt", "OPTForCausalLM", OPT_SMALL, OPT_BIG, DECODER | UNTIED, length=100.0),
    Case(
        "opt",
        "OPTForCausalLM",
        OPT_SMALL,
        OPT_BIG,
        DECODER | TIED | {"enable_bias": False},
        "opt-tied-unbiased",
        residual=TIED_RESIDUAL,
        length=100.0,
    ),
    Case(
        "opt",
        "OPTForCausalLM",
        OPT_SMALL,
        OPT_BIG,
        DECODER | TIED | {"layer_norm_elementwise_affine": False},
        "opt-tied-without-gains",
        length=100.0,
    ),
    Case(
        "opt",
        "OPTForCausalLM",
        OPT_SMALL | {"word_embed_proj_dim": 12},
        OPT_BIG | {"word_embed_proj_dim": 20},
        DECODER | UNTIED,
        "opt-projected",
        length=100.0,
    ),
    Case(
        "opt",
        "OPTForCausalLM",
        OPT_SMALL | {"word_embed_proj_dim": 12},
        OPT_BIG | {"word_embed_proj_dim": 20},
        DECODER | TIED,
        "opt-projected-tied",
        length=100.0,
    ),
    Case(
        "opt",
        "OPTForCausalLM",
        OPT_SMALL,
        OPT_BIG | SAME_DEPTH,
        DECODER | UNTIED | POST_NORM,
        "opt-post-norm",
        residual=STREAM_RESIDUAL,
        lift=FIXED_EPS,
    ),
    Case(
        "opt",
        "OPTForCausalLM",
        OPT_SMALL | {"word_embed_proj_dim": 12},
        OPT_BIG | SAME_DEPTH | {"word_embed_proj_dim": 20},
        DECODER | TIED | POST_NORM,
        "opt-post-norm-projected-tied",
        residual=STREAM_RESIDUAL,
        lift=FIXED_EPS,
    ),
    Case("biogpt", "BioGptForCausalLM", SIMPLE_SMALL, SIMPLE_BIG, DECODER | UNTIED, length=100.0),
    Case(
        "biogpt",
        "BioGptForCausalLM",
        SIMPLE_SMALL,
        SIMPLE_BIG,
        DECODER | TIED | {"scale_embedding": False},
        "biogpt-tied-unscaled",
        residual=TIED_RESIDUAL,
        length=100.0,
    ),
]

PARTIAL = {"partial_rotary_factor": 0.5}
CASES += [
    Case("olmo", "OlmoForCausalLM", NARROW, WIDE, DECODER | UNTIED | {"attention_bias": True}, length=100.0),
    Case("olmo", "OlmoForCausalLM", NARROW, WIDE, DECODER | TIED, "olmo-tied", length=100.0),
    Case(
        "nemotron",
        "NemotronForCausalLM",
        SMALL | {"head_dim": 8},
        BIG | {"head_dim": 8},
        DECODER | UNTIED | BIASED | PARTIAL | {"norm_eps": 1e-12},
    ),
    Case(
        "nemotron",
        "NemotronForCausalLM",
        NARROW | {"head_dim": 8},
        WIDE | {"head_dim": 8},
        DECODER | TIED | {"norm_eps": 1e-12},
        "nemotron-tied",
        residual=TIED_RESIDUAL,
    ),
    Case("starcoder2", "Starcoder2ForCausalLM", NARROW, WIDE, DECODER | UNTIED | {"norm_epsilon": 1e-12}),
    Case(
        "starcoder2",
        "Starcoder2ForCausalLM",
        NARROW,
        WIDE,
        DECODER | TIED | {"norm_epsilon": 1e-12, "use_bias": False, "sliding_window": 4},
        "starcoder2-tied-unbiased",
        residual=TIED_RESIDUAL,
    ),
    Case(
        "cohere", "CohereForCausalLM", NARROW, WIDE, DECODER | UNTIED | EPS | {"logit_scale": 0.3, "use_qk_norm": True}
    ),
    Case(
        "cohere",
        "CohereForCausalLM",
        NARROW | {"logit_scale": 0.5},
        WIDE | {"logit_scale": 0.3},
        DECODER | TIED | EPS | {"attention_bias": True},
        "cohere-tied-biased",
        residual=TIED_RESIDUAL,
    ),
    Case(
        "cohere2",
        "Cohere2ForCausalLM",
        NARROW | TURNS,
        WIDE | BIG_TURNS,
        DECODER | UNTIED | EPS | SLIDING | {"logit_scale": 0.3},
    ),
    Case("phi", "PhiForCausalLM", NARROW, WIDE, DECODER | UNTIED | EPS | PARTIAL),
    Case(
        "phi",
        "PhiForCausalLM",
        NARROW,
        WIDE,
        DECODER | TIED | EPS | PARTIAL | {"qk_layernorm": True},
        "phi-tied-qk-norm",
        residual=TIED_RESIDUAL,
    ),
    Case("stablelm", "StableLmForCausalLM", NARROW, WIDE, DECODER | UNTIED | EPS | {"use_qkv_bias": True}),
    Case(
        "stablelm",
        "StableLmForCausalLM",
        NARROW | {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32},
        WIDE | {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64},
        DECODER | TIED | EPS | {"qk_layernorm": True, "use_parallel_residual": True},
        "stablelm-tied-qk-norm-parallel",
        residual=TIED_RESIDUAL,
    ),
]
