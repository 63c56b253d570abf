"""ModernBERT and EuroBERT."""

from hf_guide.layouts.registry import register_layout

register_layout(
    "modernbert",
    """
    embeddings.tok_embeddings: table vocab embed
    embeddings.norm: norm embed
    layers.{block}
      .attn_norm: norm embed
      .attn.Wqkv: (heads q_dim + heads k_dim + heads head_dim) embed < .attn_norm | .attn_norm | .attn_norm
      .attn.Wo: embed (heads head_dim)
      .mlp_norm: norm embed
      .mlp.Wi: (mlp + mlp) embed < .mlp_norm | .mlp_norm
      .mlp.Wo: embed mlp
    final_norm: norm embed
    head.dense: pooled embed < final_norm
    head.norm: norm pooled
    classifier: labels pooled
    decoder: vocab pooled < head.norm
    """,
    norm="layer",
    rope="half",
    sizes={"mlp": "intermediate_size"},
    alike=(("classifier", "pooled", "embed"),),  # the masked-language decoder is tied to the embedding
    exactness="the gain of the embeddings' norm becomes a diagonal: logits off by 23 % on a rotated residual stream, gains at "
    "1 +- 0.3; by 98 % behind the masked-language head, whose GELU does not commute with a projection",
)

register_layout(
    "eurobert",
    """
    dense: pooled embed < norm
    classifier: labels pooled < norm
    """,
    like="llama",
    alike=(("dense", "pooled", "embed"),),
)
