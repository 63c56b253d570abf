"""What a case of the laws is: one family in a small and a big shape, and how its function is read."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

TOKENS = 60
TIED_RESIDUAL = 0.5
"""Of a gain that is fitted before a tied head; 0.09 to 0.29 was measured, the gains being 1 and 0.3 to either side."""

SANDWICH_RESIDUAL = 0.3
"""Of gains that are folded in before their norm; 0.05 to 0.16 was measured."""

STREAM_RESIDUAL = 1.0
"""Of gains on the residual stream itself; the measured error is in each layout's `exactness`."""


@dataclass(frozen=True)
class Case:
    """One family in two shapes: keyword arguments of its config; `both` go into either.

    `output` is the output that is compared; of the residual stream itself, which a projection only rotates,
    `... gram` compares the products among its rows. `prepare` changes a model that was built, `settle` one whose
    parameters were moved.
    `identity`, `lift` and `residual` bound the relative error of the laws of those names. The last is that of a rotated
    residual stream under random gains, and is a rounding error only where no gain is on the stream itself.
    A `lift` of None: no wider model computes the same function, for the reason in the comment at the case.
    `length` multiplies what is added to the stream of a pre-norm model whose norms have a fixed, large eps.
    """

    family: str
    model_class: str
    small: dict[str, Any]
    big: dict[str, Any]
    both: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    inputs: str = "tokens"
    output: str = "logits"
    prepare: Callable[[PreTrainedModel], None] | None = None
    settle: Callable[[PreTrainedModel], None] | None = None
    identity: float = 1e-9
    lift: float | None = 1e-5
    length: float = 1.0
    residual: float = 1e-5

    def __str__(self) -> str:
        return self.name or self.family


def config_of(case: Case, shape: dict[str, Any]) -> PreTrainedConfig:
    """Return the config of one of the case's shapes."""
    return getattr(transformers, case.model_class).config_class(**case.both, **shape)


def build(case: Case, shape: dict[str, Any]) -> PreTrainedModel:
    """Return a model of one of the case's shapes, float64, in evaluation mode."""
    model_class = getattr(transformers, case.model_class)
    model = model_class._from_config(config_of(case, shape), dtype=torch.float64).eval()
    if case.prepare is not None:
        case.prepare(model)
    return model


@torch.no_grad()
def settle(model: PreTrainedModel, case: Case) -> None:
    """Apply the case's `settle` to a model with random parameters."""
    if case.settle is not None:
        case.settle(model)


@torch.no_grad()
def logits_of(model: PreTrainedModel, case: Case) -> torch.Tensor:
    """Return the model's output on fixed input."""
    model.set_attn_implementation("eager")
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the others do not support float64
    outputs = model(**INPUTS[case.inputs]())
    output, _, gram = case.output.partition(" ")
    found = outputs[output]
    return found @ found.mT if gram else found


def tokens() -> dict[str, torch.Tensor]:
    """Return a batch of two sentences."""
    return {"input_ids": torch.randint(3, TOKENS, (2, 11), generator=torch.Generator().manual_seed(5))}


def pairs() -> dict[str, torch.Tensor]:
    """Return two sentences and the beginnings of their answers."""
    return tokens() | {
        "decoder_input_ids": torch.randint(3, TOKENS, (2, 7), generator=torch.Generator().manual_seed(6))
    }


def sounds() -> dict[str, torch.Tensor]:
    """Return two spectrograms of 7 bands and 20 frames."""
    return {"input_features": torch.randn(2, 7, 20, generator=torch.Generator().manual_seed(7), dtype=torch.float64)}


def spectrograms() -> dict[str, torch.Tensor]:
    """Return the same two spectrograms, time first, under the name that models of one encoder have for them."""
    return {"input_values": sounds()["input_features"].mT.contiguous()}


def speech() -> dict[str, torch.Tensor]:
    """Return two spectrograms and the beginnings of their transcripts."""
    return sounds() | {"decoder_input_ids": pairs()["decoder_input_ids"]}


def images() -> dict[str, torch.Tensor]:
    """Return two images of 3 channels and 12 x 12 pixels."""
    return {"pixel_values": torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(8), dtype=torch.float64)}


def large_images() -> dict[str, torch.Tensor]:
    """Return two images of 3 channels and 64 x 64 pixels, which stages may reduce."""
    return {"pixel_values": torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(8), dtype=torch.float64)}


def images_with_noise() -> dict[str, torch.Tensor]:
    """Return two images of 9 patches, and what decides which of these are masked."""
    return images() | {"noise": torch.rand(2, 9, generator=torch.Generator().manual_seed(9), dtype=torch.float64)}


def captions() -> dict[str, torch.Tensor]:
    """Return two images and two sentences."""
    return tokens() | images()


INPUTS = {
    "captions": captions,
    "tokens": tokens,
    "pairs": pairs,
    "sounds": sounds,
    "spectrograms": spectrograms,
    "speech": speech,
    "images": images,
    "images with noise": images_with_noise,
    "large images": large_images,
}
