"""Encoder-decoders."""

import torch
from torch import nn
from transformers import PreTrainedModel

from tests.invariants.case import STREAM_RESIDUAL, TIED_RESIDUAL, TOKENS, Case

T5_SMALL = {"d_model": 24, "d_kv": 6, "d_ff": 20, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
T5_BIG = {"d_model": 40, "d_kv": 6, "d_ff": 60, "num_layers": 4, "num_decoder_layers": 6, "num_heads": 8}
T5 = {
    "vocab_size": TOKENS,
    "layer_norm_epsilon": 1e-12,
    "num_labels": 5,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
}
SMALL = {
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 16,
}
BIG = {
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 60,
    "decoder_ffn_dim": 40,
}
DEEP = BIG | {"encoder_layers": 4, "decoder_layers": 6}
BART = {
    "vocab_size": TOKENS,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_labels": 5,
}
WHISPER = {
    "vocab_size": TOKENS,
    "num_mel_bins": 7,
    "max_source_positions": 10,
    "max_target_positions": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
}
WHISPER |= {"eos_token_id": 2, "decoder_start_token_id": 1, "num_labels": 5, "classifier_proj_size": 9}


def untie(model: PreTrainedModel) -> None:
    """As a checkpoint does that holds a head of its own, though the config of these families always says tied."""
    model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
    del model.all_tied_weights_keys["lm_head.weight"]


def straighten(model: PreTrainedModel) -> None:
    """Move the second convolution to where GELU is the identity, and the positions back by as much."""
    encoder = model.get_submodule("model.encoder" if hasattr(model, "model") else "encoder")
    encoder.conv2.bias += 1000
    encoder.embed_positions.weight -= 1000


CASES: list[Case] = [
    Case(
        "blenderbot-small",
        "BlenderbotSmallForConditionalGeneration",
        SMALL,
        BIG,
        BART | {"scale_embedding": True},
        inputs="pairs",
        residual=STREAM_RESIDUAL,
    ),
    Case(
        "plbart",
        "PLBartForConditionalGeneration",
        SMALL,
        BIG,
        BART | {"scale_embedding": True},
        inputs="pairs",
        residual=STREAM_RESIDUAL,
    ),
    Case("mvp", "MvpForConditionalGeneration", SMALL, BIG, BART, inputs="pairs", residual=STREAM_RESIDUAL),
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
    Case("bart", "BartForConditionalGeneration", SMALL, BIG, BART, inputs="pairs", residual=STREAM_RESIDUAL),
    Case(
        "bart",
        "BartForConditionalGeneration",
        SMALL,
        BIG,
        BART | {"tie_word_embeddings": False, "scale_embedding": True},
        "bart-untied",
        inputs="pairs",
        residual=STREAM_RESIDUAL,
    ),
    Case(
        "mbart",
        "MBartForConditionalGeneration",
        SMALL,
        DEEP,
        BART | {"scale_embedding": True},
        inputs="pairs",
        residual=STREAM_RESIDUAL,
    ),
    Case(
        "mbart",
        "MBartForConditionalGeneration",
        SMALL,
        DEEP,
        BART | {"tie_word_embeddings": False},
        "mbart-untied",
        inputs="pairs",
        residual=STREAM_RESIDUAL,
    ),
    Case(
        "pegasus",
        "PegasusForConditionalGeneration",
        SMALL,
        DEEP,
        BART | {"scale_embedding": True},
        inputs="pairs",
        residual=TIED_RESIDUAL,
    ),
    Case(
        "blenderbot",
        "BlenderbotForConditionalGeneration",
        SMALL,
        DEEP,
        BART | {"scale_embedding": True, "tie_word_embeddings": False},
        inputs="pairs",
    ),
    Case(
        "whisper",
        "WhisperForConditionalGeneration",
        SMALL,
        DEEP,
        WHISPER,
        inputs="speech",
        settle=straighten,
        residual=TIED_RESIDUAL,
    ),
    Case(
        "whisper",
        "WhisperForConditionalGeneration",
        SMALL,
        DEEP,
        WHISPER | {"tie_word_embeddings": False},
        "whisper-untied",
        inputs="speech",
        settle=straighten,
    ),
    # GELU on the encoder's stream: no wider model computes the same there.
    Case(
        "whisper",
        "WhisperForConditionalGeneration",
        SMALL,
        DEEP,
        WHISPER | {"tie_word_embeddings": False},
        "whisper-bent",
        inputs="speech",
        lift=None,
        residual=STREAM_RESIDUAL,
    ),
    Case(
        "whisper",
        "WhisperForAudioClassification",
        SMALL,
        DEEP,
        WHISPER,
        "whisper-classifier",
        inputs="sounds",
        settle=straighten,
    ),
]
