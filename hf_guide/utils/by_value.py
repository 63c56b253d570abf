"""Make configs arguments of functions whose results are kept, with `functools.lru_cache`: by the values that they have."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from transformers import PreTrainedConfig

T = TypeVar("T")


@dataclass(frozen=True)
class ByValue(Generic[T]):
    """An argument that is equal to another if both are written alike.

    It holds the argument itself, so that no other object gets an address by which a part of it is written.

    Attributes:
        text: How the argument is written.
        value: The argument.
    """

    text: str
    value: T = field(compare=False)

    @classmethod
    def of(cls, value: T) -> "ByValue[T]":
        """Return a config, or a mapping or a sequence of configs, classes and other values, as such an argument.

        Example:
            >>> from transformers import LlamaConfig
            >>> ByValue.of(LlamaConfig()) == ByValue.of(LlamaConfig())
            True
            >>> ByValue.of({"sizes": (1, 2)}) == ByValue.of({"sizes": [1, 2]})
            False
        """
        return cls(_write(value), value)


def _write(value: object) -> str:
    if isinstance(value, PreTrainedConfig):
        return f"{_write(type(value))}({_write(vars(value))})"
    if isinstance(value, type):
        return f"{value.__qualname__} at {id(value)}"  # code of a checkpoint may define another class of this name
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_write(each)}" for key, each in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}[{', '.join(map(_write, value))}]"
    return repr(value)
