"""What an example is known by: a hash of what the model is fed, padding left out.

So an example is found again in another order, epoch or batch, padded otherwise, and not where it was masked, truncated or
tokenised otherwise.
"""

from collections.abc import Collection, Mapping
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from hf_guide.errors import CaptureError
from hf_guide.tasks import Task
from hf_guide.utils.labels import IGNORE_INDEX

KEY_BYTES = 16

_PRIMARY_INPUTS = ("input_ids", "pixel_values", "input_features", "input_values", "inputs_embeds")
_AUXILIARY_INPUTS = ("token_type_ids", "position_ids")


def example_keys(batch: Mapping[str, Any], task: Task, *, ignore: Collection[str] = ()) -> list[bytes]:
    """Return one key of 16 bytes for each example of a collated batch.

    `attention_mask`, (batch, length), strips padding on either side. Of an encoder-decoder the labels count (up to the last
    that is not -100), or else `decoder_input_ids`. Inputs named in `ignore`, and token types that are all zero, do not.

    Raises:
        CaptureError: the batch holds nothing that a model is fed, or an attention mask of another shape.
    """
    fed = {name: torch.as_tensor(batch[name]) for name in _PRIMARY_INPUTS if batch.get(name) is not None}
    if not fed:
        raise CaptureError(
            f"A batch has none of {', '.join(_PRIMARY_INPUTS)}, by which an example is known; it has {sorted(batch)}."
        )
    beside = {name: torch.as_tensor(batch[name]) for name in _AUXILIARY_INPUTS if batch.get(name) is not None}
    mask = _padding_mask(batch, "attention_mask")
    written: list[Tensor] = []
    if task.row.targets_in_decoder:
        name = "labels" if batch.get("labels") is not None else "decoder_input_ids"
        if batch.get(name) is None:
            raise CaptureError(
                f"An encoder-decoder's batch needs labels or decoder_input_ids; it has {sorted(batch)}."
            )
        decoder = torch.as_tensor(batch[name])
        written = [decoder[row][places] for row, places in enumerate(token_positions(batch, task))]
    keys = []
    for row in range(len(next(iter(fed.values())))):
        key = blake2b(digest_size=KEY_BYTES)
        for name, tensor in (fed | beside).items():
            value = _strip_padding(tensor, mask, row)
            if name in ignore or (name == "token_type_ids" and not value.any()):
                continue
            _update_hash(key, name, value)
        if written:
            _update_hash(key, "decoder", written[row])
        keys.append(key.digest())
    return keys


def token_positions(batch: Mapping[str, Any], task: Task) -> list[Tensor]:
    """Return for each example the places (int64) of its unpadded tokens along the logits' second axis."""
    if not task.row.targets_in_decoder:
        mask = _padding_mask(batch, "attention_mask")
        ids = next(torch.as_tensor(batch[name]) for name in _PRIMARY_INPUTS if batch.get(name) is not None)
    elif (labels := batch.get("labels")) is not None:
        written = torch.as_tensor(labels) != IGNORE_INDEX
        # Up to the last label: one that is left out in the middle is still a place.
        mask = written.flip(1).cumsum(1).flip(1) > 0
        ids = mask
    else:
        mask = _padding_mask(batch, "decoder_attention_mask")
        ids = torch.as_tensor(batch["decoder_input_ids"])
    if mask is None:
        return [torch.arange(ids.shape[1], device=ids.device)] * len(ids)
    return [row.nonzero().squeeze(1) for row in mask]


def _padding_mask(batch: Mapping[str, Any], name: str) -> Tensor | None:
    if batch.get(name) is None:
        return None
    mask = torch.as_tensor(batch[name])
    if mask.ndim != 2:
        raise CaptureError(
            f"{name} has the shape {tuple(mask.shape)}; one of (batch, length) was expected, which says what is padding. "
            "A collator that packs several examples into one row cannot be used with a capture: let it pad."
        )
    return mask.bool()


def _strip_padding(tensor: Tensor, mask: Tensor | None, row: int) -> Tensor:
    return tensor[row] if mask is None or tensor.shape[:2] != mask.shape else tensor[row][mask[row]]


def _update_hash(key: Any, name: str, value: Tensor) -> None:
    value = value.detach().cpu().to(torch.float32 if value.is_floating_point() else torch.int64).contiguous()
    key.update(f"{name}{tuple(value.shape)}".encode())
    key.update(value.numpy().data)
