"""ModernBERT and EuroBERT."""

from tests.invariants.case import STREAM_RESIDUAL, TOKENS, Case
from tests.invariants.shapes import ENCODER_DEEP, ENCODER_SMALL

MODERN = {
    "vocab_size": TOKENS,
    "max_position_embeddings": 32,
    "norm_eps": 1e-12,
    "num_labels": 5,
    "local_attention": 4,
}
MODERN |= {f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")}
EURO = {
    "vocab_size": TOKENS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rms_norm_eps": 1e-12,
    "num_labels": 5,
}
CASES: list[Case] = [
    Case(
        "modernbert",
        "ModernBertModel",
        ENCODER_SMALL | {"layer_types": ["full_attention"] * 2},
        ENCODER_DEEP | {"layer_types": ["full_attention", *["sliding_attention"] * 2, "full_attention"]},
        MODERN | {"attention_bias": True, "mlp_bias": True, "norm_bias": True},
        output="last_hidden_state gram",
        residual=STREAM_RESIDUAL,
    ),
    Case(
        "modernbert",
        "ModernBertForSequenceClassification",
        ENCODER_SMALL,
        ENCODER_DEEP,
        MODERN,
        "modernbert-classifier",
        lift=None,
        residual=STREAM_RESIDUAL,
    ),
    Case(
        "modernbert",
        "ModernBertForMaskedLM",
        ENCODER_SMALL,
        ENCODER_DEEP,
        MODERN,
        "modernbert-masked",
        lift=None,
        residual=STREAM_RESIDUAL,
    ),
    Case("eurobert", "EuroBertForMaskedLM", ENCODER_SMALL, ENCODER_DEEP, EURO | {"tie_word_embeddings": False}),
    Case("eurobert", "EuroBertForSequenceClassification", ENCODER_SMALL, ENCODER_DEEP, EURO, "eurobert-pooled"),
    Case("eurobert", "EuroBertForTokenClassification", ENCODER_SMALL, ENCODER_DEEP, EURO, "eurobert-tokens"),
]
