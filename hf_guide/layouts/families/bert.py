"""BERT, RoBERTa, DistilBERT, ELECTRA, ALBERT, MPNet and their variants."""

from hf_guide.layouts.families.exactness import POST_NORM_NOTE
from hf_guide.layouts.registry import register_layout

register_layout(
    "bert",
    """
    embeddings.word_embeddings: table vocab embed
    embeddings.position_embeddings: positions embed
    embeddings.token_type_embeddings: token_types embed
    embeddings.LayerNorm: norm embed
    encoder.layer.{block}
      .attention.self.query: (heads q_dim) embed
      .attention.self.key: (heads k_dim) embed
      .attention.self.value: (heads head_dim) embed
      .attention.output.dense: embed (heads head_dim)
      .attention.output.LayerNorm: norm embed
      .intermediate.dense: mlp embed
      .output.dense: embed mlp
      .output.LayerNorm: norm embed
    pooler.dense: pooled embed
    classifier: labels pooled
    qa_outputs: 2 embed
    cls.seq_relationship: 2 pooled
    cls.predictions.transform.dense: embed embed
    cls.predictions.transform.LayerNorm: norm embed
    cls.predictions.decoder: vocab embed < cls.predictions.transform.LayerNorm
    cls.predictions.bias: vocab
    """,
    norm="layer",
    alike=(("pooler", "pooled", "embed"),),  # a token classifier takes the residual stream, not the pooler
    exactness=POST_NORM_NOTE.format("25 % to 43 %", "82 %"),
)
register_layout(
    "big_bird",
    """
    pooler: pooled embed
    classifier.dense: pooled embed
    classifier.out_proj: labels pooled
    qa_classifier.intermediate.dense: mlp embed
    qa_classifier.output.dense: embed mlp
    qa_classifier.output.LayerNorm: norm embed
    qa_classifier.qa_outputs: 2 embed
    """,
    like="bert",
)
register_layout("ernie", "embeddings.task_type_embeddings: token_types embed", like="bert")

register_layout(
    "roberta",
    """
    classifier: labels embed
    classifier.dense: pooled embed
    classifier.out_proj: labels pooled
    lm_head.dense: embed embed
    lm_head.layer_norm: norm embed
    lm_head.decoder: vocab embed < lm_head.layer_norm
    lm_head.bias: vocab
    """,
    like="bert",
    alike=(),
    exactness=POST_NORM_NOTE.format("43 %", "76 %"),
)
for family in ("xlm-roberta", "camembert", "data2vec-text"):
    register_layout(family, like="roberta")

register_layout(
    "longformer",
    """
    encoder.layer.{block}
      .attention.self.query_global: (heads q_dim) embed
      .attention.self.key_global: (heads k_dim) embed
      .attention.self.value_global: (heads head_dim) embed
    """,
    like="roberta",
)
register_layout(
    "layoutlm",
    """
    embeddings.x_position_embeddings: positions embed
    embeddings.y_position_embeddings: positions embed
    embeddings.h_position_embeddings: positions embed
    embeddings.w_position_embeddings: positions embed
    """,
    like="bert",
)

register_layout(
    "xlm-roberta-xl",
    """
    encoder.layer.{block}
      .attention.self_attn_layer_norm: norm embed
      .attention.self.query: (heads q_dim) embed < .attention.self_attn_layer_norm
      .attention.self.key: (heads k_dim) embed < .attention.self_attn_layer_norm
      .attention.self.value: (heads head_dim) embed < .attention.self_attn_layer_norm
      .LayerNorm: norm embed
      .intermediate.dense: mlp embed < .LayerNorm
    encoder.LayerNorm: norm embed
    classifier: labels embed < encoder.LayerNorm
    classifier.dense: pooled embed < encoder.LayerNorm
    qa_outputs: 2 embed < encoder.LayerNorm
    lm_head.dense: embed embed < encoder.LayerNorm
    """,
    like="roberta",
    exactness="exact; GELU in the masked-language head does not commute with a projection",
)

