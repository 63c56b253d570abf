"""`hf-guide quickstart`: print where the quickstart is; it needs packages of data, which this package does not."""

import argparse

__all__ = ["DESCRIPTION", "EXAMPLE", "HELP", "add_arguments", "run"]

HELP = "print how to run the quickstart, which is part of the repository"
DESCRIPTION = (
    "The quickstart is a pair of scripts in the repository: examples/quickstart/run.py makes students of one language\n"
    "model by several methods, trains and compares them; examples/quickstart/classification.py does so for classifiers,\n"
    "by hard labels, by KD and by LELP. `make quickstart` in a clone of the repository runs both."
)
EXAMPLE = "python examples/quickstart/run.py"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Accept any flags of the previous release, which the message answers too."""
    parser.set_defaults(ignores_flags=True)


def run(args: argparse.Namespace) -> int:
    """Print where the quickstart is and return the exit code."""
    print(f"{DESCRIPTION}\n\n    {EXAMPLE}")
    return 0
