"""One file that says everything about a distillation, and what the command line says over it.

Does: read YAML or JSON, bring texts to the types of the fields they are for, refuse what is no field.
Does not: look at what the fields say; their dataclasses do.
"""

import argparse
import dataclasses
import json
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from hf_guide.data.arguments import DataArguments, ModelArguments
from hf_guide.distillation.arguments import RENAMED_ARGUMENTS, DistillationArguments
from hf_guide.errors import HfGuideError, OptionError
from hf_guide.utils.deprecation import RenamedOptions
from hf_guide.validation import did_you_mean

DATACLASSES = (ModelArguments, DataArguments, DistillationArguments)


@dataclass(frozen=True)
class DistillConfig:
    """Everything about one distillation."""

    models: ModelArguments
    data: DataArguments
    training: DistillationArguments


def read_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> DistillConfig:
    """Read a YAML or JSON file and what stands over it.

    Args:
        path: a mapping of fields of `ModelOptions`, `DataOptions` and `DistillationArguments`.
        overrides: words of a command line such as `--learning_rate 1e-4`; they count over the file.

    Raises:
        OptionError: a key that is no field (with the nearest one), or a value that its field does not take.
        OSError: the file cannot be read.
    """
    parser = _make_parser()
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    flags, in_file = parse_overrides(overrides), _read_file(Path(path))
    for name in in_file:
        if name not in actions:
            raise OptionError(f"{path} has the key {name!r}, which is not known.{did_you_mean(str(name), actions)}")
    overridden = {RENAMED_ARGUMENTS.names.get(name, name) for name in flags}
    kept = {
        name: value for name, value in in_file.items() if RENAMED_ARGUMENTS.names.get(name, name) not in overridden
    }
    chosen = RENAMED_ARGUMENTS.translate(kept | flags, str(path))
    _check_strings({name: value for name, value in chosen.items() if name not in overridden})
    chosen = {name: _coerce(name, value, actions[name]) for name, value in chosen.items()}
    try:
        models, data, training = parser.parse_dict(chosen)
    except HfGuideError:
        raise
    except (ValueError, TypeError) as error:  # TrainingArguments say what is wrong in these
        raise OptionError(f"{path}: {error}") from error
    return DistillConfig(models, data, training)


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Return the fields that words of a command line set, and only those; old names are kept as they are.

    Raises:
        OptionError: a flag that is no field (with the nearest one), or a value that its field does not take.
        SystemExit: after `--help`.
    """
    parser = _make_parser()
    if not {"-h", "--help"} & set(words):  # help tells the defaults
        for action in parser._actions:
            action.default = argparse.SUPPRESS
    found, unknown = parser.parse_known_args(list(words))
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        raise OptionError(
            f"{unknown[0]!r} is not understood; overrides are --key value.{did_you_mean(unknown[0].partition('=')[0], flags)}"
        )
    return vars(found)


class _ArgumentParser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say what is wrong without the usage, which is several screens long."""
        raise OptionError(f"{message}; `{self.prog} --help` lists every option.")


def _make_parser() -> HfArgumentParser:
    parser = _ArgumentParser(DATACLASSES, prog="hf-guide distill CONFIG", allow_abbrev=False)  # type: ignore[arg-type]
    _add_renamed_flags(parser, RENAMED_ARGUMENTS)
    return parser


def _add_renamed_flags(parser: argparse.ArgumentParser, renamed: RenamedOptions) -> None:
    """Accept the flags of the previous release, too; they are not listed, and `renamed.translate` warns of them."""
    actions = {action.dest: action for action in parser._actions}
    for old, new in renamed.names.items():
        action = actions[new]
        options: dict[str, Any] = {"nargs": action.nargs, "const": action.const, "type": action.type}
        parser.add_argument(f"--{old}", default=argparse.SUPPRESS, help=argparse.SUPPRESS, **options)
    for old in renamed.moved:
        parser.add_argument(f"--{old}", default=argparse.SUPPRESS, help=argparse.SUPPRESS, type=yaml.safe_load)


def _read_file(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
        raise OptionError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise OptionError(f"{path} is a mapping of options to values; found {type(found).__name__}.")
    return found


def _check_strings(chosen: Mapping[str, Any]) -> None:
    """Refuse values other than texts for options that are names or paths; a mapping may stand where its field has one."""
    hints = {name: hint for part in DATACLASSES for name, hint in typing.get_type_hints(part).items()}
    names = {field.name for part in DATACLASSES[:2] for field in dataclasses.fields(part)} | {
        "teacher",
        "teacher_cache",
        "output_dir",
    }
    for name, value in chosen.items():
        if name == "data_files" and not isinstance(value, (str, list, dict, type(None))):
            raise OptionError(
                f"data_files must be the name of a file, several, or a mapping of them; found {value!r}."
            )
        kinds = {*(typing.get_args(hints[name]) or (hints[name],))} - {type(None)}
        if name in names and kinds == {str} and value is not None and not isinstance(value, str):
            raise OptionError(f"{name} must be a text; found {value!r}.")
        if kinds == {dict, str} and isinstance(value, str) and name.endswith("_kwargs") and value[:1] != "{":
            raise OptionError(f"{name} must be a mapping; found {value!r}.")


def _coerce(name: str, value: Any, action: argparse.Action) -> Any:
    """Return a value as its field has it: YAML reads 1e-4, without a point, as a text."""
    of_number, of_truth = action.type in (int, float), getattr(action.type, "__name__", "") == "string_to_bool"
    if not (of_number or of_truth) or value is None or action.nargs == "+":
        return value
    wanted = "true or false" if of_truth else "a number"
    wrong = OptionError(f"{name} is {wanted}; found {value!r}.")
    if isinstance(value, str):
        try:
            return action.type(value)  # type: ignore[operator,misc]
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise wrong from error
    if isinstance(value, bool) is not of_truth or not isinstance(value, (bool, int, float)):
        raise wrong
    if action.type is int and value != int(value):
        raise OptionError(f"{name} is a whole number; found {value!r}.")
    return value
