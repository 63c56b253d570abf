"""What models do to the output of their language head: scales, soft-caps, added biases, by the names of their configs."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def logit_transforms(model: Any) -> Iterator[Callable[[Tensor], Tensor]]:
    """Everything that a model of this config might do to its head's output, the simplest first."""
    configs = [model.config, model.config.get_text_config(decoder=True)]

    def numbers(names: tuple[str, ...]) -> list[float]:
        found = [getattr(config, name, None) for config in configs for name in names]
        return list(dict.fromkeys(value for value in found if isinstance(value, (int, float)) and value))

    scales: list[Callable[[Tensor], Tensor]] = [_same]
    for value in numbers(_SCALES):
        scales += [_times(value), _over(value)]
    caps: list[Callable[[Tensor], Tensor]] = [_same, *(_capped(value) for value in numbers(_CAPS))]
    owners = [module for module in model.modules() if isinstance(getattr(module, "final_logits_bias", None), Tensor)]
    biases: list[Callable[[Tensor], Tensor]] = [*(_biased(owner) for owner in owners), _same]
    for bias, cap, scale in itertools.product(biases, caps, scales):
        parts = [part for part in (scale, cap, bias) if part is not _same]
        yield parts[0] if len(parts) == 1 else _chain(parts)


def _same(logits: Tensor) -> Tensor:
    return logits


def _times(value: float) -> Callable[[Tensor], Tensor]:
    return lambda logits: logits * value


def _over(value: float) -> Callable[[Tensor], Tensor]:
    return lambda logits: logits / value


def _capped(value: float) -> Callable[[Tensor], Tensor]:
    return lambda logits: torch.tanh(logits / value) * value


def _biased(owner: Any) -> Callable[[Tensor], Tensor]:
    # Read anew each time: a buffer moves with its model, and tokens are added to it.
    return lambda logits: logits + owner.final_logits_bias.to(logits.device)


def _chain(parts: list[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
    def chained(logits: Tensor) -> Tensor:
        for part in parts:
            logits = part(logits)
        return logits

    return chained if parts else _same
