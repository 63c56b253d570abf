"""GPT-NeoX and Pythia."""

from hf_guide.layouts.registry import register_layout

register_layout(
    "gpt_neox",
    """
    embed_in: table vocab embed
    layers.{block}
      .input_layernorm: norm embed
      .attention.query_key_value: (heads (q_dim + k_dim + head_dim)) embed < .input_layernorm
      .attention.dense: embed (heads head_dim)
      .post_attention_layernorm: norm embed
      .mlp.dense_h_to_4h: mlp embed < .post_attention_layernorm
      .mlp.dense_4h_to_h: embed mlp
    final_layer_norm: norm embed
    lm_head: vocab embed < final_layer_norm
    score: labels embed < final_layer_norm
    classifier: labels embed < final_layer_norm
    qa_outputs: 2 embed < final_layer_norm
    """,
    norm="layer",
    rope="half",
)
