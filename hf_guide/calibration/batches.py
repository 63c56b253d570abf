"""Calibration data as batches of what a teacher's forward takes.

A dataset is rows (of `input_ids`, or of text, which the teacher's own tokenizer cuts up) or batches already, as a DataLoader
yields them. What is drawn is kept, because it goes through the teacher more than once: token ids, or pixels.
"""

import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_guide.errors import OptionError
from hf_guide.initialization.options import InitializationConfig
from hf_guide.initialization.weights import Teacher

Batch = dict[str, Tensor]
IGNORED = -100  # the label of a place that has no target, as everywhere in Transformers
TOKENS_PER_NEURON, TOKENS = 5, (8192, 65536)
EXPECTED = (
    "a datasets dataset with a column input_ids or text, a list of texts, or an iterable of batches (dicts of tensors)"
)


def check_dataset(dataset: Any, method: str) -> None:
    """Refuse a missing calibration dataset, or one that cannot be iterated, before anything is read.

    Raises:
        OptionError: says what a calibration dataset is.
    """
    if dataset is None:
        raise OptionError(
            f"method={method!r} looks at what the teacher does with real data, and no calibration_dataset was given. "
            f"Pass {EXPECTED}; or choose method='guide', which needs none."
        )
    if isinstance(dataset, (str, bytes, Mapping)) or not isinstance(dataset, Iterable):
        raise OptionError(f"calibration_dataset is {EXPECTED}; found a {type(dataset).__name__}.")


def draw_batches(
    dataset: Iterable[Any],
    model: PreTrainedModel,
    teacher: Teacher,
    options: InitializationConfig,
    *,
    tokens: int,
    **hub: Any,
) -> list[Batch]:
    """Return the first `tokens` tokens of a dataset as batches for the teacher's forward, on the CPU.

    The last batch is kept whole. `hub` says how the teacher's tokenizer is fetched, where text needs one.

    Raises:
        OptionError: rows of which nothing can be made, or none at all; says what was found.
    """
    rows = iter(dataset)
    first = next(rows, None)
    if first is None:
        raise OptionError(f"calibration_dataset is empty: pass {EXPECTED}.")
    rows = itertools.chain([first], rows)
    accepted = inspect.signature(model.forward).parameters
    drawn: list[Batch] = []
    seen = 0
    for batch in _batches(rows, first, teacher, options, hub):
        kept = {
            name: value.detach().cpu()
            for name, value in batch.items()
            if isinstance(value, Tensor) and name in accepted and name != "labels"
        }
        if not kept:
            raise OptionError(
                f"A batch of calibration_dataset has {sorted(batch)}, of which {type(model).__name__} takes no tensor; "
                f"pass {EXPECTED}."
            )
        kept = _with_decoder_inputs(kept, batch.get("labels"), model)
        drawn.append(kept)
        seen += tokens_in(kept, model)
        if seen >= tokens:
            break
    return drawn


def tokens_for(neurons: int) -> int:
    """Return how many tokens are looked at by default: five for each neuron of the teacher's MLP, within `TOKENS`.

    After a whole run a student of a Llama of 192 neurons ended alike whether 2,048, 4,096, 8,192 or 16,384 were heard
    (starting_points.py, three seeds, within 0.6 perplexities); the floor is for what is trained for less.
    """
    return min(max(TOKENS_PER_NEURON * neurons, TOKENS[0]), TOKENS[1])


