"""CLIP and SigLIP: an image tower and a text tower."""

import re
from collections.abc import Callable

from transformers import PreTrainedConfig

from hf_guide.layouts.families.exactness import IMAGE_NORM_NOTE
from hf_guide.layouts.registry import register_layout

TOWER = """
    @encoder.layers.{block}
      .layer_norm1: norm embed
      .self_attn.q_proj: (heads q_dim) embed < .layer_norm1
      .self_attn.k_proj: (heads k_dim) embed < .layer_norm1
      .self_attn.v_proj: (heads head_dim) embed < .layer_norm1
      .self_attn.out_proj: embed (heads head_dim)
      .layer_norm2: norm embed
      .mlp.fc1: mlp embed < .layer_norm2
      .mlp.fc2: embed mlp
"""
IMAGE_TOWER = (
    TOWER
    + """
    @embeddings.patch_embedding: table embed channels kernel kernel
    @embeddings.position_embedding: table patches embed
    @embeddings.class_embedding: table embed
    @pre_layrnorm: norm embed
    @post_layernorm: norm embed
    @head.probe: 1 1 embed
    @head.attention.in_proj: (heads q_dim + heads k_dim + heads head_dim) embed < - | @post_layernorm | @post_layernorm
    @head.attention.out_proj: embed (heads head_dim)
    @head.layernorm: norm embed
    @head.mlp.fc1: mlp embed < @head.layernorm
    @head.mlp.fc2: embed mlp
    visual_projection: projected embed < @post_layernorm
"""
)
TEXT_TOWER = (
    TOWER
    + """
    @embeddings.token_embedding: table vocab embed
    @embeddings.position_embedding: positions embed
    @final_layer_norm: norm embed
    @head: projected embed < @final_layer_norm
    text_projection: projected embed < @final_layer_norm
"""
)

register_layout("clip_vision_model", IMAGE_TOWER.replace("@", ""), norm="layer", exactness=IMAGE_NORM_NOTE)
register_layout("siglip_vision_model", like="clip_vision_model", exactness="exact")
register_layout("clip_text_model", TEXT_TOWER.replace("@", ""), norm="layer")
register_layout("siglip_text_model", like="clip_text_model")

TWO_TOWERS = IMAGE_TOWER.replace("@", "vision_model.") + re.sub(
    r"\b(embed|heads|q_dim|k_dim|head_dim)\b", r"text_\1", TEXT_TOWER.replace("@", "text_model.")
)


def _head_size(tower: str) -> Callable[[PreTrainedConfig], int]:
    return lambda config: getattr(config, tower).hidden_size // getattr(config, tower).num_attention_heads


register_layout(
    "clip",
    TWO_TOWERS
    + """
    logit_scale: scalar
    classifier: labels embed
    """,
    norm="layer",
    sizes={
        "heads": lambda config: config.vision_config.num_attention_heads,
        "head_dim": _head_size("vision_config"),
        "text_heads": lambda config: config.text_config.num_attention_heads,
        **{f"text_{name}": _head_size("text_config") for name in ("q_dim", "k_dim", "head_dim")},
    },
    exactness=IMAGE_NORM_NOTE,
)
register_layout(
    "siglip",
    """
    logit_scale: 1
    logit_bias: 1
    text_model.head: embed text_embed < text_model.final_layer_norm  # compared with the output of the image head
    classifier: labels embed < vision_model.post_layernorm
    """,
    like="clip",
    exactness="exact",
)
