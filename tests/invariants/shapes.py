"""Config values that the cases of several families share."""

from tests.invariants.case import TOKENS

DECODER = {
    "vocab_size": TOKENS,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
RMS = DECODER | {"rms_norm_eps": 1e-12}
UNTIED, TIED = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}
SMALL = {
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
}
BIG = {
    "hidden_size": 40,
    "intermediate_size": 60,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 6,
}
# Heads as wide together as the stream, as families without a head size of their own need.
NARROW = {
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
}
WIDE = {
    "hidden_size": 48,
    "intermediate_size": 60,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
}
SLIDING = {"sliding_window": 4}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"]}
BIG_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]}
GRANITE = {"embedding_multiplier": 3.0, "logits_scaling": 5.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2}
PAIR_SMALL = {
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 16,
}
PAIR_BIG = {
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 60,
    "decoder_ffn_dim": 40,
}
PAIR_DEEP = PAIR_BIG | {"encoder_layers": 4, "decoder_layers": 6}
# Post-norm families have as many blocks in both shapes: a block that writes nothing still norms the stream once more.
ENCODER_SMALL = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4}
ENCODER_BIG = {"hidden_size": 48, "intermediate_size": 60, "num_hidden_layers": 2, "num_attention_heads": 8}
ENCODER_DEEP = ENCODER_BIG | {"num_hidden_layers": 4}
TEXT = {
    "vocab_size": TOKENS,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "layer_norm_eps": 1e-12,
    "num_labels": 5,
}
EPS = {"layer_norm_eps": 1e-12}
PARTIAL = {"partial_rotary_factor": 0.5}
IMAGE_SMALL = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE_BIG = {"hidden_size": 48, "intermediate_size": 60, "num_hidden_layers": 4, "num_attention_heads": 8}
IMAGES = {"image_size": 12, "patch_size": 4, "layer_norm_eps": 1e-12, "num_labels": 5}
