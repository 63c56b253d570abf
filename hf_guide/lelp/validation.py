"""Arrays as users give them: tensors, NumPy, lists, tables of pandas, whole or in chunks."""

import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy
import torch
from torch import Tensor

from hf_guide.errors import OptionError, SubclassError

MISSING_LABELS = (-1, -100)
CHUNK_ROWS = 8192


def iter_aligned_chunks(
    embeddings: Any, labels: Any = None, logits: Any = None, subclass_labels: Any = None
) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]]:
    """Yield (embeddings, labels, logits, subclass_labels) chunk by chunk.

    Args:
        embeddings: an array (N, width), or an iterable of such; so are the others, which may be whole arrays beside
            chunks, of one row an example in the same order, or None.

    Raises:
        SubclassError: numbers of rows that differ.
    """
    if hasattr(embeddings, "shape"):
        whole = as_tensor(embeddings)
        if whole.ndim != 2:
            raise SubclassError(f"Embeddings of the shape (N, width) were expected; found {tuple(whole.shape)}.")
        parts: Iterable[Tensor] = whole.split(CHUNK_ROWS)
    else:
        parts = (_to_rows(each, as_tensor) for each in embeddings)
    beside = [_AlignedChunks(labels, as_labels), _AlignedChunks(logits), _AlignedChunks(subclass_labels)]
    for part in parts:
        first, second, third = (each.next(len(part)) for each in beside)
        yield part, first, second, third
    for each in beside:
        each.end()


class _AlignedChunks:
    """An array, or an iterable of chunks, taken in step with the embeddings."""

    def __init__(self, given: Any, read: "Callable[[Any], Tensor] | None" = None):
        self._read = read or as_tensor
        self._whole = self._read(given) if hasattr(given, "shape") or _is_number_sequence(given) else None
        self._chunks = iter(given) if given is not None and self._whole is None else None
        self._taken = 0

    def next(self, rows: int) -> Tensor | None:
        if self._whole is not None:
            found = self._whole[self._taken : self._taken + rows]
        elif self._chunks is not None:
            found = _to_rows(next(self._chunks, torch.zeros(0)), self._read)
        else:
            return None
        self._taken += rows
        if len(found) != rows:
            raise SubclassError(
                f"{self._taken} embeddings came with {self._taken - rows + len(found)} labels or logits."
            )
        return found

    def end(self) -> None:
        if self._whole is not None and len(self._whole) != self._taken:
            raise SubclassError(f"{self._taken} embeddings came with {len(self._whole)} labels or logits.")
        left = 0 if self._chunks is None else sum(len(_to_rows(each, self._read)) for each in islice(self._chunks, 1))
        if left:
            raise SubclassError(f"{self._taken} embeddings came with {self._taken + left} labels or logits, or more.")


def as_tensor(array: Any) -> Tensor:
    """Return a tensor of a tensor, a NumPy array, or what either can be made of, such as a table of pandas.

    Raises:
        SubclassError: it is no array of numbers.
    """
    if isinstance(array, Tensor):
        return array.detach()
    try:
        if hasattr(array, "__array__") and not isinstance(array, numpy.ndarray):
            array = numpy.array(array)  # a copy: a table's own memory may not be written
        return torch.as_tensor(array)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SubclassError(f"An array of numbers was expected, not a {type(array).__name__}: {error}") from error


def as_labels(labels: Any) -> Tensor:
    """Return labels as a tensor, False and True as 0 and 1, None among others as -1.

    Raises:
        SubclassError: they are no numbers.
    """
    if _is_number_sequence(labels):
        labels = [MISSING_LABELS[0] if each is None else each for each in labels]
    found = as_tensor(labels)
    return found.long() if found.dtype == torch.bool else found


def check_integer_labels(labels: Tensor, what: str) -> None:
    """Refuse labels of a dtype that is not of whole numbers.

    Raises:
        SubclassError: names the dtype.
    """
    if labels.is_floating_point() or labels.is_complex():
        raise SubclassError(f"{what} are whole numbers; found {labels.dtype}. Map them to numbers from 0 on.")


def check_integer(name: str, value: Any, least: int = 1) -> int:
    """Return a whole number of at least `least`, of Python or NumPy, as one of Python.

    Raises:
        OptionError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise OptionError(f"{name} is a whole number of at least {least}; found {value!r}.")
    return int(value)


def check_positive(name: str, value: Any) -> float:
    """Return a positive number, of Python or NumPy, as one of Python.

    Raises:
        OptionError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < float(value) < math.inf:
        raise OptionError(f"{name} is a positive number; found {value!r}.")
    return float(value)


def _to_rows(chunk: Any, read: Callable[[Any], Tensor]) -> Tensor:
    found = read(chunk)
    if not found.ndim:
        raise SubclassError(
            f"Chunks of several examples were expected; found the single number {found.item()}. Give one array of them all."
        )
    return found


def _is_number_sequence(given: Any) -> bool:
    """Whether these are single numbers, or None for a missing one, in a list or another sequence without a shape."""
    if hasattr(given, "shape") or not isinstance(given, Sequence) or isinstance(given, (str, bytes)) or not len(given):
        return False
    return all(each is None or isinstance(each, numbers.Number) or getattr(each, "ndim", None) == 0 for each in given)
