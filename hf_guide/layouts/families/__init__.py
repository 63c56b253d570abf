"""The built-in layouts: importing this registers them."""

from hf_guide.layouts.families import (
    decoders,
    depth_rules,
    encoder_decoders,
    encoders,
    gpt_decoders,
    layer_norm_decoders,
    mixtures,
    vision,
)

__all__ = [
    "decoders",
    "depth_rules",
    "encoder_decoders",
    "encoders",
    "gpt_decoders",
    "layer_norm_decoders",
    "mixtures",
    "vision",
]
