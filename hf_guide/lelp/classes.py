"""Which class each example is of: that of its label or, where it has none, the teacher's own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_guide.errors import SubclassError
from hf_guide.lelp.moments import check_class_range, check_finite_rows
from hf_guide.lelp.validation import MISSING_LABELS, as_labels


def resolve_classes(
    labels: Any, logits: Tensor | None, rows: int, num_classes: int, numbers: Sequence[int] | None = None
) -> Tensor:
    """Return each example's class, (rows,).

    Args:
        labels: (rows,), whole numbers; None, -1 and -100, or None for all, stand for the teacher's own class.
        logits: (rows, num_classes), needed where there is no label.
        numbers: what to call the rows in an error; by default they count from 0.

    Raises:
        SubclassError: labels of another shape or outside the classes, which it names; no logits, of this shape and finite,
            where a label is missing.
    """
    names = range(rows) if numbers is None else numbers
    if labels is None:
        return _teacher_argmax(logits, rows, num_classes, names)
    found = as_labels(labels)
    if found.shape != (rows,) or found.is_floating_point() or found.is_complex():
        raise SubclassError(
            f"Labels are whole numbers, one an example, ({rows},); found {tuple(found.shape)} of {found.dtype}."
        )
    found = found.long()
    missing = torch.isin(found, torch.tensor(MISSING_LABELS, device=found.device))
    check_class_range(found.masked_fill(missing, 0), num_classes, names)
    if not bool(missing.any()):
        return found
    return torch.where(missing, _teacher_argmax(logits, rows, num_classes, names).to(found.device), found)


def _teacher_argmax(logits: Tensor | None, rows: int, num_classes: int, numbers: Sequence[int]) -> Tensor:
    """Return the class that the teacher gives each example, (rows,)."""
    if logits is None:
        raise SubclassError(
            "Examples without labels are grouped by the teacher's own class: give its logits, or labels for all."
        )
    if logits.shape != (rows, num_classes):
        raise SubclassError(f"Logits of the shape ({rows}, {num_classes}) were expected; found {tuple(logits.shape)}.")
    check_finite_rows(logits.nan_to_num(nan=torch.nan, neginf=0.0), numbers, "logits")  # a class may be ruled out
    return logits.argmax(1)
