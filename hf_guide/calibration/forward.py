"""Run a model on calibration batches: without a cache, in evaluation mode, and without the rows of padding."""

import contextlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_guide.calibration.data import Batch
from hf_guide.calibration.modules import ModuleRef
from hf_guide.models.hooks import StopForward
from hf_guide.models.modes import eager_experts, eval_mode
from hf_guide.tasks import Task, task_of_class_name
from hf_guide.utils.half_precision import fast_half_products

CROSS_ATTENTION_KEY_VALUE = re.compile(r"\.(?:EncDecAttention|encoder_attn)\.[kv]")
"""Modules of a decoder that read the encoder's tokens."""


@contextlib.contextmanager
def calibration_mode(model: PreTrainedModel) -> Iterator[None]:
    """Put a model into evaluation mode, with experts that run one by one, for the duration of the block.

    Products in half precision are made as fast as those in float32 where the processor has no instructions for them.
    """
    with eval_mode(model), eager_experts(model), fast_half_products(model):
        yield


@torch.no_grad()
def forward_no_cache(model: PreTrainedModel, batch: Batch) -> Any:
    """Return the model's outputs, computed without a cache; None if a hook raised `StopForward`."""
    try:
        return forward_without_cache(model, batch)
    except StopForward:
        return None


def forward_without_cache(model: PreTrainedModel, batch: Batch) -> Any:
    """Return the model's outputs, computed without a cache, with gradients where they are enabled."""
    inputs: dict[str, Any] = {name: _to_model(value, model) for name, value in batch.items()}
    if task_of_class_name(type(model).__name__) is Task.MULTIPLE_CHOICE:  # each text is a question with one choice
        inputs = {name: value.unsqueeze(1) if value.ndim == 2 else value for name, value in inputs.items()}
    accepted = inspect.signature(model.forward).parameters
    takes_any = any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in accepted.values())
    inner = inspect.signature(model.base_model.forward).parameters if takes_any else {}
    if "use_cache" in {*accepted, *inner}:
        inputs["use_cache"] = False  # the heads of some families pass it on as one of their keywords
    return model(**inputs)


def running_device(model: PreTrainedModel) -> torch.device:
    """Return the device of a model, some of whose weights may be loaded only while they are used."""
    return next((parameter.device for parameter in model.parameters() if not parameter.is_meta), model.device)


def _to_model(value: Tensor, model: PreTrainedModel) -> Tensor:
    value = value.to(running_device(model))
    return value.to(model.dtype) if value.is_floating_point() else value


def reads_decoder_tokens(ref: ModuleRef, config: PreTrainedConfig) -> bool:
    """Return whether a module's inputs are the tokens of an encoder-decoder's decoder.

    The keys and values of cross-attention are in the decoder, and their inputs are the encoder's tokens.
    """
    if CROSS_ATTENTION_KEY_VALUE.search(ref.name):
        return False
    return is_decoder_stack(next((norm for norm in ref.match.row.input_norms if norm), ref.name), config)


def is_decoder_stack(name: str, config: PreTrainedConfig) -> bool:
    """Return whether a stack, or the norm after it, belongs to an encoder-decoder's decoder.

    A head that names neither side reads the decoder. A model that is only a decoder may also call its blocks so (OPT):
    its one mask is `attention_mask`.
    """
    return bool(config.is_encoder_decoder) and ("decoder" in name or "encoder" not in name)


def drop_padding(activations: Tensor, batch: Batch, *, of_decoder: bool = False) -> Tensor:
    """Return the rows that are not padding, (tokens, width).

    Args:
        activations: (batch, length, width), or (batch * length, width) as inside of a mixture of experts.
        batch: The inputs, with the masks.
        of_decoder: Whether the tokens are the decoder's, which have a mask of their own.

    Example:
        >>> batch = {"attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}
        >>> drop_padding(torch.zeros(2, 3, 8), batch).shape
        torch.Size([3, 8])
    """
    mask = batch.get("decoder_attention_mask" if of_decoder else "attention_mask")
    rows = activations.reshape(-1, activations.shape[-1])
    if mask is not None and mask.ndim == 2 and activations.shape[:-1] in (mask.shape, (mask.numel(),)):
        return rows[mask.to(activations.device).bool().flatten()]
    return rows
