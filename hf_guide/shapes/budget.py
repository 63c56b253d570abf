"""A student's budget: parameters, active parameters, or memory."""

import re
from dataclasses import dataclass
from typing import Any

from hf_guide.errors import OptionError
from hf_guide.validation import check_integer

TOLERANCE = 0.02
"""How far a student may be from its budget, as a share of it; a budget of memory is never exceeded."""

DEFAULT_CACHE_LENGTH = 2048
"""Positions of the key-value cache that a budget of memory counts."""

_COUNT_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
_BYTE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_QUANTITY = re.compile(r"\s*(\d+(?:[._]\d+)*)\s*([A-Za-z%]*)\s*")


@dataclass(frozen=True)
class Budget:
    """What a student may cost; at least one of the first three is set.

    Attributes:
        num_parameters: Number of parameters, tied ones counted once.
        active_parameters: Parameters that one token passes in a mixture of experts.
        memory: Bytes of the weights and of the key-value cache for `cache_length` positions.
        cache_length: Positions of the cache; None for `DEFAULT_CACHE_LENGTH`, or as many as the model has if these are fewer.
    """

    num_parameters: int | None = None
    active_parameters: int | None = None
    memory: int | None = None
    cache_length: int | None = None

    @classmethod
    def parse(
        cls,
        num_parameters: "int | str | None" = None,
        active_parameters: "int | str | None" = None,
        memory: "int | str | None" = None,
        cache_length: int | None = None,
        *,
        teacher_parameters: int,
    ) -> "Budget | None":
        """Return the budget that the options of `from_teacher` state; None where they state none.

        Args:
            teacher_parameters: Of which a percentage is taken.

        Raises:
            OptionError: An option that does not parse, or `cache_length` without `memory`.

        Example:
            >>> Budget.parse("25%", teacher_parameters=1000).num_parameters
            250
            >>> Budget.parse(memory="1.5MB", teacher_parameters=1000).memory
            1500000
        """
        if cache_length is not None and memory is None:
            raise OptionError("cache_length is of use only with memory=; leave it out, or set memory.")
        if num_parameters is None and active_parameters is None and memory is None:
            return None
        return cls(
            _parse_count("num_parameters", num_parameters, teacher_parameters),
            _parse_count("active_parameters", active_parameters, teacher_parameters),
            _parse_bytes(memory),
            None if cache_length is None else check_integer("cache_length", cache_length),
        )

    def num_cached(self, positions: int | None) -> int:
        """Return how many positions of a model the cache is counted for.

        Args:
            positions: Those that the model has for the tokens that it generates; None for no limit.

        Raises:
            OptionError: `cache_length` is more than the model has.

        Example:
            >>> Budget(memory=10**6).num_cached(448), Budget(memory=10**6).num_cached(None)
            (448, 2048)
        """
        limit = DEFAULT_CACHE_LENGTH if positions is None else positions
        if self.cache_length is None:
            return min(limit, DEFAULT_CACHE_LENGTH)
        if positions is not None and self.cache_length > positions:
            raise OptionError(
                f"cache_length={self.cache_length} is more than the {positions} positions that the model has: pass at most "
                "these, or give the student more."
            )
        return self.cache_length

    def entries(self) -> dict[str, int]:
        """Return what is set, by its name; what the MLP is solved for is first."""
        entries = {
            "active_parameters": self.active_parameters,
            "num_parameters": self.num_parameters,
            "memory": self.memory,
        }
        return {name: value for name, value in entries.items() if value is not None}

    def __str__(self) -> str:
        return ", ".join(f"{name}={value:,}" for name, value in self.entries().items())


def _parse_count(option: str, value: Any, whole: int) -> int | None:
    if value is None:
        return None
    example = "a whole number, or a text such as '23M', '1.5B' or '25%' (of the teacher's parameters)"
    if isinstance(value, float) and not value.is_integer():
        raise OptionError(f"{option} must be {example}; found {value!r}.{_as_percentage(value)}")
    if not isinstance(value, str):
        return check_integer(option, value)
    number, unit = _split_unit(option, value, example)
    if unit == "%":
        if not 0 < number <= 100:
            raise OptionError(f"{option} must be above 0 % and at most 100 % of the teacher's; found {value!r}.")
        return max(1, round(number / 100 * whole))
    count = number * _COUNT_UNITS.get(unit.upper(), 0)
    if count < 1 or not unit and not number.is_integer():
        raise OptionError(f"{option} must be {example}; found {value!r}.{'' if unit else _as_percentage(number)}")
    return round(count)


def _as_percentage(share: float) -> str:
    """Return how to write a share of the teacher's parameters; "" for what is none."""
    return f" For that share of the teacher's parameters, write '{100 * share:g}%'." if 0 < share < 1 else ""


def _parse_bytes(value: Any) -> int | None:
    if value is None:
        return None
    if not isinstance(value, str):
        return check_integer("memory", value)
    example = "a number of bytes, or a text such as '500MB' or '1.5GiB'"
    number, unit = _split_unit("memory", value, example)
    size = number * _BYTE_UNITS.get(unit.upper(), 0)
    if size < 1:
        raise OptionError(f"memory must be {example}; found {value!r}.")
    return round(size)


def _split_unit(option: str, value: str, example: str) -> tuple[float, str]:
    match = _QUANTITY.fullmatch(value)
    try:
        return float(match[1]), match[2]  # type: ignore[index]
    except (TypeError, ValueError):
        raise OptionError(f"{option} must be {example}; found {value!r}.") from None
