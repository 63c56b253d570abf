"""Measure the cache that a model keeps while it generates: the tensors that a forward of it returns.

Measured and not derived from a config, since families differ in what they keep: the latent of multi-head latent attention, a
window of positions, one key/value head for all, the states of a recurrence. The forward is on the meta device, so it computes
nothing.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from hf_guide.errors import ShapeError
from hf_guide.models.tiny_models import MODEL_ERRORS

_CACHE_OUTPUTS = ("past_key_values", "cache_params")
"""What outputs call the cache, the second in Mamba's."""

_FEW_POSITIONS = 16
"""More than the kernel of a convolution, whose inputs are part of the states."""


@dataclass(frozen=True)
class CachedTensor:
    """A tensor of a cache.

    Attributes:
        layer: The index of the block that keeps it.
        name: What the block keeps it as.
        itemsize: Bytes of a number: states of a recurrence may be float32 in a model of another dtype.
    """

    layer: int
    name: str
    shape: tuple[int, ...]
    itemsize: int


@dataclass(frozen=True)
class CacheMeter:
    """Measures the caches of models.

    Attributes:
        dtype: Of the student.
        positions: Those of the decoder.
        encoder_positions: Those that cross-attention keeps; 0 of a model without an encoder.
    """

    dtype: torch.dtype
    positions: int
    encoder_positions: int

    def num_bytes(self, model: PreTrainedModel) -> int:
        """Return the bytes of all tensors of a model's cache; 0 of one that keeps none.

        Raises:
            ShapeError: As `tensors`.

        Example:
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> from hf_guide.models.model_classes import meta_model
            >>> config = LlamaConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
            >>> CacheMeter(torch.float32, 100, 0).num_bytes(meta_model(LlamaForCausalLM, config))
            6400
        """
        return sum(torch.Size(each.shape).numel() * each.itemsize for each in self.tensors(model))

    def tensors(self, model: PreTrainedModel) -> list[CachedTensor]:
        """Return the tensors of the cache that a model on the meta device keeps. The model is not changed.

        Raises:
            ShapeError: The model cannot run on the meta device.
        """
        if not model.can_generate():
            return []
        model = copy.deepcopy(model).to(self.dtype).eval()  # type: ignore[arg-type]
        if model._is_stateful:  # states alone do not grow, and Mamba's forward takes a step for each position
            of_few = self._run(model, min(self.positions, _FEW_POSITIONS))
            if not any(each.name.endswith("keys") for each in of_few):
                return of_few
        return self._run(model, self.positions)

    @torch.no_grad()
    def _run(self, model: PreTrainedModel, positions: int) -> list[CachedTensor]:
        tokens = torch.empty(1, positions, dtype=torch.long, device="meta")
        inputs: dict[str, Any] = {"input_ids": tokens}
        if model.config.is_encoder_decoder:
            width = model.config.hidden_size
            encoded = torch.empty(1, self.encoder_positions, width, dtype=self.dtype, device="meta")
            inputs = {"decoder_input_ids": tokens, "encoder_outputs": BaseModelOutput(last_hidden_state=encoded)}
        try:
            # Other implementations look at values, or at the hardware, of which the meta device has none.
            model.set_attn_implementation("eager")
            model.set_experts_implementation("batched_mm")
            outputs = model(**inputs, use_cache=True, return_dict=True)
        except MODEL_ERRORS as error:
            raise ShapeError(
                f"The size of the cache of {type(model).__name__} could not be measured: {type(error).__name__}: {error}. "
                "Without memory= it is not needed: use num_parameters= instead."
            ) from error
        cache = next((found for name in _CACHE_OUTPUTS if (found := outputs.get(name)) is not None), None)
        return list(_cached_tensors(cache))


def _cached_tensors(cache: Any) -> Iterator[CachedTensor]:
    """Yield the tensors of a cache, those of self-attention before those of cross-attention."""
    parts = {"cache": cache}
    if hasattr(cache, "cross_attention_cache"):
        parts = {"cache": cache.self_attention_cache, "cross_attention_cache": cache.cross_attention_cache}
    for part, of_part in parts.items():
        for index, layer in enumerate(getattr(of_part, "layers", ())):
            for name, tensor in _named_tensors(f"{part}.", vars(layer)):
                yield CachedTensor(index, name, tuple(tensor.shape), tensor.element_size())


def _named_tensors(prefix: str, values: dict[Any, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors among an object's attributes, and in their lists and dicts: there may be several states."""
    for key, value in values.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, (list, tuple)):
            yield from _named_tensors(f"{prefix}{key}.", dict(enumerate(value)))
        elif isinstance(value, dict):
            yield from _named_tensors(f"{prefix}{key}.", value)
