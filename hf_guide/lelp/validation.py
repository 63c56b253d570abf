"""Arrays as users pass them (tensors, NumPy, lists, pandas; whole or in chunks) and the class of each example, checked."""

import numbers
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy
import torch
from torch import Tensor

from hf_guide.errors import SubclassError
from hf_guide.utils.finite import non_finite_rows

MISSING_LABELS = (-1, -100)
CHUNK_ROWS = 8192


def iter_aligned_chunks(
    embeddings: Any, labels: Any = None, logits: Any = None, fine_labels: Any = None
) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]]:
    """Yield (embeddings, labels, logits, fine_labels) chunk by chunk.

    Args:
        embeddings: An array (N, width), or an iterable of such. The others have one row an example in the same order; they
            may be whole arrays where the embeddings are chunks, or None.

    Raises:
        SubclassError: The numbers of rows differ.
    """
    if hasattr(embeddings, "shape"):
        whole = as_tensor(embeddings)
        if whole.ndim != 2:
            raise SubclassError(f"Embeddings must have the shape (N, width); found {tuple(whole.shape)}.")
        chunks: Iterable[Tensor] = whole.split(CHUNK_ROWS)
    else:
        chunks = (_to_rows(chunk, as_tensor) for chunk in embeddings)
    columns = [_AlignedChunks(labels, as_labels), _AlignedChunks(logits), _AlignedChunks(fine_labels)]
    for chunk in chunks:
        first, second, third = (column.next(len(chunk)) for column in columns)
        yield chunk, first, second, third
    for column in columns:
        column.check_exhausted()


class _AlignedChunks:
    """An array or an iterable of chunks, read in step with the embeddings."""

    def __init__(self, values: Any, convert: Callable[[Any], Tensor] | None = None):
        self._convert = convert or as_tensor
        self._whole = self._convert(values) if hasattr(values, "shape") or _is_number_sequence(values) else None
        self._chunks = iter(values) if values is not None and self._whole is None else None
        self._num_read = 0

    def next(self, rows: int) -> Tensor | None:
        if self._whole is not None:
            chunk = self._whole[self._num_read : self._num_read + rows]
        elif self._chunks is not None:
            chunk = _to_rows(next(self._chunks, torch.zeros(0)), self._convert)
        else:
            return None
        self._num_read += rows
        if len(chunk) != rows:
            raise SubclassError(
                f"{self._num_read} embeddings came with {self._num_read - rows + len(chunk)} labels or logits; each example "
                "needs one."
            )
        return chunk

    def check_exhausted(self) -> None:
        if self._whole is not None and len(self._whole) != self._num_read:
            raise SubclassError(
                f"{self._num_read} embeddings came with {len(self._whole)} labels or logits; each needs an example."
            )
        chunks = () if self._chunks is None else islice(self._chunks, 1)
        extra = sum(len(_to_rows(chunk, self._convert)) for chunk in chunks)
        if extra:
            raise SubclassError(
                f"{self._num_read} embeddings came with {self._num_read + extra} labels or logits, or more; each needs an "
                "example."
            )


def as_tensor(array: Any) -> Tensor:
    """Return a tensor, a NumPy array or what converts to either, such as a pandas table, as a tensor.

    Raises:
        SubclassError: Not an array of numbers.

    Example:
        >>> as_tensor([[1.0, 2.0]]).shape
        torch.Size([1, 2])
    """
    if isinstance(array, Tensor):
        return array.detach()
    try:
        if hasattr(array, "__array__") and not isinstance(array, numpy.ndarray):
            array = numpy.array(array)  # a copy: a table's own memory may be read-only
        return torch.as_tensor(array)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SubclassError(f"An array of numbers was expected, not a {type(array).__name__}: {error}") from error


def as_labels(labels: Any) -> Tensor:
    """Return labels as a tensor; False and True become 0 and 1, and None in a list -1.

    Raises:
        SubclassError: Not numbers.

    Example:
        >>> as_labels([2, None, 0])
        tensor([ 2, -1,  0])
    """
    if _is_number_sequence(labels):
        labels = [MISSING_LABELS[0] if label is None else label for label in labels]
    tensor = as_tensor(labels)
    return tensor.long() if tensor.dtype == torch.bool else tensor


