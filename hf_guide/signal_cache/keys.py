"""Compute the key of an example: a hash of the model's inputs without padding.

The key does not depend on the order, the epoch, the batch or the padding; it does on masking, truncation and tokenisation.
"""

from collections.abc import Collection, Mapping
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from hf_guide.errors import CaptureError
from hf_guide.models.packed_rows import packed_padding_mask
from hf_guide.tasks import Task
from hf_guide.utils.labels import IGNORE_INDEX

KEY_BYTES = 16

_PRIMARY_INPUTS = ("input_ids", "pixel_values", "input_features", "input_values", "inputs_embeds")
_AUXILIARY_INPUTS = ("token_type_ids", "position_ids", "bbox")
_RANDOM_INPUTS = ("perm_mask", "target_mapping")


def example_keys(
    batch: Mapping[str, Any], task: Task, *, ignore: Collection[str] = (), in_decoder: bool | None = None
) -> list[bytes]:
    """Return one key of 16 bytes for each example of a collated batch.

    Args:
        batch: `attention_mask`, (batch, length), strips padding on either side. Of an encoder-decoder the labels (up to the
            last that is not -100), or else `decoder_input_ids`, are part of the key.
        task: The model's.
        ignore: Inputs that are left out; token types that are all zero always are.
        in_decoder: Whether the targets are a decoder's; by default where the task has models with one.

    Raises:
        CaptureError: The batch has no input of a model, an attention mask of another shape, or images of several examples in
            one row.
    """
    inputs = {name: torch.as_tensor(batch[name]) for name in _PRIMARY_INPUTS if batch.get(name) is not None}
    if not inputs:
        raise CaptureError(
            f"The batch has none of {', '.join(_PRIMARY_INPUTS)}, of which the key of an example is made; it has "
            f"{sorted(batch)}."
        )
    auxiliary = {name: torch.as_tensor(batch[name]) for name in _AUXILIARY_INPUTS if batch.get(name) is not None}
    for name in _RANDOM_INPUTS:
        if batch.get(name) is not None:
            raise CaptureError(
                f"The batch has {name}, an order of the tokens that is drawn anew in each epoch and on which the teacher's "
                "outputs depend, so they cannot be stored by example. Train with the teacher itself."
            )
    mask = _text_mask(batch)
    sizes = {name: len(tensor) for name, tensor in inputs.items()}
    if len(set(sizes.values())) > 1:
        raise CaptureError(
            f"The batch has {sizes} rows, so rows cannot be assigned to examples: use a collator and a processor that make "
            "one row per example, or train with the teacher itself."
        )
    decoder_tokens: list[Tensor] = []
    if task.row.targets_in_decoder if in_decoder is None else in_decoder:
        name = "labels" if batch.get("labels") is not None else "decoder_input_ids"
        if batch.get(name) is None:
            raise CaptureError(
                f"An encoder-decoder's batch needs labels or decoder_input_ids; it has {sorted(batch)}."
            )
        decoder = torch.as_tensor(batch[name])
        decoder_tokens = [decoder[row][positions] for row, positions in enumerate(token_positions(batch, task, True))]
    keys = []
    for row in range(len(next(iter(inputs.values())))):
        key = blake2b(digest_size=KEY_BYTES)
        for name, tensor in (inputs | auxiliary).items():
            value = _strip_padding(tensor, mask, row)
            if name in ignore or (name == "token_type_ids" and not value.any()):
                continue
            _update_hash(key, name, value)
        if mask is not None and mask.ndim == 3:
            _update_hash(key, "choices", mask[row].sum(-1))
        if decoder_tokens:
            _update_hash(key, "decoder", decoder_tokens[row])
        keys.append(key.digest())
    return keys


def token_positions(batch: Mapping[str, Any], task: Task, in_decoder: bool | None = None) -> list[Tensor]:
    """Return for each example the positions (int64) of its tokens without padding, along the second axis of the logits."""
    if not (task.row.targets_in_decoder if in_decoder is None else in_decoder):
        mask = _text_mask(batch)
        ids = next(torch.as_tensor(batch[name]) for name in _PRIMARY_INPUTS if batch.get(name) is not None)
    elif (labels := batch.get("labels")) is not None:
        has_label = torch.as_tensor(labels) != IGNORE_INDEX
        # Up to the last label: an ignored one before it is still a position.
        mask = has_label.flip(1).cumsum(1).flip(1) > 0
        ids = mask
    else:
        mask = _padding_mask(batch, "decoder_attention_mask")
        ids = torch.as_tensor(batch["decoder_input_ids"])
    if mask is None:
        return [torch.arange(ids.shape[1], device=ids.device)] * len(ids)
    return [row.nonzero().squeeze(1) for row in mask]


def _text_mask(batch: Mapping[str, Any]) -> Tensor | None:
    """Return which positions are no padding: by the attention mask, or of packed rows by their position ids."""
    mask = _padding_mask(batch, "attention_mask")
    return packed_padding_mask(batch) if mask is None else mask


def _padding_mask(batch: Mapping[str, Any], name: str) -> Tensor | None:
    if batch.get(name) is None:
        return None
    mask = torch.as_tensor(batch[name])
    is_choice = mask.ndim == 3 and torch.as_tensor(batch.get("input_ids", 0)).ndim == 3
    if mask.ndim != 2 and not is_choice:
        raise CaptureError(
            f"{name} has the shape {tuple(mask.shape)}; it must be (batch, length) and mark padding. A collator that "
            "packs several examples into one row cannot be used with a capture: let it pad."
        )
    return mask.bool()


def _strip_padding(tensor: Tensor, mask: Tensor | None, row: int) -> Tensor:
    return tensor[row] if mask is None or tensor.shape[: mask.ndim] != mask.shape else tensor[row][mask[row]]


def _update_hash(key: Any, name: str, value: Tensor) -> None:
    value = value.detach().cpu().to(torch.float32 if value.is_floating_point() else torch.int64).contiguous()
    key.update(f"{name}{tuple(value.shape)}".encode())
    key.update(value.numpy().data)
