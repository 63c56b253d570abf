"""DeBERTa v2 and v3."""

from tests.invariants.case import STREAM_RESIDUAL, Case
from tests.invariants.shapes import ENCODER_BIG, ENCODER_SMALL, TEXT

DEBERTA = TEXT | {
    "relative_attention": True,
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "pos_att_type": ["c2p", "p2c"],
    "type_vocab_size": 2,
}
CASES: list[Case] = [
    Case(
        "deberta-v2",
        "DebertaV2ForSequenceClassification",
        ENCODER_SMALL,
        ENCODER_BIG,
        DEBERTA | {"share_att_key": True},
        residual=STREAM_RESIDUAL,
    ),
    Case(
        "deberta-v2",
        "DebertaV2ForTokenClassification",
        ENCODER_SMALL | {"embedding_size": 12},
        ENCODER_BIG | {"embedding_size": 20},
        DEBERTA,
        "deberta-v2-factorised",
        residual=STREAM_RESIDUAL,
    ),
    Case(
        "deberta-v2",
        "DebertaV2ForMaskedLM",
        ENCODER_SMALL,
        ENCODER_BIG,
        DEBERTA | {"legacy": False},
        "deberta-v2-masked",
        lift=None,
        residual=STREAM_RESIDUAL,
    ),
]
