"""Compute losses of a language model's logits a chunk of items at a time, forward and backward in one pass.

Does: sum named losses over items, with their gradients, so that no chunk of logits outlives its step.
Does not: know what the losses are, select items, or divide by their number.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_guide.errors import HfGuideError, OptionError
from hf_guide.models.lm_head import LMHead, linear_compute_dtype

_CPU_CHUNK_SIZE = 2**19
"""How many logits a CPU processes at once: they stay in its caches."""
_DEVICE_CHUNK_SIZE = 2**26
"""How many logits another device processes at once: they keep it busy."""


def chunked_loss(
    hidden: Tensor,
    head: LMHead,
    loss: Callable[[Tensor, slice], Mapping[str, Tensor]],
    weights: Mapping[str, float],
    *,
    max_logits: int = 2**23,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weighted sum of losses over all items, without holding all logits at once.

        sum_items sum_name weights[name] * loss(transform(hidden W^T + b))[name]

    The gradients of the sum are computed in the same pass and kept in float32 or better; they take as much memory as `hidden`
    and the head's parameters, whatever the number of items. So `backward` can be called once, and scales them (by the
    number of items) afterwards: nothing underflows in half precision that would not in the model's own loss.

    Args:
        hidden: The inputs of the head at the items, (items, width), of any floating dtype.
        head: As `find_lm_head` returns it. Under autocast it multiplies in autocast's precision, as in its model.
        loss: Called with logits (chunk, vocabulary), float32 or better, and the slice of the items that they are for; returns
            one value per item, (chunk,), for each of its names. Names that are not in `weights` are summed too, without
            gradient. Chunks are in order.
        weights: By name; `loss` must return all of them.
        max_logits: How many logits are held at once, those of one item at least. On a CPU no other buffer is as large; on
            other devices about six are.

    Returns:
        The sum, with gradient to `hidden` and the head's weight and bias, and each name's own sum, without. Scalars,
        float64 for a float64 head and float32 for all others.

    Raises:
        OptionError: `loss` does not return a name of `weights`.
        HfGuideError: `hidden` or a loss has another shape, or backward is called twice.
    """
    if hidden.dim() != 2 or hidden.shape[-1] != head.module.weight.shape[-1]:
        raise HfGuideError(
            f"hidden must have the shape (items, {head.module.weight.shape[-1]}); found {tuple(hidden.shape)}. Select "
            "the items first."
        )
    sums: dict[str, Tensor] = {}
    state = ChunkedLossState(head.transform, loss, dict(weights), max_logits, torch.is_grad_enabled(), sums)
    return ChunkedLoss.apply(hidden, head.module.weight, head.module.bias, state), sums


