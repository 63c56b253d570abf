"""Gemma to Gemma 3."""

from tests.invariants.case import SANDWICH_RESIDUAL, TIED_RESIDUAL, Case
from tests.invariants.shapes import ALTERNATING, BIG, BIG_ALTERNATING, RMS, SLIDING, SMALL, TIED, UNTIED

CASES: list[Case] = [
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
        SMALL | ALTERNATING,
        BIG | BIG_ALTERNATING,
        RMS | UNTIED | SLIDING | {"query_pre_attn_scalar": 16},
        residual=SANDWICH_RESIDUAL,
    ),
    Case(
        "gemma2",
        "Gemma2ForCausalLM",
        SMALL | ALTERNATING,
        BIG | BIG_ALTERNATING,
        RMS | TIED | {"attention_bias": True, "attn_logit_softcapping": None},
        "gemma2-tied-biased",
        residual=TIED_RESIDUAL,
    ),
    Case(
        "gemma3_text",
        "Gemma3ForCausalLM",
        SMALL | ALTERNATING,
        BIG | BIG_ALTERNATING,
        RMS | UNTIED | SLIDING,
        residual=SANDWICH_RESIDUAL,
    ),
    Case(
        "gemma3_text",
        "Gemma3ForCausalLM",
        SMALL | ALTERNATING,
        BIG | BIG_ALTERNATING,
        RMS | TIED | {"attention_bias": True},
        "gemma3_text-tied-biased",
        residual=TIED_RESIDUAL,
    ),
]
