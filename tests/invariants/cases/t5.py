"""T5, mT5 and UMT5."""

import torch
from torch import nn
from transformers import PreTrainedModel

from tests.invariants.case import TIED_RESIDUAL, TOKENS, Case

T5_SMALL = {"d_model": 24, "d_kv": 6, "d_ff": 20, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
T5_BIG = {"d_model": 40, "d_kv": 6, "d_ff": 60, "num_layers": 4, "num_decoder_layers": 6, "num_heads": 8}
T5 = {
    "vocab_size": TOKENS,
    "layer_norm_epsilon": 1e-12,
    "num_labels": 5,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
}


def untie(model: PreTrainedModel) -> None:
    """Give the model a head of its own, as some checkpoints have, though the configs of these families are always tied."""
    model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
    del model.all_tied_weights_keys["lm_head.weight"]


CASES: list[Case] = [
    Case("t5", "T5ForConditionalGeneration", T5_SMALL, T5_BIG, T5, inputs="pairs", residual=TIED_RESIDUAL),
    Case(
        "t5",
        "T5ForConditionalGeneration",
        T5_SMALL,
        T5_BIG,
        T5 | {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"},
        "t5-untied-gated",
        inputs="pairs",
        prepare=untie,
    ),
    Case("t5", "T5ForTokenClassification", T5_SMALL, T5_BIG, T5, "t5-tokens"),
    Case("mt5", "MT5ForConditionalGeneration", T5_SMALL, T5_BIG, T5, inputs="pairs", prepare=untie),
    Case(
        "mt5", "MT5ForConditionalGeneration", T5_SMALL, T5_BIG, T5, "mt5-tied", inputs="pairs", residual=TIED_RESIDUAL
    ),
    Case("umt5", "UMT5ForConditionalGeneration", T5_SMALL, T5_BIG, T5, inputs="pairs", prepare=untie),
]
