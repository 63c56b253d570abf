"""Turn a calibration dataset into batches for a teacher's forward pass.

A dataset is rows (of `input_ids`, `pixel_values` or sounds, or of text or conversations, which the teacher's tokenizer
encodes), or batches, as a DataLoader or `Dataset.iter` yields them. A conversation, or a prompt with its completion, is one
row of tokens, as for training. Batches are kept in memory, because they go through the teacher more than once.
"""

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_guide.calibration.config import SELF_GENERATED, CalibratedConfig
from hf_guide.chat.encoding import ChatEncoder
from hf_guide.chat.formats import DatasetFormat, RowFormat, detect_format
from hf_guide.chat.packing import split_packed
from hf_guide.errors import OptionError, TeacherError
from hf_guide.models.positions import max_input_tokens, text_positions
from hf_guide.models.pretrained import load_processing_class
from hf_guide.teachers.checkpoint import TeacherCheckpoint
from hf_guide.teachers.processors import num_token_rows
from hf_guide.utils.labels import IGNORE_INDEX, decoder_ids_from_labels

Batch = dict[str, Tensor]
_SOUND_INPUTS = ("input_features", "input_values")
DEFAULT_PATCH_SIDE = 16
TOKENS_PER_NEURON, MIN_TOKENS, MAX_TOKENS = 10, 8192, 65536
EXPECTED_DATASET = (
    "a datasets dataset with a column input_ids, text, messages, pixel_values, input_features or input_values, a list of "
    f"texts, an iterable of batches (dicts of tensors), or {SELF_GENERATED!r}, for text that the teacher generates itself"
)


def num_rows(batch: Batch) -> int | None:
    """Return how many examples a batch has; None where a row is not an example, as of patches of several images.

    Example:
        >>> num_rows({"input_ids": torch.zeros(8, 16)})
        8
    """
    lengths = {len(value) for value in batch.values()}
    return lengths.pop() if len(lengths) == 1 else None


def first_rows(batch: Batch, rows: int | None) -> Batch:
    """Return the first rows of a batch; the whole batch if `rows` is None, or if a row is not an example.

    Example:
        >>> first_rows({"input_ids": torch.zeros(8, 16)}, 3)["input_ids"].shape
        torch.Size([3, 16])
    """
    return batch if rows is None or num_rows(batch) is None else {name: value[:rows] for name, value in batch.items()}


def is_self_generated(dataset: Any) -> bool:
    """Return whether the teacher is to generate the calibration dataset itself."""
    return isinstance(dataset, str) and dataset == SELF_GENERATED


def check_calibration_dataset(dataset: Any, method: str) -> None:
    """Raise for a missing calibration dataset, or one that cannot be iterated, before anything is read.

    Raises:
        OptionError: States what a calibration dataset must be.
    """
    if dataset is None:
        raise OptionError(
            f"method={method!r} collects the teacher's activations on data, and no calibration_dataset was given. Pass "
            f"{EXPECTED_DATASET}; or choose method='guide', which needs none."
        )
    if is_self_generated(dataset):
        return
    if isinstance(dataset, (str, bytes, Mapping)) or not isinstance(dataset, Iterable):
        value = repr(dataset) if isinstance(dataset, str) else f"a {type(dataset).__name__}"
        raise OptionError(f"calibration_dataset must be {EXPECTED_DATASET}; found {value}.")


