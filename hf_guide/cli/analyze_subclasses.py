"""`hf-guide analyze-subclasses PROJECTOR DATASET`: see a projector's subclasses, and whether they are likely to help.

This module imports nothing heavy, so that `hf-guide --help` answers at once; the work is in `lelp/analysis/analyze.py`.
"""

import argparse
from pathlib import Path

from hf_guide.cli.renamed_flags import add_renamed_flag
from hf_guide.cli.teacher_arguments import hub_arguments

HELP = "see a projector's pseudo-subclasses, and whether they are likely to help"
DESCRIPTION = (
    "Run the teacher over a dataset and write one page: each class's subspace colored by subclass, the most probable\n"
    "examples of each subclass, sizes, variance, mutual information with fine labels, and an estimated gain: small\n"
    "probes are trained with and without subclasses, to tell in seconds whether a student is likely to gain."
)
FILES = (".jsonl", ".json", ".csv", ".txt", ".parquet")
EXAMPLE = "hf-guide analyze-subclasses projector/ questions.jsonl --fine-label-column fine_label -o subclasses.html"
DEPRECATED_NAME = "subclasses"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the projector, the dataset and the output files to `parser`."""
    parser.add_argument("projector", metavar="PROJECTOR", help="a saved projector: a folder or a Hub id")
    parser.add_argument(
        "dataset", metavar="DATASET", help="a Hub id, a folder, or a file (.jsonl, .csv, .txt, .parquet)"
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("subclasses.html"), metavar="FILE", help="the page to write"
    )
    parser.add_argument(
        "--figures",
        type=Path,
        metavar="FOLDER",
        help="also write one figure of each class, and all measurements as JSON",
    )
    parser.add_argument("--teacher", help="a Hub id or a folder; by default the one the projector was fitted to")
    parser.add_argument("--processor", metavar="NAME", help="tokenizer or image processor; by default the teacher's")
    parser.add_argument("--config-name", metavar="NAME", help="the configuration of the dataset")
    parser.add_argument("--split", default="train", help="the split to read, such as train[:1000] (default: train)")
    for role in ("text", "image", "label"):
        parser.add_argument(
            f"--{role}-column", metavar="NAME", help=f"the column of {role}s; by default the usual names"
        )
    parser.add_argument("--fine-label-column", metavar="NAME", help="fine labels to compare the subclasses with")
    parser.add_argument(
        "--max-samples", type=int, default=4000, metavar="N", help="read a random sample of N examples (default: 4000)"
    )
    parser.add_argument(
        "--num-examples", type=int, default=6, metavar="N", help="examples of each subclass (default: 6)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="examples of a forward pass (default: 32)"
    )
    parser.add_argument("--no-probe", action="store_true", help="do not train probes to estimate the gain")
    parser.add_argument("--revision", help="branch, tag or commit of the teacher on the Hub")
    parser.add_argument("--token", help="access token for the Hub; by default the one you are logged in with")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the teacher")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bars")
    add_renamed_flag(parser, "--finer-column", "--fine-label-column")
    add_renamed_flag(parser, "--nearest", "--num-examples", type=int)
    add_renamed_flag(parser, "--max-examples", "--max-samples", type=int)
    add_renamed_flag(parser, "--no-forecast", "--no-probe", is_switch=True)


def run(args: argparse.Namespace) -> int:
    """Run with the arguments of `add_arguments`; print the results and return the exit code."""
    from hf_guide.data.arguments import DataArguments
    from hf_guide.errors import OptionError
    from hf_guide.utils.deprecation import warn_renamed
    from hf_guide.utils.escaping import to_single_line
    from hf_guide.validation import check_integer

    if args.command == DEPRECATED_NAME:
        warn_renamed("hf-guide", DEPRECATED_NAME, "analyze-subclasses")
    check_integer("--num-examples", args.num_examples)
    check_integer("--batch-size", args.batch_size)
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
        max_train_examples=args.max_samples,
    )
    if not args.output.resolve().parent.is_dir():
        raise OptionError(f"There is no folder {args.output.resolve().parent} to write {args.output.name} into.")

    from transformers.utils import logging

    from hf_guide.lelp.analysis.analyze import analyze
    from hf_guide.lelp.analysis.report import describe_mutual_information
    from hf_guide.lelp.projector import SubclassProjector

    if args.no_progress:
        logging.disable_progress_bar()
    report = analyze(
        SubclassProjector.from_pretrained(args.projector, token=args.token),
        data,
        args.output,
        teacher=args.teacher,
        processor=args.processor,
        fine_label_column=args.fine_label_column,
        figures=args.figures,
        num_examples=args.num_examples,
        batch_size=args.batch_size,
        train_probes=not args.no_probe,
        **hub_arguments(args),
        show_progress=not args.no_progress,
    )
    summary = report.summary
    if summary.gain_estimate is not None:
        print(summary.gain_estimate.summary())
    elif summary.no_gain_estimate is not None:
        print(f"The gain was not estimated: {summary.no_gain_estimate} (--no-probe skips this step.)")
    if summary.fine_label_information is not None:
        print(describe_mutual_information(summary.fine_label_information))
    for each in summary.classes:
        sizes = " ".join(f"{size:.0%}" for size in each.sizes.tolist())
        ratio = each.explained_variance_ratio
        variance = "" if ratio is None else f"; variance explained {ratio:.0%}"
        print(f"{to_single_line(each.name)}: {len(each.rows):,} examples; subclasses {sizes}{variance}")
    print(f"Wrote {report.page}" + (f", and figures to {args.figures}" if report.figures else ""))
    return 0
