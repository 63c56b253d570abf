"""Layouts of OPT, and of decoders with Llama's rows and LayerNorm. Nothing but tables: `layouts.py` says how."""

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
    exactness="post-norm: gains become diagonals, logits off by 51 % on a turned stream, gains being 1 +- 0.3",
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

# Llama's rows with LayerNorm in the place of RMSNorm.

register_layout("olmo", like="llama", norm="layer")
register_layout("nemotron", like="llama", norm="layer", norm_offset=1.0)

register_layout(
    "starcoder2",
    """
    layers.{block}
      .mlp.c_fc: mlp embed < .post_attention_layernorm
      .mlp.c_proj: embed mlp
    """,
    like="llama",
    norm="layer",
)

register_layout(
    "cohere",
    """
    layers.{block}
      .self_attn.q_norm: norm (kv_heads group) q_dim
      .self_attn.k_norm: norm kv_heads k_dim
      .mlp.gate_proj: mlp embed < .input_layernorm
      .mlp.up_proj: mlp embed < .input_layernorm
    """,
    like="llama",
    norm="layer",
    rope="interleaved",
    tied_head_scale=lambda config: config.logit_scale,
)
register_layout("cohere2", like="cohere")

register_layout(
    "phi",
    """
    layers.{block}
      .self_attn.dense: embed (kv_heads group head_dim)
      .self_attn.q_layernorm: norm q_dim
      .self_attn.k_layernorm: norm k_dim
      .mlp.fc1: mlp embed < .input_layernorm
      .mlp.fc2: embed mlp
    final_layernorm: norm embed
    lm_head: vocab embed < final_layernorm
    score: labels embed < final_layernorm
    """,
    like="llama",
    norm="layer",
)


def _stablelm(config: PreTrainedConfig) -> str:
    return "stablelm (parallel)" if config.use_parallel_residual else "stablelm"


register_layout(
    "stablelm",
    """
    layers.{block}
      .self_attn.q_layernorm.norms.{heads}: norm q_dim
      .self_attn.k_layernorm.norms.{kv_heads}: norm k_dim
    """,
    like="llama",
    norm="layer",
    variant=_stablelm,
)
register_layout(
    "stablelm (parallel)",
    """
    layers.{block}
      .mlp.gate_proj: mlp embed < .input_layernorm
      .mlp.up_proj: mlp embed < .input_layernorm
    """,
    like="stablelm",
    variant=_stablelm,
)
