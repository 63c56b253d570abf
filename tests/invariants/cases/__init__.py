"""Small models of every family, each in a small and a big shape."""

from tests.invariants.cases import (
    decoders,
    encoder_decoders,
    encoders,
    gpt_decoders,
    layer_norm_decoders,
    mixtures,
    vision,
)

CASES = [
    *decoders.CASES,
    *gpt_decoders.CASES,
    *layer_norm_decoders.CASES,
    *mixtures.CASES,
    *encoders.CASES,
    *encoder_decoders.CASES,
    *vision.CASES,
]