def row_chunks(logits: Tensor) -> Iterator[slice]:
    """Yield the rows of (items, classes) in runs that stay in a processor's cache; once where there are none."""
    items, classes = logits.shape
    rows = max(1, (_CPU_CHUNK_SIZE if logits.device.type == "cpu" else _DEVICE_CHUNK_SIZE) // max(1, classes))
    return (slice(start, min(start + rows, items)) for start in range(0, max(1, items), rows))


@dataclass(frozen=True)
class ChunkedLossState:
    """The arguments of `chunked_loss`, and the sums that it fills."""

    transform: Callable[[Tensor], Tensor]
    loss: Callable[[Tensor, slice], Mapping[str, Tensor]]
    weights: Mapping[str, float]
    max_logits: int
    grad_enabled: bool
    sums: dict[str, Tensor]

    def backward_chunk(self, raw: Tensor, first: int, *, with_gradient: bool) -> tuple[Tensor, bool]:
        """Return the weighted sum of a chunk's losses; overwrite the head's output `raw` with the gradient by it.

        Args:
            raw: The output of the head's linear layer, (chunk, vocabulary).
            first: The index of its first item.
            with_gradient: Whether the gradient is computed.

        Returns:
            The sum, and whether `raw` was overwritten: not if no loss depends on it.
        """
        wide_dtype = torch.promote_types(raw.dtype, torch.float32)
        total, has_gradient = torch.zeros((), dtype=wide_dtype, device=raw.device), False
        for rows in row_chunks(raw):
            part = raw[rows].detach()
            with torch.set_grad_enabled(with_gradient):
                part.requires_grad_(with_gradient)
                weighted = self.weighted_sum(
                    self.transform(part).to(wide_dtype), slice(first + rows.start, first + rows.stop)
                )
            total += weighted.detach()
            if weighted.requires_grad:
                (gradient,) = torch.autograd.grad(weighted, part)
                raw[rows], has_gradient = gradient, True
        return total, has_gradient

    def weighted_sum(self, logits: Tensor, rows: slice) -> Tensor:
        """Return the weighted sum of a chunk's losses, with its graph, and add each to `sums`."""
        terms = self.loss(logits, rows)
        missing = sorted(set(self.weights) - set(terms))
        if missing:
            raise OptionError(
                f"The loss returns {sorted(terms)}; weights also has {missing}. Return them, or leave them out of weights."
            )
        total = logits.new_zeros(())
        for name, term in terms.items():
            if term.shape != logits.shape[:1]:
                raise HfGuideError(
                    f"The loss {name!r} must be one value per item, ({len(logits)},); found {tuple(term.shape)}."
                )
            summed = term.sum(dtype=logits.dtype)
            self.sums[name] = self.sums.get(name, 0.0) + summed.detach()
            if self.weights.get(name):
                total = total + self.weights[name] * summed
        return total


class ChunkedLoss(torch.autograd.Function):
    """Compute the weighted sum and, in the same pass, its gradients by the hidden states, the weight and the bias."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, state: ChunkedLossState) -> Tensor:
        """Compute the loss, and its gradients with it, chunk by chunk."""
        items, vocabulary = len(hidden), weight.shape[0]
        dtype = linear_compute_dtype(hidden, weight)
        wide_dtype = torch.promote_types(dtype, torch.float32)
        matrix, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
        needs_gradient = [state.grad_enabled and needed for needed in ctx.needs_input_grad[:3]]
        gradients = [
            torch.zeros_like(tensor, dtype=wide_dtype) if tensor is not None and needed else None
            for tensor, needed in zip((hidden, weight, bias), needs_gradient, strict=True)
        ]
        total = torch.zeros((), dtype=wide_dtype, device=hidden.device)
        step = max(1, state.max_logits // vocabulary)
        # Once even without items, so that every name has a sum.
        for start in range(0, max(1, items), step):
            rows = slice(start, min(start + step, items))
            inputs = hidden[rows].detach().to(dtype)
            raw = nn.functional.linear(inputs, matrix, offset)
            weighted, has_gradient = state.backward_chunk(raw, start, with_gradient=any(needs_gradient))
            total += weighted
            if has_gradient:
                _add_gradients(gradients, raw, inputs, matrix, rows)
        ctx.gradients = gradients
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients that the forward pass computed."""
        if ctx.gradients is None:
            raise HfGuideError("backward() was already called on this loss; compute it again.")
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [
            None if gradient is None else gradient.mul_(factor).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (*scaled, None)


def _add_gradients(
    gradients: list[Tensor | None], gradient: Tensor, inputs: Tensor, matrix: Tensor, rows: slice
) -> None:
    of_hidden, of_weight, of_bias = gradients
    if of_hidden is not None:
        of_hidden[rows] = gradient @ matrix
    if of_weight is not None:
        if gradient.dtype == torch.bfloat16:
            of_weight += gradient.T @ inputs
        else:
            # A sum over many items may be too large for float16.
            of_weight.addmm_(gradient.T.to(of_weight.dtype), inputs.to(of_weight.dtype))
    if of_bias is not None:
        of_bias += gradient.sum(0, dtype=of_bias.dtype)
