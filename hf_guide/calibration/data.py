"""Turn a calibration dataset into batches for a teacher's forward pass.

A dataset is rows (of `input_ids`, `pixel_values` or sounds, or of text or conversations, which the teacher's tokenizer
encodes), or batches, as a DataLoader or `Dataset.iter` yields them. A conversation, or a prompt with its completion, is one
row of tokens, as for training. Batches are kept in memory, because they go through the teacher more than once.
"""

import dataclasses
import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_guide.calibration.batches import Batch, check_batch, count_rows, count_tokens, first_rows
from hf_guide.calibration.config import SELF_GENERATED, CalibratedConfig
from hf_guide.calibration.raw_inputs import check_processed, check_reads_text, check_text_alone, processing_hint
from hf_guide.calibration.row_collator import MAIN_INPUTS, RowCollator, num_axes, row_axes, rows_with
from hf_guide.chat.encoding import ChatEncoder
from hf_guide.chat.formats import DatasetFormat, RowFormat, detect_format
from hf_guide.errors import OptionError, TeacherError
from hf_guide.models.positions import max_input_tokens
from hf_guide.models.pretrained import load_processing_class
from hf_guide.teachers.checkpoint import TeacherCheckpoint
from hf_guide.utils.labels import IGNORE_INDEX, decoder_ids_from_labels
from hf_guide.validation import instead_of_dataset

TOKENS_PER_NEURON, MIN_TOKENS, MAX_TOKENS = 20, 8192, 65536
EXPECTED_DATASET = (
    "a datasets dataset with a column input_ids, text, messages, pixel_values, input_features or input_values, a list of "
    f"texts, an iterable of batches (dicts of tensors), or {SELF_GENERATED!r}, for text that the teacher generates itself"
)


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
    advice = instead_of_dataset(dataset)
    if advice is not None or isinstance(dataset, (str, bytes)) or not isinstance(dataset, Iterable):
        value = repr(dataset) if isinstance(dataset, str) else f"a {type(dataset).__name__}"
        raise OptionError(f"calibration_dataset must be {EXPECTED_DATASET}; found {value}. {advice or ''}".rstrip())


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
    first, rows = _peek(dataset)
    if first is None:
        raise OptionError(f"calibration_dataset is empty: pass {EXPECTED_DATASET}.")
    accepted = [name for name in inspect.signature(model.forward).parameters if name != "labels"]
    length = max_text_length(options.calibration_seq_length, model.config, student)
    collator = RowCollator(accepted, options.calibration_batch_size, _pad_token(teacher))
    batches: list[Batch] = []
    total = 0
    for columns in _iter_batches(rows, first, collator, teacher, length, hub):
        batch = {
            name: value.detach().cpu()
            for name, value in columns.items()
            if isinstance(value, Tensor) and name in accepted
        }
        if not batch:
            raise OptionError(
                f"A batch of calibration_dataset has {sorted(columns)}, of which {type(model).__name__} takes no tensor; "
                f"pass {EXPECTED_DATASET}.{processing_hint(accepted)}"
            )
        check_processed(batch)
        if not count_tokens(batch, model):
            continue
        batch = _with_decoder_inputs(batch, columns.get("labels"), model)
        check_batch(batch, model, student)
        batches.append(first_rows(batch, count_rows(batch, num_tokens - total, model)))
        total += count_tokens(batches[-1], model)
        if total >= num_tokens:
            break
    if not batches:
        raise OptionError(
            f"calibration_dataset holds not one token, only empty texts or rows: pass {EXPECTED_DATASET}."
        )
    return batches


def default_num_tokens(num_neurons: int) -> int:
    """Return the default number of tokens: twenty for each neuron of the teacher's MLP, from `MIN_TOKENS` to `MAX_TOKENS`.

    A student of a Llama of 192 neurons ended alike after full training whether 2,048, 4,096, 8,192 or 16,384 were used
    (initialization_comparison.py, three seeds, within 0.6 perplexities), so the minimum is for short training. Of
    SmolLM2-135M, which has 1,536, students trained on some 50,000 to 100,000 tokens ended 5 % better with ten per neuron than
    with five, and 2 % better with twenty than with ten (two seeds), for which the start takes 1.6 times as long.

    Example:
        >>> default_num_tokens(192), default_num_tokens(1536)
        (8192, 30720)
    """
    return min(max(TOKENS_PER_NEURON * num_neurons, MIN_TOKENS), MAX_TOKENS)


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


