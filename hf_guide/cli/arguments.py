"""Arguments that several commands share, and flags made from the fields of dataclasses."""

import argparse
import ast
import contextlib
import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

from hf_guide.errors import OptionError
from hf_guide.utils.deprecation import RenamedOptions, warn_renamed


def add_teacher_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the teacher and its source."""
    parser.add_argument("teacher", metavar="TEACHER", help="Hub id or folder of the big model")
    parser.add_argument("--gguf-file", metavar="FILE", help="GGUF file of the teacher to read")
    add_hub_arguments(parser)


def add_hub_arguments(parser: "argparse.ArgumentParser | argparse._ArgumentGroup") -> None:
    """Add the flags of a teacher on the Hub."""
    parser.add_argument("--revision", help="branch, tag or commit of the teacher")
    parser.add_argument("--token", help="access token for the Hub; by default your login's")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code of the teacher's repository")


def add_dataset_run_arguments(parser: argparse.ArgumentParser, *, folder: str) -> None:
    """Add the flags of the commands that run a teacher over a dataset and write a folder.

    Args:
        parser: Of the command.
        folder: What the folder is, for the help.
    """
    parser.add_argument(
        "-o", "--output", required=True, type=Path, help=f"folder of {folder}: new, empty, or unfinished"
    )
    parser.add_argument(
        "--processing-class-name-or-path",
        metavar="NAME",
        help="tokenizer or processor: a Hub id or a folder; by default the teacher's",
    )
    parser.add_argument("--train-only", action="store_true", help="leave out the evaluation split")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="dtype of the teacher; by default the checkpoint's"
    )
    add_hub_arguments(parser)
    parser.add_argument("--no-progress", action="store_true", help="show no progress bars")


def hub_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Return the flags of `add_hub_arguments` as keyword arguments of `from_pretrained`."""
    return {"revision": args.revision, "token": args.token, "trust_remote_code": args.trust_remote_code}


def add_budget_arguments(group: Any, *, brief: bool = False) -> None:
    """Add the flags of a budget, from which the student's sizes follow; with `brief` only the first is in the help."""
    number = (
        "such as 23M or 25%%: `hf-guide shapes` describes budgets"
        if brief
        else ("number of parameters, such as 23M or 25%% of the teacher's: chooses the sizes")
    )
    rest = [
        "the same of what a token passes in a mixture of experts",
        "the same of weights and key-value cache, such as 500MB",
        "positions of that cache (default: 2048)",
        "with calibration data: distil the best starts for so many steps before they are compared",
    ]
    active, memory, length, steps = [argparse.SUPPRESS] * 4 if brief else rest
    group.add_argument("--num-parameters", metavar="N", help=number)
    group.add_argument("--active-parameters", metavar="N", help=active)
    group.add_argument("--memory", metavar="SIZE", help=memory)
    group.add_argument("--cache-length", type=int, metavar="N", help=length)
    group.add_argument("--search-steps", type=int, metavar="N", help=steps)


def budget_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Return the flags of `add_budget_arguments` that are given, as keyword arguments of `from_teacher`."""
    names = ("num_parameters", "active_parameters", "memory", "cache_length", "search_steps")
    values = {name: getattr(args, name) for name in names}
    given = {name: value for name, value in values.items() if value is not None}
    return {name: int(value) if str(value).isdigit() else value for name, value in given.items()}


def to_flag(name: str) -> str:
    """Return the flag of an option.

    >>> to_flag("hidden_size")
    '--hidden-size'
    """
    return "--" + name.replace("_", "-")


def parse_key_value(text: str, flag: str) -> tuple[str, Any]:
    """Split KEY=VALUE; the value is parsed as JSON or a Python literal if possible, otherwise it is a string.

    Raises:
        OptionError: The text is not of this form.

    Example:
        >>> parse_key_value("layers=0,4,9", "--option")
        ('layers', [0, 4, 9])
    """
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise OptionError(f"{flag} {text!r} must be key=value, for example {flag} rms_norm_eps=1e-6.")
    for parse in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError):
            parsed = parse(value)
            return key, list(parsed) if isinstance(parsed, tuple) else parsed
    return key, value


def add_fields(group: Any, cls: type[Any], *, list_types: dict[str, type], skip: tuple[str, ...] = ()) -> None:
    """Add a flag for each field of a dataclass whose fields have help; a flag that is not given has the value None.

    Args:
        group: A parser or a group of arguments.
        cls: The dataclass.
        list_types: Item types of the fields that are lists.
        skip: Fields without a flag.
    """
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name in skip:
            continue
        options: dict[str, Any] = {"default": None, "help": field.metadata["help"]}
        if hints[field.name] in (bool, bool | None):
            options["action"] = argparse.BooleanOptionalAction
        elif field.name in list_types:
            options |= {"nargs": "+", "type": list_types[field.name], "metavar": "X"}
        else:
            types = [each for each in typing.get_args(hints[field.name]) or (hints[field.name],)]
            is_number = types[0] in (int, float)
            options |= {"type": types[0] if is_number else str, "metavar": "N" if is_number else "X"}
        group.add_argument(to_flag(field.name), **options)


def explicit_fields(args: argparse.Namespace, cls: type[Any]) -> dict[str, Any]:
    """Return the fields of a dataclass that flags set."""
    values = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(cls)}
    return {name: value for name, value in values.items() if value is not None}


def translate_renamed_flags(
    args: argparse.Namespace, parser: argparse.ArgumentParser, renamed: RenamedOptions, command: str
) -> None:
    """Set the values of old flags under their new names, with a warning that states the new flag.

    Raises:
        OptionError: A flag is given under both names.
    """
    for old, new in renamed.names.items():
        if old not in vars(args):
            continue
        if getattr(args, new) != parser.get_default(new):
            raise OptionError(f"{to_flag(new)} and its deprecated name {to_flag(old)} are both given; keep the first.")
        warn_renamed(f"hf-guide {command}", to_flag(old), to_flag(new))
        convert = renamed.conversions.get(old)
        value = vars(args).pop(old)
        setattr(args, new, convert(value) if convert is not None else value)
