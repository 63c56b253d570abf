"""Every check of an option: each returns the value in its canonical form, or raises an OptionError that names the option.

Does: check numbers, choices, mappings and what is passed as a dataset; suggest the nearest valid name.
Does not: check tensors (`utils/finite.py`), files or models.
"""

import difflib
import json
import math
import os
from collections.abc import Iterable, Mapping
from enum import Enum
from numbers import Integral, Real
from typing import Any

from hf_guide.errors import OptionError

TEMPERATURE_RANGE = (1e-3, 1e3)
"""Below, logits divided by it overflow; above, float32 no longer distinguishes a softmax from the uniform distribution."""

MAX_WEIGHT = 1e6


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `" Did you mean 'x' or 'y'?"`, or an empty string where no known name is close to `word`.

    Example:
        >>> did_you_mean("temperatur", ["temperature", "beta"])
        " Did you mean 'temperature'?"
    """
    near = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(name) for name in near)}?" if near else ""


def instead_of_dataset(dataset: Any) -> str | None:
    """Return what to pass instead of a table or a mapping of columns or datasets; None where it is neither.

    These have a length and can be iterated, which yields names instead of examples.

    Example:
        >>> instead_of_dataset({"text": ["a", "b"]})
        'Pass datasets.Dataset.from_dict(...) of it.'
        >>> instead_of_dataset({"train": [{"text": "a"}], "test": [{"text": "b"}]})
        "Pass one of its entries ['train', 'test']."
    """
    if hasattr(dataset, "itertuples"):  # of pandas
        return "Pass datasets.Dataset.from_pandas(...) of it."
    if not isinstance(dataset, Mapping):
        return None
    if all(map(_is_column, dataset.values())):
        return "Pass datasets.Dataset.from_dict(...) of it."
    return f"Pass one of its entries {list(map(str, dataset))}."


def _is_column(values: Any) -> bool:
    is_list = isinstance(values, (list, tuple)) and not any(isinstance(value, Mapping) for value in values[:1])
    return is_list or hasattr(values, "dtype")


def check_is_dataset(dataset: Any, name: str) -> None:
    """Check that examples are passed, and not a name, a table, or a mapping of columns or datasets.

    Args:
        dataset: What was passed.
        name: The name of the parameter.

    Raises:
        OptionError: States what to pass instead.
    """
    if isinstance(dataset, (str, bytes, os.PathLike)):
        raise OptionError(
            f"{name} must contain processed examples; found the {type(dataset).__name__} {str(dataset)!r}. Load it first, "
            "as by datasets.load_dataset, and process it as for training."
        )
    advice = instead_of_dataset(dataset)
    if advice is not None:
        raise OptionError(f"{name} must be a dataset of examples; found a {type(dataset).__name__}. {advice}")


def check_known_fields(options: Any, names: Iterable[str]) -> None:
    """Check that every keyword is a field of a dataclass of options.

    Raises:
        OptionError: Names the keyword, the nearest field and all fields.
    """
    known = list(options.__dataclass_fields__)
    for name in names:
        if name not in known:
            raise OptionError(
                f"{options.__name__} has no {name!r}; expected some of {known}.{did_you_mean(name, known)}"
            )


def check_choice(option: str, value: Any, choices: "type[Enum] | Iterable[str]") -> str:
    """Return one of several texts; members of an enum of texts count as their value.

    Raises:
        OptionError: It is none of them; names the nearest.

    Example:
        >>> check_choice("distance", "cosine", ["mse", "cosine"])
        'cosine'
    """
    known = [str(each.value if isinstance(each, Enum) else each) for each in choices]
    text = value.value if isinstance(value, Enum) else value
    if isinstance(text, str) and text in known:
        return text
    raise OptionError(f"{option}={value!r} is not known; expected one of {known}.{did_you_mean(str(text), known)}")


def check_mapping(option: str, value: Any, *, like: str = "") -> dict[str, Any]:
    """Return a mapping as a dict; text is parsed as JSON, as the command line passes it.

    Args:
        option: Its name, for the error.
        value: A mapping, or JSON of one.
        like: An example in JSON, for the error.

    Raises:
        OptionError: It is neither.
    """
    example = f", such as {like}" if like else ""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise OptionError(
                f"{option} must be a mapping{example}; found {value!r}, which is not JSON ({error})."
            ) from error
    if not isinstance(value, Mapping):
        raise OptionError(f"{option} must be a mapping{example}; found {value!r}.")
    return dict(value)


def check_bool(option: str, value: Any) -> bool:
    """Return True or False.

    Raises:
        OptionError: It is neither.
    """
    if isinstance(value, bool):
        return value
    raise OptionError(f"{option} must be True or False; found {value!r}.")


def check_number(
    option: str, value: Any, low: float, high: float, *, includes_low: bool = True, includes_high: bool = True
) -> float:
    """Return a finite real number between two bounds.

    Args:
        option: Its name, for the error.
        value: What was passed. Booleans and texts are not numbers; NumPy's numbers are.
        low, high: The bounds; each is valid itself unless `includes_low` or `includes_high` is False.

    Raises:
        OptionError: It is not a number, is not finite, or is outside the bounds.

    Example:
        >>> check_number("temperature", 2, 0.001, 1000)
        2.0
    """
    if isinstance(value, Real) and not isinstance(value, bool):
        number = float(value)
        above = low <= number if includes_low else low < number
        below = number <= high if includes_high else number < high
        if math.isfinite(number) and above and below:
            return number
    first, last = "from" if includes_low else "above", "to" if includes_high else "and below"
    raise OptionError(f"{option} must be a number {first} {low:g} {last} {high:g}; found {value!r}.")


def check_positive(option: str, value: Any) -> float:
    """Return a finite number above 0.

    Raises:
        OptionError: It is not one.
    """
    if isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) < math.inf:
        return float(value)
    raise OptionError(f"{option} must be a positive number; found {value!r}.")


def check_integer(option: str, value: Any, low: int = 1, high: int | None = None) -> int:
    """Return a whole number of at least `low`, and at most `high`.

    Raises:
        OptionError: It is not a whole number, or is out of range.

    Example:
        >>> check_integer("num_subclasses", 4)
        4
    """
    if isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value):
        if high is None or int(value) <= high:
            return int(value)
    bounds = f"of at least {low}" if high is None else f"from {low} to {high}"
    raise OptionError(f"{option} must be a whole number {bounds}; found {value!r}.")


def check_temperature(option: str, value: Any) -> float:
    """Return a temperature of a softmax.

    Raises:
        OptionError: It is not a number, or is outside `TEMPERATURE_RANGE`.
    """
    return check_number(option, value, *TEMPERATURE_RANGE)


def check_weight(option: str, value: Any) -> float:
    """Return a weight, from 0 to `MAX_WEIGHT`.

    Raises:
        OptionError: It is not a number, or is out of range.
    """
    return check_number(option, value, 0.0, MAX_WEIGHT)


class StringEnum(str, Enum):
    """Named choices; each accepts its plain string, and is written as it.

    Example:
        >>> class Color(StringEnum):
        ...     RED = "red"
        >>> str(Color.RED), Color.parse("red", "color") is Color.RED
        ('red', True)
    """

    @classmethod
    def parse(cls, value: "str | StringEnum", option: str) -> "StringEnum":
        """Return the member that `value` names.

        Raises:
            OptionError: Unknown value; names the nearest one.
        """
        return cls(check_choice(option, value, cls))

    def __str__(self) -> str:
        return str(self.value)
