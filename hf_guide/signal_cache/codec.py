"""Encode a teacher's outputs as the arrays that are stored, and decode them into the tensors that a loss takes.

`FORMAT.md` defines the arrays.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_guide.errors import CaptureError, OptionError
from hf_guide.models.adapters import is_encoder_decoder
from hf_guide.models.targets import frame_mask
from hf_guide.signal_cache.config import CaptureConfig
from hf_guide.signal_cache.keys import token_positions
from hf_guide.signal_cache.manifest import CaptureManifest
from hf_guide.signal_cache.shards import Arrays, pack_indices, unpack_indices
from hf_guide.tasks import Task
from hf_guide.teachers.forward import TeacherOutputs, TeacherRunner

COLUMN_PREFIX = "teacher_"
"""How the names begin of what `CaptureDataCollator` adds to a batch."""

_SINGLE_SIGNALS = ("logits", "topk_indices", "topk_log_probs", "log_normalizer", "features")


MAX_CHUNK_LOGITS = 2**24
"""How many logits are held at once in float32."""
CPU_CACHE_LOGITS = 2**19
"""How many logits a CPU encodes at once: they fit in its caches, which is several times as fast."""


@dataclass(frozen=True)
class CapturedExample:
    """The signals of a teacher for one example of N unpadded tokens (of an encoder-decoder those of the decoder).

    Attributes:
        logits: Of classifiers (classes,), or (N, classes) where items are tokens; of language models whose whole
            distribution was stored its log-probabilities (N, classes). Float32.
        topk_indices, topk_log_probs: Of language models the k most likely tokens and their log-probabilities at temperature
            1, (N, k), int64 and float32.
        log_normalizer: log sum_j exp(log p_j / temperature) over the whole vocabulary, (N,), float32.
        hidden_states: By layer, (N, width) or as the model returns it, float32.
        features: The input of the head, (width,), or (N, width) where items are tokens, float32.
    """

    logits: Tensor | None = None
    topk_indices: Tensor | None = None
    topk_log_probs: Tensor | None = None
    log_normalizer: Tensor | None = None
    hidden_states: Mapping[int, Tensor] = field(default_factory=dict)
    features: Tensor | None = None

    def named(self) -> dict[str, Tensor]:
        """Return the signals that there are, by their names in a batch."""
        single = {COLUMN_PREFIX + name: getattr(self, name) for name in _SINGLE_SIGNALS}
        layers = {f"{COLUMN_PREFIX}hidden_{layer}": value for layer, value in self.hidden_states.items()}
        return {name: value for name, value in single.items() if value is not None} | layers


def decode_example(manifest: CaptureManifest, arrays: Arrays, temperature: float) -> CapturedExample:
    """Return the signals of an example from what is stored of it, at one of the captured temperatures.

    Rounding moved some of the k largest probabilities' mass; their log-probabilities are rescaled so that the mass of the
    tail is exactly the stored one.
    """
    hidden = {
        int(name.removeprefix("hidden_")): _to_float32(value)
        for name, value in arrays.items()
        if name.startswith("hidden_")
    }
    features = _to_float32(arrays["features"]) if "features" in arrays else None
    if manifest.is_dense:
        stored = next(
            (arrays[name] for name in ("logits", "log_probs") if name in arrays), None
        )  # embeddings have none
        logits = None if stored is None else _to_float32(stored)
        return CapturedExample(logits=logits, hidden_states=hidden, features=features)
    indices = torch.from_numpy(unpack_indices(arrays, manifest.classes))
    temperatures = manifest.config.temperatures
    log_head_mass = log1mexp(torch.from_numpy(arrays["log_tail"].astype(np.float64)))
    log_probs = _to_float32(arrays["log_probs"])
    log_probs += (log_head_mass[:, temperatures.index(1.0)] - log_probs.double().logsumexp(1)).float().unsqueeze(1)
    if temperature == 1.0:
        normalizer = torch.zeros(len(log_probs))
    else:
        scaled = (log_probs.double() / temperature).logsumexp(1)
        normalizer = (scaled - log_head_mass[:, temperatures.index(temperature)]).float()
    return CapturedExample(None, indices, log_probs, normalizer, hidden, features)


def log1mexp(log_mass: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for x of at most 0, exact at both ends."""
    return torch.where(log_mass > -0.6931, torch.log(-torch.expm1(log_mass)), torch.log1p(-torch.exp(log_mass)))


