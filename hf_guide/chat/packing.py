"""Put several examples into one row, so that little is padding, and keep them apart by their positions.

The position ids of a row begin at 0 for each of its examples, and there is no attention mask: from both together Transformers
knows where an example begins, and no token attends to another example's. What a batch adds at the end of a row has position
0 throughout. `hf_guide.models.packed_rows` verifies that a model keeps the examples of such rows apart.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hf_guide.utils.labels import IGNORE_INDEX


def assign_rows(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Return which examples each row has: best-fit decreasing, rows in the order of their first examples.

    Args:
        lengths: Of the examples, at most `size` each.
        size: Tokens in a row.

    Example:
        >>> assign_rows([3, 5, 2, 4], size=8)
        [[0, 1], [2, 3]]
    """
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # by the tokens that are free
    for example in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[example]
        free = min((space for space in open_rows if space >= length), default=None)
        if free is None:
            row, free = len(rows), size
            rows.append([])
        else:
            row = open_rows[free].pop()
            if not open_rows[free]:
                del open_rows[free]
        rows[row].append(example)
        if free > length:
            open_rows.setdefault(free - length, []).append(row)
    return sorted(sorted(row) for row in rows)


def pack_rows(examples: Mapping[str, Sequence[Sequence[int]]], size: int) -> dict[str, list[list[int]]]:
    """Return packed rows of `input_ids`, `labels` and `position_ids`. The first token of an example is never a target.

    Args:
        examples: `input_ids` and `labels`, at most `size` tokens each.
        size: Tokens in a row, at most.
    """
    packed: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
    for row in assign_rows([len(ids) for ids in examples["input_ids"]], size):
        packed["input_ids"].append([token for index in row for token in examples["input_ids"][index]])
        packed["labels"].append([label for index in row for label in [IGNORE_INDEX, *examples["labels"][index][1:]]])
        packed["position_ids"].append(
            [position for index in row for position in range(len(examples["input_ids"][index]))]
        )
    return packed


def split_packed(row: Mapping[str, Any]) -> list[dict[str, list[int]]]:
    """Return the examples of a packed row, `input_ids` and `labels` each.

    Args:
        row: Its examples begin where `position_ids` are 0, or have the lengths `seq_lengths`, as TRL packs them.

    Example:
        >>> split_packed({"input_ids": [5, 6, 7], "labels": [-100, 6, -100], "position_ids": [0, 1, 0]})
        [{'input_ids': [5, 6], 'labels': [-100, 6]}, {'input_ids': [7], 'labels': [-100]}]
    """
    columns = {
        name: torch.as_tensor(row[name]).tolist() for name in ("input_ids", "labels") if row.get(name) is not None
    }
    if row.get("seq_lengths") is not None:
        ends = list(itertools.accumulate(torch.as_tensor(row["seq_lengths"]).tolist()))
        starts = [0, *ends[:-1]]
    else:
        positions = torch.as_tensor(row["position_ids"]).tolist()
        starts = [index for index, position in enumerate(positions) if position == 0]
        ends = [*starts[1:], len(positions)]
    return [
        {name: values[start:end] for name, values in columns.items()} for start, end in zip(starts, ends, strict=True)
    ]


class PackedCollator:
    """Batches packed rows: pads them at the end with position 0 and without labels, and makes no attention mask.

    Example:
        >>> rows = [{"input_ids": [5, 6], "labels": [-100, 6], "position_ids": [0, 1]}]
        >>> rows += [{"input_ids": [7, 8, 9], "labels": [-100, 8, 9], "position_ids": [0, 1, 2]}]
        >>> PackedCollator()(rows)["position_ids"].tolist()
        [[0, 1, 0], [0, 1, 2]]
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return `input_ids`, `labels` and `position_ids`, (rows, tokens) each."""
        columns = {
            name: [torch.as_tensor(row[name]) for row in rows] for name in ("input_ids", "labels", "position_ids")
        }
        fill = int(columns["input_ids"][0][0])  # a token that every model of this batch knows: none attends to it
        fills = {"input_ids": fill, "labels": IGNORE_INDEX, "position_ids": 0}
        return {
            name: pad_sequence(values, batch_first=True, padding_value=fills[name]) for name, values in columns.items()
        }
