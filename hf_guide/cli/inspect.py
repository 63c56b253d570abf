"""`hf-guide inspect`: how much variance each width retains. The work is in `scripts/inspect.py`."""

import argparse
from pathlib import Path

from hf_guide.cli.arguments import add_teacher_arguments, hub_arguments, to_flag

HELP = "show how much variance each width retains, to choose one"
DESCRIPTION = (
    "Show how much of the embedding matrix's variance each width retains, and suggest widths that suit the heads."
)
EXAMPLE = "hf-guide inspect HuggingFaceTB/SmolLM2-135M --plot curve.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the teacher, and the file of the plot."""
    add_teacher_arguments(parser)
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="also plot the curve into this file (.png, .pdf, .svg)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the variance curve, the widths that reach round percentages, and suggested students."""
    from hf_guide.initialization.infer_layout import layout_for
    from hf_guide.initialization.report import format_count
    from hf_guide.scripts.inspect import count_parameters, suggest_widths, variance_curves
    from hf_guide.teachers.checkpoint import open_teacher
    from hf_guide.utils.escaping import to_single_line
    from hf_guide.visualization import (
        LANDMARKS,
        check_figure_output,
        figure_file,
        plot_explained_variance,
        text_plot,
        width_reaching,
    )

    if args.plot:
        check_figure_output(args.plot)
    teacher = open_teacher(args.teacher, gguf_file=args.gguf_file, **hub_arguments(args))
    layout = layout_for(teacher.config, teacher.model_class)
    curves = variance_curves(teacher, layout)
    parameters = count_parameters(teacher, layout, {}) or 0
    print(f"{to_single_line(teacher.name)}: {teacher.model_class.__name__}, {format_count(parameters)} parameters")
    for axis, curve in curves.items():
        print(f"\nFraction of the embedding variance along {axis!r} at each width\n\n{text_plot(curve)}\n")
        if axis != "embed":
            continue
        print(
            f"{'variance':>8}  {'from width':>10}  {'suggested student':46}  {'variance':>8}  {'size':>8}  "
            "with half of the blocks"
        )
        suggestions = {each.target: each for each in suggest_widths(teacher, layout, curve)}
        for target in LANDMARKS:
            line = f"{target:8.0%}  {width_reaching(curve, target):10}  "
            if target in suggestions:
                suggestion = suggestions[target]
                flags = " ".join(f"{to_flag(name)} {value}" for name, value in suggestion.overrides.items())
                sizes = (suggestion.parameters, suggestion.parameters_half)
                size, half = (format_count(count) if count else "-" for count in sizes)
                line += f"{flags:46}  {suggestion.explained_variance:8.1%}  {size:>8}  {half:>23}"
            else:
                line += "no smaller width suits the heads"
            print(line)
    if args.plot:
        plot_explained_variance(curves, args.plot)
        print(f"\nPlotted in {figure_file(args.plot)}")
    return 0
