"""T5, mT5 and UMT5."""

from hf_guide.layouts.registry import register_layout

register_layout(
    "t5",
    """
    shared: table vocab embed
    encoder.embed_tokens: table vocab embed
    encoder.block.0.layer.0.SelfAttention.relative_attention_bias: buckets heads
    encoder.block.{block}
      .layer.0.layer_norm: norm embed
      .layer.0.SelfAttention.q: (heads q_dim) embed < .layer.0.layer_norm
      .layer.0.SelfAttention.k: (heads k_dim) embed < .layer.0.layer_norm
      .layer.0.SelfAttention.v: (heads head_dim) embed < .layer.0.layer_norm
      .layer.0.SelfAttention.o: embed (heads head_dim)
      .layer.1.layer_norm: norm embed
      .layer.1.DenseReluDense.wi: mlp embed < .layer.1.layer_norm
      .layer.1.DenseReluDense.wi_0: mlp embed < .layer.1.layer_norm
      .layer.1.DenseReluDense.wi_1: mlp embed < .layer.1.layer_norm
      .layer.1.DenseReluDense.wo: embed mlp
    encoder.final_layer_norm: norm embed
    decoder.embed_tokens: table vocab embed
    decoder.block.0.layer.0.SelfAttention.relative_attention_bias: buckets heads
    decoder.block.{block}
      .layer.0.layer_norm: norm embed
      .layer.0.SelfAttention.q: (heads q_dim) embed < .layer.0.layer_norm
      .layer.0.SelfAttention.k: (heads k_dim) embed < .layer.0.layer_norm
      .layer.0.SelfAttention.v: (heads head_dim) embed < .layer.0.layer_norm
      .layer.0.SelfAttention.o: embed (heads head_dim)
      .layer.1.layer_norm: norm embed
      .layer.1.EncDecAttention.q: (heads q_dim) embed < .layer.1.layer_norm
      .layer.1.EncDecAttention.k: (heads k_dim) embed < encoder.final_layer_norm
      .layer.1.EncDecAttention.v: (heads head_dim) embed < encoder.final_layer_norm
      .layer.1.EncDecAttention.o: embed (heads head_dim)
      .layer.2.layer_norm: norm embed
      .layer.2.DenseReluDense.wi: mlp embed < .layer.2.layer_norm
      .layer.2.DenseReluDense.wi_0: mlp embed < .layer.2.layer_norm
      .layer.2.DenseReluDense.wi_1: mlp embed < .layer.2.layer_norm
      .layer.2.DenseReluDense.wo: embed mlp
    decoder.final_layer_norm: norm embed
    lm_head: vocab embed < decoder.final_layer_norm
    classification_head.dense: pooled embed < decoder.final_layer_norm
    classification_head.out_proj: labels pooled
    classifier: labels embed < encoder.final_layer_norm
    qa_outputs: 2 embed < decoder.final_layer_norm
    """,
    sizes={"heads": "num_heads", "head_dim": "d_kv"},
    attention_scale=lambda config: 1.0,
    tied_head_scale=lambda config: config.d_model**-0.5 if config.scale_decoder_outputs else 1.0,
)
register_layout("mt5", like="t5", tied_head_scale=lambda config: 1.0)
register_layout(
    "umt5",
    """
    encoder.block.{block}.layer.0.SelfAttention.relative_attention_bias: buckets heads
    decoder.block.{block}.layer.0.SelfAttention.relative_attention_bias: buckets heads
    """,
    like="t5",
    tied_head_scale=lambda config: config.d_model**-0.5 if config.tie_word_embeddings else 1.0,
)
