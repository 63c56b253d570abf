"""Small models of every family, each in a small and a big shape."""

from tests.invariants.cases import decoders, encoder_decoders, encoders, vision

CASES = [*decoders.CASES, *encoders.CASES, *encoder_decoders.CASES, *vision.CASES]
