"""`hf-guide families`: list the model families with a registered layout."""

import argparse

from hf_guide.errors import OptionError

HELP = "list the supported model families, and how exact their initialization is"
DESCRIPTION = (
    "List the supported model families. The layout of any other family is inferred where that is unambiguous;\n"
    "otherwise there is an error."
)
EXAMPLE = "hf-guide families llama"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the text to search for."""
    parser.add_argument(
        "name", nargs="?", default="", metavar="NAME", help="list only families with this in their name"
    )


def run(args: argparse.Namespace) -> int:
    """Print one line per family."""
    from hf_guide.layouts.registry import registered_layouts

    layouts = {family: layout for family, layout in sorted(registered_layouts().items()) if args.name in family}
    if not layouts:
        raise OptionError(f"No supported family has {args.name!r} in its name; `hf-guide families` lists all.")
    width = max(map(len, layouts))
    for family, layout in layouts.items():
        print(f"{family:{width}}  {layout.exactness}")
    return 0
