"""Multiply in float32 what a CPU without instructions for bfloat16 or float16 multiplies in them.

Such a processor, as every x86 one without AVX-512 BF16 or AMX, takes several times as long for a product in half precision as
in float32. One with the instructions sums products in float32 and rounds them once to half precision, as is done here.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

_INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}
"""Of each dtype the capabilities of a processor, as PyTorch names them, any of which multiplies in it."""

CHUNK_BYTES = 8 << 20
"""Bytes of a weight that are in float32 at a time."""

_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten.convolution.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


@functools.cache
def multiplies_in(dtype: torch.dtype) -> bool:
    """Return whether this processor multiplies matrices in bfloat16 or float16 faster than in float32, summed in float32.

    Example:
        >>> multiplies_in(torch.bfloat16) in (True, False)
        True
    """
    capabilities = torch.cpu.get_capabilities()
    return torch.backends.mkldnn.is_available() and any(capabilities.get(each) for each in _INSTRUCTIONS[dtype])


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Leave the caller's autocast, on the CPU and on the accelerator.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16), without_autocast():
        ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        torch.float32
    """
    accelerator = torch.accelerator.current_accelerator()
    with contextlib.ExitStack() as stack:
        for device in {"cpu", *([] if accelerator is None else [accelerator.type])}:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextlib.contextmanager
def fast_half_products(model: nn.Module) -> Iterator[None]:
    """Run a model's products in float32 where they are in half precision and the processor has no instructions for it.

    The weights and what its modules return keep their dtype, and rounding differs as it does between processors. It has no
    effect on other devices, on other dtypes, and where the processor has the instructions.

    Example:
        >>> linear = nn.Linear(8, 4, dtype=torch.bfloat16)
        >>> with fast_half_products(linear), torch.no_grad():
        ...     linear(torch.zeros(2, 8, dtype=torch.bfloat16)).dtype
        torch.bfloat16
    """
    # Only of weights on the CPU: a mode is asked about every operation, and costs as much as a small one on a GPU takes.
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.device.type == "cpu"}
    slow = {dtype for dtype in dtypes & _INSTRUCTIONS.keys() if not multiplies_in(dtype)}
    active = _get_current_dispatch_mode()
    is_covered = isinstance(active, _Float32Products) and slow <= active.dtypes
    with _Float32Products(slow) if slow and not is_covered else contextlib.nullcontext():
        yield


class _Float32Products(TorchDispatchMode):
    """Computes products on the CPU in float32 whose first operands are of one of `dtypes`, and returns them in that dtype."""

    def __init__(self, dtypes: "set[torch.dtype]"):
        super().__init__()
        self.dtypes = dtypes

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        dtype = args[0].dtype if function in _PRODUCTS else None
        # `types` has classes of tensors with products of their own, such as quantised and distributed ones.
        if dtype not in self.dtypes or types or args[0].device.type != "cpu":
            return function(*args, **options)
        options = {name: _to_float32(value) for name, value in options.items()}
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            return _chunked(function, args, options, dtype)
        outputs = function(*map(_to_float32, args), **options)
        return (outputs[0].to(dtype), *outputs[1:]) if isinstance(outputs, tuple) else outputs.to(dtype)


def _chunked(function: Any, args: tuple[Any, ...], options: Mapping[str, Any], dtype: Any) -> Tensor:
    """Return `[bias +] x W`, W in float32 some columns at a time; of a linear layer these are rows of its weight."""
    *bias, x, weight = args
    x, step = x.float(), max(1, CHUNK_BYTES // (4 * max(1, weight.shape[0])))
    parts = []
    for start in range(0, max(1, weight.shape[1]), step):
        columns = slice(start, start + step)
        added = [each[..., columns] if each.shape[-1] > 1 else each for each in bias]
        parts.append(function(*map(_to_float32, added), x, weight[:, columns].float(), **options).to(dtype))
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def _to_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _INSTRUCTIONS else value
