"""Image encoders.

The residual stream starts from patches, so the directions are fitted on the columns of the patch projection, the positions
and the added tokens. Positions form a grid: a student keeps its teacher's `patches`.
"""

from transformers import PreTrainedConfig

from hf_guide.layouts.registry import register_layout


def _decoder_head_dim(config: PreTrainedConfig) -> int:
    return config.decoder_hidden_size // config.decoder_num_attention_heads


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
    decoder.0: values embed kernel kernel < layernorm  # the pixels of masked patches
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
    "yolos",
    """
    embeddings.detection_tokens: table 1 patches embed
    encoder.interpolation.mid_position_embeddings: gaps 1 patches embed
    encoder.layer.{block}
      .layernorm_before: norm embed
      .attention.attention.query: (heads q_dim) embed < .layernorm_before
      .attention.attention.key: (heads k_dim) embed < .layernorm_before
      .attention.attention.value: (heads head_dim) embed < .layernorm_before
      .attention.output.dense: embed (heads head_dim)
      .layernorm_after: norm embed
      .intermediate.dense: mlp embed < .layernorm_after
      .output.dense: embed mlp
    class_labels_classifier.layers.0: hidden embed < layernorm
    class_labels_classifier.layers.1: second_hidden hidden
    class_labels_classifier.layers.2: (labels + 1) second_hidden  # the last is for no object
    bbox_predictor.layers.0: hidden embed < layernorm
    bbox_predictor.layers.1: second_hidden hidden
    bbox_predictor.layers.2: 4 second_hidden
    """,
    like="vit",
)

register_layout(
    "vit_mae",
    """
    decoder.decoder_embed: table decoder_embed embed < layernorm
    decoder.mask_token: 1 1 decoder_embed
    decoder.decoder_pos_embed: table 1 patches decoder_embed
    decoder.decoder_layers.{block}
      .layernorm_before: norm decoder_embed
      .attention.q_proj: (decoder_heads decoder_q_dim) decoder_embed < .layernorm_before
      .attention.k_proj: (decoder_heads decoder_k_dim) decoder_embed < .layernorm_before
      .attention.v_proj: (decoder_heads decoder_head_dim) decoder_embed < .layernorm_before
      .attention.o_proj: decoder_embed (decoder_heads decoder_head_dim)
      .layernorm_after: norm decoder_embed
      .mlp.fc1: mlp decoder_embed < .layernorm_after
      .mlp.fc2: decoder_embed mlp
    decoder.decoder_norm: norm decoder_embed
    decoder.decoder_pred: values decoder_embed < decoder.decoder_norm
    """,
    like="vit",
    sizes={
        "decoder_heads": "decoder_num_attention_heads",
        "decoder_head_dim": _decoder_head_dim,
        "decoder_q_dim": _decoder_head_dim,
        "decoder_k_dim": _decoder_head_dim,
    },
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
