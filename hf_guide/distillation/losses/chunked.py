"""The walk over chunks of logits: forward, and at once backward, so that no chunk outlives its turn."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_guide.distillation.losses.divergences import row_chunks
from hf_guide.errors import HfGuideError, OptionError


@dataclass(frozen=True)
class ChunkedLossState:
    """What is done on the way: see `heads.chunked_loss`. `sums` is filled."""

    transform: Callable[[Tensor], Tensor]
    loss: Callable[[Tensor, slice], Mapping[str, Tensor]]
    weights: Mapping[str, float]
    max_logits: int
    grad_enabled: bool
    sums: dict[str, Tensor]

    def backward_chunk(self, raw: Tensor, first: int, *, with_slope: bool) -> tuple[Tensor, bool]:
        """Return the weighted sum of a chunk's losses, and whether `raw` has become its slope by what it was.

        Args:
            raw: what the head says of some items, (some items, vocabulary).
            first: which of the items the first of them is.
        """
        finest = torch.promote_types(raw.dtype, torch.float32)
        total, has_slope = torch.zeros((), dtype=finest, device=raw.device), False
        for rows in row_chunks(raw):
            part = raw[rows].detach()
            with torch.set_grad_enabled(with_slope):
                part.requires_grad_(with_slope)
                weighed = self.weighted_sum(
                    self.transform(part).to(finest), slice(first + rows.start, first + rows.stop)
                )
            total += weighed.detach()
            if weighed.requires_grad:
                (slope,) = torch.autograd.grad(weighed, part)
                raw[rows], has_slope = slope, True
        return total, has_slope

    def weighted_sum(self, logits: Tensor, rows: slice) -> Tensor:
        """Return the weighted sum of a chunk's losses, with its graph, and add each to `sums`."""
        terms = self.loss(logits, rows)
        missing = sorted(set(self.weights) - set(terms))
        if missing:
            raise OptionError(f"The loss gives {sorted(terms)}, and weights asks for {missing} too.")
        total = logits.new_zeros(())
        for name, term in terms.items():
            if term.shape != logits.shape[:1]:
                raise HfGuideError(
                    f"The loss {name!r} must be one number an item, ({len(logits)},); found {tuple(term.shape)}."
                )
            summed = term.sum(dtype=logits.dtype)
            self.sums[name] = self.sums.get(name, 0.0) + summed.detach()
            if self.weights.get(name):
                total = total + self.weights[name] * summed
        return total


class ChunkedLoss(torch.autograd.Function):
    """The weighted sum, and with it the gradients by the hidden states, the weight and the bias."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, walk: ChunkedLossState) -> Tensor:
        items, vocabulary = len(hidden), weight.shape[0]
        dtype = linear_compute_dtype(hidden, weight)
        finest = torch.promote_types(dtype, torch.float32)
        matrix, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
        wanted = [walk.grad_enabled and needed for needed in ctx.needs_input_grad[:3]]
        slopes = [
            torch.zeros_like(tensor, dtype=finest) if tensor is not None and want else None
            for tensor, want in zip((hidden, weight, bias), wanted, strict=True)
        ]
        total = torch.zeros((), dtype=finest, device=hidden.device)
        step = max(1, walk.max_logits // vocabulary)
        # Once even where there are no items, so that every name has a sum.
        for start in range(0, max(1, items), step):
            rows = slice(start, min(start + step, items))
            fed = hidden[rows].detach().to(dtype)
            raw = nn.functional.linear(fed, matrix, offset)
            weighed, has_slope = walk.backward_chunk(raw, start, with_slope=any(wanted))
            total += weighed
            if has_slope:
                _add_gradients(slopes, raw, fed, matrix, rows)
        ctx.slopes = slopes
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.slopes is None:
            raise HfGuideError("chunked_loss can be gone backward through once; call it again for a second time.")
        slopes, ctx.slopes = ctx.slopes, None
        scaled = [
            None if slope is None else slope.mul_(factor).to(dtype)
            for slope, dtype in zip(slopes, ctx.dtypes, strict=True)
        ]
        return (*scaled, None)


def _add_gradients(slopes: list[Tensor | None], slope: Tensor, fed: Tensor, matrix: Tensor, rows: slice) -> None:
    of_hidden, of_weight, of_bias = slopes
    if of_hidden is not None:
        of_hidden[rows] = slope @ matrix
    if of_weight is not None:
        if slope.dtype == torch.bfloat16:
            of_weight += slope.T @ fed
        else:
            # A sum over many items may be too large for float16.
            of_weight.addmm_(slope.T.to(of_weight.dtype), fed.to(of_weight.dtype))
    if of_bias is not None:
        of_bias += slope.sum(0, dtype=of_bias.dtype)


def linear_compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What precision `nn.Linear` would multiply in here."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return weight.dtype
