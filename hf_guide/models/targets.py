"""Find the items of a batch: the positions of the canonical outputs (`outputs.py`) that have a target, and their labels.

An *item* is one thing that a teacher's loss is averaged over, as the row of the task states: a token with a target, an
example, the start or the end of an answer, a frame, a pixel, a query, a row of similarities, a masked patch. A *target* is
what the model's own loss is averaged over (`count_targets`). Both are known before any model runs.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_guide.errors import TaskError
from hf_guide.models.adapters import is_encoder_decoder, without_adapter
from hf_guide.models.outputs import grid_size
from hf_guide.tasks import OutputKind, Task
from hf_guide.utils.labels import IGNORE_INDEX, decoder_ids_from_labels

_QUERY_COUNTS = ("num_queries", "num_detection_tokens")
_SPAN_LABELS = ("start_positions", "end_positions")


def target_mask(task: Task, inputs: Mapping[str, Any], *, shifted: bool | None = None, model: Any = None) -> Tensor:
    """Return which positions of the canonical outputs are items: bool, (batch,) or (batch, positions).

    Without labels all attended positions are: the teacher has signals there.

    Args:
        task: The model's.
        inputs: The model's, with labels if there are any.
        shifted: Whether the model's loss compares the logits of token i with the label of token i + 1, as
            `label_shift.shifts_labels` finds; the last position then has no target. By default that of the task.
        model: The model, whose config states how many frames, queries or patches there are, and which labels are ignored.

    Raises:
        TaskError: There are neither labels nor token ids.

    Example:
        >>> target_mask(Task.CAUSAL_LM, {"labels": torch.tensor([[5, 6, -100]])}).tolist()
        [[True, False, False]]
    """
    match task.row.outputs[0].items:
        case "token":
            return _token_mask(task, inputs, shifted, model)
        case "boundary":
            return _boundary_mask(inputs)
        case "frame":
            mask = frame_mask(inputs, model)
            sounds = _first_tensor(inputs)
            return torch.ones(len(sounds), 1, dtype=torch.bool, device=sounds.device) if mask is None else mask
        case "pixel":
            return _pixel_mask(inputs, model)
        case "query":
            batch = _first_tensor(inputs)
            return torch.ones(len(batch), num_queries(model.config) or 1, dtype=torch.bool, device=batch.device)
        case "row":
            batch = _first_tensor(inputs)
            return torch.ones(len(batch), 2, dtype=torch.bool, device=batch.device)
        case "patch":
            return _patch_mask(inputs, model)
    labels = inputs.get("labels")
    if isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point():
        return labels != IGNORE_INDEX
    batch = labels if isinstance(labels, Tensor) else _first_tensor(inputs)
    return torch.ones(batch.shape[0], dtype=torch.bool, device=batch.device)


def item_labels(task: Task, inputs: Mapping[str, Any], mask: Tensor, *, shifted: bool | None = None) -> Tensor | None:
    """Return the labels of the items that `mask` selects, (items,) or (items, labels); None where items have no labels."""
    items = task.row.outputs[0].items
    if items == "boundary":
        positions = _span_positions(inputs)
        return None if positions is None else positions.clamp(min=0)[mask]
    labels = inputs.get("labels")
    if items not in ("token", "example"):
        return None
    shifted = task is Task.CAUSAL_LM if shifted is None else shifted
    if shifted and isinstance(inputs.get("shift_labels"), Tensor):
        return inputs["shift_labels"][mask]
    if not isinstance(labels, Tensor):
        return None
    if shifted:
        return torch.nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:][mask]
    return labels[mask]


def has_targets(task: Task, inputs: Mapping[str, Any], label_names: Any = ("labels",)) -> bool:
    """Return whether a batch has what a model's own loss needs."""
    match task.row.outputs[0].items:
        case "row":
            return True  # the pairs themselves
        case "patch":
            return task is Task.IMAGE_PRETRAINING or inputs.get("bool_masked_pos") is not None
        case "boundary":
            return all(inputs.get(name) is not None for name in _SPAN_LABELS)
    if task.row.outputs[0].kind is OutputKind.FEATURES:
        return False
    return any(inputs.get(name) is not None for name in label_names)


def needs_labels(task: Task) -> bool:
    """Return whether a model's own loss for `task` is computed from labels, not from its inputs alone or not at all."""
    output = task.row.outputs[0]
    return output.items not in ("row", "patch") and output.kind is not OutputKind.FEATURES


def target_inputs(task: Task) -> tuple[str, ...]:
    """Return the inputs by which a model for `task` computes its own loss, apart from "labels"."""
    return {"boundary": _SPAN_LABELS, "row": ("return_loss",)}.get(task.row.outputs[0].items, ())