def _to_float32(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.float32))  # a copy: what is mapped is read-only


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
    teacher: TeacherRunner, batch: Mapping[str, Any], config: CaptureConfig, numbers: Sequence[int]
) -> list[Arrays]:
    """Run a teacher on a collated batch and return the arrays that are stored of each example.

    Args:
        teacher: The teacher.
        batch: As the collator returns it.
        config: What is stored; its layers are resolved.
        numbers: The examples' indices in the dataset, for errors.

    Raises:
        CaptureError: An output is not finite, or not in float16; it names the example.
    """
    task = teacher.task
    outputs = teacher.forward(batch, hidden_states=bool(config.hidden_layers), features=config.save_penultimate)
    stored = stored_positions(task, batch, teacher.model)
    positions = [] if stored is None else [each.to(outputs.logits.device) for each in stored]
    if task.is_language_model:
        examples = _encode_language_model(outputs, positions, config, numbers)
    else:
        logits = outputs.logits
        if bool(logits.isnan().any() | logits.isposinf().any()):
            _raise_not_finite(logits.isnan() | logits.isposinf(), numbers, "logits")
        if task.row.outputs[0].items == "boundary":
            logits = logits.transpose(1, 2)  # token by token, without padding
        by_position = task.row.outputs[0].items in ("token", "boundary", "frame")
        values = [row[at] for row, at in zip(logits, positions, strict=True)] if by_position else list(logits)
        examples = [{"logits": value.float().cpu().numpy()} for value in values]
        if task is Task.FEATURE_EXTRACTION:
            examples = [{} for _ in values]
    vectors = {f"hidden_{layer}": outputs.hidden_states[layer] for layer in config.hidden_layers}
    if outputs.features is not None:
        vectors["features"] = outputs.features
    for name, value in vectors.items():
        narrow = value.to(outputs.logits.device, getattr(torch, config.hidden_dtype))
        if not bool(narrow.isfinite().all()):
            reason = " in float16: pass hidden_dtype='float32'" if bool(value.isfinite().all()) else ""
            _raise_not_finite(~narrow.isfinite(), numbers, name, reason)
        stripped = stored is not None and (name != "features" or task.row.outputs[0].items in ("token", "frame"))
        for row, example in enumerate(examples):
            example[name] = (narrow[row][positions[row]] if stripped else narrow[row]).cpu().numpy()
    return examples


def stored_positions(task: Task, batch: Mapping[str, Any], model: Any) -> list[Tensor] | None:
    """Return for each example the positions without padding: of its tokens, or frames; None where there is no such axis."""
    if task is Task.MULTIPLE_CHOICE:
        return None
    if task.has_token_positions:
        in_decoder = task.row.targets_in_decoder and is_encoder_decoder(model)
        return token_positions(batch, task, in_decoder)
    if task.row.inputs == "audio":
        frames = frame_mask(batch, model)
        return None if frames is None else [row.nonzero().squeeze(1) for row in frames]
    return None


def _encode_language_model(
    outputs: TeacherOutputs, positions: Sequence[Tensor], config: CaptureConfig, numbers: Sequence[int]
) -> list[Arrays]:
    classes = config.vocabulary_size or outputs.classes
    rows = torch.cat([torch.full_like(each, row) for row, each in enumerate(positions)])
    columns = torch.cat(list(positions))
    parts: list[Arrays] = []
    size = max(1, MAX_CHUNK_LOGITS // classes)
    for start in range(0, len(rows), size):
        chunk = slice(start, start + size)
        logits = outputs.logits_at(rows[chunk], columns[chunk])[:, :classes]
        largest = logits.amax(1)  # NaN if any logit is, -inf if all are
        if not bool(largest.isfinite().all()):
            at = int((~largest.isfinite()).int().argmax())
            raise CaptureError(
                f"The teacher's logits of example {numbers[int(rows[chunk][at])]} are not finite at position "
                f"{int(columns[chunk][at])}. Look at this example, or run the teacher in a wider dtype."
            )
        for part in logits.split(max(1, CPU_CACHE_LOGITS // classes)) if logits.device.type == "cpu" else (logits,):
            wide = part.to(torch.promote_types(part.dtype, torch.float32))
            parts.append(encode_dense(wide, config) if config.top_k == classes else encode_topk(wide, config))
    counts = [len(each) for each in positions]
    if not parts:
        raise CaptureError(f"Examples {list(numbers)} have no tokens. Remove empty examples from the dataset.")
    merged = {name: np.concatenate([each[name] for each in parts]) for name in parts[0]}
    split = {name: np.split(value, np.cumsum(counts)[:-1]) for name, value in merged.items()}
    examples = [{name: values[row] for name, values in split.items()} for row in range(len(positions))]
    for example in examples:
        if "indices" in example:
            example |= pack_indices(example.pop("indices"), classes)
    return examples


def encode_dense(logits: Tensor, config: CaptureConfig) -> Arrays:
    """Return all log-probabilities of logits (tokens, classes)."""
    return {"log_probs": logits.log_softmax(1).to(getattr(torch, config.log_prob_dtype)).cpu().numpy()}


def encode_topk(logits: Tensor, config: CaptureConfig) -> Arrays:
    """Return the k largest log-probabilities, their indices, and the log mass of all others at each temperature.

    The mass of the tail is summed from its own terms: one minus the mass of the k would cancel where it is small.
    """
    top, indices = logits.topk(config.top_k, dim=1)
    tails, total = [], top.new_zeros(len(top))
    for temperature in config.temperatures:
        odds = (logits - top[:, :1]).div_(temperature).exp_()  # relative to the most likely class
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
