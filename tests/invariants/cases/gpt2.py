"""GPT-2, GPT Neo, GPT BigCode, GPT-J and CodeGen."""

from tests.invariants.case import TIED_RESIDUAL, TOKENS, Case
from tests.invariants.shapes import TIED, UNTIED

GPT = {"vocab_size": TOKENS, "n_positions": 32, "layer_norm_epsilon": 1e-12, "bos_token_id": 1, "eos_token_id": 2}
GPT_SMALL = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_inner": 20}
GPT_BIG = {"n_embd": 48, "n_layer": 4, "n_head": 8, "n_inner": 60}
# Transformers makes their rotations in float64 where it builds a float64 model, in float32 where it loads one.
FLOAT32_ROTATION = 1e-6
NEO = {
    "vocab_size": TOKENS,
    "max_position_embeddings": 32,
    "layer_norm_epsilon": 1e-12,
    "window_size": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NEO_SMALL = {
    "hidden_size": 24,
    "num_layers": 2,
    "num_heads": 4,
    "intermediate_size": 20,
    "attention_types": [[["global", "local"], 1]],
}
NEO_BIG = {
    "hidden_size": 48,
    "num_layers": 4,
    "num_heads": 8,
    "intermediate_size": 60,
    "attention_types": [[["global", "global", "local", "local"], 1]],
}
CASES: list[Case] = [
    Case("gpt2", "GPT2LMHeadModel", GPT_SMALL, GPT_BIG, GPT, residual=TIED_RESIDUAL),
    Case("gpt2", "GPT2LMHeadModel", GPT_SMALL, GPT_BIG, GPT | UNTIED, "gpt2-untied"),
    Case("gpt_neo", "GPTNeoForCausalLM", NEO_SMALL, NEO_BIG, NEO | UNTIED),
    Case("gpt_neo", "GPTNeoForCausalLM", NEO_SMALL, NEO_BIG, NEO | TIED, "gpt_neo-tied", residual=TIED_RESIDUAL),
    Case("gpt_bigcode", "GPTBigCodeForCausalLM", GPT_SMALL, GPT_BIG, GPT | UNTIED),
    Case(
        "gpt_bigcode",
        "GPTBigCodeForCausalLM",
        GPT_SMALL,
        GPT_BIG,
        GPT | {"multi_query": False},
        "gpt_bigcode-tied-multihead",
        residual=TIED_RESIDUAL,
    ),
    Case(
        "gptj",
        "GPTJForCausalLM",
        GPT_SMALL | {"n_head": 3},
        GPT_BIG | {"n_head": 6},
        GPT | {"rotary_dim": 4},
        identity=FLOAT32_ROTATION,
    ),
    Case(
        "gptj",
        "GPTJForCausalLM",
        GPT_SMALL | {"n_head": 3},
        GPT_BIG | {"n_head": 6},
        GPT | {"rotary_dim": 8} | TIED,
        "gptj-tied",
        residual=TIED_RESIDUAL,
        identity=FLOAT32_ROTATION,
    ),
    Case(
        "codegen",
        "CodeGenForCausalLM",
        GPT_SMALL | {"n_embd": 32},
        GPT_BIG | {"n_embd": 64},
        GPT | {"n_ctx": 32, "rotary_dim": 4},
        identity=FLOAT32_ROTATION,
    ),
    Case(
        "codegen",
        "CodeGenForCausalLM",
        GPT_SMALL | {"n_embd": 32},
        GPT_BIG | {"n_embd": 64},
        GPT | {"n_ctx": 32, "rotary_dim": 4} | TIED,
        "codegen-tied",
        residual=TIED_RESIDUAL,
        identity=FLOAT32_ROTATION,
    ),
]
