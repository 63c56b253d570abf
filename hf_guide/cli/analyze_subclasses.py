"""`hf-guide analyze-subclasses`: describe a projector's pseudo-subclasses. The work is in `lelp/analysis/analyze.py`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from hf_guide.cli.arguments import add_hub_arguments, hub_arguments
from hf_guide.utils.deprecation import RenamedOptions

if TYPE_CHECKING:
    from hf_guide.lelp.analysis.report import SubclassSummary

HELP = "describe a projector's pseudo-subclasses, and measure whether they are likely to help"
DESCRIPTION = (
    "Run the teacher over a dataset and write an HTML page: each class's subspace colored by subclass, the most\n"
    "probable examples of each subclass, sizes, variance, mutual information with fine labels, and a verdict: small\n"
    "students are trained by LELP and by KD, and by fine labels where there are any."
)
EXAMPLE = "hf-guide analyze-subclasses projector/ questions.jsonl --fine-label-column fine_label -o subclasses.html"
FILES = (".jsonl", ".json", ".csv", ".txt", ".parquet")
RENAMED_FLAGS = RenamedOptions(
    names={
        "finer_column": "fine_label_column",
        "nearest": "num_examples",
        "no_forecast": "no_probe",
        "max_examples": "max_samples",
        "config_name": "dataset_config_name",
        "split": "dataset_split",
        "processor": "processing_class_name_or_path",
    }
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the projector, the dataset, and what to write."""
    parser.add_argument("projector", metavar="PROJECTOR", help="folder or Hub id of a saved SubclassProjector")
    parser.add_argument("dataset", metavar="DATASET", help=f"a Hub id, a folder, or a file ({', '.join(FILES)})")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("subclasses.html"), metavar="FILE", help="HTML page to write"
    )
    parser.add_argument(
        "--figures", type=Path, metavar="FOLDER", help="also write one figure per class, and the numbers as JSON"
    )
    parser.add_argument("--teacher", help="Hub id or folder; by default the teacher that the projector was fitted to")
    parser.add_argument(
        "--processing-class-name-or-path",
        metavar="NAME",
        help="tokenizer or image processor; by default the teacher's",
    )
    parser.add_argument("--dataset-config-name", metavar="NAME", help="configuration of the dataset")
    parser.add_argument("--dataset-split", default="train", help="split to read, or a slice of one (default: train)")
    for role in ("text", "image", "label"):
        parser.add_argument(
            f"--{role}-column", metavar="NAME", help=f"column of {role}s; by default found by its name"
        )
    parser.add_argument(
        "--fine-label-column", metavar="NAME", help="column of fine labels to compare the subclasses with"
    )
    parser.add_argument(
        "--max-samples", type=int, default=4000, metavar="N", help="number of random examples to read (default: 4000)"
    )
    parser.add_argument("--num-examples", type=int, default=6, metavar="N", help="examples to show for each subclass")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="batch size of the teacher")
    parser.add_argument("--no-probe", action="store_true", help="do not train students to measure the gain")
    parser.add_argument(
        "--student", metavar="NAME", help="student of the probe: Hub id or folder; by default smaller than the teacher"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=900,
        metavar="N",
        help="steps of the probe's students: your training's, if fewer (default: 900)",
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="students of each objective in the probe")
    add_hub_arguments(parser)
    parser.add_argument("--no-progress", action="store_true", help="show no progress bars")


def run(args: argparse.Namespace) -> int:
    """Analyze, print a summary and where the page is, and return the exit code."""
    from hf_guide.data.arguments import DataArguments
    from hf_guide.errors import OptionError
    from hf_guide.utils.files import check_can_create, check_output_file
    from hf_guide.validation import check_integer

    check_integer("--max-samples", args.max_samples)
    check_integer("--num-examples", args.num_examples)
    check_integer("--batch-size", args.batch_size)
    check_integer("--steps", args.steps)
    check_integer("--seeds", args.seeds)
    is_file = Path(args.dataset).is_file()
    if not is_file and Path(args.dataset).suffix in FILES and not Path(args.dataset).exists():
        raise OptionError(f"There is no file {args.dataset}.")
    data = DataArguments(
        dataset_name="" if is_file else args.dataset,
        data_files=args.dataset if is_file else None,
        dataset_config_name=args.dataset_config_name,
        dataset_train_split=args.dataset_split,
        text_column=args.text_column,
        image_column=args.image_column,
        label_column=args.label_column,
        max_train_samples=args.max_samples,
    )
    check_output_file(args.output)
    if args.figures is not None and args.figures.exists() and not args.figures.is_dir():
        raise OptionError(f"--figures must be a folder; {args.figures} is a file.")
    if args.figures is not None:
        check_can_create(args.figures)

    from transformers.utils import logging

    from hf_guide.lelp.analysis.analyze import analyze
    from hf_guide.lelp.projector import SubclassProjector

    if args.no_progress:
        logging.disable_progress_bar()
    report = analyze(
        SubclassProjector.from_pretrained(args.projector, token=args.token),
        data,
        args.output,
        teacher=args.teacher,
        processor=args.processing_class_name_or_path,
        fine_label_column=args.fine_label_column,
        figures=args.figures,
        num_examples=args.num_examples,
        batch_size=args.batch_size,
        train_probes=not args.no_probe,
        student=args.student,
        steps=args.steps,
        num_seeds=args.seeds,
        **hub_arguments(args),
        show_progress=not args.no_progress,
    )
    _print_summary(report.summary)
    print(f"Written to {report.page}" + (f" and {args.figures}" if report.figures else ""))
    return 0


def _print_summary(summary: "SubclassSummary") -> None:
    from hf_guide.lelp.analysis.report import describe_mutual_information
    from hf_guide.utils.escaping import to_single_line

    if summary.probe is not None:
        print(summary.probe.summary())
    elif summary.no_probe is not None:
        print(f"Whether subclasses help was not measured: {summary.no_probe} (Pass --no-probe to skip it.)")
    if summary.fine_label_information is not None:
        print(describe_mutual_information(summary.fine_label_information))
    for each in summary.classes:
        sizes = " ".join(f"{size:.0%}" for size in each.sizes.tolist())
        ratio = each.explained_variance_ratio
        variance = "" if ratio is None else f"; explained variance {ratio:.0%}"
        print(f"{to_single_line(each.name)}: {len(each.rows):,} examples; subclasses {sizes}{variance}")
