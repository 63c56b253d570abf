"""`hf-guide shapes`: rank the student shapes of a budget, and plot them."""

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_guide.cli.arguments import add_teacher_arguments, budget_arguments, hub_arguments, to_flag
from hf_guide.cli.init import (
    SIZES,
    add_calibration_arguments,
    add_key_values,
    add_shape_arguments,
    read_calibration_dataset,
    shape_overrides,
)
from hf_guide.errors import OptionError

if TYPE_CHECKING:
    from hf_guide.shapes.candidates import ShapeCandidate

HELP = "rank the student shapes of a number of parameters, or of memory"
DESCRIPTION = (
    "List the best student shapes of a budget and which to take. Without data a rule ranks them; with calibration data the\n"
    "loss of untrained calibrated students on a part of it. Sizes that are given are kept."
)
EXAMPLE = (
    "hf-guide shapes HuggingFaceTB/SmolLM2-135M --num-parameters 23M --calibration-dataset texts.txt -o shapes.png"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the teacher, the budget, sizes that are kept, and calibration data."""
    add_teacher_arguments(parser)
    add_shape_arguments(parser)
    calibration = parser.add_argument_group("calibration")
    add_calibration_arguments(calibration)
    calibration.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="option of calibrated, such as calibration_tokens=8192; may be repeated",
    )
    parser.add_argument("--limit", type=int, default=12, metavar="N", help="number of shapes to list (default: 12)")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16", "float64"],
        metavar="DTYPE",
        help="of the student, for its memory; by default the teacher's",
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="plot the shapes into this file (.png, .pdf, .svg)"
    )
    parser.add_argument("--no-progress", action="store_true", help="show no progress bars")


def run(args: argparse.Namespace) -> int:
    """Print the ranking, and the command that makes the best student."""
    budget = budget_arguments(args)
    if not budget:
        raise OptionError("Set what the student may cost: --num-parameters, --active-parameters or --memory.")
    if args.output:
        from hf_guide.visualization import check_figure_output

        check_figure_output(args.output)
    overrides = shape_overrides(args)
    dataset = read_calibration_dataset(args.calibration_dataset)
    if args.option and dataset is None:
        raise OptionError("--option is of calibrated, which needs --calibration-dataset; leave it out, or set that.")
    options = add_key_values({"method": "calibrated"}, args.option, "--option") if dataset is not None else None

    from hf_guide.shapes.search import find_shapes
    from hf_guide.visualization import figure_file, plot_shapes

    shapes = find_shapes(
        args.teacher,
        method=options,
        calibration_dataset=dataset,
        calibration_cache_dir=args.calibration_cache_dir,
        dtype=args.dtype,
        tokenizer=args.tokenizer,
        limit=args.limit,
        gguf_file=args.gguf_file,
        show_progress=not args.no_progress,
        **hub_arguments(args),
        **budget,
        **overrides,
    )
    print("\n".join(format_table(shapes)))
    command = init_command(args, {**overrides, **shapes[0].overrides})
    print(f"\nTake the first: {command}{' --token ...' if args.token else ''}")
    if args.output:
        plot_shapes([each.to_json() for each in shapes], args.output)
        print(f"Plotted in {figure_file(args.output)}")
    return 0


def init_command(args: argparse.Namespace, sizes: Mapping[str, Any]) -> str:
    """Return the `hf-guide init` that makes the student of some sizes as it was ranked.

    It has every flag of this command that `init` has, too, but for the budget, which the sizes replace, and the token, which
    is not printed.
    """
    from hf_guide.shapes.search import START_FOLDER, search_folder

    words = ["hf-guide", *(word for name in args.imports for word in ("--import", name)), "init", args.teacher]
    for name, size in sizes.items():
        words += [to_flag(name), str(size)] if name in SIZES else ["--config", f"{name}={json.dumps(size)}"]
    if args.calibration_dataset:
        words += ["--method", "calibrated", "--calibration-dataset", *map(str, args.calibration_dataset)]
    words += [word for option in args.option for word in ("--option", option)]
    values = {name: getattr(args, name) for name in ("tokenizer", "dtype", "gguf_file", "revision")}
    values["calibration_cache_dir"] = search_folder(args.calibration_cache_dir, START_FOLDER)
    words += [word for name, value in values.items() if value is not None for word in (to_flag(name), str(value))]
    words += [to_flag(name) for name in ("trust_remote_code", "no_progress") if getattr(args, name)]
    return f"{shlex.join(words)} -o student/"


def format_table(shapes: "Sequence[ShapeCandidate]") -> list[str]:
    """Return a header and a line for each shape; columns without values are left out."""
    from hf_guide.initialization.report import format_count

    columns = {name: [str(each.sizes[name]) for each in shapes] for name in shapes[0].sizes}
    columns["parameters"] = [format_count(each.parameters) for each in shapes]
    if any(each.active_parameters != each.parameters for each in shapes):
        columns["active"] = [format_count(each.active_parameters) for each in shapes]
    columns["memory"] = [f"{each.memory / 2**20:,.1f} MiB" for each in shapes]
    columns["FLOPs a token"] = [format_count(each.flops_per_token) for each in shapes]
    columns["rule score"] = [f"{each.rule_score:.2f}" for each in shapes]
    for name in ("quick_loss", "loss", "distilled_loss"):
        losses = [getattr(each, name) for each in shapes]
        if any(loss is not None for loss in losses):
            columns[name.replace("_", " ")] = ["-" if loss is None else f"{loss:.3f}" for loss in losses]
    widths = {name: max(len(name), *map(len, cells)) for name, cells in columns.items()}
    header = "  ".join(name.rjust(width) for name, width in widths.items())
    rows = zip(*columns.values(), strict=True)
    return [header, *("  ".join(map(str.rjust, row, widths.values())) for row in rows)]
