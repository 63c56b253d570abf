"""Join rows of a calibration dataset into batches, with all inputs that the teacher's forward pass takes."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig

from hf_guide.calibration.batches import Batch, check_whole_numbers
from hf_guide.calibration.raw_inputs import check_is_array
from hf_guide.chat.packing import split_packed
from hf_guide.errors import OptionError
from hf_guide.utils.labels import IGNORE_INDEX

MAIN_INPUTS = ("input_ids", "pixel_values", "input_features", "input_values")
"""The columns by which rows are known, the first of a row's."""

Rows = Sequence[Mapping[str, Any]]


def row_axes(column: str, config: PreTrainedConfig) -> int:
    """Return how many axes a main input has in one row: a waveform has one, and its spectrogram two, or three in CLAP.

    Example:
        >>> from transformers import ViTConfig
        >>> row_axes("pixel_values", ViTConfig())
        3
    """
    if column == "input_values":
        return 2 if hasattr(config, "num_mel_bins") else 1  # as an AST has
    if column == "input_features":
        return 3 if config.model_type.startswith("clap") else 2
    return {"input_ids": 1, "pixel_values": 3}[column]


def num_axes(value: Any) -> int:
    """Return the number of axes of a tensor, an array, or nested lists.

    Example:
        >>> num_axes([[1, 2], [3]]), num_axes(torch.zeros(2, 3, 4)), num_axes(None)
        (2, 3, 0)
    """
    is_ragged = isinstance(value, np.ndarray) and value.dtype.hasobject  # rows of several lengths
    if isinstance(value, (list, tuple)) or is_ragged:
        return 1 + (num_axes(value[0]) if len(value) else 0)
    return getattr(value, "ndim", 0)


def rows_with(rows: Iterable[Any], column: str) -> Iterator[Mapping[str, Any]]:
    """Yield rows, or batches, after checking that each has a column.

    Raises:
        OptionError: One is of another form than the first.
    """
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping) or column not in row:
            is_row = isinstance(row, Mapping)
            found = f"has the columns {sorted(map(str, row))}" if is_row else f"is a {type(row).__name__}"
            raise OptionError(
                f"Item {number} of calibration_dataset {found}, and the first one has {column}: pass rows, or batches, "
                "that all have the same columns."
            )
        yield row


@dataclass(frozen=True)
class RowCollator:
    """Joins rows, each a mapping of the inputs of one example, into batches.

    Args:
        accepted: The inputs that the teacher's forward pass takes; other columns are left out.
        batch_size: Rows in a batch.
        pad_token_id: What ids are padded with.
    """

    accepted: Sequence[str]
    batch_size: int
    pad_token_id: int

    def collate(self, rows: Iterable[Mapping[str, Any]], column: str) -> Iterator[Batch]:
        """Yield batches of rows; rows whose main input is missing or empty are skipped.

        Args:
            rows: The rows.
            column: Their main input, one of `MAIN_INPUTS`.

        Raises:
            OptionError: Rows cannot be joined; names the column.
        """
        examples = _iter_examples(rows) if column == "input_ids" else rows
        filled = _iter_filled(examples, column)
        while batch := list(itertools.islice(filled, self.batch_size)):
            yield self._join(batch, column)

    def as_tensors(self, batches: Iterable[Mapping[str, Any]], column: str) -> Iterator[Mapping[str, Any]]:
        """Yield batches of tensors as they are; convert those of lists or arrays, as `datasets` makes them."""
        for batch in batches:
            if isinstance(batch[column], Tensor):
                yield batch
                continue
            check_is_array(column, batch[column])
            columns = {name: batch[name] for name in (*self.accepted, "labels") if num_axes(batch.get(name)) > 0}
            rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            filled = [row for row in rows if _is_filled(row, column)]
            if filled:
                yield self._join(filled, column)

    def _join(self, rows: Rows, column: str) -> Batch:
        """Return the batch of rows that have a main input."""
        if column == "input_ids":
            batch, present = self._pad_ids(rows), {"input_ids", "attention_mask"}
        else:
            batch, present = {column: _stack(rows, column)}, {column}
        return {**batch, **_token_labels(rows), **self._other_inputs(rows, present)}

    def _pad_ids(self, rows: Rows) -> Batch:
        """Return ids padded on the right, with a mask where there is padding.

        Raises:
            OptionError: A row's mask has another length than its ids, or these are no whole numbers.
        """
        ids = [torch.as_tensor(row["input_ids"]) for row in rows]
        for tokens in ids:
            check_whole_numbers("input_ids", tokens)
        masks = [
            torch.as_tensor(row["attention_mask"]).long()
            if _is_filled(row, "attention_mask")
            else torch.ones_like(tokens)
            for row, tokens in zip(rows, ids, strict=True)
        ]
        for tokens, mask in zip(ids, masks, strict=True):
            if len(tokens) != len(mask):
                raise OptionError(
                    f"A row of calibration_dataset has {len(tokens)} input_ids and an attention_mask of {len(mask)}: they "
                    "must be equally long, or leave out the mask."
                )
        batch, mask = {"input_ids": self._pad(ids, "input_ids").long()}, pad_sequence(masks, batch_first=True)
        return batch if bool(mask.all()) else {**batch, "attention_mask": mask}

    def _pad(self, values: list[Tensor], name: str) -> Tensor:
        """Return lists of numbers padded on the right: token ids with the padding token, all else with 0."""
        padding = self.pad_token_id if name.endswith("input_ids") else 0
        return pad_sequence(values, batch_first=True, padding_value=padding)

    def _other_inputs(self, rows: Rows, present: set[str]) -> Batch:
        """Return those of the accepted inputs that rows have: lists of whole numbers padded, all else stacked.

        A decoder's ids of several lengths get a mask of their own.

        Args:
            rows: The rows.
            present: The inputs that the batch has already, or does not need.

        Raises:
            OptionError: Some rows have an input and others do not, or it has several shapes; names it.
        """
        batch: Batch = {}
        for name in self.accepted:
            values = [row.get(name) for row in rows]
            if name in present or "label" in name or not any(num_axes(value) > 0 for value in values):
                continue  # single numbers are labels too, such as where an answer starts
            tensors = [torch.as_tensor(value) for value in values if num_axes(value) > 0]
            shapes = sorted({tuple(tensor.shape) for tensor in tensors})
            is_sequence = all(tensor.ndim == 1 and not tensor.is_floating_point() for tensor in tensors)
            if len(tensors) < len(rows) or (len(shapes) > 1 and not is_sequence):
                raise _unlike(name, shapes if len(tensors) == len(rows) else None)
            if not is_sequence:
                batch[name] = torch.stack([each.float() if each.is_floating_point() else each for each in tensors])
                continue
            batch[name] = self._pad(tensors, name)
            if name == "decoder_input_ids" and len(shapes) > 1:
                batch["decoder_attention_mask"] = pad_sequence(
                    [torch.ones_like(each) for each in tensors], batch_first=True
                )
        return batch


