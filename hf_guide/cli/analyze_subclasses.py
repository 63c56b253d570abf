"""`hf-guide subclasses PROJECTOR DATASET`: see what a projector's subclasses are, and whether they are likely to help.

This module is light, so that `hf-guide --help` answers at once; the work is in `lelp/analysis/analyze.py`.
"""

import argparse
from pathlib import Path

from hf_guide.cli.teacher_arguments import hub_arguments

HELP = "see a projector's pseudo-subclasses, and whether they are likely to help"
DESCRIPTION = (
    "Run the teacher over a dataset and write one page: each class's subspace coloured by subclass, the nearest\n"
    "examples of each subclass, sizes, variance, what they know of finer labels, and a forecast: tiny students are\n"
    "trained with and without subclasses, so that you need not train a real one to learn that they do not help."
)
FILES = (".jsonl", ".json", ".csv", ".txt", ".parquet")
EXAMPLE = "hf-guide subclasses projector/ questions.jsonl --finer-column fine_label -o subclasses.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the projector, the dataset, and what is to be written."""
    parser.add_argument("projector", metavar="PROJECTOR", help="what fit_subclasses saved: a folder or a Hub id")
    parser.add_argument(
        "dataset", metavar="DATASET", help="a Hub id, a folder, or a file (.jsonl, .csv, .txt, .parquet)"
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("subclasses.html"), metavar="FILE", help="the page to write"
    )
    parser.add_argument(
        "--figures", type=Path, metavar="FOLDER", help="also write one figure a class, and the numbers as JSON"
    )
    parser.add_argument("--teacher", help="a Hub id or a folder; by default the one the projector was fitted to")
    parser.add_argument("--processor", metavar="NAME", help="tokenizer or image processor; by default the teacher's")
    parser.add_argument("--config-name", metavar="NAME", help="which of the dataset's configurations")
    parser.add_argument(
        "--split", default="train", help="the split to look at; slices are understood (default: train)"
    )
    for role in ("text", "image", "label"):
        parser.add_argument(
            f"--{role}-column", metavar="NAME", help=f"the column of {role}s; by default the usual names"
        )
    parser.add_argument("--finer-column", metavar="NAME", help="finer labels to compare the subclasses with")
    parser.add_argument(
        "--max-examples", type=int, default=4000, metavar="N", help="look at so many, drawn at random (default: 4000)"
    )
    parser.add_argument("--nearest", type=int, default=6, metavar="N", help="examples shown of each subclass")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="examples the teacher reads at once")
    parser.add_argument("--no-forecast", action="store_true", help="train no tiny students to tell what to expect")
    parser.add_argument("--revision", help="branch, tag or commit of the teacher on the Hub")
    parser.add_argument("--token", help="access token for the Hub; by default the one you are logged in with")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the teacher")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bars")


def run(args: argparse.Namespace) -> int:
    """Look with the flags of `add_arguments`, say what was found and where it is, and return the exit code."""
    from hf_guide.data.arguments import DataArguments
    from hf_guide.errors import OptionError
    from hf_guide.utils.escaping import to_single_line

    for name in ("nearest", "batch_size"):
        if getattr(args, name) < 1:
            raise OptionError(
                f"--{name.replace('_', '-')} is a whole number of at least 1; found {getattr(args, name)}."
            )
    is_file = Path(args.dataset).is_file()
    if not is_file and Path(args.dataset).suffix in FILES and not Path(args.dataset).exists():
        raise OptionError(f"There is no file {args.dataset}.")
    data = DataArguments(
        dataset="" if is_file else args.dataset,
        data_files=args.dataset if is_file else None,
        dataset_config_name=args.config_name,
        train_split=args.split,
        text_column=args.text_column,
        image_column=args.image_column,
        label_column=args.label_column,
        max_train_examples=args.max_examples,
    )
    if not args.output.resolve().parent.is_dir():
        raise OptionError(f"There is no folder {args.output.resolve().parent} to write {args.output.name} into.")

    from transformers.utils import logging

    from hf_guide.lelp.analysis.analyze import analyze
    from hf_guide.lelp.analysis.report import describe_mutual_information
    from hf_guide.lelp.projector import SubclassProjector

    if args.no_progress:
        logging.disable_progress_bar()
    looked = analyze(
        SubclassProjector.from_pretrained(args.projector, token=args.token),
        data,
        args.output,
        teacher=args.teacher,
        processor=args.processor,
        finer_column=args.finer_column,
        figures=args.figures,
        examples=args.nearest,
        batch_size=args.batch_size,
        forecast=not args.no_forecast,
        **hub_arguments(args),
        show_progress=not args.no_progress,
    )
    if looked.view.forecast is not None:
        print(looked.view.forecast.summary())
    elif looked.view.no_forecast is not None:
        print(f"There is no forecast: {looked.view.no_forecast} (--no-forecast does not ask for one.)")
    if looked.view.knowledge is not None:
        print(describe_mutual_information(looked.view.knowledge))
    for each in looked.view.classes:
        sizes = " ".join(f"{size:.0%}" for size in each.sizes.tolist())
        held = "" if each.explained is None else f"; variance held {each.explained:.0%}"
        print(f"{to_single_line(each.name)}: {len(each.rows):,} examples; subclasses {sizes}{held}")
    print(f"Drawn in {looked.page}" + (f", and in {args.figures}" if looked.figures else ""))
    return 0