def tokens_in(batch: Batch, model: PreTrainedModel) -> int:
    """Return how many tokens a batch holds; an image counts as its patches."""
    if "attention_mask" in batch and batch["attention_mask"].ndim == 2:
        return int(batch["attention_mask"].sum())
    if "input_ids" in batch:
        return batch["input_ids"].numel()
    first = next(iter(batch.values()))
    patch = getattr(model.config, "patch_size", None)
    if first.ndim == 4 and isinstance(patch, int):
        return first.shape[0] * (first.shape[-2] // patch) * (first.shape[-1] // patch)
    return first.shape[0] * (first.shape[1] if first.ndim > 1 else 1)


def _with_decoder_inputs(batch: Batch, labels: Any, model: PreTrainedModel) -> Batch:
    """Return a batch with what an encoder-decoder's decoder reads, where it is missing, and a mask of its real tokens.

    That is the labels, shifted as the model itself does it; where there are none, the same tokens as the encoder.

    Raises:
        OptionError: a model that cannot shift labels.
    """
    accepted = inspect.signature(model.forward).parameters
    if "decoder_input_ids" not in accepted or "decoder_input_ids" in batch or "decoder_inputs_embeds" in batch:
        return batch
    batch, mask = dict(batch), batch.get("attention_mask")
    if "labels" in accepted and isinstance(labels, Tensor) and labels.ndim == 2:
        labels = labels.detach().cpu()
        batch["decoder_input_ids"] = _shifted(labels, model)
        mask = (labels != IGNORED).long()
    elif "input_ids" in batch:
        batch["decoder_input_ids"] = batch["input_ids"]  # it must read something
    if "decoder_attention_mask" in accepted and mask is not None and not bool(mask.all()):
        batch.setdefault("decoder_attention_mask", mask)
    return batch


def _shifted(labels: Tensor, model: PreTrainedModel) -> Tensor:
    try:
        if hasattr(model, "prepare_decoder_input_ids_from_labels"):
            return model.prepare_decoder_input_ids_from_labels(labels)
        ids = labels.new_full(labels.shape, model.config.decoder_start_token_id)
        ids[:, 1:] = labels[:, :-1]
        return ids.masked_fill(ids == IGNORED, model.config.pad_token_id)
    except (AttributeError, ValueError, TypeError) as error:  # of Transformers, where the config has not both tokens
        raise OptionError(
            f"calibration_dataset has labels, of which {type(model).__name__} cannot make its decoder's input: {error}. Set "
            "decoder_start_token_id and pad_token_id in its config, or give decoder_input_ids."
        ) from error


def _batches(
    rows: Iterator[Any], first: Any, teacher: Teacher, options: InitializationConfig, hub: Mapping[str, Any]
) -> Iterator[Mapping[str, Any]]:
    size, length = options.calibration_batch_size, options.calibration_length
    if isinstance(first, str):
        return _batches_of_text(rows, _tokenizer(teacher, hub), size, length)
    if not isinstance(first, Mapping):
        raise OptionError(f"calibration_dataset yields a {type(first).__name__}; pass {EXPECTED}.")
    if any(isinstance(value, Tensor) and value.ndim > 1 for value in first.values()):
        return rows
    if "input_ids" in first:
        return _batches_of_ids(rows, size, _pad_token(teacher))
    columns = [name for name, value in first.items() if isinstance(value, str)]
    column = "text" if "text" in columns else columns[0] if len(columns) == 1 else None
    if column is None:
        raise OptionError(
            f"calibration_dataset has the columns {sorted(map(str, first))}, none of them input_ids or text; pass {EXPECTED}."
        )
    return _batches_of_text((row[column] for row in rows), _tokenizer(teacher, hub), size, length)


def _tokenizer(teacher: Teacher, hub: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(teacher.name, revision=teacher.revision, **hub)
    except (OSError, ValueError, ImportError) as error:
        raise OptionError(
            f"calibration_dataset is text, and the teacher {teacher.name} has no tokenizer beside it ({error}). "
            "Tokenize it yourself, and pass rows or batches of input_ids."
        ) from error


def _pad_token(teacher: Teacher) -> int:
    token = getattr(teacher.config, "pad_token_id", None)
    return token if isinstance(token, int) and token >= 0 else 0


def _batches_of_text(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, size: int, length: int
) -> Iterator[Batch]:
    """Texts joined by the end-of-text token and cut, as models of language are trained; one a row where texts have marks."""
    if tokenizer.cls_token_id is not None:
        encoded = (tokenizer(text, truncation=True, max_length=length) for text in texts)
        yield from _batches_of_ids(encoded, size, tokenizer.pad_token_id or 0)
        return
    held: list[int] = []
    for text in texts:
        held += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        held += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        while len(held) >= size * length:
            yield {"input_ids": torch.tensor(held[: size * length]).view(size, length)}
            held = held[size * length :]
    if len(held) >= length:
        whole = len(held) // length
        yield {"input_ids": torch.tensor(held[: whole * length]).view(whole, length)}
    elif held:
        yield {"input_ids": torch.tensor([held])}


def _batches_of_ids(rows: Iterable[Mapping[str, Any]], size: int, pad_token: int) -> Iterator[Batch]:
    """Rows padded on the right, side by side, with a mask where there is padding."""
    rows = iter(rows)
    while several := list(itertools.islice(rows, size)):
        ids = [torch.as_tensor(row["input_ids"]).flatten() for row in several]
        longest = max(map(len, ids))
        padded = torch.full((len(ids), longest), pad_token, dtype=torch.long)
        mask = torch.zeros_like(padded)
        for place, (row, tokens) in enumerate(zip(several, ids, strict=True)):
            padded[place, : len(tokens)] = tokens
            given = row.get("attention_mask")
            mask[place, : len(tokens)] = 1 if given is None else torch.as_tensor(given).flatten()
        yield {"input_ids": padded} if bool(mask.all()) else {"input_ids": padded, "attention_mask": mask}
