"""Tensors with an entry for each block of a stack, or between each two: reduced to the blocks that a student keeps."""

import functools
from collections.abc import Callable, Sequence

from torch import Tensor

from hf_guide.layouts.grammar import Axis, AxisConcat, AxisName


def block_table_transform(
    name: str, axes: Sequence[Axis], blocks: Sequence[int], depth: int
) -> tuple[Callable[[Tensor], Tensor] | None, str | None]:
    """Return what reduces a table before the entries of selected blocks are taken, and a note on what is dropped.

    What is added between two blocks becomes all that is added between the teacher's two. Weights that mix hidden states by a
    softmax become those of the states that dropped blocks leave as they were.

    Args:
        name: The parameter's, relative to the base model.
        axes: Of the parameter.
        blocks: The teacher's block that feeds each of the student's.
        depth: The number of the teacher's blocks.
    """
    in_order = sorted(set(blocks)) == list(blocks)
    if axes[0] == AxisName("gaps"):
        complete = in_order and blocks[0] == 0 and blocks[-1] == depth - 1
        note = None if complete else f"what is added outside of the selected blocks {list(blocks)} is dropped"
        return functools.partial(add_up_gaps, blocks=blocks), note
    if len(axes) != 1 or not isinstance(axes[0], AxisConcat):
        return None, None
    if not name.endswith("layer_weights") or not in_order:
        return None, "its entries for blocks that are not selected are dropped"
    return functools.partial(merge_state_weights, blocks=blocks), None


def add_up_gaps(values: Tensor, blocks: Sequence[int]) -> Tensor:
    """Return what is added after each block, (depth - 1, ...), with the sum up to the next selected block at each selected.

    Example:
        >>> import torch
        >>> add_up_gaps(torch.tensor([1, 2, 4, 8]), [0, 2, 4]).tolist()
        [3, 2, 12, 8]
    """
    summed = values.clone()
    for block, following in zip(blocks, blocks[1:], strict=False):
        if following > block:
            summed[block] = values[block:following].sum(0)
    return summed


def merge_state_weights(weights: Tensor, blocks: Sequence[int]) -> Tensor:
    """Return softmax weights of hidden states, (depth + 1,), with each kept state's including those that equal it.

    The state after a dropped block is the one before it, so the weights of both add up: in the exponent, the logarithm of
    the sum of exponentials.
    """
    merged = weights.clone()
    states = [0, *(block + 1 for block in blocks)]
    for start, stop in zip(states, [*states[1:], len(weights)], strict=True):
        merged[start] = weights[start:stop].logsumexp(0)
    return merged
