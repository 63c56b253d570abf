"""Layouts of image encoders. Nothing but tables: `layouts.py` says how they are read.

What the residual stream is made from are patches, so the directions are fitted on the columns of the patch projection,
the positions and the added tokens. Positions form a grid: a student keeps its teacher's `patches`.
"""

import re
from collections.abc import Callable

from transformers import PreTrainedConfig

from hf_guide.layouts.registry import register_layout

register_layout(
    "vit",
    """
    embeddings.patch_embeddings.projection: table embed channels kernel kernel
    embeddings.position_embeddings: table 1 patches embed
    embeddings.cls_token: table 1 1 embed
    embeddings.mask_token: 1 1 embed
    layers.{block}
      .layernorm_before: norm embed
      .attention.q_proj: (heads q_dim) embed < .layernorm_before
      .attention.k_proj: (heads k_dim) embed < .layernorm_before
      .attention.v_proj: (heads head_dim) embed < .layernorm_before
      .attention.o_proj: embed (heads head_dim)
      .layernorm_after: norm embed
      .mlp.fc1: mlp embed < .layernorm_after
      .mlp.fc2: embed mlp
    layernorm: norm embed
    pooler.dense: pooled embed  # the norm before it is also what a base model returns, so it keeps its gain
    classifier: labels embed < layernorm
    """,
    norm="layer",
)
register_layout("vit_msn", like="vit")
register_layout("ijepa", like="vit")
register_layout(
    "deit",
    """
    embeddings.distillation_token: table 1 1 embed
    cls_classifier: labels embed < layernorm
    distillation_classifier: labels embed < layernorm
    """,
    like="vit",
)

register_layout(
    "dinov2",
    """
    embeddings.mask_token: 1 embed
    encoder.layer.{block}
      .norm1: norm embed
      .attention.q_proj: (heads q_dim) embed < .norm1
      .attention.k_proj: (heads k_dim) embed < .norm1
      .attention.v_proj: (heads head_dim) embed < .norm1
      .attention.o_proj: embed (heads head_dim) > .layer_scale1.lambda1
      .layer_scale1.lambda1: norm embed
      .norm2: norm embed
      .mlp.fc1: mlp embed < .norm2
      .mlp.fc2: embed mlp > .layer_scale2.lambda1
      .mlp.gate_proj: mlp embed < .norm2
      .mlp.up_proj: mlp embed < .norm2
      .mlp.down_proj: embed mlp > .layer_scale2.lambda1
      .layer_scale2.lambda1: norm embed
    classifier: labels (2 embed) < layernorm
    """,
    like="vit",
)
register_layout("dinov2_with_registers", "embeddings.register_tokens: table 1 patches embed", like="dinov2")

register_layout(
    "beit",
    """
    layers.{block}
      .attention.o_proj: embed (heads head_dim) > .lambda_1
      .lambda_1: norm embed
      .mlp.fc2: embed mlp > .lambda_2
      .lambda_2: norm embed
      .relative_position_bias.relative_position_bias_table: buckets heads
    shared_position_bias.relative_position_bias_table: buckets heads
    pooler.layernorm: norm embed
    classifier: labels embed < pooler.layernorm
    lm_head: vocab embed < layernorm
    """,
    like="vit",
    variant=lambda config: "beit" if config.use_mean_pooling else "beit_first_token",
)
register_layout(
    "beit_first_token",
    "classifier: labels embed < layernorm",
    like="beit",
    variant=lambda config: "beit" if config.use_mean_pooling else "beit_first_token",
)

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
IMAGE_NORM_NOTE = "the gain of the embeddings' norm becomes a diagonal: 15 % of a turned stream, gains being 1 +- 0.3"

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
    text_model.head: embed text_embed < text_model.final_layer_norm  # compared with what the image's head writes
    classifier: labels embed < vision_model.post_layernorm
    """,
    like="clip",
    exactness="exact",
)
