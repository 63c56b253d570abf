"""NaN and infinity in weights, gradients and activations: found in one pass over them.

Does: detect them, name the tensors or rows that have them, and advise where another dtype helps, or for weights that are to be
saved. Does not: advise otherwise; a caller knows what they are and what to do.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from hf_guide.errors import NotFiniteError


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this process's shard of a sharded tensor (FSDP, tensor parallelism, ZeRO-3); others as they are."""
    tensor = getattr(tensor, "ds_tensor", tensor)
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether no tensor has NaN or infinity, in one pass over them and one wait for their device."""
    checked = [local_tensor(tensor.detach()) for tensor in tensors]
    checked = [tensor for tensor in checked if _is_checkable(tensor)]
    # The Euclidean norm is many times as fast on a CPU, but overflows for large values; the largest value does not.
    return not checked or any(bool(get_total_norm(checked, norm).isfinite()) for norm in (2.0, math.inf))


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor has neither NaN nor infinity, in one pass without a copy where it has none.

    Example:
        >>> is_finite(torch.tensor([1.0, 2.0])), is_finite(torch.tensor([1.0, float("nan")]))
        (True, False)
    """
    if not tensor.is_floating_point():
        return True
    # In the tensor's own dtype: a CPU sums half precision in float32 by itself, and 30 times as fast as with dtype=float32.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())  # a sum of finite values may overflow


def overflow_advice(dtype: torch.dtype, otherwise: str, action: str = "Make the student") -> str:
    """Return a sentence on what helps against values that overflow in a model's dtype.

    Args:
        dtype: The model's.
        otherwise: The sentence for a dtype that has float32's range already, without its full stop.
        action: What to do with the model.

    Example:
        >>> overflow_advice(torch.float16, "Check the data")
        "Make the student with dtype='bfloat16' or 'float32'."
        >>> overflow_advice(torch.bfloat16, "Check the data")
        'Check the data.'
    """
    if torch.finfo(dtype).max < torch.finfo(torch.bfloat16).max:
        return f"{action} with dtype='bfloat16' or 'float32'."
    return f"{otherwise}."


def non_finite_rows(values: Tensor) -> Tensor:
    """Return the indices of the rows along the first axis that have NaN or infinity, in ascending order.

    Example:
        >>> non_finite_rows(torch.tensor([[0.0, 1.0], [float("inf"), 0.0]]))
        tensor([1])
    """
    if is_finite(values):
        return torch.empty(0, dtype=torch.long, device=values.device)
    return (~values.isfinite().flatten(1).all(1)).nonzero().flatten()


def non_finite_names(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Return the names of the tensors that have NaN or infinity, in their order."""
    return [name for name, tensor in named if not all_finite([tensor])]


def check_weights_finite(weights: nn.Module | Mapping[str, Any], what: str = "The student") -> None:
    """Check that no weight is NaN or infinite, before it is saved.

    Args:
        weights: A model, or its state dict.
        what: The subject of the error's sentence.

    Raises:
        NotFiniteError: Names the first such weight, and how many there are.
    """
    tensors = weights if isinstance(weights, Mapping) else weights.state_dict()
    named = [(name, value) for name, value in tensors.items() if isinstance(value, Tensor)]
    if all_finite(value for _, value in named):
        return
    wrong = non_finite_names(named)
    raise NotFiniteError(
        f"{what} was not saved: its weight {wrong[0]} has NaN or infinity, as {len(wrong)} of {len(named)} weights do. "
        "Weights must be finite: go back to the last checkpoint, or initialize the student again."
    )


def _is_checkable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize > 1 and tensor.numel() > 0 and not tensor.is_meta
