"""DeBERTa v2 and v3."""

from hf_guide.layouts.families.exactness import POST_NORM_NOTE
from hf_guide.layouts.registry import register_layout

register_layout(
    "deberta-v2",
    """
    embeddings.word_embeddings: table vocab table_embed
    embeddings.position_embeddings: positions table_embed
    embeddings.token_type_embeddings: token_types table_embed
    embeddings.embed_proj: table embed table_embed
    encoder.rel_embeddings: table buckets embed
    encoder.LayerNorm: norm embed
    encoder.conv.conv: embed embed kernel
    encoder.conv.LayerNorm: norm embed
    encoder.layer.{block}
      .attention.self.query_proj: (heads q_dim) embed
      .attention.self.key_proj: (heads k_dim) embed
      .attention.self.value_proj: (heads head_dim) embed
      .attention.self.pos_query_proj: (heads q_dim) embed
      .attention.self.pos_key_proj: (heads k_dim) embed
    cls.predictions.transform.dense: table_embed embed
    cls.predictions.transform.LayerNorm: norm table_embed
    cls.predictions.decoder: vocab table_embed < cls.predictions.transform.LayerNorm
    lm_predictions.lm_head.dense: embed embed
    lm_predictions.lm_head.LayerNorm: norm embed
    lm_predictions.lm_head.bias: vocab
    """,
    like="bert",
    alike=(("embeddings.embed_proj", "table_embed", "embed"), ("pooler", "pooled", "embed")),
    sizes={
        "head_dim": lambda config: getattr(
            config, "attention_head_size", config.hidden_size // config.num_attention_heads
        )
    },
    exactness=POST_NORM_NOTE.format("37 %, 97 % where factorised", "86 %")
    + "; nor does the convolution's activation, where there is one",
)
