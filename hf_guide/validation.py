"""Checks of options that are numbers. Each returns the value in Python's own type, or raises an error that names it."""

import math
from numbers import Integral, Real
from typing import Any

from hf_guide.errors import OptionError

TEMPERATURE_RANGE = (1e-3, 1e3)
"""Below, logits divided by it overflow; above, float32 no longer tells a softmax from the uniform distribution."""

MAX_WEIGHT = 1e6


def check_number(
    option: str, value: Any, low: float, high: float, *, includes_low: bool = True, includes_high: bool = True
) -> float:
    """Return a real number that lies between two bounds.

    Args:
        option: its name, for the error.
        value: what was passed. Booleans and text are no numbers; NumPy's numbers are.
        low, high: the bounds; each counts as valid unless `includes_low` or `includes_high` is False.

    Raises:
        OptionError: it is no number, is not finite, or lies outside the bounds.
    """
    if isinstance(value, Real) and not isinstance(value, bool):
        number = float(value)
        above = low <= number if includes_low else low < number
        below = number <= high if includes_high else number < high
        if math.isfinite(number) and above and below:
            return number
    first, last = "from" if includes_low else "above", "to" if includes_high else "and below"
    raise OptionError(f"{option} must be a number {first} {low:g} {last} {high:g}; found {value!r}.")


def check_integer(option: str, value: Any, low: int = 1) -> int:
    """Return a whole number that is at least `low`.

    Raises:
        OptionError: it is no whole number, or is smaller.
    """
    if isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= low:
        return int(value)
    raise OptionError(f"{option} must be a whole number of at least {low}; found {value!r}.")


def check_temperature(option: str, value: Any) -> float:
    """Return a temperature of a softmax.

    Raises:
        OptionError: it is no number, or lies outside `TEMPERATURES`.
    """
    return check_number(option, value, *TEMPERATURE_RANGE)


def check_weight(option: str, value: Any) -> float:
    """Return a weight, from 0 to `MAX_WEIGHT`.

    Raises:
        OptionError: it is no number, or lies outside.
    """
    return check_number(option, value, 0.0, MAX_WEIGHT)
