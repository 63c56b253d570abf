"""`hf-guide card FOLDER`: draw a student's card again, the rest of its text kept.

This module is light, so that `hf-guide --help` answers at once.
"""

import argparse
from pathlib import Path

HELP = "draw a student's model card again"
DESCRIPTION = (
    "Draw our part of a student's README.md again, from what its folder tells. The rest of the card stays as it is."
)
EXAMPLE = "hf-guide card student/ --license apache-2.0"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the folder and what a card can be told besides what the folder holds."""
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where the student was saved")
    parser.add_argument("--model-id", metavar="ID", help="the student's name on the Hub, such as me/student")
    parser.add_argument(
        "--license", help="its licence, such as apache-2.0; by default the card's own, or the teacher's"
    )
    parser.add_argument("--language", action="append", metavar="CODE", help="a language, such as en; may be repeated")
    parser.add_argument("--dataset", action="append", metavar="ID", help="a dataset it learned from; may be repeated")
    parser.add_argument("--tag", action="append", metavar="TAG", help="a tag besides ours; may be repeated")


def run(args: argparse.Namespace) -> int:
    """Draw the card with the flags of `add_arguments`, say where it is, and return the exit code."""
    from hf_guide.hub.model_card import redraw_card

    path = redraw_card(
        args.folder,
        model_id=args.model_id,
        license=args.license,
        language=args.language,
        datasets=args.dataset,
        tags=args.tag,
    )
    print(f"Drawn in {path}; what stood outside of our part is as it was.")
    return 0
