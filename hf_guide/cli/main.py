"""`hf-guide`: the command line. Nothing heavy is imported before it is needed, so that --help answers at once."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_guide.errors import HfGuideError, OptionError
from hf_guide.utils.escaping import escape_control_characters


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return 0 when done, 1 after an error, 2 after wrong usage, 130 after Ctrl-C."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except (HfGuideError, OSError, ImportError) as error:
        print(f"hf-guide: error: {escape_control_characters(error)}", file=sys.stderr)
        return 2 if isinstance(error, OptionError) else 1
    except KeyboardInterrupt:
        print(f"hf-guide: interrupted{describe_remaining_output(args)}.", file=sys.stderr)
        return 130


def describe_remaining_output(args: argparse.Namespace) -> str:
    """Return what an interrupted command has left where it was to write; nothing of one that has no output."""
    kept = getattr(args, "calibration_cache_dir", None)
    if kept is not None and kept.is_dir() and any(kept.iterdir()):
        return f"; the same command goes on from {kept}"
    if getattr(args, "output", None) is None:
        return ""
    output = Path(args.output)
    is_there = any(output.iterdir()) if output.is_dir() else output.exists()
    return f"; {output} is there" if is_there else "; nothing was left behind"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    from hf_guide.cli import analyze_subclasses, capture, card, distill, families, init, inspect, quickstart

    parser = argparse.ArgumentParser(
        prog="hf-guide",
        description="Make a small Transformers model out of a big one.",
        epilog="first:  hf-guide inspect TEACHER\nthen:   hf-guide init TEACHER --hidden-size 288 -o student/\n"
        "        hf-guide distill CONFIG.yaml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (init, inspect, families, capture, distill, card, analyze_subclasses, quickstart):
        _add_command(commands, module.__name__.rpartition(".")[2].replace("_", "-"), module, help=module.HELP)
        if hasattr(module, "DEPRECATED_NAME"):
            _add_command(commands, module.DEPRECATED_NAME, module)  # not listed by --help
    return parser


def _add_command(commands: Any, name: str, module: Any, **options: str) -> None:
    command = commands.add_parser(
        name,
        description=module.DESCRIPTION,
        epilog=f"example:\n  {module.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )
    module.add_arguments(command)
    command.set_defaults(run=module.run)


if __name__ == "__main__":
    sys.exit(main())
