"""SegFormer: each stage is a residual stream of its own width, `stage0` to `stage3`, which starts from overlapping patches.

A stage's norm follows its patches, and another its last block; a padded convolution reads the latter, so its bias cannot be
folded and its gain stays. Keys and values of a stage with a reduction come from a convolution of the normed stream.
"""

import itertools
from collections.abc import Callable

from transformers import PreTrainedConfig

from hf_guide.errors import LayoutError
from hf_guide.layouts.registry import register_layout

NUM_STAGES = 4

STAGE = """
    stages.@.patch_embeddings.proj: table stage@ {previous} kernel kernel
    stages.@.patch_embeddings.layer_norm: norm stage@
    stages.@.layer_norm: norm stage@
    stages.@.blocks.{{block}}
      .layernorm_before: norm stage@
      .attention.q_proj: (stage@_heads stage@_q_dim) stage@ < .layernorm_before
      .attention.k_proj: (stage@_heads stage@_k_dim) {reduced}
      .attention.v_proj: (stage@_heads stage@_head_dim) {reduced}
      .attention.o_proj: stage@ (stage@_heads stage@_head_dim)
      .attention.sequence_reduction.sequence_reduction: reduced@ stage@ kernel kernel < .layernorm_before
      .attention.sequence_reduction.layer_norm: norm reduced@
      .layernorm_after: norm stage@
      .mlp.fc1: mlp stage@ < .layernorm_after
      .mlp.dwconv.dwconv: mlp one kernel kernel
      .mlp.fc2: stage@ mlp
    decode_head.linear_projections.@.proj: fused stage@
"""


def _rows(reductions: tuple[bool, ...]) -> str:
    rows = []
    for stage, is_reduced in enumerate(reductions):
        read = f"reduced{stage}" if is_reduced else f"stage{stage} < .layernorm_before"
        previous = f"stage{stage - 1}" if stage else "channels"
        rows.append(STAGE.replace("@", str(stage)).format(previous=previous, reduced=read))
    head = """
    decode_head.linear_fuse: decoder ({stages} fused) one one
    decode_head.batch_norm: norm decoder
    decode_head.batch_norm.running_mean: decoder
    decode_head.batch_norm.running_var: decoder
    decode_head.batch_norm.num_batches_tracked: scalar
    decode_head.classifier: labels decoder one one
    classifier: labels stage{last}
    """
    return "".join(rows) + head.format(stages=len(reductions), last=len(reductions) - 1)


def _heads(stage: int) -> Callable[[PreTrainedConfig], int]:
    return lambda config: config.num_attention_heads[stage]


def _head_dim(stage: int) -> Callable[[PreTrainedConfig], int]:
    return lambda config: config.hidden_sizes[stage] // config.num_attention_heads[stage]


def _variant(config: PreTrainedConfig) -> str:
    if config.num_encoder_blocks != NUM_STAGES:
        raise LayoutError(f"The layout of 'segformer' has {NUM_STAGES} stages, the config {config.num_encoder_blocks}")
    return _name(tuple(ratio > 1 for ratio in config.sr_ratios))


def _name(reductions: tuple[bool, ...]) -> str:
    if reductions == USUAL:
        return "segformer"
    return f"segformer (reduction in stages {[stage for stage, reduced in enumerate(reductions) if reduced]})"


USUAL = (True, True, True, False)
SIZES = {
    f"stage{stage}_{name}": size
    for stage in range(NUM_STAGES)
    for name, size in (
        ("heads", _heads(stage)),
        ("head_dim", _head_dim(stage)),
        ("q_dim", _head_dim(stage)),
        ("k_dim", _head_dim(stage)),
    )
}
for reductions in itertools.product((True, False), repeat=NUM_STAGES):
    register_layout(
        _name(reductions),
        _rows(reductions),
        norm="layer",
        sizes=SIZES,
        variant=_variant,
        exactness="the gains of each stage's first and last norm become diagonals",
    )
