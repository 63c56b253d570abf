"""What a teacher says of a batch, as the arrays that are stored: one forward pass, chunk after chunk of its logits."""

import contextlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_guide.distillation.capture_keys import token_places
from hf_guide.distillation.capture_options import CaptureConfig
from hf_guide.distillation.capture_storage import Arrays, pack_indices
from hf_guide.distillation.capture_teachers import unwrapped
from hf_guide.distillation.embeddings import embedding_per_item, find_classifier, heard_embeddings
from hf_guide.distillation.tasks import Task, add_decoder_inputs
from hf_guide.errors import CaptureError, OptionError

MAX_LOGITS = 2**24  # held at once in float32

_NO_INPUT = ("labels", "label", "label_ids", "start_positions", "end_positions")


@torch.inference_mode()
def run_teacher(
    model: nn.Module, task: Task, batch: Mapping[str, Any], *, hidden_states: bool, embedding: bool
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
    """Return the logits, all hidden states and what the head is fed; the last two only where wanted."""
    bare = unwrapped(model)
    device = next(model.parameters()).device
    tensors = {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
    tensors = add_decoder_inputs(bare, task, tensors)
    known = inspect.signature(bare.forward).parameters
    inputs: dict[str, Any] = {
        name: value for name, value in tensors.items() if name in known and name not in _NO_INPUT
    }
    if "use_cache" in known:
        inputs["use_cache"] = False
    with contextlib.ExitStack() as stack:
        heard = stack.enter_context(heard_embeddings(find_classifier(bare, task))) if embedding else []
        outputs = model(**inputs, output_hidden_states=hidden_states, return_dict=True)
    fed = heard[-1] if heard else None
    if fed is not None and not task.is_per_token:
        everyone = torch.ones(len(fed), dtype=torch.bool, device=fed.device)
        fed = embedding_per_item(task, fed, everyone, inputs)
    layers: tuple[Tensor, ...] = ()
    if hidden_states:
        name = "decoder_hidden_states" if task is Task.SEQ2SEQ_LM else "hidden_states"
        layers = outputs[name]
    return outputs.logits, layers, fed


def resolve_layers(layers: Sequence[int], count: int) -> list[int]:
    """Return layer numbers counted from the start, of `count` hidden states.

    Raises:
        OptionError: there is no such layer.
    """
    for layer in layers:
        if not -count <= layer < count:
            raise OptionError(f"hidden_states has layer {layer}; this teacher has layers 0 to {count - 1}.")
    return list(dict.fromkeys(layer % count for layer in layers))


@torch.inference_mode()
def read_signals(
    model: nn.Module, task: Task, batch: Mapping[str, Any], config: CaptureConfig, numbers: Sequence[int]
) -> list[Arrays]:
    """Return what is stored of each example of a collated batch.

    Args:
        model: the teacher, in evaluation mode.
        task: what its head is for.
        batch: as the collator gives it.
        config: what is wanted, its layers resolved.
        numbers: the examples' places in the dataset, for errors.

    Raises:
        CaptureError: the teacher said something that is not finite, or that float16 does not hold; it names the example.
    """
    wanted = bool(config.hidden_states)
    logits, layers, fed = run_teacher(model, task, batch, hidden_states=wanted, embedding=config.embedding)
    by_token = task is not Task.IMAGE_CLASSIFICATION
    places = [place.to(logits.device) for place in token_places(batch, task)] if by_token else []
    if task.is_language_model:
        examples = _language_signals(logits[..., : config.vocabulary_size], places, config, numbers)
    else:
        if bool(logits.isnan().any() | logits.isposinf().any()):
            _refuse(logits.isnan() | logits.isposinf(), numbers, "logits")
        kept = [row[place] for row, place in zip(logits, places, strict=True)] if task.is_per_token else list(logits)
        examples = [{"logits": value.float().cpu().numpy()} for value in kept]
    found = {f"hidden_{layer}": layers[layer] for layer in config.hidden_states}
    if fed is not None:
        found["embedding"] = fed
    for name, value in found.items():
        narrow = value.to(getattr(torch, config.hidden_dtype))
        if not bool(narrow.isfinite().all()):
            reason = " in float16: pass hidden_dtype='float32'" if bool(value.isfinite().all()) else ""
            _refuse(~narrow.isfinite(), numbers, name, reason)
        stripped = by_token and (name != "embedding" or task.is_per_token)
        for row, example in enumerate(examples):
            example[name] = (narrow[row][places[row]] if stripped else narrow[row]).cpu().numpy()
    return examples


def _language_signals(
    logits: Tensor, places: Sequence[Tensor], config: CaptureConfig, numbers: Sequence[int]
) -> list[Arrays]:
    classes = logits.shape[-1]
    rows = torch.cat([torch.full_like(place, row) for row, place in enumerate(places)])
    where = torch.cat(list(places))
    parts: list[Arrays] = []
    for start in range(0, len(rows), max(1, MAX_LOGITS // classes)):
        chunk = slice(start, start + max(1, MAX_LOGITS // classes))
        some = logits[rows[chunk], where[chunk]]
        some = some.to(torch.promote_types(some.dtype, torch.float32))
        total = some.logsumexp(1)
        if not bool(total.isfinite().all()):
            at = int((~total.isfinite()).int().argmax())
            raise CaptureError(
                f"The teacher's logits of example {numbers[int(rows[chunk][at])]} are not finite at place "
                f"{int(where[chunk][at])}. Look at this example, or run the teacher in a wider dtype."
            )
        parts.append(dense(some, total, config) if config.top_k == classes else largest(some, total, config))
    counts = [len(place) for place in places]
    if not parts:
        raise CaptureError(f"Examples {list(numbers)} have no tokens. Remove empty examples from the dataset.")
    merged = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    split = {name: np.split(value, np.cumsum(counts)[:-1]) for name, value in merged.items()}
    examples = [{name: values[row] for name, values in split.items()} for row in range(len(places))]
    for example in examples:
        if "indices" in example:
            example |= pack_indices(example.pop("indices"), classes)
    return examples


def dense(logits: Tensor, total: Tensor, config: CaptureConfig) -> Arrays:
    """Return all log-probabilities, (places, classes); `total` is the logsumexp of `logits`."""
    return {"log_probs": (logits - total[:, None]).to(getattr(torch, config.log_prob_dtype)).cpu().numpy()}


def largest(logits: Tensor, total: Tensor, config: CaptureConfig) -> Arrays:
    """Return the largest k log-probabilities, their indices, and the log of all others' mass at each temperature.

    `logits` (places, classes) is written over. The tail is summed from its own terms: one minus the head's mass would lose
    what is small.
    """
    top, indices = logits.topk(config.top_k, dim=1)
    totals = [(logits / t).logsumexp(1) if t != 1 else total for t in config.temperatures]
    logits.scatter_(1, indices, -torch.inf)
    tails = [
        (logits / t if t != 1 else logits).logsumexp(1) - whole
        for t, whole in zip(config.temperatures, totals, strict=True)
    ]
    return {
        "indices": indices.cpu().numpy(),
        "log_probs": (top - total[:, None]).to(getattr(torch, config.log_prob_dtype)).cpu().numpy(),
        "log_tail": torch.stack(tails, 1).clamp(max=0).float().cpu().numpy(),
    }


def _refuse(wrong: Tensor, numbers: Sequence[int], what: str, reason: str = "") -> None:
    row = int(wrong.flatten(1).any(1).int().argmax())
    raise CaptureError(
        f"The teacher's {what} of example {numbers[row]} are not finite{reason or ': look at this example'}."
    )