register_layout(
    "megatron-bert",
    """
    encoder.layer.{block}
      .attention.ln: norm embed
      .attention.self.query: (heads q_dim) embed < .attention.ln
      .attention.self.key: (heads k_dim) embed < .attention.ln
      .attention.self.value: (heads head_dim) embed < .attention.ln
      .ln: norm embed
      .intermediate.dense: mlp embed < .ln
    encoder.ln: norm embed
    classifier: labels pooled < encoder.ln
    qa_outputs: 2 embed < encoder.ln
    cls.predictions.transform.dense: embed embed < encoder.ln
    """,
    like="bert",
    exactness="exact; GELU in the masked-language head does not commute with a projection",
)
register_layout(
    "roberta-prelayernorm",
    """
    encoder.layer.{block}
      .attention.LayerNorm: norm embed
      .attention.self.query: (heads q_dim) embed < .attention.LayerNorm
      .attention.self.key: (heads k_dim) embed < .attention.LayerNorm
      .attention.self.value: (heads head_dim) embed < .attention.LayerNorm
      .intermediate.LayerNorm: norm embed
      .intermediate.dense: mlp embed < .intermediate.LayerNorm
    LayerNorm: norm embed
    classifier: labels embed < LayerNorm
    classifier.dense: pooled embed < LayerNorm
    qa_outputs: 2 embed < LayerNorm
    lm_head.dense: embed embed < LayerNorm
    """,
    like="roberta",
    exactness="the gain of the embeddings' norm becomes a diagonal: logits off by 15 % on a rotated residual stream, gains at "
    "1 +- 0.3; GELU in the masked-language head does not commute with a projection",
)

register_layout(
    "distilbert",
    """
    embeddings.word_embeddings: table vocab embed
    embeddings.position_embeddings: positions embed
    embeddings.LayerNorm: norm embed
    transformer.layer.{block}
      .attention.q_lin: (heads q_dim) embed
      .attention.k_lin: (heads k_dim) embed
      .attention.v_lin: (heads head_dim) embed
      .attention.out_lin: embed (heads head_dim)
      .sa_layer_norm: norm embed
      .ffn.lin1: mlp embed
      .ffn.lin2: embed mlp
      .output_layer_norm: norm embed
    pre_classifier: pooled embed
    classifier: labels pooled
    qa_outputs: 2 embed
    vocab_transform: embed embed
    vocab_layer_norm: norm embed
    vocab_projector: vocab embed < vocab_layer_norm
    """,
    norm="layer",
    alike=(("pre_classifier", "pooled", "embed"),),
    exactness=POST_NORM_NOTE.format("30 %", "76 %"),
)

register_layout(
    "electra",
    """
    embeddings.word_embeddings: table vocab table_embed
    embeddings.position_embeddings: positions table_embed
    embeddings.token_type_embeddings: token_types table_embed
    embeddings.LayerNorm: norm table_embed
    embeddings_project: table embed table_embed < embeddings.LayerNorm
    sequence_summary.summary: summary embed
    classifier: labels summary
    classifier.dense: pooled embed
    classifier.out_proj: labels pooled
    discriminator_predictions.dense: pooled embed
    discriminator_predictions.dense_prediction: 1 pooled
    generator_predictions.dense: table_embed embed
    generator_predictions.LayerNorm: norm table_embed
    generator_lm_head: vocab table_embed < generator_predictions.LayerNorm
    """,
    like="bert",
    alike=(("embeddings_project", "table_embed", "embed"), ("sequence_summary", "summary", "embed")),
    exactness=POST_NORM_NOTE.format("41 %, 80 % where factorised", "78 %"),
)

register_layout(
    "albert",
    """
    embeddings.word_embeddings: table vocab table_embed
    embeddings.position_embeddings: positions table_embed
    embeddings.token_type_embeddings: token_types table_embed
    embeddings.LayerNorm: norm table_embed
    encoder.embedding_hidden_mapping_in: table embed table_embed < embeddings.LayerNorm
    encoder.albert_layer_groups.{stage}.albert_layers.{inner}
      .attention.query: (heads q_dim) embed
      .attention.key: (heads k_dim) embed
      .attention.value: (heads head_dim) embed
      .attention.dense: embed (heads head_dim)
      .attention.LayerNorm: norm embed
      .ffn: mlp embed
      .ffn_output: embed mlp
      .full_layer_layer_norm: norm embed
    pooler: pooled embed
    classifier: labels pooled
    qa_outputs: 2 embed
    sop_classifier.classifier: labels pooled
    predictions.dense: table_embed embed
    predictions.LayerNorm: norm table_embed
    predictions.decoder: vocab table_embed < predictions.LayerNorm
    predictions.bias: vocab
    """,
    norm="layer",
    alike=(("pooler", "pooled", "embed"),),
    exactness=POST_NORM_NOTE.format("54 %", "95 %"),
)

register_layout(
    "mpnet",
    """
    encoder.layer.{block}
      .attention.attn.q: (heads q_dim) embed
      .attention.attn.k: (heads k_dim) embed
      .attention.attn.v: (heads head_dim) embed
      .attention.attn.o: embed (heads head_dim)
      .attention.LayerNorm: norm embed
    encoder.relative_attention_bias: buckets heads
    """,
    like="roberta",
    exactness=POST_NORM_NOTE.format("33 %", "96 %"),
)
