"""OPT and BioGPT."""

from tests.invariants.case import STREAM_RESIDUAL, TIED_RESIDUAL, Case
from tests.invariants.shapes import DECODER, TIED, UNTIED

# LayerNorm's eps is 1e-5 in them whatever the config, a larger share of a wider model's smaller variance.
FIXED_EPS = 1e-4
SIMPLE_SMALL = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3}
SIMPLE_BIG = {"hidden_size": 48, "intermediate_size": 60, "num_hidden_layers": 4, "num_attention_heads": 6}
OPT_SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 20}
OPT_BIG = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 8, "ffn_dim": 60}
SAME_DEPTH = {"num_hidden_layers": 2}  # a post-norm block that writes nothing still norms the stream
POST_NORM = {"do_layer_norm_before": False}
CASES: list[Case] = [
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
