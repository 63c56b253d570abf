"""`hf-guide methods`: list the initialization methods and their options."""

import argparse

HELP = "list the initialization methods and their options"
DESCRIPTION = "List the methods of `hf-guide init --method`, and their options for --option KEY=VALUE."
EXAMPLE = "hf-guide methods calibrated"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the method to describe."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="describe only this method")


def run(args: argparse.Namespace) -> int:
    """Print each method with its options, their defaults and what they do."""
    import textwrap

    from hf_guide.methods import list_methods
    from hf_guide.validation import check_choice

    methods = list_methods()
    names = [check_choice("method", args.name, methods)] if args.name else list(methods)
    for name in names:
        print(name)
        for option in methods[name]:
            choices = f" ({', '.join(option.choices)})" if option.choices else ""
            print(f"  {option.name}={option.default}{choices}")
            print(textwrap.fill(option.help, 100, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return 0
