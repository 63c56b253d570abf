"""Phi and Phi-3."""

from tests.invariants.case import TIED_RESIDUAL, Case
from tests.invariants.shapes import DECODER, EPS, NARROW, PARTIAL, RMS, TIED, UNTIED, WIDE

CASES: list[Case] = [
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
]
