"""Bring the outputs of a model for any task into the one form in which they are distilled.

The canonical form is (batch, classes) or (batch, positions, classes); `targets.target_mask` selects the items among its
leading axes. What a task's outputs are called, and what their axes count, is in the row of the task.

Does: rearrange outputs; capture what a beam-search head for question answering computes but does not return.
Does not: run a model, select items (`targets.py`), or compare a student with a teacher (`hf_guide.teachers.alignment`).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hf_guide.errors import TaskError
from hf_guide.models.adapters import without_adapter
from hf_guide.models.hooks import removable_hooks
from hf_guide.tasks import OutputKind, Task

Outputs = Mapping[str, Any] | Sequence[Any]

PIXEL_STRIDE = 4
"""Segmentations are compared on a grid of every fourth pixel, which is that of SegFormer's and UperNet's own logits."""


def task_logits(
    task: Task,
    outputs: Outputs,
    inputs: Mapping[str, Any],
    head_outputs: Mapping[str, Tensor] | None = None,
    *,
    has_loss: bool = False,
) -> Tensor:
    """Return what is distilled of a model's outputs: (batch, classes) or (batch, positions, classes).

    - Answers to questions: (batch, 2, length), the logits of the start and of the end; at padding they are -inf.
    - Choices: (batch, choices). CTC: (batch, frames, tokens). Detectors: (batch, queries, classes).
    - Segmentations: (batch, pixels, classes), interpolated as in the model's own loss to a grid of every fourth pixel.
    - Images and texts: (batch, 2, batch), the similarities of each image with all texts, and of each text with all images.
    - Masked images: (batch, patches, values).

    Args:
        task: The model's.
        outputs: The model's, by name or as a tuple.
        inputs: What it was called with.
        head_outputs: As from `capture_head_outputs`.
        has_loss: Whether a tuple begins with the loss.

    Raises:
        TaskError: An output is missing.

    Example:
        >>> outputs = {"start_logits": torch.zeros(1, 3), "end_logits": torch.ones(1, 3)}
        >>> task_logits(Task.QUESTION_ANSWERING, outputs, {"attention_mask": torch.tensor([[1, 1, 0]])})
        tensor([[[0., 0., -inf],
                 [1., 1., -inf]]])
    """
    outputs_of_row = [each for each in task.row.outputs if each.name != "pred_boxes"]
    named = {
        each.name: _find_output(task, each.name, index + has_loss, outputs, head_outputs or {})
        for index, each in enumerate(outputs_of_row)
    }
    first = named[outputs_of_row[0].name]
    if task is Task.QUESTION_ANSWERING and any(each.ndim != 2 for each in named.values()):
        raise TaskError(
            "The end logits of a beam-search head depend on the start, so the batch must have start_positions and "
            f"end_positions for them to be distilled; it has {sorted(inputs)}. {what_works(task)}."
        )
    match task.row.outputs[0].items:
        case "boundary":
            return _mask_padding(torch.stack(list(named.values()), 1), inputs)
        case "row":
            return torch.stack(list(named.values()), 1)
        case "pixel":
            return _on_grid(first, inputs["pixel_values"])
        case "patch" if task is Task.MASKED_IMAGE_MODELING:
            return _in_patches(first, inputs["bool_masked_pos"].shape[1])
    return first


@contextmanager
def capture_head_outputs(model: Any, task: Task) -> Iterator[dict[str, Tensor]]:
    """Collect what the layers of a beam-search head for question answering return; of other models nothing.

    XLNetForQuestionAnswering and its kin return only the likeliest spans, or nothing at all with labels. Their end logits
    depend on the start: given the start and the end of the answer, the head takes the true start, as in training.
    """
    captured: dict[str, Tensor] = {}
    heads = beam_search_heads(model, task)

    def keep(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Tensor) -> None:
            captured[name] = output

        return hook

    with removable_hooks() as handles:
        handles += [layer.register_forward_hook(keep(name)) for name, layer in heads.items()]
        yield captured


def beam_search_heads(model: Any, task: Task) -> dict[str, Any]:
    """Return the layers of a beam-search head by the name of what they return; of other models none."""
    if task is not Task.QUESTION_ANSWERING:
        return {}
    bare = without_adapter(model)
    owners = (bare, getattr(bare, "qa_outputs", None))  # Flaubert's and XLM's are those of an SQuADHead
    for owner in owners:
        heads = {name: getattr(owner, name, None) for name in ("start_logits", "end_logits")}
        if all(isinstance(each, torch.nn.Module) for each in heads.values()):
            return heads
    return {}


def last_hidden_state(outputs: Any) -> Tensor:
    """Return the last hidden states of a model without a head, (batch, length, width); of image models its axes may differ.

    Raises:
        TaskError: It returns none.
    """
    value = outputs.get("last_hidden_state") if isinstance(outputs, Mapping) else outputs[0]
    if not isinstance(value, Tensor):
        raise TaskError(
            f"A model for {Task.FEATURE_EXTRACTION} must return 'last_hidden_state'; found {sorted(outputs)}. Load it with "
            "the AutoModelFor... class of its task."
        )
    return value


def boxes_and_objectness(task: Task, outputs: Mapping[str, Any], kind: OutputKind) -> tuple[Tensor, Tensor]:
    """Return a detector's boxes (batch, queries, 4) and the probability (batch, queries) that a query is an object.

    Raises:
        TaskError: The model has no boxes.
    """
    boxes = outputs.get("pred_boxes")
    if not isinstance(boxes, Tensor):
        raise TaskError(f"The loss 'boxes' is for models that return pred_boxes; this one returns {sorted(outputs)}.")
    logits = outputs["logits"].float()
    if kind is OutputKind.CATEGORICAL:  # the last class is "no object"
        return boxes, 1 - logits.softmax(-1)[..., -1]
    return boxes, logits.sigmoid().amax(-1)


def what_works(task: Task) -> str:
    """Return the end of an error: the losses of a task that need no logits of the teacher."""
    if task is Task.FEATURE_EXTRACTION:
        return "Use 'features' and 'hidden_states' instead"
    if task.row.outputs[0].items == "row":
        return "Use 'kd' between models of one kind, or 'ce', the model's own loss, alone"
    if task.row.outputs[0].items == "query":  # whose hidden states are those of its queries, too
        return "Use a teacher with the student's queries, or 'ce', the model's own loss, alone"
    return "Use 'ce', the model's own loss, and 'hidden_states' instead"


def grid_size(image_size: Sequence[int]) -> tuple[int, int]:
    """Return the height and width of the grid on which segmentations of an image are compared."""
    height, width = image_size
    return -(-height // PIXEL_STRIDE), -(-width // PIXEL_STRIDE)


def _find_output(task: Task, name: str, index: int, outputs: Outputs, head_outputs: Mapping[str, Tensor]) -> Tensor:
    if name in head_outputs:
        return head_outputs[name]
    if not isinstance(outputs, Mapping):
        if index < len(outputs) and isinstance(outputs[index], Tensor):
            return outputs[index]
        names: Any = f"a tuple of {len(outputs)}"
    else:
        # DetrForSegmentation names the logits of its queries as detectors do.
        value = outputs.get(name, outputs.get("logits") if name == "class_queries_logits" else None)
        if isinstance(value, Tensor):
            return value
        names = sorted(outputs)
    raise TaskError(
        f"A model for {task} must return {name!r} for its outputs to be distilled; found {names}. {what_works(task)}."
    )


def _mask_padding(logits: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Return logits (batch, 2, length) with -inf at padding, where no answer can be."""
    attended = inputs.get("attention_mask")
    if not isinstance(attended, Tensor) or attended.shape != (len(logits), logits.shape[-1]):
        return logits
    return logits.masked_fill(attended.to(logits.device)[:, None] == 0, -math.inf)


def _on_grid(logits: Tensor, pixels: Tensor) -> Tensor:
    """Return logits (batch, classes, height, width) as (batch, pixels of the grid, classes)."""
    size = grid_size(pixels.shape[-2:])
    if logits.shape[-2:] != size:
        wide = logits.float() if logits.dtype.itemsize < 4 else logits
        logits = torch.nn.functional.interpolate(wide, size=size, mode="bilinear", align_corners=False)
    return logits.flatten(2).transpose(1, 2)


def _in_patches(images: Tensor, num_patches: int) -> Tensor:
    """Return images (batch, channels, height, width) as (batch, patches, values)."""
    batch, channels, height, width = images.shape
    rows = round(math.sqrt(num_patches * height / width))
    columns = num_patches // max(rows, 1)
    if rows * columns != num_patches or height % rows or width % columns:
        raise TaskError(
            f"bool_masked_pos has {num_patches} patches, which do not divide a reconstruction of {height} x {width} pixels. "
            "It must be (batch, patches), as the model takes it."
        )
    patches = images.unflatten(3, (columns, -1)).unflatten(2, (rows, -1))  # batch, channels, rows, y, columns, x
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, num_patches, -1)