def load_calibration_batches(
    dataset: Iterable[Any],
    model: PreTrainedModel,
    teacher: TeacherCheckpoint,
    options: CalibratedConfig,
    *,
    num_tokens: int,
    student: PreTrainedConfig | None = None,
    **hub: Any,
) -> list[Batch]:
    """Return the first `num_tokens` tokens of a dataset as batches for the teacher's forward pass, on the CPU.

    The last example is not cut; rows without a token are skipped. Of rows all columns that the teacher's forward pass takes
    are kept, as of batches.

    Args:
        dataset: Rows or batches; see the module's docstring.
        model: The running teacher.
        teacher: The opened checkpoint, whose tokenizer encodes text.
        options: The batch size and length of text.
        num_tokens: The number of tokens.
        student: The config of the student, which may have fewer positions.
        **hub: Keywords of `from_pretrained` for the tokenizer.

    Raises:
        OptionError: Rows cannot be made into batches, there are none, or ids are outside of the teacher's vocabulary; the
            message states which.
    """
    rows = iter(dataset)
    first = next(rows, None)
    if first is None:
        raise OptionError(f"calibration_dataset is empty: pass {EXPECTED_DATASET}.")
    rows = itertools.chain([first], rows)
    accepted = [name for name in inspect.signature(model.forward).parameters if name != "labels"]
    length = max_text_length(options.calibration_seq_length, model.config, student)
    batches: list[Batch] = []
    total = 0
    for columns in _iter_batches(rows, first, accepted, teacher, options, length, hub):
        batch = {
            name: value.detach().cpu()
            for name, value in columns.items()
            if isinstance(value, Tensor) and name in accepted
        }
        if not batch:
            raise OptionError(
                f"A batch of calibration_dataset has {sorted(columns)}, of which {type(model).__name__} takes no tensor; "
                f"pass {EXPECTED_DATASET}."
            )
        if not count_tokens(batch, model):
            continue
        batch = _with_decoder_inputs(batch, columns.get("labels"), model)
        _check_ids(batch, model)
        _check_lengths(batch, model.config, type(model).__name__)
        if student is not None:
            _check_lengths(batch, student, "the student")
        batches.append(_first_tokens(batch, num_tokens - total, model))
        total += count_tokens(batches[-1], model)
        if total >= num_tokens:
            break
    if not batches:
        raise OptionError(
            f"calibration_dataset holds not one token, only empty texts or rows: pass {EXPECTED_DATASET}."
        )
    return batches


def default_num_tokens(num_neurons: int) -> int:
    """Return the default number of tokens: ten for each neuron of the teacher's MLP, from `MIN_TOKENS` to `MAX_TOKENS`.

    A student of a Llama of 192 neurons ended alike after full training whether 2,048, 4,096, 8,192 or 16,384 were used
    (initialization_comparison.py, three seeds, within 0.6 perplexities), so the minimum is for short training; one of
    SmolLM2-135M, of 1,536, trained on 92,160 tokens ended 5 % better with ten per neuron than with five.

    Example:
        >>> default_num_tokens(192), default_num_tokens(1536)
        (8192, 15360)
    """
    return min(max(TOKENS_PER_NEURON * num_neurons, MIN_TOKENS), MAX_TOKENS)


