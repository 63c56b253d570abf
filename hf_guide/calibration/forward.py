"""Run a model on calibration batches: without a cache, in evaluation mode, and without the rows of padding."""

import contextlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_guide.calibration.data import Batch
from hf_guide.calibration.modules import ModuleRef
from hf_guide.models.hooks import StopForward, register_input_hook, removable_hooks
from hf_guide.models.modes import eager_float64_experts, eval_mode

CROSS_ATTENTION_KEY_VALUE = re.compile(r"\.(?:EncDecAttention|encoder_attn)\.[kv]")
"""Modules of a decoder that are given the encoder's tokens."""


@torch.no_grad()
def forward_no_cache(model: PreTrainedModel, batch: Batch) -> Any:
    """Run a forward without a cache; return its outputs, or None where a hook has heard enough."""
    inputs: dict[str, Any] = {name: _to_model(value, model) for name, value in batch.items()}
    accepted = inspect.signature(model.forward).parameters
    hands_on = any(each.kind == inspect.Parameter.VAR_KEYWORD for each in accepted.values())
    inside = inspect.signature(model.base_model.forward).parameters if hands_on else {}
    if "use_cache" in {*accepted, *inside}:
        inputs["use_cache"] = False  # of some families' heads it is one of the keywords that are handed on
    try:
        return model(**inputs)
    except StopForward:
        return None


def capture_input(model: PreTrainedModel, module: nn.Module, batch: Batch) -> Tensor | None:
    """Return what a module is given in a forward, which ends there; None where the forward never comes to it."""
    heard: list[Tensor] = []

    def stop(tensor: Tensor) -> None:
        heard.append(tensor)
        raise StopForward

    with removable_hooks() as handles:
        handles.append(register_input_hook(module, stop))
        forward_no_cache(model, batch)
    return heard[0] if heard else None


def _to_model(value: Tensor, model: PreTrainedModel) -> Tensor:
    value = value.to(model.device)
    return value.to(model.dtype) if value.is_floating_point() else value


@contextlib.contextmanager
def calibration_mode(model: PreTrainedModel) -> Iterator[None]:
    """Put a model into evaluation mode, with experts that run in its dtype, for the duration of the block."""
    with eval_mode(model), eager_float64_experts(model):
        yield


def reads_decoder_tokens(part: ModuleRef, config: PreTrainedConfig) -> bool:
    """Whether what a part is given are the tokens of an encoder-decoder's decoder: those that it reads, wherever it stands."""
    if CROSS_ATTENTION_KEY_VALUE.search(part.name):
        return False
    return is_decoder_stack(next((norm for norm in part.match.row.input_norms if norm), part.name), config)


def is_decoder_stack(name: str, config: PreTrainedConfig) -> bool:
    """Whether a stack, or the norm behind it, is an encoder-decoder's decoder; a head that names neither reads the decoder.

    A model that is a decoder and nothing else may call its blocks so as well (OPT): its mask is the only one.
    """
    return bool(config.is_encoder_decoder) and ("decoder" in name or "encoder" not in name)


def drop_padding(heard: Tensor, batch: Batch, *, of_decoder: bool = False) -> Tensor:
    """Return the rows, (tokens, width), of what was heard, (batch, length, width), that are not padding.

    What is heard within a mixture of experts has the two axes made one, (batch * length, width).
    """
    mask = batch.get("decoder_attention_mask" if of_decoder else "attention_mask")
    if mask is not None and mask.ndim == 2 and heard.shape[:-1] in (mask.shape, (mask.numel(),)):
        return heard.reshape(-1, heard.shape[-1])[mask.to(heard.device).bool().flatten()]
    return heard.reshape(-1, heard.shape[-1])
