"""Hooks that read a model's activations and are removed again, and an exception that ends a forward pass early."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

ActivationCallback = Callable[[Tensor], object]


class StopForward(Exception):  # noqa: N818  # control flow, not an error
    """Raised by a hook that has recorded all that is needed, to skip the rest of the forward pass."""


@contextlib.contextmanager
def removable_hooks() -> Iterator[list[Any]]:
    """Yield a list for the handles of hooks; remove them all at the end of the block.

    Example:
        >>> import torch
        >>> layer, inputs = nn.Linear(2, 3), []
        >>> with removable_hooks() as handles:
        ...     handles.append(register_input_hook(layer, inputs.append))
        ...     output = layer(torch.ones(4, 2))
        >>> [tuple(each.shape) for each in inputs], len(layer._forward_pre_hooks)
        ([(4, 2)], 0)
    """
    handles: list[Any] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


def register_input_hook(module: nn.Module, callback: ActivationCallback) -> Any:
    """Call `callback` with the first tensor that `module` is called with; return the hook's handle."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        callback(hidden_states_arg(args, kwargs))

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def hidden_states_arg(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the tensor that a module was called with: its first argument, `hidden_states`, or its first keyword."""
    if args:
        return args[0]
    return kwargs["hidden_states"] if "hidden_states" in kwargs else next(iter(kwargs.values()))


def first_output(output: Any) -> Tensor:
    """Return a module's output, or the first of several."""
    return output if isinstance(output, Tensor) else output[0]
