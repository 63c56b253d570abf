"""Read a dataclass from a JSON file, and check its values against the annotations of its fields."""

import dataclasses
import json
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from hf_guide.errors import HfGuideError

T = TypeVar("T")


def read_json_record(path: Path, parse: Callable[[dict[str, Any]], T], what: str, advice: str) -> T:
    """Return the dataclass in a JSON file.

    Args:
        path: The file.
        parse: Makes the dataclass from the file's content.
        what: What the file is, for errors, such as "an initialization report".
        advice: What to do if it is not, as a sentence.

    Raises:
        FileNotFoundError: There is no such file.
        HfGuideError: The file is something else, or a field has the wrong type.
    """
    try:
        record = parse(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        raise HfGuideError(
            f"{path} is not {what}, or was written by an incompatible version of hf_guide: {error}. {advice}"
        ) from error
    check_field_types(record, str(path))
    return record


def check_field_types(record: Any, where: str) -> None:
    """Check that the fields of a dataclass, and of dataclasses in it, have the types of their annotations.

    Annotations may consist of `str`, `int`, `float`, `bool`, `None`, `Any`, `list`, `dict`, `Literal`, unions and
    dataclasses.

    Raises:
        HfGuideError: A field has another type; names it, the expected type and the value.
    """
    hints = typing.get_type_hints(type(record))
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if not matches_annotation(value, hints[field.name]):
            shown = repr(value)
            shown = shown if len(shown) <= 80 else shown[:77] + "..."
            raise HfGuideError(
                f"{field.name} in {where} must be {_format_annotation(hints[field.name])}; found {shown}. The file "
                "was changed or is damaged: write it again, or remove it."
            )


def matches_annotation(value: Any, hint: Any) -> bool:
    """Return whether a value matches an annotation; an int also matches float, a bool matches neither."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if hint is None or hint is type(None):
        return value is None
    if origin in (Union, types.UnionType):
        return any(matches_annotation(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is list:
        return isinstance(value, list) and all(matches_annotation(entry, arguments[0]) for entry in value)
    if origin is dict:
        return isinstance(value, Mapping) and all(
            matches_annotation(key, arguments[0]) and matches_annotation(entry, arguments[1])
            for key, entry in value.items()
        )
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return type(value) is hint and all(
            matches_annotation(getattr(value, name), each) for name, each in hints.items()
        )
    return isinstance(value, hint)


def _format_annotation(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint)) if not typing.get_args(hint) else str(hint).replace("typing.", "")
