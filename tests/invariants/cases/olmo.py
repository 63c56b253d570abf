"""OLMo to OLMo 3, and EXAONE 4, whose blocks are OLMo 2's."""

from tests.invariants.case import SANDWICH_RESIDUAL, TIED_RESIDUAL, Case
from tests.invariants.shapes import (
    ALTERNATING,
    BIG,
    BIG_ALTERNATING,
    DECODER,
    NARROW,
    RMS,
    SLIDING,
    SMALL,
    TIED,
    UNTIED,
    WIDE,
)

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
CASES: list[Case] = [
    Case("olmo", "OlmoForCausalLM", NARROW, WIDE, DECODER | UNTIED | {"attention_bias": True}, length=100.0),
    Case("olmo", "OlmoForCausalLM", NARROW, WIDE, DECODER | TIED, "olmo-tied", length=100.0),
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
        OLMO_SMALL | ALTERNATING,
        OLMO_BIG | BIG_ALTERNATING,
        RMS | UNTIED | SLIDING,
        residual=SANDWICH_RESIDUAL,
    ),
    Case(
        "exaone4",
        "Exaone4ForCausalLM",
        SMALL | ALTERNATING,
        BIG | BIG_ALTERNATING,
        RMS | UNTIED | SLIDING,
        residual=SANDWICH_RESIDUAL,
    ),
    Case(
        "exaone4",
        "Exaone4ForCausalLM",
        SMALL | ALTERNATING,
        BIG | BIG_ALTERNATING,
        RMS | TIED | SLIDING,
        "exaone4-tied",
        residual=TIED_RESIDUAL,
    ),
]
