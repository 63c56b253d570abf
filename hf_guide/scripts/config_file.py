"""Read the YAML or JSON file of a command, and the options of the command line that override it.

Does: extend Transformers' `HfArgumentParser` by what a user's file needs: errors with the nearest valid key, numbers that YAML
reads as text (1e-4), old names with a warning. Does not: check values; the dataclasses do.
"""

import argparse
import dataclasses
import json
import os
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser, TrainingArguments

from hf_guide.errors import HfGuideError, OptionError
from hf_guide.utils.deprecation import add_renamed_flags, renamed_options_of
from hf_guide.validation import did_you_mean

_ONLY_STRINGS = ("teacher", "teacher_cache", "output_dir")
"""Options of training that must not be mappings or numbers, in addition to all options of other dataclasses."""


def parse_config(
    path: str | os.PathLike[str],
    classes: Sequence[type[Any]],
    *,
    overrides: Sequence[str] = (),
    changes: "Mapping[str, Any] | None" = None,
    prog: str,
) -> tuple[Any, ...]:
    """Return one instance of each dataclass, from a file and a command line.

    Args:
        path: YAML or JSON mapping of fields of these classes.
        classes: Dataclasses without common field names.
        overrides: Command-line arguments such as `--learning_rate 1e-4`; they take precedence over the file.
        changes: Options that take precedence over the file, and not over the command line.
        prog: Name of the command, for its help.

    Raises:
        OptionError: A key is not a field (names the nearest one), or a value is invalid.
        OSError: The file cannot be read.
        SystemExit: After `--help`.
    """
    parser = _make_parser(classes, prog)
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    renamed = renamed_options_of(*classes)
    flags, in_file = parse_overrides(overrides, classes, prog=prog), _read_file(Path(path)) | dict(changes or {})
    overridden = {renamed.names.get(name, name) for name in flags}
    file_options = {name: value for name, value in in_file.items() if renamed.names.get(name, name) not in overridden}
    options = renamed.translate(file_options | flags, str(path))
    _check_keys(options, classes, Path(path))
    _check_strings({name: value for name, value in options.items() if name not in overridden}, classes)
    options = {name: _coerce(name, value, actions[name]) for name, value in options.items()}
    try:
        return parser.parse_dict(options, allow_extra_keys=False)
    except HfGuideError:
        raise
    except (ValueError, TypeError) as error:  # raised by TrainingArguments
        raise OptionError(f"{path}: {error}") from error


def read_options(path: str | os.PathLike[str], classes: Sequence[type[Any]]) -> dict[str, Any]:
    """Return the options in a YAML or JSON file, old names translated with a warning.

    Raises:
        OptionError: The file is not a mapping, or has a key that is not a field of `classes` (names the nearest one).
        OSError: The file cannot be read.
    """
    options = renamed_options_of(*classes).translate(_read_file(Path(path)), str(path))
    _check_keys(options, classes, Path(path))
    return options


def parse_overrides(words: Sequence[str], classes: Sequence[type[Any]], *, prog: str) -> dict[str, Any]:
    """Return the fields that command-line arguments set, and only those; old names are not translated.

    Raises:
        OptionError: A flag is not a field (names the nearest one), or a value is invalid.
        SystemExit: After `--help`.
    """
    parser = _make_parser(classes, prog)
    if not {"-h", "--help"} & set(words):  # help shows the defaults
        for action in parser._actions:
            action.default = argparse.SUPPRESS
    namespace, unknown = parser.parse_known_args(list(words))
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        raise OptionError(
            f"{unknown[0]!r} is not an option; overrides must be --key value."
            f"{did_you_mean(unknown[0].partition('=')[0], flags)}"
        )
    return vars(namespace)


class _ArgumentParser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise without printing the usage, which is several screens long."""
        raise OptionError(f"{message}; `{self.prog} --help` lists every option.")


def _make_parser(classes: Sequence[type[Any]], prog: str) -> HfArgumentParser:
    parser = _ArgumentParser(classes, prog=prog, allow_abbrev=False)  # type: ignore[arg-type]
    add_renamed_flags(parser, renamed_options_of(*classes))
    return parser


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        options = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
        raise OptionError(f"{path} cannot be read: {error}") from error
    if not isinstance(options, dict):
        raise OptionError(f"{path} must be a mapping of options to values; found {type(options).__name__}.")
    return options


def _check_keys(options: Mapping[str, Any], classes: Sequence[type[Any]], path: Path) -> None:
    known = [field.name for each in classes for field in dataclasses.fields(each)]
    for name in options:
        if name not in known:
            raise OptionError(f"{path} has an unknown key {name!r}.{did_you_mean(str(name), known)}")


def _check_strings(options: Mapping[str, Any], classes: Sequence[type[Any]]) -> None:
    """Check the options that must be strings, and those that may also be mappings."""
    hints = {name: hint for each in classes for name, hint in typing.get_type_hints(each).items()}
    strings = {
        field.name for each in classes if not issubclass(each, TrainingArguments) for field in dataclasses.fields(each)
    }
    for name, value in options.items():
        if name == "data_files" and not isinstance(value, (str, list, dict, type(None))):
            raise OptionError(f"data_files must be a file name, a list or a mapping of them; found {value!r}.")
        types = {*(typing.get_args(hints[name]) or (hints[name],))} - {type(None)}
        if name in {*strings, *_ONLY_STRINGS} and types == {str} and value is not None and not isinstance(value, str):
            raise OptionError(f"{name} must be a string; found {value!r}.")
        if types == {dict, str} and isinstance(value, str) and name.endswith("_kwargs") and value[:1] != "{":
            raise OptionError(f"{name} must be a mapping; found {value!r}.")


def _coerce(name: str, value: Any, action: argparse.Action) -> Any:
    """Convert a value to its field's type: YAML reads 1e-4, without a decimal point, as text."""
    is_number, is_bool = action.type in (int, float), getattr(action.type, "__name__", "") == "string_to_bool"
    if not (is_number or is_bool) or value is None or action.nargs == "+":
        return value
    expected = "true or false" if is_bool else "a number"
    invalid = OptionError(f"{name} must be {expected}; found {value!r}.")
    if isinstance(value, str):
        try:
            return action.type(value)  # type: ignore[operator,misc]
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise invalid from error
    if isinstance(value, bool) is not is_bool or not isinstance(value, (bool, int, float)):
        raise invalid
    if action.type is int and value != int(value):
        raise OptionError(f"{name} must be a whole number; found {value!r}.")
    return value
