"""Which number each class of the data has in the student."""

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

from hf_guide.errors import OptionError
from hf_guide.utils.labels import IGNORE_INDEX


def label_encoder(names: Sequence[str] | None, labels: Sequence[str] | None, column: str) -> Callable[[Any], int]:
    """Return what makes a value of a column of labels the number of the student's class; None, as -100, is no label.

    Args:
        names: of the classes in the data, by number; None where they have none.
        labels: of the student's classes in their order; None where the data's numbers stand.
        column: for errors.

    Raises:
        OptionError: a class of the data that the student does not know, both lists shown.
    """
    if labels is None or has_generic_names(labels):
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
        if value is None:
            return IGNORE_INDEX
        if isinstance(value, str):
            if value not in by_name:
                raise OptionError(
                    f"{column!r} has the class {value!r}, which is not among {list(by_name)} of the training."
                )
            return by_name[value]
        if not isinstance(value, Integral):
            raise OptionError(
                f"{column!r} must hold one class, a number or a name, in each place; found a {type(value).__name__}, "
                f"{value!r}."
            )
        value = int(value)
        most = count if places is None else len(places)
        if value != IGNORE_INDEX and (value < 0 or (most is not None and value >= most)):
            raise OptionError(f"{column!r} has the class {value}; there are {most}, from 0.")
        return value if places is None or value == IGNORE_INDEX else places[value]

    return number


def has_generic_names(labels: Sequence[str]) -> bool:
    """Whether a config's labels are only numbered, LABEL_0 and so on, which says nothing."""
    return all(label == f"LABEL_{number}" for number, label in enumerate(labels))
