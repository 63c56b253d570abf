"""`hf-guide card FOLDER`: update a student's model card. The work is in `hub/model_card.py`."""

import argparse
from pathlib import Path

from hf_guide.utils.deprecation import RenamedOptions

HELP = "update a student's model card"
DESCRIPTION = "Rewrite hf_guide's section of a student's README.md from the files in its folder; other text is kept."
EXAMPLE = "hf-guide card student/ --license apache-2.0"
RENAMED_FLAGS = RenamedOptions(names={"dataset": "dataset_name"})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the folder, and metadata that its files do not contain."""
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder of the saved student")
    parser.add_argument("--model-id", metavar="ID", help="Hub id of the student, such as me/student")
    parser.add_argument(
        "--license", help="license, such as apache-2.0; by default the card's, otherwise the teacher's"
    )
    parser.add_argument("--language", action="append", metavar="CODE", help="language, such as en; may be repeated")
    parser.add_argument("--dataset-name", action="append", metavar="ID", help="training dataset; may be repeated")
    parser.add_argument("--tag", action="append", metavar="TAG", help="additional tag; may be repeated")


def run(args: argparse.Namespace) -> int:
    """Rewrite the card's section, print the card's path, and return the exit code."""
    from hf_guide.hub.model_card import redraw_card

    path = redraw_card(
        args.folder,
        model_id=args.model_id,
        license=args.license,
        language=args.language,
        datasets=args.dataset_name,
        tags=args.tag,
    )
    print(f"Updated {path}; text outside of hf_guide's section is unchanged.")
    return 0
