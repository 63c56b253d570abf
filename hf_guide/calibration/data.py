"""Calibration data as batches of what a teacher's forward takes.

A dataset is rows (of `input_ids`, of `pixel_values`, or of text, which the teacher's own tokenizer cuts up) or batches
already, as a DataLoader or `Dataset.iter` yields them. What is drawn is kept, because it goes through the teacher more than
once: token ids, or pixels.
"""

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_guide.calibration.config import SELF_GENERATED, CalibratedConfig
from hf_guide.errors import OptionError, TeacherError
from hf_guide.models.positions import TextPositions, max_input_tokens, text_positions
from hf_guide.models.pretrained import load_processing_class
from hf_guide.teachers.checkpoint import TeacherCheckpoint
from hf_guide.utils.labels import IGNORE_INDEX, decoder_ids_from_labels

Batch = dict[str, Tensor]
TOKENS_PER_NEURON, MIN_MAX_TOKENS = 10, (8192, 65536)
EXPECTED_DATASET = (
    "a datasets dataset with a column input_ids, text or pixel_values, a list of texts, an iterable of batches (dicts of "
    f"tensors), or {SELF_GENERATED!r}, for text that the teacher writes itself"
)


def is_self_generated(dataset: Any) -> bool:
    """Whether the teacher is to write the calibration dataset itself."""
    return isinstance(dataset, str) and dataset == SELF_GENERATED


def check_calibration_dataset(dataset: Any, method: str) -> None:
    """Refuse a missing calibration dataset, or one that cannot be iterated, before anything is read.

    Raises:
        OptionError: says what a calibration dataset is.
    """
    if dataset is None:
        raise OptionError(
            f"method={method!r} looks at what the teacher does with real data, and no calibration_dataset was given. "
            f"Pass {EXPECTED_DATASET}; or choose method='guide', which looks at none."
        )
    if is_self_generated(dataset):
        return
    if isinstance(dataset, (str, bytes, Mapping)) or not isinstance(dataset, Iterable):
        found = repr(dataset) if isinstance(dataset, str) else f"a {type(dataset).__name__}"
        raise OptionError(f"calibration_dataset is {EXPECTED_DATASET}; found {found}.")


def load_calibration_batches(
    dataset: Iterable[Any],
    model: PreTrainedModel,
    teacher: TeacherCheckpoint,
    options: CalibratedConfig,
    *,
    tokens: int,
    **hub: Any,
) -> list[Batch]:
    """Return the first `tokens` tokens of a dataset as batches for the teacher's forward, on the CPU.

    The last batch is kept whole; rows without a token are passed over. `hub` says how the teacher's tokenizer is fetched,
    where text needs one.

    Raises:
        OptionError: rows of which nothing can be made, or none at all, or tokens that the teacher has not; says what was
            found.
    """
    rows = iter(dataset)
    first = next(rows, None)
    if first is None:
        raise OptionError(f"calibration_dataset is empty: pass {EXPECTED_DATASET}.")
    rows = itertools.chain([first], rows)
    accepted, positions = inspect.signature(model.forward).parameters, text_positions(model.config)
    drawn: list[Batch] = []
    seen = 0
    for batch in _iter_batches(rows, first, teacher, options, hub):
        kept = {
            name: value.detach().cpu()
            for name, value in batch.items()
            if isinstance(value, Tensor) and name in accepted and name != "labels"
        }
        if not kept:
            raise OptionError(
                f"A batch of calibration_dataset has {sorted(batch)}, of which {type(model).__name__} takes no tensor; "
                f"pass {EXPECTED_DATASET}."
            )
        if not count_tokens(kept, model):
            continue
        kept = _with_decoder_inputs(kept, batch.get("labels"), model)
        _check_ids(kept, model, positions)
        drawn.append(kept)
        seen += count_tokens(kept, model)
        if seen >= tokens:
            break
    if not drawn:
        raise OptionError(
            f"calibration_dataset holds not one token, only empty texts or rows: pass {EXPECTED_DATASET}."
        )
    return drawn


def default_num_tokens(neurons: int) -> int:
    """Return how many tokens are looked at by default: ten for each neuron of the teacher's MLP, within `TOKENS`.

    After a whole run a student of a Llama of 192 neurons ended alike whether 2,048, 4,096, 8,192 or 16,384 were heard
    (initialization_comparison.py, three seeds, within 0.6 perplexities), so the floor is for what is trained for less; one of
    SmolLM2-135M, of 1,536, trained on 92,160 tokens ended 5 % better with ten a neuron than with five.
    """
    return min(max(TOKENS_PER_NEURON * neurons, MIN_MAX_TOKENS[0]), MIN_MAX_TOKENS[1])


