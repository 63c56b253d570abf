"""Find the positions of a model's logits that have a target, and their labels.

An *item* is one thing that a loss is averaged over: a token with a target (language models, token classification) or an
example (sequence and image classification).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_guide.errors import TaskError
from hf_guide.models.adapters import is_encoder_decoder, without_adapter
from hf_guide.tasks import Task
from hf_guide.utils.labels import IGNORE_INDEX, decoder_ids_from_labels


def target_mask(task: Task, inputs: Mapping[str, Any], *, shifted: bool | None = None) -> Tensor:
    """Return which positions of the logits have a target: bool, (batch, length) where items are tokens, else (batch,).

    Without labels all attended positions have one: the teacher has signals there.

    Args:
        task: The model's.
        inputs: The model's, with labels if there are any.
        shifted: Whether the model's loss compares the logits of token i with the label of token i + 1, as
            `label_shift.shifts_labels` finds; the last position then has no target. By default that of the task.

    Raises:
        TaskError: There are neither labels nor token ids.

    Example:
        >>> target_mask(Task.CAUSAL_LM, {"labels": torch.tensor([[5, 6, -100]])}).tolist()
        [[True, False, False]]
    """
    labels = inputs.get("labels")
    if not task.is_per_token:
        if isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point():
            return labels != IGNORE_INDEX
        batch = labels if isinstance(labels, Tensor) else _first_tensor(inputs)
        return torch.ones(batch.shape[0], dtype=torch.bool, device=batch.device)
    shifted = task is Task.CAUSAL_LM if shifted is None else shifted
    if shifted and isinstance(inputs.get("shift_labels"), Tensor):
        return inputs["shift_labels"] != IGNORE_INDEX
    if isinstance(labels, Tensor):
        return _next_is_visible(labels != IGNORE_INDEX) if shifted else labels != IGNORE_INDEX
    if task.row.targets_in_decoder and not shifted:
        attended, ids = inputs.get("decoder_attention_mask"), inputs.get("decoder_input_ids")
    else:
        attended, ids = inputs.get("attention_mask"), inputs.get("input_ids", inputs.get("inputs_embeds"))
    if isinstance(attended, Tensor) and attended.ndim == 2:
        attended = attended.bool()
    elif isinstance(ids, Tensor):
        attended = torch.ones(ids.shape[:2], dtype=torch.bool, device=ids.device)
    else:
        raise TaskError(
            f"The batch must have labels or token ids, from which the targets of a {task} model are found; it has "
            f"{sorted(inputs)}. Give the dataset labels."
        )
    return attended & _next_is_visible(attended) if shifted else attended


def item_labels(task: Task, inputs: Mapping[str, Any], mask: Tensor, *, shifted: bool | None = None) -> Tensor | None:
    """Return the labels of the items that `mask` selects, (items,) or (items, labels); None without labels."""
    labels = inputs.get("labels")
    shifted = task is Task.CAUSAL_LM if shifted is None else shifted
    if shifted and isinstance(inputs.get("shift_labels"), Tensor):
        return inputs["shift_labels"][mask]
    if not isinstance(labels, Tensor):
        return None
    if shifted:
        return torch.nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:][mask]
    return labels[mask]


def add_decoder_inputs(model: PreTrainedModel, task: Task, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return `inputs` with the decoder inputs that an encoder-decoder makes from its labels, if they are missing."""
    has_decoder_inputs = "decoder_input_ids" in inputs or "decoder_inputs_embeds" in inputs
    needs_decoder_inputs = task.row.targets_in_decoder and is_encoder_decoder(model)
    if not needs_decoder_inputs or has_decoder_inputs or not isinstance(inputs.get("labels"), Tensor):
        return inputs
    return inputs | {"decoder_input_ids": decoder_ids_from_labels(inputs["labels"], without_adapter(model))}


def mean_per_item(task: Task, values: Tensor, mask: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Return one value per item, (items,), from values at all positions, (batch, length).

    Where items are tokens it is the value at their position, otherwise the mean over the attended positions.
    """
    if task.is_per_token:
        return values[mask]
    attended = inputs.get("attention_mask")
    if isinstance(attended, Tensor) and attended.shape == values.shape:
        weights = attended.to(values)
        return ((values * weights).sum(1) / weights.sum(1).clamp(min=1))[mask]
    return values.mean(1)[mask]


def _next_is_visible(attended: Tensor) -> Tensor:
    """Return the positions whose next position is attended."""
    return torch.nn.functional.pad(attended[:, 1:], (0, 1), value=False)


def _first_tensor(inputs: Mapping[str, Any]) -> Tensor:
    for value in inputs.values():
        if isinstance(value, Tensor) and value.ndim > 0:
            return value
    raise TaskError(f"The batch must have a tensor, whose first axis is its size; it has {sorted(inputs)}.")