def _iter_examples(rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Yield rows, and of packed rows the texts in them: packed, they would attend to each other."""
    for row in rows:
        has_starts = num_axes(row.get("position_ids")) == 1 and not _is_filled(row, "attention_mask")
        if _is_filled(row, "input_ids") and (has_starts or _is_filled(row, "seq_lengths")):
            yield from split_packed(row)
        else:
            yield row


def _iter_filled(rows: Iterable[Mapping[str, Any]], column: str) -> Iterator[Mapping[str, Any]]:
    """Yield the rows whose main input is neither missing nor empty, after checking that it is numbers."""
    for row in rows:
        check_is_array(column, row[column])
        if _is_filled(row, column):
            yield row


def _is_filled(row: Mapping[str, Any], column: str) -> bool:
    value = row.get(column)
    return num_axes(value) > 0 and len(value) > 0  # type: ignore[arg-type]


def _stack(rows: Rows, column: str) -> Tensor:
    """Return images, (images, channels, height, width), or sounds, stacked: in float32, or whole numbers as they are.

    Raises:
        OptionError: They have several shapes, or images not three axes.
    """
    values = [
        value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
        for value in (row[column] for row in rows)
    ]
    values = [value.float() if value.is_floating_point() else value for value in values]
    shapes = sorted({tuple(value.shape) for value in values})
    if len(shapes) > 1 or (column == "pixel_values" and len(shapes[0]) != 3):
        raise _unlike(column, shapes)
    return torch.stack(values)


def _unlike(name: str, shapes: Sequence[tuple[int, ...]] | None) -> OptionError:
    """Return the error for an input that rows have in several shapes, or, of shapes None, some have not."""
    found = "some rows alone" if shapes is None else f"the shapes {' and '.join(map(str, shapes[:3]))}"
    advice = (
        "images must be (channels, height, width), the same in each row, as the teacher's image processor makes them"
        if name == "pixel_values"
        else "they must be the same in each row of a batch. Pad or cut them, set calibration_batch_size to 1, or pass batches"
    )
    return OptionError(f"calibration_dataset has {name} of {found}: {advice}.")


def _token_labels(rows: Rows) -> Batch:
    """Return the labels of rows that have one for each token, padded; nothing of others."""
    if not all(num_axes(row.get("labels")) == 1 for row in rows):
        return {}
    labels = [torch.as_tensor(row["labels"]).long() for row in rows]
    return {"labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX)}
