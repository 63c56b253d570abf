"""Whisper, whose encoder and decoder are two residual streams, `enc_embed` and `embed`."""

from hf_guide.layouts.registry import register_layout

register_layout(
    "whisper",
    """
    encoder.conv1: filters channels kernel
    encoder.conv2: table enc_embed filters kernel
    encoder.embed_positions: table positions enc_embed
    encoder.layers.{block}
      .self_attn.q_proj: (enc_heads enc_q_dim) enc_embed < .self_attn_layer_norm
      .self_attn.k_proj: (enc_heads enc_k_dim) enc_embed < .self_attn_layer_norm
      .self_attn.v_proj: (enc_heads enc_head_dim) enc_embed < .self_attn_layer_norm
      .self_attn.out_proj: enc_embed (enc_heads enc_head_dim)
      .self_attn_layer_norm: norm enc_embed
      .fc1: mlp enc_embed < .final_layer_norm
      .fc2: enc_embed mlp
      .final_layer_norm: norm enc_embed
    encoder.layer_norm: norm enc_embed
    decoder.layers.{block}
      .encoder_attn.k_proj: (heads k_dim) enc_embed < encoder.layer_norm
      .encoder_attn.v_proj: (heads head_dim) enc_embed < encoder.layer_norm
    proj_out: vocab embed < decoder.layer_norm
    projector: pooled enc_embed < encoder.layer_norm
    classifier: labels pooled
    """,
    like="mbart",
    embedding_scale=lambda config: 1.0,  # its config has a scale, which it does not use
    exactness="exact but for GELU on the encoder's residual stream after the second convolution",
)
