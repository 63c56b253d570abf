"""`hf-guide families`: what is supported, and how exactly."""

import argparse

from hf_guide.errors import OptionError

HELP = "list the supported families, and how exactly each is carried over"
DESCRIPTION = "List the supported families. Others are derived where that is certain, and refused where it is not."
EXAMPLE = "hf-guide families llama"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the word that families are looked for by."""
    parser.add_argument("word", nargs="?", default="", help="show only families with this in their name")


def run(args: argparse.Namespace) -> int:
    """Print one line a family."""
    from hf_guide.layouts.registry import registered_layouts

    layouts = {family: layout for family, layout in sorted(registered_layouts().items()) if args.word in family}
    if not layouts:
        raise OptionError(f"No supported family has {args.word!r} in its name; `hf-guide families` lists all.")
    longest = max(map(len, layouts))
    for family, layout in layouts.items():
        print(f"{family:{longest}}  {layout.exactness}")
    return 0