def count_tokens(batch: Batch, model: PreTrainedModel) -> int:
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
        batch["decoder_input_ids"] = _shift_labels(labels, model)
        mask = (labels != IGNORE_INDEX).long()
    elif "input_ids" in batch:
        batch["decoder_input_ids"] = batch["input_ids"]  # it must read something
    if "decoder_attention_mask" in accepted and mask is not None and not bool(mask.all()):
        batch.setdefault("decoder_attention_mask", mask)
    return batch


def _shift_labels(labels: Tensor, model: PreTrainedModel) -> Tensor:
    try:
        return decoder_ids_from_labels(labels, model)
    except (AttributeError, ValueError, TypeError) as error:  # of Transformers, where the config has not both tokens
        raise OptionError(
            f"calibration_dataset has labels, of which {type(model).__name__} cannot make its decoder's input: {error}. Set "
            "decoder_start_token_id and pad_token_id in its config, or give decoder_input_ids."
        ) from error


def _check_ids(batch: Batch, model: PreTrainedModel, positions: TextPositions) -> None:
    """Refuse ids and positions that the teacher has no row for: on a GPU they would end the process's use of it.

    Args:
        positions: what the model's tables of positions allow.

    Raises:
        OptionError: names the id and how many there are, or how long a row is and may be.
    """
    for name, longest in (("input_ids", positions.longest), ("decoder_input_ids", positions.max_target_tokens)):
        ids = batch.get(name)
        table = None if ids is None else model.get_input_embeddings()
        if not isinstance(table, nn.Embedding) or ids is None:
            continue
        if longest is not None and ids.shape[-1] > longest:
            raise OptionError(
                f"calibration_dataset has rows of {ids.shape[-1]} tokens in {name}, and {type(model).__name__} has "
                f"{longest} positions for them: cut them."
            )
        least, most = int(ids.min()), int(ids.max())
        if least < 0 or most >= table.num_embeddings:
            raise OptionError(
                f"calibration_dataset has the token id {least if least < 0 else most} in {name}, and {type(model).__name__} "
                f"has tokens 0 to {table.num_embeddings - 1}: tokenize with the teacher's own tokenizer, and pad with a token "
                "of it."
            )


def _iter_batches(
    rows: Iterator[Any], first: Any, teacher: TeacherCheckpoint, options: CalibratedConfig, hub: Mapping[str, Any]
) -> Iterator[Mapping[str, Any]]:
    size, length = options.calibration_batch_size, max_text_length(options.calibration_seq_length, teacher)
    if isinstance(first, str):
        return _batches_of_text(_iter_texts(rows), _tokenizer(teacher, hub), size, length)
    if not isinstance(first, Mapping):
        raise OptionError(f"calibration_dataset yields a {type(first).__name__}; pass {EXPECTED_DATASET}.")
    if "input_ids" in first:
        if _num_axes(first["input_ids"]) < 2:
            return _batches_of_ids(rows, size, _pad_token(teacher))
        return _batches_as_tensors(rows, "input_ids", lambda several: _pad_rows(several, _pad_token(teacher)))
    if "pixel_values" in first:
        if _num_axes(first["pixel_values"]) < 4:
            return _batches_of_images(rows, size)
        return _batches_as_tensors(rows, "pixel_values", _stack_images)
    if any(isinstance(value, Tensor) and value.ndim > 1 for value in first.values()):
        return rows
    columns = [name for name, value in first.items() if isinstance(value, str)]
    column = "text" if "text" in first else columns[0] if len(columns) == 1 else None
    if column is None:
        raise OptionError(
            f"calibration_dataset has the columns {sorted(map(str, first))}, none of them input_ids, text or pixel_values; "
            f"pass {EXPECTED_DATASET}."
        )
    return _batches_of_text(_iter_texts(row[column] for row in rows), _tokenizer(teacher, hub), size, length)


def max_text_length(length: int, teacher: TeacherCheckpoint) -> int:
    """Return at how many tokens text is cut: as asked, where the teacher has so many positions."""
    limit = max_input_tokens(teacher.config)
    return length if limit is None else min(length, limit)


def _num_axes(value: Any) -> int:
    """Return how many axes a tensor, an array, or lists in lists have."""
    if isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.dtype.hasobject):  # rows not alike
        return 1 + (_num_axes(value[0]) if len(value) else 0)
    return getattr(value, "ndim", 0)