def count_targets(task: Task, inputs: Mapping[str, Any], mask: Tensor, model: Any) -> Tensor:
    """Return the number of what a model's own loss is averaged over in a batch, a scalar.

    It is the number of items for tokens, examples and masked patches, of answers for questions, and of pixels with a label for
    segmentations. Losses that depend on the batch as a whole (CTC, detection, image-text pairs) count examples: of several
    micro-batches of one size it is then their mean, as in `Trainer`.

    Args:
        task: The model's.
        inputs: The model's, with labels.
        mask: The items, as from `target_mask`.
        model: The model.
    """
    match task.row.outputs[0].items:
        case "token" | "example" | "patch":
            return mask.sum()
        case "boundary":
            return mask.sum() / 2
        case "pixel" if isinstance(inputs.get("labels"), Tensor):
            labels = inputs["labels"]
            return (
                (labels != ignored_pixel_label(model.config)).sum()
                if model.config.num_labels > 1
                else mask.new_tensor(labels.numel(), dtype=torch.int64)
            )
    return mask.any(-1).sum()


def num_queries(config: Any) -> int | None:
    """Return the number of a detector's queries; None where its config does not state it."""
    for each in (config, getattr(config, "decoder_config", None)):
        for name in _QUERY_COUNTS:
            if isinstance(getattr(each, name, None), int):
                return int(getattr(each, name))
    return None


def num_frames(model: Any, samples: Tensor) -> Tensor | None:
    """Return how many frames a speech model makes of each number of samples (or of feature vectors); None where unknown."""
    bare = without_adapter(model)
    for each in (bare, getattr(bare, "base_model", None), getattr(bare, "encoder", None)):
        for name in ("_get_feat_extract_output_lengths", "_get_subsampling_output_length"):
            function = getattr(each, name, None)
            if function is not None:
                frames: Tensor = function(samples)
                return frames
    return None


def frame_mask(inputs: Mapping[str, Any], model: Any) -> Tensor | None:
    """Return which frames of a speech model are not padding, (batch, frames); None where their number is not known.

    Raises:
        TaskError: The batch has no sound.
    """
    name = next((each for each in ("input_values", "input_features") if isinstance(inputs.get(each), Tensor)), None)
    if name is None:
        raise TaskError(f"The batch must have input_values or input_features; it has {sorted(inputs)}.")
    sounds, attended = inputs[name], inputs.get("attention_mask")
    total = num_frames(model, torch.tensor(sounds.shape[1]))
    if total is None:
        return None
    positions = torch.arange(int(total), device=sounds.device)
    if not isinstance(attended, Tensor):
        return torch.ones(len(sounds), len(positions), dtype=torch.bool, device=sounds.device)
    lengths = num_frames(model, attended.sum(-1))
    assert lengths is not None
    return positions < lengths.to(sounds.device)[:, None]


def ignored_pixel_label(config: Any) -> int:
    """Return the label of pixels that a segmentation model's own loss ignores."""
    value = getattr(config, "semantic_loss_ignore_index", None)
    return 255 if value is None else int(value)


