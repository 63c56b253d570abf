"""The classes of a dataset and their indices in the student."""

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

from datasets import ClassLabel, Dataset, List
from transformers import PreTrainedConfig

from hf_guide.errors import OptionError
from hf_guide.tasks import OutputKind, Task, output_kind
from hf_guide.utils.labels import IGNORE_INDEX


def student_labels(
    train: Dataset,
    column: str,
    student: PreTrainedConfig | None,
    teacher: PreTrainedConfig | None,
    *,
    is_new_head: bool,
    kind: OutputKind = OutputKind.CATEGORICAL,
) -> list[str]:
    """Return the names of a student's classes in order: its own, otherwise its teacher's, otherwise the dataset's.

    Args:
        train: Raw training split.
        column: Its column of labels.
        student, teacher: Configs of classifiers; None for one that does not exist or is not a classifier.
        is_new_head: Whether an existing model gets a new head, which may use the dataset's names where the teacher's classes
            are only numbered.
        kind: What the labels are, as from `value_kind`.
    """
    names = None if kind is OutputKind.REAL else class_names(train, column)
    config = student if student is not None else teacher
    if config is None and kind is OutputKind.REAL:
        return ["LABEL_0"]
    if config is None:
        return names or [f"LABEL_{index}" for index in range(count_classes(train, column))]
    id2label: Any = config.id2label
    labels = [str(id2label[index]) for index in sorted(id2label)]
    replaceable = student is None and is_new_head and has_generic_names(labels)
    return names if replaceable and names is not None and len(names) == len(labels) else labels


def value_kind(train: Dataset, column: str, task: Task, configs: Sequence[PreTrainedConfig | None]) -> OutputKind:
    """Return what the values of a label column are: classes, lists of classes, or real numbers.

    Args:
        train: Raw training split.
        column: Its column of labels.
        task: Whose labels they are; only those of whole examples can be lists or real numbers.
        configs: Of the models for the task that exist; their outputs decide what is expected.

    Raises:
        OptionError: The column has other values than the models predict.
    """
    if task.is_per_token or task.row.outputs[0].items != "example":
        return OutputKind.CATEGORICAL
    feature = train.features[column]
    dtype = str(getattr(feature, "dtype", ""))
    found = OutputKind.CATEGORICAL
    if isinstance(feature, List):
        found = OutputKind.BERNOULLI
    elif dtype.startswith(("float", "double", "decimal")):
        found = OutputKind.REAL
    for config in filter(None, configs):
        expected = output_kind(task, config)
        if expected is OutputKind.REAL and dtype.startswith(("int", "uint")) and not isinstance(feature, ClassLabel):
            found = OutputKind.REAL
        if expected is not found:
            raise OptionError(
                f"The column {column!r} contains {_VALUES[found]}, and {config._name_or_path or type(config).__name__} "
                f"predicts {_VALUES[expected]}. Set label_column to a column of those, or use a model with the problem_type "
                f"of {_VALUES[found]}."
            )
    return found


_VALUES = {
    OutputKind.CATEGORICAL: "one class for each example",
    OutputKind.BERNOULLI: "a list of classes for each example",
    OutputKind.REAL: "real numbers",
}


def value_encoder(kind: OutputKind, train: Dataset, column: str, labels: Sequence[str] | None) -> Callable[[Any], Any]:
    """Return a function from a value of the label column to what the model's loss takes.

    Args:
        kind: As from `value_kind`: an index of a class, a float for each class (1 if it is in the list), or a float.
        train: Raw training split.
        column: Its column of labels.
        labels: Names of the student's classes, in order; None keeps the dataset's indices.
    """
    if kind is OutputKind.REAL:
        return lambda value: _real_number(value, column)
    encode = label_encoder(class_names(train, column), labels, column)
    if kind is OutputKind.CATEGORICAL:
        return encode
    names = class_names(train, column)
    count = len(labels or names or range(count_classes(train, column)))

    def encode_list(values: Any) -> list[float]:
        chosen = [encode(value) for value in values] if isinstance(values, list) else [IGNORE_INDEX]
        if IGNORE_INDEX in chosen or len(set(chosen)) < len(chosen):
            raise OptionError(
                f"{column!r} must contain a list of different classes, by name or index, for each example; found {values!r}."
            )
        return [float(index in chosen) for index in range(count)]

    return encode_list


def _real_number(value: Any, column: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise OptionError(f"{column!r} must contain a finite number for each example; found {value!r}.")
    return float(value)


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
