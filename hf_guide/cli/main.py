"""`hf-guide`: the command line. Heavy modules are imported when a command runs, so that --help answers at once."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from hf_guide.cli.arguments import translate_renamed_flags
from hf_guide.errors import HfGuideError, OptionError
from hf_guide.utils.deprecation import RenamedOptions, add_renamed_flags, warn_renamed
from hf_guide.utils.escaping import escape_control_characters

RENAMED_COMMANDS = {"subclasses": "analyze-subclasses"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return 0 when done, 1 after an error, 2 after wrong usage, 130 after Ctrl-C."""
    args, unknown = build_parser().parse_known_args(argv)
    if unknown and not getattr(args, "ignores_flags", False):
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        if args.command in RENAMED_COMMANDS:
            warn_renamed("hf-guide", args.command, RENAMED_COMMANDS[args.command])
        translate_renamed_flags(args, args.parser, args.renamed_flags, args.command)
        expand_home(args)
        import_modules(args.imports)
        return args.run(args)
    except (HfGuideError, OSError, ImportError) as error:
        print(f"hf-guide: error: {escape_control_characters(error)}", file=sys.stderr)
        return 2 if isinstance(error, OptionError) else 1
    except Exception as error:
        from hf_guide.utils.files import is_write_error

        if not is_write_error(error):
            raise
        print(f"hf-guide: error: a file could not be written: {escape_control_characters(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"hf-guide: interrupted{describe_remaining_output(args)}.", file=sys.stderr)
        return 130


def expand_home(args: argparse.Namespace) -> None:
    """Replace a leading `~` of paths by the home folder, as of `-o=~/student`, which a shell leaves as it is."""

    def expanded(value: Any) -> Any:
        if isinstance(value, list):
            return [expanded(each) for each in value]
        if isinstance(value, Path):
            return value.expanduser()
        return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value

    for name, value in list(vars(args).items()):
        setattr(args, name, expanded(value))


def import_modules(names: Sequence[str]) -> None:
    """Import modules that register losses, methods or splitters; they are looked for in the working directory last.

    Raises:
        OptionError: A name is a path.
        ImportError: There is no such module, or it fails.
    """
    if names and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")) or name.endswith(".py"):
            raise OptionError(
                f"--import must be the name of a module, such as my_losses for my_losses.py in the working directory; "
                f"found {name!r}."
            )
        importlib.import_module(name)


def describe_remaining_output(args: argparse.Namespace) -> str:
    """Return what an interrupted command left on disk; empty for a command without output."""
    cache_dir = getattr(args, "calibration_cache_dir", None)
    if cache_dir is not None and cache_dir.is_dir() and any(cache_dir.iterdir()):
        return f"; run the same command again to continue from {cache_dir}"
    if getattr(args, "output", None) is None:
        return ""
    output = Path(args.output)
    exists = any(output.iterdir()) if output.is_dir() else output.exists()
    return f"; {output} was written" if exists else "; nothing was written"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    from hf_guide.cli import (
        analyze_subclasses,
        capture,
        card,
        distill,
        families,
        init,
        inspect,
        label,
        methods,
        quickstart,
        shapes,
    )

    parser = argparse.ArgumentParser(
        prog="hf-guide",
        description="Make a small Transformers model from a big one.",
        epilog="first:  hf-guide inspect TEACHER\nthen:   hf-guide init TEACHER --num-parameters 25% -o student/\n"
        "        hf-guide distill CONFIG.yaml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="import a Python module first, which registers losses, methods or splitters of your own; may be repeated",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (
        init,
        shapes,
        methods,
        inspect,
        families,
        capture,
        label,
        distill,
        card,
        analyze_subclasses,
        quickstart,
    ):
        name = module.__name__.rpartition(".")[2].replace("_", "-")
        _add_command(commands, name, module, help=module.HELP)
    for old, new in RENAMED_COMMANDS.items():
        _add_command(commands, old, {"analyze-subclasses": analyze_subclasses}[new])  # without help it is not listed
    return parser


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps long flags on one line with their help."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=35)


def _add_command(commands: "argparse._SubParsersAction", name: str, module: ModuleType, **listing: Any) -> None:
    parser = commands.add_parser(
        name,
        description=module.DESCRIPTION,
        epilog=f"example: {module.EXAMPLE}",
        formatter_class=_HelpFormatter,
        **listing,
    )
    module.add_arguments(parser)
    renamed = getattr(module, "RENAMED_FLAGS", RenamedOptions())
    add_renamed_flags(parser, renamed)
    parser.set_defaults(run=module.run, parser=parser, renamed_flags=renamed)


if __name__ == "__main__":
    sys.exit(main())