def count_tokens(batch: Batch, model: PreTrainedModel) -> int:
    """Return the number of tokens of a batch; an image counts as its patches."""
    if "attention_mask" in batch and batch["attention_mask"].ndim == 2:
        return int(batch["attention_mask"].sum())
    if "input_ids" in batch:
        return batch["input_ids"].numel()
    first = next(iter(batch.values()))
    if first.ndim == 4:
        patch = _patch_side(model.config)
        return first.shape[0] * (first.shape[-2] // patch) * (first.shape[-1] // patch)
    return first.shape[0] * (first.shape[1] if first.ndim > 1 else 1)


def _first_tokens(batch: Batch, tokens: int, model: PreTrainedModel) -> Batch:
    """Return as many of a batch's first examples as have that many tokens; the whole batch if a row is not an example."""
    rows, mask = num_rows(batch), batch.get("attention_mask")
    if rows is None:
        return batch
    if mask is not None and mask.ndim == 2:
        lengths = mask.sum(1)
    else:
        lengths = torch.full((rows,), count_tokens(batch, model) / rows)
    return first_rows(batch, int((lengths.cumsum(0) < tokens).sum()) + 1)


def _patch_side(config: PreTrainedConfig) -> int:
    """Return the side of an image's patch: of SegFormer's first stage, and 16 pixels where a config has none."""
    patch = getattr(config, "patch_size", None)
    if isinstance(patch, int):
        return patch
    strides = getattr(config, "strides", None)
    return strides[0] if isinstance(strides, (list, tuple)) and strides else DEFAULT_PATCH_SIDE


def _with_decoder_inputs(batch: Batch, labels: Any, model: PreTrainedModel) -> Batch:
    """Return a batch with the inputs of an encoder-decoder's decoder, if they are missing, and their padding mask.

    They are the labels, shifted as the model itself shifts them; if there are none, the encoder's tokens.

    Raises:
        OptionError: The model cannot shift labels.
    """
    accepted = inspect.signature(model.forward).parameters
    if "decoder_input_ids" not in accepted or "decoder_input_ids" in batch or "decoder_inputs_embeds" in batch:
        return batch
    batch, mask = dict(batch), batch.get("attention_mask")
    if "labels" in accepted and isinstance(labels, Tensor) and labels.ndim == 2:
        labels = labels.detach().cpu()
        start = getattr(model.config, "decoder_start_token_id", None)
        if start is not None and bool((labels[:, 0] == start).all()):
            labels = labels[:, 1:]  # as tokenizers of speech write them
        batch["decoder_input_ids"] = _shift_labels(labels, model)
        mask = (labels != IGNORE_INDEX).long()
    elif "input_ids" in batch:
        batch["decoder_input_ids"] = batch["input_ids"]  # the decoder needs an input
    if "decoder_attention_mask" in accepted and mask is not None and not bool(mask.all()):
        batch.setdefault("decoder_attention_mask", mask)
    return batch


def _shift_labels(labels: Tensor, model: PreTrainedModel) -> Tensor:
    try:
        return decoder_ids_from_labels(labels, model)
    except (AttributeError, ValueError, TypeError) as error:  # of Transformers, where the config has not both tokens
        raise OptionError(
            f"calibration_dataset has labels, from which {type(model).__name__} cannot make its decoder's input: {error}. Set "
            "decoder_start_token_id and pad_token_id in its config, or add decoder_input_ids."
        ) from error


def _check_ids(batch: Batch, model: PreTrainedModel) -> None:
    """Raise for ids beyond the teacher's table: on a GPU they would make the device unusable.

    Raises:
        OptionError: Names the id and the vocabulary.
    """
    for name in ("input_ids", "decoder_input_ids"):
        ids = batch.get(name)
        rows = None if ids is None else num_token_rows(model)
        if rows is None or ids is None:
            continue
        smallest, largest = int(ids.min()), int(ids.max())
        if smallest < 0 or largest >= rows:
            outside = smallest if smallest < 0 else largest
            raise OptionError(
                f"calibration_dataset has the token id {outside} in {name}, and {type(model).__name__} "
                f"has tokens 0 to {rows - 1}: tokenize with the teacher's own tokenizer, and pad with a token "
                "of it."
            )


def _check_lengths(batch: Batch, config: PreTrainedConfig, model_name: str) -> None:
    """Raise for rows beyond the position tables of the teacher, or of the student.

    Raises:
        OptionError: Names the length and its limit.
    """
    positions = text_positions(config)
    for name, max_length in (("input_ids", positions.max_tokens), ("decoder_input_ids", positions.max_target_tokens)):
        if name in batch and max_length is not None and batch[name].shape[-1] > max_length:
            raise OptionError(
                f"calibration_dataset has rows of {batch[name].shape[-1]} tokens in {name}, and {model_name} has {max_length} "
                "positions for them: cut them."
            )


def _iter_batches(
    rows: Iterator[Any],
    first: Any,
    accepted: Sequence[str],
    teacher: TeacherCheckpoint,
    options: CalibratedConfig,
    length: int,
    hub: Mapping[str, Any],
) -> Iterator[Mapping[str, Any]]:
    size, pad_token = options.calibration_batch_size, _pad_token(teacher)
    if isinstance(first, str):
        return _batches_of_text(_iter_texts(rows), load_teacher_tokenizer(teacher, hub), size, length)
    if not isinstance(first, Mapping):
        raise OptionError(f"calibration_dataset yields a {type(first).__name__}; pass {EXPECTED_DATASET}.")
    if "input_ids" in first:
        if _num_axes(first["input_ids"]) < 2:
            return _batches_of_ids(_iter_examples(rows), accepted, size, pad_token)
        return _batches_as_tensors(rows, "input_ids", accepted, lambda rows: _pad_rows(rows, accepted, pad_token))
    if "pixel_values" in first:
        if _num_axes(first["pixel_values"]) < 4:
            return _batches_of_images(rows, accepted, size, pad_token)
        return _batches_as_tensors(
            rows, "pixel_values", accepted, lambda rows: _stack_images(rows, accepted, pad_token)
        )
    sounds = next((name for name in _SOUND_INPUTS if name in first), None)
    if sounds is not None and not isinstance(first[sounds], Tensor):
        return _batches_of_sounds(rows, sounds, accepted, size, pad_token)
    if any(isinstance(value, Tensor) and value.ndim > 1 for value in first.values()):
        return rows
    data_format = detect_format(list(map(str, first)), first, "calibration_dataset")
    if data_format is not None and data_format.kind is not RowFormat.TEXT:
        encoded = _encode_chat(rows, data_format, load_teacher_tokenizer(teacher, hub), length)
        return _batches_of_ids(encoded, accepted, size, pad_token)
    column = _text_column(first)
    if column is None:
        raise OptionError(
            f"calibration_dataset has the columns {sorted(map(str, first))}, none of them input_ids, text, messages, "
            f"pixel_values, input_features or input_values; pass {EXPECTED_DATASET}."
        )
    tokenizer = load_teacher_tokenizer(teacher, hub)
    return _batches_of_text(_iter_texts(row[column] for row in rows), tokenizer, size, length)


def _text_column(row: Mapping[str, Any]) -> str | None:
    """Return the column of a row that holds its text; None if there is none, or several."""
    columns = [name for name, value in row.items() if isinstance(value, str)]
    return "text" if "text" in row else columns[0] if len(columns) == 1 else None


def iter_texts(dataset: Any, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield the texts of a calibration dataset; of a conversation, or a prompt with its completion, the text it is trained on.

    Args:
        dataset: Texts, or rows of text or conversations.
        tokenizer: The teacher's, with its chat template.

    Raises:
        OptionError: The dataset is not text.
    """
    rows = iter(dataset)
    first = next(rows, None)
    rows = itertools.chain([] if first is None else [first], rows)
    if first is None or isinstance(first, str):
        yield from _iter_texts(rows)
        return
    data_format = detect_format(list(map(str, first)), first, "calibration_dataset") if _has_text(first) else None
    column = _text_column(first) if _has_text(first) else None
    if data_format is not None and data_format.kind is not RowFormat.TEXT:
        encode = ChatEncoder(tokenizer, data_format)
        for index, row in enumerate(_iter_rows(rows, data_format)):
            yield str(tokenizer.decode(encode(row, index).input_ids))
    elif column is not None:
        yield from _iter_texts(row[column] for row in rows)
    else:
        found = sorted(map(str, first)) if isinstance(first, Mapping) else f"a {type(first).__name__}"
        raise OptionError(
            f"The pieces of a smaller vocabulary are chosen by text, and calibration_dataset yields {found}. Pass a list of "
            "texts, or a dataset with a column text or messages, which is not tokenized yet."
        )


def _has_text(row: Any) -> bool:
    """Whether a row may hold text: it is a mapping, and not tokenized."""
    return isinstance(row, Mapping) and "input_ids" not in row


def max_text_length(length: int, *configs: PreTrainedConfig | None) -> int:
    """Return the length of a row of text: `length`, or the least number of positions of the models if that is less."""
    limits = [max_input_tokens(config) for config in configs]
    return min([length, *(limit for limit in limits if limit is not None)])


def _num_axes(value: Any) -> int:
    """Return the number of axes of a tensor, an array, or nested lists."""
    if isinstance(value, (list, tuple)) or (
        isinstance(value, np.ndarray) and value.dtype.hasobject
    ):  # rows of several lengths
        return 1 + (_num_axes(value[0]) if len(value) else 0)
    return getattr(value, "ndim", 0)


def load_teacher_tokenizer(teacher: TeacherCheckpoint, hub: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a teacher's vocabulary.

    Raises:
        OptionError: It has none that loads.
    """
    if teacher.tokenizer is not None:
        return teacher.tokenizer
    try:
        return load_processing_class(AutoTokenizer, teacher.name, revision=teacher.revision, **hub)
    except TeacherError as error:
        raise OptionError(
            f"calibration_dataset is text, and the teacher {teacher.name} has no tokenizer that loads. {error} Or "
            "tokenize it yourself, and pass rows or batches of input_ids."
        ) from error


def _pad_token(teacher: TeacherCheckpoint) -> int:
    token = getattr(teacher.config, "pad_token_id", None)
    return token if isinstance(token, int) and token >= 0 else 0


def _iter_texts(values: Iterable[Any]) -> Iterator[str]:
    """Yield texts one by one, from rows or from batches; skip empty and missing ones."""
    for value in values:
        for text in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(text, str) and text:
                yield text
            elif text is not None and not isinstance(text, str):
                raise OptionError(
                    f"calibration_dataset has a {type(text).__name__} where text must be; pass {EXPECTED_DATASET}."
                )


def _batches_of_text(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, size: int, length: int
) -> Iterator[Batch]:
    """Yield texts joined by the end-of-text token and cut into rows; one text per row if the tokenizer has a CLS token."""
    if tokenizer.cls_token_id is not None:
        length = min(length, tokenizer.model_max_length)  # in some families less than the number of positions
        encoded = (tokenizer(text, truncation=True, max_length=length) for text in texts)
        yield from _batches_of_ids(encoded, (), size, tokenizer.pad_token_id or 0)
        return
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        while len(ids) >= size * length:
            yield {"input_ids": torch.tensor(ids[: size * length]).view(size, length)}
            ids = ids[size * length :]
    if len(ids) >= length:
        num_rows = len(ids) // length
        yield {"input_ids": torch.tensor(ids[: num_rows * length]).view(num_rows, length)}
    elif ids:
        yield {"input_ids": torch.tensor([ids])}


def _encode_chat(
    rows: Iterator[Mapping[str, Any]], data_format: DatasetFormat, tokenizer: PreTrainedTokenizerBase, length: int
) -> Iterator[dict[str, list[int]]]:
    """Yield one row of tokens for each conversation, the same as for training."""
    encode = ChatEncoder(tokenizer, data_format)
    for index, row in enumerate(_iter_rows(rows, data_format)):
        yield {"input_ids": encode(row, index).truncate(length, tokenizer.truncation_side).input_ids}


def _iter_rows(rows: Iterable[Mapping[str, Any]], data_format: DatasetFormat) -> Iterator[Mapping[str, Any]]:
    """Yield rows; of batches, as `Dataset.iter` yields them, the rows in them."""
    for row in rows:
        value = row.get(data_format.columns[0])
        if isinstance(value, list) and value and isinstance(value[0], (str, list)):
            yield from (dict(zip(row, values, strict=True)) for values in zip(*row.values(), strict=True))
        else:
            yield row


def _iter_examples(rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Yield rows, and of packed rows the texts in them: packed, they would attend to each other."""
    for row in rows:
        has_starts = _num_axes(row.get("position_ids")) == 1 and not _is_filled(row, "attention_mask")
        if _is_filled(row, "input_ids") and (has_starts or _is_filled(row, "seq_lengths")):
            yield from split_packed(row)
        else:
            yield row


def _batches_of_ids(
    rows: Iterable[Mapping[str, Any]], accepted: Sequence[str], size: int, pad_token: int
) -> Iterator[Batch]:
    """Yield batches of those rows that hold a token."""
    filled = (row for row in rows if _is_filled(row, "input_ids"))
    while batch := list(itertools.islice(filled, size)):
        yield _pad_rows(batch, accepted, pad_token)


def _batches_of_images(
    rows: Iterator[Mapping[str, Any]], accepted: Sequence[str], size: int, pad_token: int
) -> Iterator[Batch]:
    filled = (row for row in rows if _is_filled(row, "pixel_values"))
    while batch := list(itertools.islice(filled, size)):
        yield _stack_images(batch, accepted, pad_token)


def _batches_of_sounds(
    rows: Iterator[Mapping[str, Any]], column: str, accepted: Sequence[str], size: int, pad_token: int
) -> Iterator[Batch]:
    """Yield batches of spectrograms or waveforms, and of their transcripts where they have some.

    Raises:
        OptionError: Sounds of a batch differ in length.
    """
    filled = (row for row in rows if _is_filled(row, column))
    while batch := list(itertools.islice(filled, size)):
        sounds = [torch.as_tensor(np.asarray(row[column], dtype=np.float32)) for row in batch]
        shapes = sorted({tuple(sound.shape) for sound in sounds})
        if len(shapes) > 1:
            raise OptionError(
                f"calibration_dataset has {column} of the shapes {' and '.join(map(str, shapes[:3]))}: they must be the "
                "same in each row of a batch. Pad or cut them, set calibration_batch_size to 1, or pass batches."
            )
        others = [name for name in accepted if name != column]
        yield {column: torch.stack(sounds), **_labels(batch), **_other_inputs(batch, others, pad_token)}


def _batches_as_tensors(
    batches: Iterable[Mapping[str, Any]],
    column: str,
    accepted: Sequence[str],
    join: Callable[[list[dict[str, Any]]], Batch],
) -> Iterator[Mapping[str, Any]]:
    """Yield batches of tensors as they are; convert those of lists or arrays, as `datasets` makes them."""
    for batch in batches:
        if isinstance(batch[column], Tensor):
            yield batch
            continue
        columns = {name: batch[name] for name in (*accepted, "labels") if _num_axes(batch.get(name)) > 0}
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        filled = [row for row in rows if _is_filled(row, column)]
        if filled:
            yield join(filled)


def _is_filled(row: Mapping[str, Any], column: str) -> bool:
    value = row.get(column)
    return _num_axes(value) > 0 and len(value) > 0  # type: ignore[arg-type]


def _pad_rows(rows: list[Any], accepted: Sequence[str], pad_token: int) -> Batch:
    """Return rows padded on the right, with a mask where there is padding; their labels, one per token; and other inputs.

    Raises:
        OptionError: A row's mask has another length, or an input other shapes.
    """
    ids = [torch.as_tensor(row["input_ids"]).long() for row in rows]
    masks = [
        torch.as_tensor(row["attention_mask"]).long() if _is_filled(row, "attention_mask") else torch.ones_like(tokens)
        for row, tokens in zip(rows, ids, strict=True)
    ]
    for tokens, mask in zip(ids, masks, strict=True):
        if len(tokens) != len(mask):
            raise OptionError(
                f"A row of calibration_dataset has {len(tokens)} input_ids and an attention_mask of {len(mask)}: they "
                "must be equally long, or leave out the mask."
            )
    batch = {"input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_token)}
    mask = pad_sequence(masks, batch_first=True)
    if not bool(mask.all()):
        batch["attention_mask"] = mask
    others = [name for name in accepted if name not in ("input_ids", "attention_mask")]
    return {**batch, **_labels(rows), **_other_inputs(rows, others, pad_token)}


def _stack_images(rows: list[Any], accepted: Sequence[str], pad_token: int) -> Batch:
    """Return images stacked, (images, channels, height, width), and other inputs.

    Raises:
        OptionError: They are not images, or of several sizes.
    """
    images = [torch.as_tensor(row["pixel_values"]).float() for row in rows]
    shapes = sorted({tuple(image.shape) for image in images})
    if len(shapes) > 1 or len(shapes[0]) != 3:
        raise OptionError(
            f"calibration_dataset has pixel_values of the shape {' and '.join(map(str, shapes))}: they must be the "
            "same (channels, height, width) in each row. Use the teacher's image processor."
        )
    others = [name for name in accepted if name != "pixel_values"]
    return {"pixel_values": torch.stack(images), **_other_inputs(rows, others, pad_token)}


def _labels(rows: list[Any]) -> Batch:
    """Return the labels of rows that have one for each token, padded; nothing of others."""
    if not all(_num_axes(row.get("labels")) == 1 for row in rows):
        return {}
    labels = [torch.as_tensor(row["labels"]).long() for row in rows]
    return {"labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX)}


def _other_inputs(rows: list[Any], names: Iterable[str], pad_token: int) -> Batch:
    """Return those of the named inputs that rows have: lists of whole numbers padded on the right, all else stacked.

    Token ids are padded with the padding token, and get a mask of their own if they are a decoder's; all else with 0.

    Raises:
        OptionError: Some rows have an input and others do not, or it has several shapes; names it.
    """
    batch: Batch = {}
    for name in names:
        values = [row.get(name) for row in rows]
        if "label" in name or not any(_num_axes(value) > 0 for value in values):
            continue  # single numbers are labels too, such as where an answer starts
        tensors = [torch.as_tensor(value) for value in values if _num_axes(value) > 0]
        shapes = sorted({tuple(tensor.shape) for tensor in tensors})
        is_sequence = all(tensor.ndim == 1 and not tensor.is_floating_point() for tensor in tensors)
        if len(tensors) < len(rows) or (len(shapes) > 1 and not is_sequence):
            found = " and ".join(map(str, shapes[:3])) if len(tensors) == len(rows) else "some rows alone"
            raise OptionError(
                f"calibration_dataset has {name} of {found}: all rows of a batch must have it in the same shape. Leave the "
                "column out, set calibration_batch_size to 1, or pass batches."
            )
        if not is_sequence:
            batch[name] = torch.stack([each.float() if each.is_floating_point() else each for each in tensors])
            continue
        padding = pad_token if name.endswith("input_ids") else 0
        batch[name] = pad_sequence(tensors, batch_first=True, padding_value=padding)
        if name == "decoder_input_ids" and len(shapes) > 1:
            batch["decoder_attention_mask"] = pad_sequence(
                [torch.ones_like(each) for each in tensors], batch_first=True
            )
    return batch
