"""BART, mBART, Pegasus, Blenderbot, PLBart and MVP. Encoder and decoder share the embedding and its directions."""

from tests.invariants.case import STREAM_RESIDUAL, TIED_RESIDUAL, TOKENS, Case
from tests.invariants.shapes import PAIR_BIG, PAIR_DEEP, PAIR_SMALL

BART = {
    "vocab_size": TOKENS,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_labels": 5,
}
CASES: list[Case] = [
    Case("bart", "BartForConditionalGeneration", PAIR_SMALL, PAIR_BIG, BART, inputs="pairs", residual=STREAM_RESIDUAL),
    Case(
        "bart",
        "BartForConditionalGeneration",
        PAIR_SMALL,
        PAIR_BIG,
        BART | {"tie_word_embeddings": False, "scale_embedding": True},
        "bart-untied",
        inputs="pairs",
        residual=STREAM_RESIDUAL,
    ),
    Case(
        "plbart",
        "PLBartForConditionalGeneration",
        PAIR_SMALL,
        PAIR_BIG,
        BART | {"scale_embedding": True},
        inputs="pairs",
        residual=STREAM_RESIDUAL,
    ),
    Case("mvp", "MvpForConditionalGeneration", PAIR_SMALL, PAIR_BIG, BART, inputs="pairs", residual=STREAM_RESIDUAL),
    Case(
        "blenderbot-small",
        "BlenderbotSmallForConditionalGeneration",
        PAIR_SMALL,
        PAIR_BIG,
        BART | {"scale_embedding": True},
        inputs="pairs",
        residual=STREAM_RESIDUAL,
    ),
    Case(
        "mbart",
        "MBartForConditionalGeneration",
        PAIR_SMALL,
        PAIR_DEEP,
        BART | {"scale_embedding": True},
        inputs="pairs",
        residual=STREAM_RESIDUAL,
    ),
    Case(
        "mbart",
        "MBartForConditionalGeneration",
        PAIR_SMALL,
        PAIR_DEEP,
        BART | {"tie_word_embeddings": False},
        "mbart-untied",
        inputs="pairs",
        residual=STREAM_RESIDUAL,
    ),
    Case(
        "pegasus",
        "PegasusForConditionalGeneration",
        PAIR_SMALL,
        PAIR_DEEP,
        BART | {"scale_embedding": True},
        inputs="pairs",
        residual=TIED_RESIDUAL,
    ),
    Case(
        "blenderbot",
        "BlenderbotForConditionalGeneration",
        PAIR_SMALL,
        PAIR_DEEP,
        BART | {"scale_embedding": True, "tie_word_embeddings": False},
        inputs="pairs",
    ),
]
