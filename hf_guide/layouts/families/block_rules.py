"""Block rules of families whose layouts are inferred: what they compute from a block's index or from the depth."""

import functools
import math

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from hf_guide.errors import TeacherError
from hf_guide.layouts.families.gpt2 import inverse_block_scale
from hf_guide.layouts.registry import BlockTransfer, register_block_rules


def _branch_scale(config: PreTrainedConfig, block: int) -> float:
    return float(config.scale_depth) / math.sqrt(config.num_hidden_layers)


# Both are factors of what a branch adds to the residual stream: the output projections compensate for the ratio.
register_block_rules(
    "minicpm3",
    block_scale={
        "layers.{block}.self_attn.o_proj": _branch_scale,
        "layers.{block}.mlp.down_proj": _branch_scale,
    },
)


def _esmc_scale(config: PreTrainedConfig, block: int) -> float:
    return 1 / math.sqrt(config.num_hidden_layers / 36)


register_block_rules(
    "esmc",
    block_scale={
        "layers.{block}.self_attn.o_proj": _esmc_scale,
        "layers.{block}.mlp.down_proj": _esmc_scale,
    },
)


def _scale_queries(value: Tensor, transfer: BlockTransfer) -> Tensor:
    """Return a fused weight or bias, [queries keys values] along the last axis, with the queries scaled."""
    factor = inverse_block_scale(transfer.teacher_config, transfer.teacher_block) / inverse_block_scale(
        transfer.student_config, transfer.student_block
    )
    if factor == 1.0:
        return value
    queries, others = value.split([value.shape[-1] // 3, 2 * value.shape[-1] // 3], dim=-1)
    return torch.cat([queries.double() * factor, others.double()], dim=-1)


register_block_rules("imagegpt", block_value={"h.{block}.attn.c_attn": _scale_queries})


def _lambda_init(config: PreTrainedConfig, block: int) -> float:
    return 0.8 - 0.6 * math.exp(-0.3 * block)


def _scale_lambda(value: Tensor, transfer: BlockTransfer, pair: int) -> Tensor:
    """Return lambda_q of a pair so that exp(q1 k1) - exp(q2 k2) + lambda_init is the teacher's in another block.

    A smaller lambda_init is compensated for in the first exponential, a larger one in the second; q changes along k.
    """
    missing = _lambda_init(transfer.teacher_config, transfer.teacher_block) - _lambda_init(
        transfer.student_config, transfer.student_block
    )
    if missing == 0.0 or (missing > 0) != (pair == 1):
        return value
    queries, keys = (transfer.read(f"self_attn.lambda_{kind}{pair}").double() for kind in "qk")
    if not bool(keys.any()):
        raise TeacherError(
            f"lambda_k{pair} of the teacher's block {transfer.teacher_block} is zero, so that its lambda_init cannot be moved "
            "into lambda_q. Keep every block at its index, or choose method='random'."
        )
    product = (queries @ keys).item()
    change = math.log(math.exp(product) + abs(missing)) - product
    return queries + change * keys / keys.square().sum()


def _one_minus_lambda_init(config: PreTrainedConfig, block: int) -> float:
    return 1 - _lambda_init(config, block)


register_block_rules(
    "diffllama",
    block_scale={"layers.{block}.self_attn.o_proj": _one_minus_lambda_init},
    block_value={
        f"layers.{{block}}.self_attn.lambda_q{pair}": functools.partial(_scale_lambda, pair=pair) for pair in (1, 2)
    },
)
