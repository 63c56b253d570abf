"""Several processes as one: each hears its own batches, and what they sum is added up."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from accelerate import PartialState
from torch import Tensor, distributed

Item = TypeVar("Item")


def world() -> tuple[int, int]:
    """Return the number of this process and how many there are."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def own_share(items: Sequence[Item]) -> list[Item]:
    """Return every n-th of `items`, those of this process."""
    rank, size = world()
    return list(items[rank::size])


def add_up(tensors: Iterable[Tensor]) -> None:
    """Add to each tensor, in place, what the other processes have under the same place in the list."""
    if world()[1] == 1:
        return
    for tensor in tensors:
        shared = tensor.to(collective_device()).contiguous()
        distributed.all_reduce(shared)
        tensor.copy_(shared)


def add_number(number: float) -> float:
    """Return the sum of one number over all processes."""
    total = torch.tensor(float(number), dtype=torch.float64)
    add_up([total])
    return total.item()


def wait() -> None:
    """Return once every process has come here."""
    if world()[1] > 1:
        distributed.barrier()


def collective_device() -> torch.device:
    """Return where tensors must be that processes send each other."""
    if "nccl" in str(distributed.get_backend()):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def own_device() -> torch.device:
    """Return the GPU of this process, or what accelerate has chosen where it was asked already; the CPU where there is none.

    It is not asked here, for it would start the processes' group. Only of CUDA (and ROCm) is it known that they have float64.
    """
    if PartialState._shared_state:
        device = PartialState().device
        return device if device.type == "cuda" else torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