def _peek(dataset: Iterable[Any]) -> tuple[Any, Iterator[Any]]:
    """Return the first item of a dataset that is not None, or None, and all items from it on."""
    rows = iter(dataset)
    first = next((row for row in rows if row is not None), None)
    return first, rows if first is None else itertools.chain([first], rows)


def _iter_batches(
    rows: Iterator[Any],
    first: Any,
    collator: RowCollator,
    teacher: TeacherCheckpoint,
    length: int,
    hub: Mapping[str, Any],
) -> Iterator[Mapping[str, Any]]:
    """Return the batches of rows in any form, as `first` has it."""
    if isinstance(first, str):
        check_reads_text(collator.accepted, "yields texts")
        return _batches_of_text(_iter_texts(rows), load_teacher_tokenizer(teacher, hub), collator, length)
    hint = processing_hint(collator.accepted)
    if not isinstance(first, Mapping):
        raise OptionError(f"calibration_dataset yields a {type(first).__name__}; pass {EXPECTED_DATASET}.{hint}")
    column = next((name for name in MAIN_INPUTS if name in first), None)
    if column is not None:
        rows = rows_with(rows, column)
        is_row = num_axes(first[column]) <= row_axes(column, teacher.config)
        return collator.collate(rows, column) if is_row else collator.as_tensors(rows, column)
    if any(isinstance(value, Tensor) and value.ndim > 1 for value in first.values()):
        return rows
    columns = sorted(map(str, first))
    data_format = detect_format(list(map(str, first)), first, "calibration_dataset")
    column = _text_column(first)
    if data_format is not None or column is not None:
        check_reads_text(collator.accepted, f"has the columns {columns}, of which the text would be tokenized")
        check_text_alone(first, collator.accepted)
    if data_format is not None and data_format.kind is not RowFormat.TEXT:
        rows = rows_with(rows, data_format.columns[0])
        encoded = _encode_chat(rows, data_format, load_teacher_tokenizer(teacher, hub), length)
        return collator.collate(encoded, "input_ids")
    if column is None:
        raise OptionError(
            f"calibration_dataset has the columns {columns}, none of them input_ids, text, messages, "
            f"pixel_values, input_features or input_values; pass {EXPECTED_DATASET}.{hint}"
        )
    tokenizer = load_teacher_tokenizer(teacher, hub)
    return _batches_of_text(_iter_texts(_values(rows, column)), tokenizer, collator, length)


def _values(rows: Iterable[Any], column: str) -> Iterator[Any]:
    """Return a column of rows that all have it."""
    return (row[column] for row in rows_with(rows, column))


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
    first, rows = _peek(dataset)
    if first is None or isinstance(first, str):
        yield from _iter_texts(rows)
        return
    data_format = detect_format(list(map(str, first)), first, "calibration_dataset") if _has_text(first) else None
    column = _text_column(first) if _has_text(first) else None
    if data_format is not None and data_format.kind is not RowFormat.TEXT:
        encode = ChatEncoder(tokenizer, data_format)
        for index, row in enumerate(_iter_rows(rows_with(rows, data_format.columns[0]), data_format)):
            yield str(tokenizer.decode(encode(row, index).input_ids))
    elif column is not None:
        yield from _iter_texts(_values(rows, column))
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
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, collator: RowCollator, length: int
) -> Iterator[Batch]:
    """Yield texts joined by the end-of-text token and cut into rows; one text per row if the tokenizer has a CLS token."""
    if tokenizer.cls_token_id is not None:
        length = min(length, tokenizer.model_max_length)  # in some families less than the number of positions
        encoded = (tokenizer(text, truncation=True, max_length=length) for text in texts)
        plain = dataclasses.replace(collator, accepted=(), pad_token_id=tokenizer.pad_token_id or 0)
        yield from plain.collate(encoded, "input_ids")
        return
    ids: list[int] = []
    size = collator.batch_size
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
