"""Image encoders.

The residual stream starts from patches, so the directions are fitted on the columns of the patch projection, the positions
and the added tokens. Positions form a grid: a student keeps its teacher's `patches`.
"""

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

# Its "images" are spectrograms; a norm follows the mean of the two added tokens' normed states.
register_layout(
    "audio-spectrogram-transformer",
    """
    embeddings.distillation_token: table 1 1 embed
    classifier.layernorm: norm embed
    classifier.dense: labels embed < classifier.layernorm
    """,
    like="vit",
    exactness="the gain of the norm before the tokens are pooled becomes a diagonal",
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
