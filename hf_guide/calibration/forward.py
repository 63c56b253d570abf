"""Run a model on calibration batches: without a cache, in evaluation mode; rows of padding, and rows that are held out."""

import contextlib
import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_guide.calibration.batches import Batch, frame_padding_mask, num_rows, padding_mask
from hf_guide.calibration.modules import ModuleRef
from hf_guide.models.hooks import StopForward
from hf_guide.models.modes import eager_experts, eval_mode, without_cache
from hf_guide.tasks import Task, task_of_class_name
from hf_guide.utils.distributed import all_reduce_scalar, all_reduce_sum_, rank_and_world_size
from hf_guide.utils.half_precision import fast_half_products

CROSS_ATTENTION_KEY_VALUE = re.compile(r"\.(?:EncDecAttention|encoder_attn)\.[kv]")
"""Modules of a decoder that read the encoder's tokens."""

HELD_OUT_EVERY = 4
"""The last of so many examples is held out to choose ridges."""


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
    with without_cache(model):
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


def drop_padding(
    activations: Tensor, batch: Batch, model: PreTrainedModel | None, *, of_decoder: bool = False
) -> Tensor:
    """Return the rows that are not padding, (tokens, width).

    Args:
        activations: (batch, length, width), or (batch * length, width) as inside of a mixture of experts.
        batch: The inputs, with the masks.
        model: Of which they are the inputs, and which makes frames of sounds; None where there are no sounds.
        of_decoder: Whether the tokens are the decoder's, which have a mask of their own.

    Example:
        >>> batch = {"attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}
        >>> drop_padding(torch.zeros(2, 3, 8), batch, None).shape
        torch.Size([3, 8])
    """
    rows = activations.reshape(-1, activations.shape[-1])
    masks = [padding_mask(batch, "decoder_input_ids" if of_decoder else "input_ids")]
    if model is not None and not of_decoder:
        masks.append(frame_padding_mask(batch, model))
    for mask in masks:
        if mask is not None and activations.shape[:-1] in (mask.shape, (mask.numel(),)):
            return rows[mask.to(activations.device).bool().flatten()]
    return rows


def held_out_examples(batches: Sequence[Batch]) -> list[Tensor | None]:
    """Return for each of this process's batches which of its examples choose the ridges of fits, (examples,) bool.

    It is every fourth example of all processes that has a token, however they are batched. None where there are fewer than
    four, or a row is not an example: `held_out_rows` then takes a part of each batch.

    Example:
        >>> batches = [{"input_ids": torch.zeros(3, 16)}, {"input_ids": torch.zeros(2, 16)}]
        >>> held_out_examples(batches)
        [tensor([False, False, False]), tensor([ True, False])]
    """
    rank, world_size = rank_and_world_size()
    filled = [_filled_examples(batch) for batch in batches]
    of_all = torch.zeros(round(all_reduce_scalar(len(batches))), dtype=torch.float64)
    of_all[rank::world_size] = torch.tensor([0.0 if each is None else each.sum().item() for each in filled]).double()
    all_reduce_sum_([of_all])  # so that examples have the same number with any number of processes
    if of_all.sum() < HELD_OUT_EVERY:
        return [None] * len(batches)
    masks: list[Tensor | None] = []
    for start, each in zip((of_all.cumsum(0) - of_all)[rank::world_size].long().tolist(), filled, strict=True):
        masks.append(None if each is None else each & ((start + each.cumsum(0)) % HELD_OUT_EVERY == 0))
    return masks


def _filled_examples(batch: Batch) -> Tensor | None:
    """Return which examples of a batch have a token, (examples,) bool; None where a row is not an example."""
    count, mask = num_rows(batch), padding_mask(batch)
    if count is None:
        return None
    return torch.ones(count, dtype=torch.bool) if mask is None else mask.bool().reshape(count, -1).any(1)


def held_out_rows(
    activations: Tensor,
    batch: Batch,
    model: PreTrainedModel | None,
    examples: Tensor | None,
    *,
    of_decoder: bool = False,
) -> Tensor:
    """Return which of the rows that `drop_padding` returns choose the ridges of fits, (tokens,) bool.

    Args:
        activations: As of `drop_padding`.
        batch, model: As of `drop_padding`.
        examples: Which examples of the batch do, (examples,) bool. None, or another number of examples than the activations
            can be split into, takes the last quarter of the rows.
        of_decoder: As of `drop_padding`.

    Example:
        >>> batch = {"attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}
        >>> held_out_rows(torch.zeros(2, 3, 8), batch, None, torch.tensor([False, True]))
        tensor([False, False,  True])
    """
    shape = activations.shape[:-1]
    count = shape.numel()
    if examples is not None and count % len(examples) == 0:
        rows = examples.to(activations.device).repeat_interleave(count // len(examples))
        return drop_padding(rows.reshape(*shape, 1), batch, model, of_decoder=of_decoder).flatten()
    kept = len(drop_padding(activations, batch, model, of_decoder=of_decoder))
    return torch.arange(kept, device=activations.device) >= kept - kept // HELD_OUT_EVERY
