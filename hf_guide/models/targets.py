"""Which positions of a model's logits have a target, and their labels.

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
    """Return which places of the logits have a target: bool, (batch, length) where items are tokens, else (batch,).

    Without labels every place that attention sees is one: a teacher can be listened to there.

    Args:
        task: the model's.
        inputs: of the model, with labels where there are any.
        shifted: whether the model's loss compares the logits of token i with the label of token i + 1, as
            `label_shift.shifts_labels` finds; the last place then never has a target. By default that of the task.

    Raises:
        TaskError: there are neither labels nor anything else that tells the shape.
    """
    labels = inputs.get("labels")
    if not task.is_per_token:
        if isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point():
            return labels != IGNORE_INDEX
        some = labels if isinstance(labels, Tensor) else _first_tensor(inputs)
        return torch.ones(some.shape[0], dtype=torch.bool, device=some.device)
    shifted = task is Task.CAUSAL_LM if shifted is None else shifted
    if shifted and isinstance(inputs.get("shift_labels"), Tensor):
        return inputs["shift_labels"] != IGNORE_INDEX
    if isinstance(labels, Tensor):
        return _next_is_visible(labels != IGNORE_INDEX) if shifted else labels != IGNORE_INDEX
    if task.row.targets_in_decoder and not shifted:
        seen, ids = inputs.get("decoder_attention_mask"), inputs.get("decoder_input_ids")
    else:
        seen, ids = inputs.get("attention_mask"), inputs.get("input_ids", inputs.get("inputs_embeds"))
    if isinstance(seen, Tensor) and seen.ndim == 2:
        seen = seen.bool()
    elif isinstance(ids, Tensor):
        seen = torch.ones(ids.shape[:2], dtype=torch.bool, device=ids.device)
    else:
        raise TaskError(
            f"The batch has neither labels nor token ids to say where a {task} model has targets; it has "
            f"{sorted(inputs)}. Give labels."
        )
    return seen & _next_is_visible(seen) if shifted else seen


def item_labels(task: Task, inputs: Mapping[str, Any], mask: Tensor, *, shifted: bool | None = None) -> Tensor | None:
    """Return the labels of the items that `mask` picks, (items,) or (items, labels); None where there are none."""
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
    """Return `inputs` with the decoder's inputs that an encoder-decoder would make from its labels, where they are missing."""
    given = "decoder_input_ids" in inputs or "decoder_inputs_embeds" in inputs
    made = task.row.targets_in_decoder and is_encoder_decoder(model)
    if not made or given or not isinstance(inputs.get("labels"), Tensor):
        return inputs
    return inputs | {"decoder_input_ids": decoder_ids_from_labels(inputs["labels"], without_adapter(model))}


def mean_per_item(task: Task, values: Tensor, mask: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Return one number an item, (items,), of numbers at every place, (batch, length).

    Where items are tokens it is the number at their place; otherwise the mean over the places that attention sees.
    """
    if task.is_per_token:
        return values[mask]
    seen = inputs.get("attention_mask")
    if isinstance(seen, Tensor) and seen.shape == values.shape:
        weights = seen.to(values)
        return ((values * weights).sum(1) / weights.sum(1).clamp(min=1))[mask]
    return values.mean(1)[mask]


def _next_is_visible(seen: Tensor) -> Tensor:
    """The places whose next one is in `seen`."""
    return torch.nn.functional.pad(seen[:, 1:], (0, 1), value=False)


def _first_tensor(inputs: Mapping[str, Any]) -> Tensor:
    for value in inputs.values():
        if isinstance(value, Tensor) and value.ndim > 0:
            return value
    raise TaskError(f"The batch has no tensor to tell its size from; it has {sorted(inputs)}.")