def complete_inputs(model: Any, task: Task, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return `inputs` with what the model would make itself, so that student and teacher are given the same.

    That is the decoder inputs of an encoder-decoder, and the noise by which a masked autoencoder selects patches. A model of
    images and texts is asked for its loss.
    """
    if task is Task.IMAGE_PRETRAINING and inputs.get("noise") is None:
        pixels = inputs["pixel_values"]
        noise = torch.rand(len(pixels), _num_patches(model.config, pixels), device=pixels.device)
        return inputs | {"noise": noise}
    if task.row.outputs[0].items == "row":
        return inputs | {"return_loss": True}
    return add_decoder_inputs(model, task, inputs)


def add_decoder_inputs(model: Any, task: Task, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return `inputs` with the decoder inputs that an encoder-decoder makes from its labels, if they are missing."""
    has_decoder_inputs = "decoder_input_ids" in inputs or "decoder_inputs_embeds" in inputs
    needs_decoder_inputs = task.row.targets_in_decoder and is_encoder_decoder(model)
    if not needs_decoder_inputs or has_decoder_inputs or not isinstance(inputs.get("labels"), Tensor):
        return inputs
    return inputs | {"decoder_input_ids": decoder_ids_from_labels(inputs["labels"], without_adapter(model))}


def mean_per_item(
    task: Task, values: Tensor, mask: Tensor, inputs: Mapping[str, Any], frames: Tensor | None = None
) -> Tensor:
    """Return one value per item, (items,), from values at all positions, (batch, length).

    Where items are the positions it is the value there, otherwise the mean over an example's attended positions, for each of
    its items. Of several choices the rows of `values` are the choices of all examples.

    Args:
        task: The model's.
        values: At all positions.
        mask: The items.
        inputs: The model's, with its attention mask.
        frames: Of a sound, which positions are not padding, as from `frame_mask`.
    """
    if task.row.outputs[0].items in ("token", "frame", "query") and values.shape == mask.shape:
        return values[mask]
    attended = inputs.get("attention_mask") if frames is None or frames.shape != values.shape else frames
    if isinstance(attended, Tensor) and attended.ndim == 3 and len(values) == attended.shape[0] * attended.shape[1]:
        attended = attended.flatten(0, 1)
    if isinstance(attended, Tensor) and attended.shape == values.shape:
        weights = attended.to(values)
        per_example = (values * weights).sum(1) / weights.sum(1).clamp(min=1)
    else:
        per_example = values.flatten(1).mean(1)
    if len(per_example) != len(mask):
        per_example = per_example.unflatten(0, (len(mask), -1)).mean(1)
    return per_example.view(-1, *[1] * (mask.ndim - 1)).expand(mask.shape)[mask]


def _token_mask(task: Task, inputs: Mapping[str, Any], shifted: bool | None, model: Any) -> Tensor:
    labels = inputs.get("labels")
    shifted = task is Task.CAUSAL_LM if shifted is None else shifted
    image_tokens = _image_tokens(model) if task is Task.IMAGE_TEXT_TO_TEXT else []
    if shifted and isinstance(inputs.get("shift_labels"), Tensor):
        return inputs["shift_labels"] != IGNORE_INDEX
    if isinstance(labels, Tensor):
        for token in image_tokens:
            if bool((labels == token).any()):
                raise TaskError(
                    f"The labels have the token {token}, which stands for an image: a model cannot learn to write it. Set "
                    f"these labels to {IGNORE_INDEX}."
                )
        return _next_is_visible(labels != IGNORE_INDEX) if shifted else labels != IGNORE_INDEX
    has_decoder = task.row.targets_in_decoder and not shifted
    if model is not None and task is Task.IMAGE_TEXT_TO_TEXT:  # most are decoders that read the images' embeddings
        has_decoder = has_decoder and bool(without_adapter(model).config.is_encoder_decoder)
    if has_decoder:
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
    targets = attended
    if isinstance(ids, Tensor) and ids.ndim == 2:
        for token in image_tokens:
            targets = targets & (ids != token)
    return attended & _next_is_visible(targets) if shifted else targets


def _image_tokens(model: Any) -> list[int]:
    """Return the ids of the tokens that stand for an image."""
    config = None if model is None else without_adapter(model).config
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    return [value for name in names if isinstance(value := getattr(config, name, None), int)]


def _span_positions(inputs: Mapping[str, Any]) -> Tensor | None:
    """Return the positions of the start and of the end of each answer, (batch, 2); None without them."""
    positions = [inputs.get(name) for name in _SPAN_LABELS]
    if not all(isinstance(each, Tensor) for each in positions):
        return None
    return torch.stack([each.flatten() for each in positions], 1)  # type: ignore[union-attr]


def _boundary_mask(inputs: Mapping[str, Any]) -> Tensor:
    positions = _span_positions(inputs)
    tokens = _first_tensor(inputs)
    if positions is None:
        return torch.ones(len(tokens), 2, dtype=torch.bool, device=tokens.device)
    tokens = next(inputs[name] for name in ("input_ids", "inputs_embeds") if isinstance(inputs.get(name), Tensor))
    return positions < tokens.shape[1]  # beyond the input a model's own loss ignores them


def _pixel_mask(inputs: Mapping[str, Any], model: Any) -> Tensor:
    pixels, labels = inputs["pixel_values"], inputs.get("labels")
    height, width = grid_size(pixels.shape[-2:])
    if not isinstance(labels, Tensor):
        return torch.ones(len(pixels), height * width, dtype=torch.bool, device=pixels.device)
    resized = torch.nn.functional.interpolate(labels[:, None].float(), size=(height, width), mode="nearest")
    return (resized != ignored_pixel_label(without_adapter(model).config)).flatten(1)


def _patch_mask(inputs: Mapping[str, Any], model: Any) -> Tensor:
    pixels, masked = inputs["pixel_values"], inputs.get("bool_masked_pos")
    if isinstance(masked, Tensor):
        return masked.bool()
    config = without_adapter(model).config
    count = _num_patches(config, pixels)
    if not hasattr(config, "mask_ratio"):
        raise TaskError(
            "The batch must have bool_masked_pos, (batch, patches), which patches are masked; it has "
            f"{sorted(inputs)}. Teacher and student must reconstruct the same."
        )
    noise = inputs.get("noise")
    noise = torch.arange(count, device=pixels.device).expand(len(pixels), -1) if noise is None else noise
    kept = int(count * (1 - config.mask_ratio))
    return noise.argsort(dim=1).argsort(dim=1) >= kept


def _num_patches(config: Any, pixels: Tensor) -> int:
    size = config.patch_size if isinstance(config.patch_size, (list, tuple)) else (config.patch_size,) * 2
    return (pixels.shape[-2] // size[0]) * (pixels.shape[-1] // size[1])


def _next_is_visible(attended: Tensor) -> Tensor:
    """Return the positions whose next position is attended."""
    return torch.nn.functional.pad(attended[:, 1:], (0, 1), value=False)


def _first_tensor(inputs: Mapping[str, Any]) -> Tensor:
    for value in inputs.values():
        if isinstance(value, Tensor) and value.ndim > 0:
            return value
    raise TaskError(f"The batch must have a tensor, whose first axis is its size; it has {sorted(inputs)}.")
