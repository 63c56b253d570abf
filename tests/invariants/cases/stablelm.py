"""StableLM."""

from tests.invariants.case import TIED_RESIDUAL, Case
from tests.invariants.shapes import DECODER, EPS, NARROW, TIED, UNTIED, WIDE

CASES: list[Case] = [
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
