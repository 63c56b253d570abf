"""Decoders."""

from tests.invariants.case import TOKENS, Case

DECODER = {"vocab_size": TOKENS, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA_SMALL = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
LLAMA_BIG = {"hidden_size": 40, "intermediate_size": 60, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 6}

CASES = [
    Case("llama", "LlamaForCausalLM", LLAMA_SMALL, LLAMA_BIG, DECODER | {"tie_word_embeddings": False, "rms_norm_eps": 1e-12}),
    Case("llama", "LlamaForCausalLM", LLAMA_SMALL, LLAMA_BIG, DECODER | {"tie_word_embeddings": True, "rms_norm_eps": 1e-12, "attention_bias": True, "mlp_bias": True}, "llama-tied-biased"),
    Case("qwen3", "Qwen3ForCausalLM", LLAMA_SMALL, LLAMA_BIG, DECODER | {"tie_word_embeddings": False, "rms_norm_eps": 1e-12}),
    Case(
        "gpt2",
        "GPT2LMHeadModel",
        {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_inner": 20},
        {"n_embd": 48, "n_layer": 4, "n_head": 8, "n_inner": 60},
        {"vocab_size": TOKENS, "n_positions": 32, "layer_norm_epsilon": 1e-12, "bos_token_id": 1, "eos_token_id": 2},
    ),
    Case(
        "gpt2",
        "GPT2LMHeadModel",
        {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_inner": 20},
        {"n_embd": 48, "n_layer": 4, "n_head": 8, "n_inner": 60},
        {"vocab_size": TOKENS, "n_positions": 32, "layer_norm_epsilon": 1e-12, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False},
        "gpt2-untied",
    ),
]
