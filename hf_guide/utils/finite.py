"""NaN and infinity in weights and gradients: found in one pass, named, and never saved."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from hf_guide.errors import NotFiniteError


def local_tensor(tensor: Tensor) -> Tensor:
    """Return what of a sharded tensor (FSDP, tensor parallelism, ZeRO-3) this process holds; others as they are."""
    tensor = getattr(tensor, "ds_tensor", tensor)
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether no tensor has NaN or infinity, in one pass over them and one wait for their device."""
    checked = [local_tensor(tensor.detach()) for tensor in tensors]
    checked = [tensor for tensor in checked if _is_checkable(tensor)]
    # The Euclidean norm is many times as fast on a CPU, but overflows for large values, which only the largest one tells.
    return not checked or any(bool(get_total_norm(checked, norm).isfinite()) for norm in (2.0, math.inf))


def non_finite_names(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Return the names of the tensors that have NaN or infinity, in their order."""
    return [name for name, tensor in named if not all_finite([tensor])]


def check_weights_finite(weights: nn.Module | Mapping[str, Any], what: str = "The student") -> None:
    """Check that no weight is NaN or infinite, before it is saved.

    Args:
        weights: a model, or its state dict.
        what: the subject of the error's sentence.

    Raises:
        NotFiniteError: names the first such weight, and how many there are.
    """
    tensors = weights if isinstance(weights, Mapping) else weights.state_dict()
    named = [(name, value) for name, value in tensors.items() if isinstance(value, Tensor)]
    if all_finite(value for _, value in named):
        return
    wrong = non_finite_names(named)
    raise NotFiniteError(
        f"{what} was not saved: its weight {wrong[0]} has NaN or infinity, as {len(wrong)} of {len(named)} weights do. "
        "Weights must be finite: go back to the last checkpoint, or make the student anew."
    )


def _is_checkable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize > 1 and tensor.numel() > 0 and not tensor.is_meta
