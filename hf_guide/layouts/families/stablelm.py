"""StableLM."""

from transformers import PreTrainedConfig

from hf_guide.layouts.registry import register_layout


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
