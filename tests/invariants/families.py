"""Small models of every family, each in a small and a big shape."""

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

TOKENS = 60


@dataclass(frozen=True)
class Case:
    """One family in two shapes: keyword arguments of its config; `both` go into either."""

    family: str
    model_class: str
    small: dict[str, Any]
    big: dict[str, Any]
    both: dict[str, Any] = field(default_factory=dict)
    name: str = ""

    def __str__(self) -> str:
        return self.name or self.family


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


def build(case: Case, shape: dict[str, Any]) -> PreTrainedModel:
    """Return a model of one of the case's shapes, float64, in evaluation mode."""
    model_class = getattr(transformers, case.model_class)
    config = model_class.config_class(**case.both, **shape)
    return model_class._from_config(config, dtype=torch.float64).eval()


@torch.no_grad()
def logits_of(model: PreTrainedModel, case: Case) -> torch.Tensor:
    """Return what the model makes of fixed input."""
    model.set_attn_implementation("eager")
    ids = torch.randint(3, TOKENS, (2, 11), generator=torch.Generator().manual_seed(5))
    return model(input_ids=ids).logits
