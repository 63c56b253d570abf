"""OPT and BioGPT."""

from transformers import PreTrainedConfig

from hf_guide.layouts.registry import register_layout


def _opt(config: PreTrainedConfig) -> str:
    if not config.do_layer_norm_before:
        return "opt (post-norm)"
    return "opt" if config.word_embed_proj_dim == config.hidden_size else "opt (projected embeddings)"


register_layout(
    "opt",
    """
    decoder.embed_tokens: table vocab embed
    decoder.embed_positions: positions embed
    decoder.layers.{block}
      .self_attn_layer_norm: norm embed
      .self_attn.q_proj: (heads q_dim) embed < .self_attn_layer_norm
      .self_attn.k_proj: (heads k_dim) embed < .self_attn_layer_norm
      .self_attn.v_proj: (heads head_dim) embed < .self_attn_layer_norm
      .self_attn.out_proj: embed (heads head_dim)
      .final_layer_norm: norm embed
      .fc1: mlp embed < .final_layer_norm
      .fc2: embed mlp
    decoder.final_layer_norm: norm embed
    lm_head: vocab embed < decoder.final_layer_norm
    score: labels embed < decoder.final_layer_norm
    qa_outputs: 2 embed < decoder.final_layer_norm
    """,
    norm="layer",
    variant=_opt,
)
register_layout(
    "opt (projected embeddings)",
    """
    decoder.embed_tokens: table vocab word
    decoder.embed_positions: table positions embed
    decoder.project_in: table embed word
    decoder.project_out: word embed < decoder.final_layer_norm
    lm_head: vocab word
    score: labels word
    qa_outputs: 2 word
    """,
    like="opt",
    variant=_opt,
)
register_layout(
    "opt (post-norm)",
    """
    decoder.layers.{block}
      .self_attn.q_proj: (heads q_dim) embed
      .self_attn.k_proj: (heads k_dim) embed
      .self_attn.v_proj: (heads head_dim) embed
      .fc1: mlp embed
    decoder.project_out: word embed
    """,
    like="opt (projected embeddings)",
    alike=(("decoder.project_in", "word", "embed"),),
    variant=_opt,
    exactness="post-norm: gains become diagonals, logits off by 51 % on a rotated residual stream, gains at 1 +- 0.3",
)

register_layout(
    "biogpt",
    """
    embed_tokens: table vocab embed
    embed_positions: positions embed
    layers.{block}
      .self_attn_layer_norm: norm embed
      .self_attn.q_proj: (heads q_dim) embed < .self_attn_layer_norm
      .self_attn.k_proj: (heads k_dim) embed < .self_attn_layer_norm
      .self_attn.v_proj: (heads head_dim) embed < .self_attn_layer_norm
      .self_attn.out_proj: embed (heads head_dim)
      .final_layer_norm: norm embed
      .fc1: mlp embed < .final_layer_norm
      .fc2: embed mlp
    layer_norm: norm embed
    output_projection: vocab embed < layer_norm
    score: labels embed < layer_norm
    classifier: labels embed < layer_norm
    """,
    norm="layer",
    embedding_scale=lambda config: config.hidden_size**0.5 if config.scale_embedding else 1.0,
)
