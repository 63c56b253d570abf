"""Cohere Command-R and Command-R7B."""

from tests.invariants.case import TIED_RESIDUAL, Case
from tests.invariants.shapes import ALTERNATING, BIG_ALTERNATING, DECODER, EPS, NARROW, SLIDING, TIED, UNTIED, WIDE

CASES: list[Case] = [
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
        NARROW | ALTERNATING,
        WIDE | BIG_ALTERNATING,
        DECODER | UNTIED | EPS | SLIDING | {"logit_scale": 0.3},
    ),
]
