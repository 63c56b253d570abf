"""The classes of a dataset and their indices in the student."""

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

from datasets import ClassLabel, Dataset, List
from transformers import PreTrainedConfig

from hf_guide.errors import OptionError
from hf_guide.utils.labels import IGNORE_INDEX


def student_labels(
    train: Dataset,
    column: str,
    student: PreTrainedConfig | None,
    teacher: PreTrainedConfig | None,
    *,
    is_new_head: bool,
) -> list[str]:
    """Return the names of a student's classes in order: its own, otherwise its teacher's, otherwise the dataset's.

    Args:
        train: Raw training split.
        column: Its column of labels.
        student, teacher: Configs of classifiers; None for one that does not exist or is not a classifier.
        is_new_head: Whether an existing model gets a new head, which may use the dataset's names where the teacher's classes
            are only numbered.
    """
    names = class_names(train, column)
    config = student if student is not None else teacher
    if config is None:
        return names or [f"LABEL_{index}" for index in range(count_classes(train, column))]
    id2label: Any = config.id2label
    labels = [str(id2label[index]) for index in sorted(id2label)]
    replaceable = student is None and is_new_head and has_generic_names(labels)
    return names if replaceable and names is not None and len(names) == len(labels) else labels


def label_encoder(names: Sequence[str] | None, labels: Sequence[str] | None, column: str) -> Callable[[Any], int]:
    """Return a function from a value of the label column to the index of the student's class; None becomes -100.

    Args:
        names: Class names of the dataset, by index; None if it has none.
        labels: Names of the student's classes, in order; None keeps the dataset's indices.
        column: Name of the column, for errors.

    Raises:
        OptionError: The dataset has a class that the student does not have.

    Example:
        >>> encode = label_encoder(["bad", "good"], ["good", "bad"], "label")
        >>> encode("bad"), encode(1), encode(None)
        (1, 0, -100)
    """
    if labels is None or has_generic_names(labels):
        count = None if labels is None else len(labels)
        if names is not None and count is not None and len(names) > count:
            raise OptionError(f"{column!r} has the {len(names)} classes {list(names)}; the student has {count}.")
        indices = list(range(len(names))) if names is not None else None
    elif names is None:
        count, indices = len(labels), None
    else:
        by_label = {label.casefold(): index for index, label in enumerate(labels)}
        unknown = [name for name in names if name.casefold() not in by_label]
        if unknown:
            raise OptionError(
                f"{column!r} has classes that the student does not have: {unknown}. The student has {list(labels)}, the "
                f"dataset {list(names)}. Rename the dataset's classes, or choose a teacher with these classes."
            )
        count, indices = len(labels), [by_label[name.casefold()] for name in names]
    by_name = dict(zip(names or (), indices or (), strict=True))

    def encode(value: Any) -> int:
        if value is None:
            return IGNORE_INDEX
        if isinstance(value, str):
            if value not in by_name:
                raise OptionError(
                    f"{column!r} has the class {value!r}, which is not among the training classes {list(by_name)}."
                )
            return by_name[value]
        if not isinstance(value, Integral):
            raise OptionError(
                f"{column!r} must contain one class, an index or a name, per item; found a {type(value).__name__}, {value!r}."
            )
        value = int(value)
        num_classes = count if indices is None else len(indices)
        if value != IGNORE_INDEX and (value < 0 or (num_classes is not None and value >= num_classes)):
            bounds = "at least 0" if num_classes is None else f"from 0 to {num_classes - 1}"
            raise OptionError(f"{column!r} has the class {value}; it must be {bounds}.")
        return value if indices is None or value == IGNORE_INDEX else indices[value]

    return encode


def has_generic_names(labels: Sequence[str]) -> bool:
    """Return whether a config's labels are Transformers' default names: LABEL_0, LABEL_1, ...

    >>> has_generic_names(["LABEL_0", "LABEL_1"])
    True
    """
    return all(label == f"LABEL_{index}" for index, label in enumerate(labels))


def class_names(dataset: Dataset, column: str) -> list[str] | None:
    """Return the class names of a column of labels or of lists of labels; None if they are only numbered.

    Raises:
        OptionError: The column does not contain classes.
    """
    feature = dataset.features[column]
    feature = feature.feature if isinstance(feature, List) else feature
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    dtype = getattr(feature, "dtype", str(feature))
    if dtype in ("string", "large_string"):
        return sorted(_unique_values(dataset, column))
    if dtype == "bool":
        return ["False", "True"]
    if not dtype.startswith(("int", "uint")):
        raise OptionError(f"The column {column!r} has the type {dtype}; classes must be whole numbers or names.")
    return None


def count_classes(dataset: Dataset, column: str) -> int:
    """Return one more than the largest index in a column of labels or of lists of labels."""
    return 1 + max(_unique_values(dataset, column))


def _unique_values(dataset: Dataset, column: str) -> set[Any]:
    values: set[Any] = set()
    for batch in dataset.select_columns([column]).iter(batch_size=1000):
        for value in batch[column]:
            values.update(value if isinstance(value, list) else [value])
    return values
