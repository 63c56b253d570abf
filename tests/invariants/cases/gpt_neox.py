"""GPT-NeoX and Pythia."""

from tests.invariants.case import TIED_RESIDUAL, Case
from tests.invariants.shapes import DECODER, EPS, TIED

NEOX_SMALL = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3}
NEOX_BIG = {"hidden_size": 48, "intermediate_size": 60, "num_hidden_layers": 4, "num_attention_heads": 6}
CASES: list[Case] = [
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
