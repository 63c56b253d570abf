"""`hf-guide inspect`: how much each width keeps of a teacher, before one is chosen."""

import argparse
from pathlib import Path

from hf_guide.cli.teacher_arguments import add_teacher_arguments, hub_arguments, to_flag

HELP = "see how much each width keeps, before choosing one"
DESCRIPTION = (
    "Show how much of the embedding table's variance each width keeps, and suggest widths that suit the heads."
)
EXAMPLE = "hf-guide inspect HuggingFaceTB/SmolLM2-135M --plot curve.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the teacher, and where the curve is drawn."""
    add_teacher_arguments(parser)
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="also draw the curve into this file (.png, .pdf, .svg)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the variance curve, the widths that reach its landmarks, and suggestions."""
    from hf_guide.cli.width_table import count_parameters, suggest_widths, variance_curves
    from hf_guide.initialization.infer_layout import layout_for
    from hf_guide.initialization.report import format_count
    from hf_guide.teachers.checkpoint import open_teacher
    from hf_guide.utils.escaping import to_single_line
    from hf_guide.visualization import LANDMARKS, plot_explained_variance, text_plot, width_reaching

    teacher = open_teacher(args.teacher, gguf_file=args.gguf_file, **hub_arguments(args))
    layout = layout_for(teacher.config, teacher.model_class)
    curves = variance_curves(teacher, layout)
    parameters = count_parameters(teacher, layout, {}) or 0
    print(f"{to_single_line(teacher.name)}: {teacher.model_class.__name__}, {format_count(parameters)} parameters")
    for axis, curve in curves.items():
        print(f"\nShare of the tables' variance along {axis!r} against the width kept\n\n{text_plot(curve)}\n")
        if axis != "embed":
            continue
        print(
            f"{'share':>5}  {'reached at':>10}  {'suggested student':46}  {'keeps':>5}  {'size':>8}  half the blocks"
        )
        suggestions = {found.share: found for found in suggest_widths(teacher, layout, curve)}
        for share in LANDMARKS:
            line = f"{share:5.0%}  {width_reaching(curve, share):10}  "
            if share in suggestions:
                found = suggestions[share]
                sizes = " ".join(f"{to_flag(name)} {value}" for name, value in found.overrides.items())
                size, half = (format_count(n) if n else "-" for n in (found.parameters, found.parameters_half))
                line += f"{sizes:46}  {found.kept:5.1%}  {size:>8}  {half:>15}"
            else:
                line += "no smaller width that suits"
            print(line)
    if args.plot:
        plot_explained_variance(curves, args.plot)
        print(f"\nDrawn in {args.plot}")
    return 0
