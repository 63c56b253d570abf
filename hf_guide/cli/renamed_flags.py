"""Flags of an earlier release: accepted for one release, with a warning that states the new name."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from hf_guide.utils.deprecation import warn_renamed


class _RenamedFlag(argparse.Action):
    """Store the value under the new flag's name, and warn."""

    def __init__(self, option_strings: Sequence[str], dest: str, *, new_flag: str, **options: Any):
        super().__init__(option_strings, dest, **options)
        self.new_flag = new_flag

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        warn_renamed(parser.prog, option_string or self.option_strings[0], self.new_flag)
        setattr(namespace, self.dest, True if self.nargs == 0 else values)


def add_renamed_flag(
    parser: argparse.ArgumentParser, old: str, new: str, *, type: Callable[[str], Any] = str, is_switch: bool = False
) -> None:
    """Accept `old` in place of the flag `new`; `--help` does not list it.

    Args:
        parser: It has the flag `new` already.
        old, new: Such as "--nearest" and "--num-examples".
        type: Of the value, as of the new flag.
        is_switch: The flag takes no value and stores True.
    """
    options: dict[str, Any] = {"nargs": 0} if is_switch else {"type": type}
    parser.add_argument(
        old,
        dest=new.removeprefix("--").replace("-", "_"),
        action=_RenamedFlag,
        new_flag=new,
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
        **options,
    )
