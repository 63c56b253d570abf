"""What is stored of an example made into what a loss takes."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hf_guide.signal_cache.manifest import CaptureManifest
from hf_guide.signal_cache.shards import Arrays, unpack_indices

COLUMN_PREFIX = "teacher_"
"""How the names begin of what `CapturedCollator` adds to a batch."""


@dataclass(frozen=True)
class CapturedExample:
    """What a teacher said of one example. `places` are its unpadded tokens, or those of the decoder.

    Attributes:
        logits: of classifiers (classes,), or (places, classes) where items are tokens; of language models whose whole
            distribution was kept its log-probabilities (places, classes). Float32.
        indices, log_probs: of language models the largest k, (places, k), int64 and float32, at temperature 1.
        log_normalizer: log sum_j exp(log p_j / temperature) over the whole vocabulary, (places,), float32.
        hidden_states: by layer, (places, width) or as the model gives it, float32.
        embedding: what the head is fed, (width,), or (places, width) where items are tokens, float32.
    """

    logits: Tensor | None = None
    indices: Tensor | None = None
    log_probs: Tensor | None = None
    log_normalizer: Tensor | None = None
    hidden_states: Mapping[int, Tensor] = field(default_factory=dict)
    embedding: Tensor | None = None

    def named(self) -> dict[str, Tensor]:
        """Return what there is by the names that it has in a batch."""
        single = ("logits", "indices", "log_probs", "log_normalizer", "embedding")
        found = {COLUMN_PREFIX + name: value for name in single if (value := getattr(self, name)) is not None}
        return found | {f"{COLUMN_PREFIX}hidden_{layer}": value for layer, value in self.hidden_states.items()}


def decode_example(manifest: CaptureManifest, arrays: Arrays, temperature: float) -> CapturedExample:
    """Return what a teacher said of an example from what is stored of it, at a captured temperature."""
    hidden = {
        int(name.removeprefix("hidden_")): _to_float32(value)
        for name, value in arrays.items()
        if name.startswith("hidden_")
    }
    embedding = _to_float32(arrays["embedding"]) if "embedding" in arrays else None
    if manifest.is_dense:
        logits = _to_float32(arrays["logits" if "logits" in arrays else "log_probs"])
        return CapturedExample(logits=logits, hidden_states=hidden, embedding=embedding)
    indices = torch.from_numpy(unpack_indices(arrays, manifest.classes))
    temperatures = manifest.config.temperatures
    heads = log1mexp(torch.from_numpy(arrays["log_tail"].astype(np.float64)))
    # What rounding took from the largest k or gave to them is set right, so that the tail keeps its mass exactly.
    log_probs = _to_float32(arrays["log_probs"])
    log_probs += (heads[:, temperatures.index(1.0)] - log_probs.double().logsumexp(1)).float().unsqueeze(1)
    if temperature == 1.0:
        normalizer = torch.zeros(len(log_probs))
    else:
        scaled = (log_probs.double() / temperature).logsumexp(1)
        normalizer = (scaled - heads[:, temperatures.index(temperature)]).float()
    return CapturedExample(None, indices, log_probs, normalizer, hidden, embedding)


def log1mexp(log_mass: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for x of at most 0, exact at both ends."""
    return torch.where(log_mass > -0.6931, torch.log(-torch.expm1(log_mass)), torch.log1p(-torch.exp(log_mass)))


def _to_float32(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.float32))  # a copy: what is mapped is read-only