def _tokenizer(teacher: TeacherCheckpoint, hub: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    try:
        return load_processing_class(AutoTokenizer, teacher.name, revision=teacher.revision, **hub)
    except TeacherError as error:
        raise OptionError(
            f"calibration_dataset is text, and the teacher {teacher.name} has no tokenizer beside it that loads. {error} Or "
            "tokenize it yourself, and pass rows or batches of input_ids."
        ) from error


def _pad_token(teacher: TeacherCheckpoint) -> int:
    token = getattr(teacher.config, "pad_token_id", None)
    return token if isinstance(token, int) and token >= 0 else 0


def _iter_texts(values: Iterable[Any]) -> Iterator[str]:
    """Texts one by one, also where several make a batch; without the empty and the missing."""
    for value in values:
        for text in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(text, str) and text:
                yield text
            elif text is not None and not isinstance(text, str):
                raise OptionError(
                    f"calibration_dataset has a {type(text).__name__} where text is; pass {EXPECTED_DATASET}."
                )


def _batches_of_text(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, size: int, length: int
) -> Iterator[Batch]:
    """Texts joined by the end-of-text token and cut, as models of language are trained; one a row where texts have marks."""
    if tokenizer.cls_token_id is not None:
        length = min(length, tokenizer.model_max_length)  # of some families fewer than there are positions
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
    """Rows side by side, those that hold a token."""
    filled = (row for row in rows if _is_filled(row, "input_ids"))
    while several := list(itertools.islice(filled, size)):
        yield _pad_rows(several, pad_token)


def _batches_of_images(rows: Iterator[Mapping[str, Any]], size: int) -> Iterator[Batch]:
    filled = (row for row in rows if _is_filled(row, "pixel_values"))
    while several := list(itertools.islice(filled, size)):
        yield _stack_images(several)


def _batches_as_tensors(
    batches: Iterable[Mapping[str, Any]], column: str, join: Callable[[list[dict[str, Any]]], Batch]
) -> Iterator[Mapping[str, Any]]:
    """Batches of tensors as they are; of lists or arrays, as `datasets` makes them, those columns that rows are read for."""
    for batch in batches:
        if isinstance(batch[column], Tensor):
            yield batch
            continue
        columns = {name: batch[name] for name in (column, "attention_mask", "labels") if name in batch}
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        several = [row for row in rows if _is_filled(row, column)]
        if several:
            yield join(several)


def _is_filled(row: Mapping[str, Any], column: str) -> bool:
    value = row.get(column)
    return _num_axes(value) > 0 and len(value) > 0  # type: ignore[arg-type]


def _pad_rows(rows: list[Any], pad_token: int) -> Batch:
    """Rows padded on the right, side by side, with a mask where there is padding; and their labels, one for each token.

    Raises:
        OptionError: a row whose mask is not as long as it.
    """
    ids = [torch.as_tensor(row["input_ids"]).long() for row in rows]
    masks = [
        torch.as_tensor(row["attention_mask"]).long() if _is_filled(row, "attention_mask") else torch.ones_like(tokens)
        for row, tokens in zip(rows, ids, strict=True)
    ]
    for tokens, mask in zip(ids, masks, strict=True):
        if len(tokens) != len(mask):
            raise OptionError(
                f"A row of calibration_dataset has {len(tokens)} input_ids and an attention_mask of {len(mask)}; give one "
                "for each, or no mask."
            )
    batch = {"input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_token)}
    mask = pad_sequence(masks, batch_first=True)
    if not bool(mask.all()):
        batch["attention_mask"] = mask
    if all(_num_axes(row.get("labels")) == 1 for row in rows):
        labels = [torch.as_tensor(row["labels"]).long() for row in rows]
        batch["labels"] = pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX)
    return batch


def _stack_images(rows: list[Any]) -> Batch:
    """Images side by side, (images, channels, height, width).

    Raises:
        OptionError: something else than images, or such of several sizes.
    """
    images = [torch.as_tensor(row["pixel_values"]).float() for row in rows]
    shapes = sorted({tuple(image.shape) for image in images})
    if len(shapes) > 1 or len(shapes[0]) != 3:
        raise OptionError(
            f"calibration_dataset has pixel_values of the shape {' and '.join(map(str, shapes))}; expected the same "
            "(channels, height, width) in each row. Let the teacher's image processor make them."
        )
    return {"pixel_values": torch.stack(images)}
