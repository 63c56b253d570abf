"""Decode what is stored of an example into the tensors that a loss takes."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hf_guide.signal_cache.manifest import CaptureManifest
from hf_guide.signal_cache.shards import Arrays, unpack_indices

COLUMN_PREFIX = "teacher_"
"""How the names begin of what `CaptureDataCollator` adds to a batch."""

_SINGLE_SIGNALS = ("logits", "topk_indices", "topk_log_probs", "log_normalizer", "features")


@dataclass(frozen=True)
class CapturedExample:
    """The signals of a teacher for one example of N unpadded tokens (of an encoder-decoder those of the decoder).

    Attributes:
        logits: Of classifiers (classes,), or (N, classes) where items are tokens; of language models whose whole
            distribution was stored its log-probabilities (N, classes). Float32.
        topk_indices, topk_log_probs: Of language models the k most likely tokens and their log-probabilities at temperature
            1, (N, k), int64 and float32.
        log_normalizer: log sum_j exp(log p_j / temperature) over the whole vocabulary, (N,), float32.
        hidden_states: By layer, (N, width) or as the model returns it, float32.
        features: The input of the head, (width,), or (N, width) where items are tokens, float32.
    """

    logits: Tensor | None = None
    topk_indices: Tensor | None = None
    topk_log_probs: Tensor | None = None
    log_normalizer: Tensor | None = None
    hidden_states: Mapping[int, Tensor] = field(default_factory=dict)
    features: Tensor | None = None

    def named(self) -> dict[str, Tensor]:
        """Return the signals that there are, by their names in a batch."""
        single = {COLUMN_PREFIX + name: getattr(self, name) for name in _SINGLE_SIGNALS}
        layers = {f"{COLUMN_PREFIX}hidden_{layer}": value for layer, value in self.hidden_states.items()}
        return {name: value for name, value in single.items() if value is not None} | layers


def decode_example(manifest: CaptureManifest, arrays: Arrays, temperature: float) -> CapturedExample:
    """Return the signals of an example from what is stored of it, at one of the captured temperatures.

    Rounding moved some of the k largest probabilities' mass; their log-probabilities are rescaled so that the mass of the
    tail is exactly the stored one.
    """
    hidden = {
        int(name.removeprefix("hidden_")): _to_float32(value)
        for name, value in arrays.items()
        if name.startswith("hidden_")
    }
    features = _to_float32(arrays["features"]) if "features" in arrays else None
    if manifest.is_dense:
        logits = _to_float32(arrays["logits" if "logits" in arrays else "log_probs"])
        return CapturedExample(logits=logits, hidden_states=hidden, features=features)
    indices = torch.from_numpy(unpack_indices(arrays, manifest.classes))
    temperatures = manifest.config.temperatures
    log_head_mass = log1mexp(torch.from_numpy(arrays["log_tail"].astype(np.float64)))
    log_probs = _to_float32(arrays["log_probs"])
    log_probs += (log_head_mass[:, temperatures.index(1.0)] - log_probs.double().logsumexp(1)).float().unsqueeze(1)
    if temperature == 1.0:
        normalizer = torch.zeros(len(log_probs))
    else:
        scaled = (log_probs.double() / temperature).logsumexp(1)
        normalizer = (scaled - log_head_mass[:, temperatures.index(temperature)]).float()
    return CapturedExample(None, indices, log_probs, normalizer, hidden, features)


def log1mexp(log_mass: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for x of at most 0, exact at both ends."""
    return torch.where(log_mass > -0.6931, torch.log(-torch.expm1(log_mass)), torch.log1p(-torch.exp(log_mass)))


def _to_float32(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.float32))  # a copy: what is mapped is read-only
