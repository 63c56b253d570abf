"""GLM and GLM-4."""

from tests.invariants.case import SANDWICH_RESIDUAL, TIED_RESIDUAL, Case
from tests.invariants.shapes import BIG, RMS, SMALL, TIED, UNTIED

CASES: list[Case] = [
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
]
