"""What the classes of a classifier's data are called, and which number each has in the student."""

from collections.abc import Callable, Sequence
from typing import Any

from datasets import ClassLabel, Dataset, List

from hf_guide.distillation.tasks import IGNORED
from hf_guide.errors import OptionError


def class_names(dataset: Dataset, column: str) -> list[str] | None:
    """Return the names of the classes in a column of labels, or of lists of labels; None where they are only numbers.

    Raises:
        OptionError: the labels are no classes.
    """
    feature = dataset.features[column]
    feature = feature.feature if isinstance(feature, List) else feature
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    kind = getattr(feature, "dtype", str(feature))
    if kind in ("string", "large_string"):
        return sorted(_values(dataset, column))
    if kind == "bool":
        return ["False", "True"]
    if not kind.startswith(("int", "uint")):
        raise OptionError(f"The column {column!r} is of {kind}; classes are whole numbers or names.")
    return None


def count_classes(dataset: Dataset, column: str) -> int:
    """Return one more than the largest number in a column of labels, or of lists of labels."""
    return 1 + max(_values(dataset, column))


def _values(dataset: Dataset, column: str) -> set[Any]:
    found: set[Any] = set()
    for batch in dataset.select_columns([column]).iter(batch_size=1000):
        for value in batch[column]:
            found.update(value if isinstance(value, list) else [value])
    return found


def label_numbers(names: Sequence[str] | None, labels: Sequence[str] | None, column: str) -> Callable[[Any], int]:
    """Return what makes a value of a column of labels the number of the student's class.

    Args:
        names: of the classes in the data, by number; None where they have none.
        labels: of the student's classes in their order; None where the data's numbers stand.
        column: for errors.

    Raises:
        OptionError: a class of the data that the student does not know, both lists shown.
    """
    if labels is None or are_generic(labels):
        count = None if labels is None else len(labels)
        if names is not None and count is not None and len(names) > count:
            raise OptionError(f"{column!r} has the {len(names)} classes {list(names)}; the student has {count}.")
        places = list(range(len(names))) if names is not None else None
    elif names is None:
        count, places = len(labels), None
    else:
        known = {name.casefold(): number for number, name in enumerate(labels)}
        unknown = [name for name in names if name.casefold() not in known]
        if unknown:
            raise OptionError(
                f"{column!r} has classes that the student does not know: {unknown}. It has {list(labels)}, the data "
                f"{list(names)}. Rename the data's, or choose a teacher with these."
            )
        count, places = len(labels), [known[name.casefold()] for name in names]
    by_name = dict(zip(names or (), places or (), strict=True))

    def number(value: Any) -> int:
        if isinstance(value, str):
            if value not in by_name:
                raise OptionError(
                    f"{column!r} has the class {value!r}, which is not among {list(by_name)} of the training."
                )
            return by_name[value]
        most = count if places is None else len(places)
        if value != IGNORED and (value < 0 or (most is not None and value >= most)):
            raise OptionError(f"{column!r} has the class {value}; there are {most}, from 0.")
        return int(value) if places is None or value == IGNORED else places[int(value)]

    return number


def are_generic(labels: Sequence[str]) -> bool:
    """Whether a config's labels are only numbered, LABEL_0 and so on, which says nothing."""
    return all(label == f"LABEL_{number}" for number, label in enumerate(labels))
