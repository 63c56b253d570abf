"""`hf-guide quickstart`: make students, distil each on the same data, compare, save the best, load it back.

This module is light, so that `hf-guide --help` answers at once; the work is in `hf_guide/quickstart`.
"""

import argparse

from hf_guide.quickstart import LelpOptions, add_arguments, options_of

__all__ = ["DESCRIPTION", "EXAMPLE", "HELP", "add_arguments", "run"]

HELP = "the whole way on a real model: initialise, distil, compare, save"
DESCRIPTION = (
    "Make random, uniform, guide and calibrated students of one teacher, train each on the same tokens, and compare\n"
    "them; or, with --task lelp, teach three like students of a classifier by hard labels, by KD and by\n"
    "pseudo-subclasses."
)
EXAMPLE = "hf-guide quickstart --task lelp"


def run(args: argparse.Namespace) -> int:
    """Run the quickstart with the flags of `add_arguments` and return the exit code."""
    options = options_of(args)
    if isinstance(options, LelpOptions):
        from hf_guide.quickstart.subclasses import quickstart_lelp

        quickstart_lelp(options)
    else:
        from hf_guide.quickstart.run import quickstart

        quickstart(options)
    return 0
