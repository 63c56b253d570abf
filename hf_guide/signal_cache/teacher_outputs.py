"""What a teacher says of a batch, as the arrays that are stored: one forward pass, chunk after chunk of its logits."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_guide.errors import CaptureError, OptionError
from hf_guide.models.adapters import check_no_virtual_tokens, forward_parameters, without_adapter
from hf_guide.models.layer_mapping import hidden_states_of
from hf_guide.models.lm_head import find_lm_head, skip_lm_head
from hf_guide.models.penultimate import capture_head_inputs, find_classifier, pooled_features
from hf_guide.models.targets import add_decoder_inputs
from hf_guide.signal_cache.config import CaptureConfig
from hf_guide.signal_cache.keys import token_positions
from hf_guide.signal_cache.shards import Arrays, pack_indices
from hf_guide.tasks import Task
from hf_guide.teachers.inputs import build_teacher_inputs

MAX_CHUNK_LOGITS = 2**24  # held at once in float32
CPU_CACHE_LOGITS = 2**19  # of a processor, whose caches then hold them: several times as fast

_TARGET_COLUMNS = ("labels", "label", "label_ids", "start_positions", "end_positions")


@dataclass(frozen=True)
class TeacherOutputs:
    """What a teacher says of one batch.

    Attributes:
        classes: its vocabulary's rows, or its labels.
        logits: of a classifier, as the model gives them.
        at: of a language model, its logits (places, classes) at rows and places of the batch, (places,) each.
        layers: all hidden states, where wanted.
        features: what its head is fed, where wanted: (batch, width), or (batch, length, width) where items are tokens.
    """

    classes: int
    logits: Tensor
    at: Callable[[Tensor, Tensor], Tensor]
    layers: tuple[Tensor, ...]
    features: Tensor | None


class TeacherRunner:
    """A teacher run without gradients; a language model's logits are made place by place where its head is known.

    Args:
        model: the teacher.
        task: what its head is for.
        processing_class: what the batches are made with; they become what the teacher's own processor would make.
        init_kwargs: `from_pretrained`'s, of which those that find files on the Hub are used.

    Raises:
        TeacherError: batches of this processor cannot become what the teacher expects.
    """

    def __init__(
        self, model: nn.Module, task: Task, processing_class: Any = None, init_kwargs: Mapping[str, Any] | None = None
    ):
        self.model, self.task = model, task
        self.inputs = build_teacher_inputs(model, task, processing_class, init_kwargs=init_kwargs)
        self.head = find_lm_head(model) if task.is_language_model else None

    @torch.inference_mode()
    def hear(self, batch: Mapping[str, Any], *, hidden_states: bool = False, features: bool = False) -> TeacherOutputs:
        """Run the teacher on a collated batch, on its own device."""
        bare, task = without_adapter(self.model), self.task
        if task.is_per_token or hidden_states or features:
            check_no_virtual_tokens(self.model, "teacher")
        # Of a teacher that is spread, or offloaded, accelerate brings the input to where it is needed.
        device = next((each.device for each in self.model.parameters() if not each.is_meta), torch.device("cpu"))
        tensors = {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
        tensors = add_decoder_inputs(bare, task, tensors)
        tensors = self.inputs.convert(tensors)
        known = forward_parameters(bare)
        inputs: dict[str, Any] = {
            name: value for name, value in tensors.items() if name in known and name not in _TARGET_COLUMNS
        }
        if "use_cache" in known:
            inputs["use_cache"] = False
        hidden: list[Tensor] = []
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.inputs.special_tokens())
            heard = stack.enter_context(capture_head_inputs(find_classifier(bare, task))) if features else []
            if self.head is not None:
                stack.enter_context(skip_lm_head(self.model, self.head, hidden.append))
            outputs = self.model(**inputs, output_hidden_states=hidden_states, return_dict=True)
            fed = heard[-1] if heard else None
            if fed is not None and not task.is_per_token:
                everyone = torch.ones(len(fed), dtype=torch.bool, device=device)
                fed = pooled_features(task, fed, everyone, inputs, bare.config)
        return TeacherOutputs(
            classes=outputs.logits.shape[-1],
            logits=outputs.logits,
            at=partial(self._logits_at, hidden[0] if hidden else outputs.logits),
            layers=hidden_states_of(outputs) if hidden_states else (),
            features=fed,
        )

    def _logits_at(self, whole: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        some = whole[rows.to(whole.device), places.to(whole.device)]
        return some if self.head is None else self.head.transform(self.head.module(some))


def resolve_layers(layers: Sequence[int], count: int) -> list[int]:
    """Return layer numbers counted from the start, of `count` hidden states.

    Raises:
        OptionError: there is no such layer.
    """
    for layer in layers:
        if not -count <= layer < count:
            raise OptionError(f"hidden_layers has layer {layer}; this teacher has layers 0 to {count - 1}.")
    return list(dict.fromkeys(layer % count for layer in layers))


@torch.inference_mode()
def encode_batch(
    listener: TeacherRunner, batch: Mapping[str, Any], config: CaptureConfig, numbers: Sequence[int]
) -> list[Arrays]:
    """Return what is stored of each example of a collated batch.

    Args:
        listener: the teacher.
        batch: as the collator gives it.
        config: what is wanted, its layers resolved.
        numbers: the examples' places in the dataset, for errors.

    Raises:
        CaptureError: the teacher said something that is not finite, or that float16 does not hold; it names the example.
    """
    task = listener.task
    heard = listener.hear(batch, hidden_states=bool(config.hidden_layers), features=config.save_penultimate)
    by_token = task.has_token_positions
    places = [place.to(heard.logits.device) for place in token_positions(batch, task)] if by_token else []
    if task.is_language_model:
        examples = _encode_language_model(heard, places, config, numbers)
    else:
        logits = heard.logits
        if bool(logits.isnan().any() | logits.isposinf().any()):
            _raise_not_finite(logits.isnan() | logits.isposinf(), numbers, "logits")
        kept = [row[place] for row, place in zip(logits, places, strict=True)] if task.is_per_token else list(logits)
        examples = [{"logits": value.float().cpu().numpy()} for value in kept]
    found = {f"hidden_{layer}": heard.layers[layer] for layer in config.hidden_layers}
    if heard.features is not None:
        found["features"] = heard.features
    for name, value in found.items():
        narrow = value.to(heard.logits.device, getattr(torch, config.hidden_dtype))
        if not bool(narrow.isfinite().all()):
            reason = " in float16: pass hidden_dtype='float32'" if bool(value.isfinite().all()) else ""
            _raise_not_finite(~narrow.isfinite(), numbers, name, reason)
        stripped = by_token and (name != "features" or task.is_per_token)
        for row, example in enumerate(examples):
            example[name] = (narrow[row][places[row]] if stripped else narrow[row]).cpu().numpy()
    return examples


def _encode_language_model(
    heard: TeacherOutputs, places: Sequence[Tensor], config: CaptureConfig, numbers: Sequence[int]
) -> list[Arrays]:
    classes = config.vocabulary_size or heard.classes
    rows = torch.cat([torch.full_like(place, row) for row, place in enumerate(places)])
    where = torch.cat(list(places))
    parts: list[Arrays] = []
    size = max(1, MAX_CHUNK_LOGITS // classes)
    for start in range(0, len(rows), size):
        chunk = slice(start, start + size)
        logits = heard.at(rows[chunk], where[chunk])[:, :classes]
        best = logits.amax(1)  # NaN where any is, minus infinity where all are
        if not bool(best.isfinite().all()):
            at = int((~best.isfinite()).int().argmax())
            raise CaptureError(
                f"The teacher's logits of example {numbers[int(rows[chunk][at])]} are not finite at place "
                f"{int(where[chunk][at])}. Look at this example, or run the teacher in a wider dtype."
            )
        for some in logits.split(max(1, CPU_CACHE_LOGITS // classes)) if logits.device.type == "cpu" else (logits,):
            some = some.to(torch.promote_types(some.dtype, torch.float32))
            parts.append(encode_dense(some, config) if config.top_k == classes else encode_topk(some, config))
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


def encode_dense(logits: Tensor, config: CaptureConfig) -> Arrays:
    """Return all log-probabilities, (places, classes)."""
    return {"log_probs": logits.log_softmax(1).to(getattr(torch, config.log_prob_dtype)).cpu().numpy()}


def encode_topk(logits: Tensor, config: CaptureConfig) -> Arrays:
    """Return the largest k log-probabilities, their indices, and the log of all others' mass at each temperature.

    The tail is summed from its own terms: one minus the head's mass would lose what is small.
    """
    top, indices = logits.topk(config.top_k, dim=1)
    tails, total = [], top.new_zeros(len(top))
    for temperature in config.temperatures:
        odds = (logits - top[:, :1]).div_(temperature).exp_()  # against the most probable one
        whole = odds.sum(1)
        tails.append(odds.scatter_(1, indices, 0.0).sum(1).log() - whole.log())
        if temperature == 1.0:
            total = whole.log()
    log_probs = top - top[:, :1] - total[:, None]
    return {
        "indices": indices.cpu().numpy(),
        "log_probs": log_probs.to(getattr(torch, config.log_prob_dtype)).cpu().numpy(),
        "log_tail": torch.stack(tails, 1).clamp(max=0).float().cpu().numpy(),
    }


def _raise_not_finite(wrong: Tensor, numbers: Sequence[int], what: str, reason: str = "") -> None:
    row = int(wrong.flatten(1).any(1).int().argmax())
    raise CaptureError(
        f"The teacher's {what} of example {numbers[row]} are not finite{reason or ': look at this example'}."
    )