def resolve_classes(
    labels: Any, logits: Tensor | None, rows: int, num_classes: int, numbers: Sequence[int] | None = None
) -> Tensor:
    """Return each example's class, (rows,): its label or, where it has none, the class that the teacher predicts.

    Args:
        labels: (rows,), whole numbers; None, -1 and -100 mark missing ones, and None means that all are missing.
        logits: (rows, num_classes), needed where a label is missing.
        numbers: What to call the rows in an error; None counts from 0.

    Raises:
        SubclassError: Labels of another shape or outside the classes, which it names; a missing label without finite logits
            of this shape.
    """
    names = range(rows) if numbers is None else numbers
    if labels is None:
        return _teacher_argmax(logits, rows, num_classes, names)
    classes = as_labels(labels)
    if classes.shape != (rows,) or classes.is_floating_point() or classes.is_complex():
        raise SubclassError(
            f"Labels must be whole numbers, one an example, ({rows},); found {tuple(classes.shape)} of {classes.dtype}."
        )
    classes = classes.long()
    missing = torch.isin(classes, torch.tensor(MISSING_LABELS, device=classes.device))
    check_class_range(classes.masked_fill(missing, 0), num_classes, names)
    if not bool(missing.any()):
        return classes
    return torch.where(missing, _teacher_argmax(logits, rows, num_classes, names).to(classes.device), classes)


def _teacher_argmax(logits: Tensor | None, rows: int, num_classes: int, numbers: Sequence[int]) -> Tensor:
    """Return the class that the teacher predicts for each example, (rows,)."""
    if logits is None:
        raise SubclassError(
            "Examples without labels are grouped by the class that the teacher predicts: give its logits, or labels for all."
        )
    if logits.shape != (rows, num_classes):
        raise SubclassError(f"Logits must have the shape ({rows}, {num_classes}); found {tuple(logits.shape)}.")
    # Minus infinity is fine: a class may be ruled out.
    check_finite_rows(logits.nan_to_num(nan=torch.nan, neginf=0.0), numbers, "logits")
    return logits.argmax(1)


def check_integer_labels(labels: Tensor, what: str) -> None:
    """Check that labels have an integer dtype.

    Raises:
        SubclassError: States the dtype.
    """
    if labels.is_floating_point() or labels.is_complex():
        raise SubclassError(f"{what} must be whole numbers; found {labels.dtype}. Map them to numbers from 0 on.")


def check_finite_rows(values: Tensor, numbers: Sequence[int], what: str) -> None:
    """Check that rows hold neither NaN nor infinity.

    Raises:
        SubclassError: Names the first example that does.
    """
    wrong = non_finite_rows(values)
    if len(wrong):
        raise SubclassError(
            f"The {what} of example {numbers[int(wrong[0])]} holds NaN or infinity, as {len(wrong)} of {len(values)} do. "
            "Look at this example, or run the teacher in a wider dtype."
        )


def check_class_range(classes: Tensor, num_classes: int, numbers: Sequence[int]) -> None:
    """Check that classes (rows,) are among the teacher's.

    Raises:
        SubclassError: Names the first example whose class is not.
    """
    wrong = (classes < 0) | (classes >= num_classes)
    if bool(wrong.any()):
        row = int(wrong.int().argmax())
        raise SubclassError(
            f"The label of example {numbers[row]} is {int(classes[row])}; the teacher has the classes 0 to "
            f"{num_classes - 1}. Map the labels to the teacher's, or leave them out: then the class it predicts counts."
        )


def _to_rows(chunk: Any, convert: Callable[[Any], Tensor]) -> Tensor:
    rows = convert(chunk)
    if not rows.ndim:
        raise SubclassError(
            f"Chunks of several examples were expected; found the single number {rows.item()}. Give one array of them all."
        )
    return rows


def _is_number_sequence(values: Any) -> bool:
    """Whether these are single numbers, or None for a missing one, in a list or another sequence without a shape."""
    if (
        hasattr(values, "shape")
        or not isinstance(values, Sequence)
        or isinstance(values, (str, bytes))
        or not len(values)
    ):
        return False
    return all(
        value is None or isinstance(value, numbers.Number) or getattr(value, "ndim", None) == 0 for value in values
    )
