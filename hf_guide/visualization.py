"""Plot explained variance against width, as a figure or in a terminal, and losses against steps."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_guide.errors import OptionError
from hf_guide.initialization.report import InitializationReport
from hf_guide.utils.escaping import escape_mathtext
from hf_guide.utils.files import atomic_write, check_output_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = Sequence[float]
LANDMARKS = (0.5, 0.8, 0.9, 0.95, 0.99)


def width_reaching(curve: Curve, share: float) -> int:
    """Return the smallest width at which a cumulative curve reaches a fraction of the variance, 0 to 1."""
    return next((width for width, value in enumerate(curve, 1) if value >= share - 1e-12), len(curve))


def plot_explained_variance(
    report_or_curve: InitializationReport | Mapping[str, Curve] | Curve,
    path: str | os.PathLike[str] | None = None,
) -> "Figure":
    """Plot the explained variance against the width, one line per projected axis.

    Args:
        report_or_curve: A report (the student's widths are marked), curves by axis, or one curve: cumulative fractions,
            0 to 1, at width 1, 2, ....
        path: Where to write the figure; the suffix determines the format.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There is no curve.
    """
    figure_class = _figure_class()
    curves: Mapping[str, Curve]
    chosen: Mapping[str, Sequence[int]] = {}
    if isinstance(report_or_curve, InitializationReport):
        curves, chosen = report_or_curve.explained_variance, report_or_curve.sizes
    elif isinstance(report_or_curve, Mapping):
        curves = report_or_curve
    else:
        curves = {"embed": report_or_curve}
    if not any(len(curve) for curve in curves.values()):
        raise ValueError("There is no variance curve to plot: only projected axes have one.")

    figure = figure_class(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for axis, curve in curves.items():
        (line,) = axes.plot(range(1, len(curve) + 1), curve, label=escape_mathtext(axis))
        if axis in chosen:
            width = chosen[axis][1]
            share = curve[width - 1]
            axes.plot([width, width, 0], [0, share, share], ":", color=line.get_color(), linewidth=1)
            axes.plot([width], [share], "o", color=line.get_color())
            axes.annotate(f"{width}: {share:.1%}", (width, share), xytext=(6, -14), textcoords="offset points")
    axes.set(xlabel="width", ylabel="explained variance", xlim=(0, None), ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend(loc="lower right")
    if path is not None:
        save_figure(figure, path)
    return figure


def loss_curves(history: Sequence[Mapping[str, float | None]]) -> dict[str, list[tuple[float, float]]]:
    """Return the training and evaluation losses of a `Trainer`'s log as (step, loss), where there are two or more."""
    curves: dict[str, list[tuple[float, float]]] = {}
    # The training loss is the whole objective, which evaluation logs apart from the task loss.
    evaluated = "eval_objective" if any("eval_objective" in entry for entry in history) else "eval_loss"
    for entry in history:
        step = entry.get("step")
        for name in ("loss", evaluated):
            value = entry.get(name)
            if step is not None and value is not None and math.isfinite(value):
                curves.setdefault(name, []).append((step, value))
    return {name: points for name, points in curves.items() if len(points) > 1}


def plot_training(
    history: Sequence[Mapping[str, float | None]], path: str | os.PathLike[str] | None = None
) -> "Figure":
    """Plot the training and evaluation losses against the step.

    Args:
        history: Entries of a `Trainer`'s log, each with its "step".
        path: Where to write the figure; the suffix determines the format.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: Losses were logged at fewer than two steps.
    """
    figure_class = _figure_class()
    curves = loss_curves(history)
    if not curves:
        raise ValueError("There is no loss to plot: it was logged at fewer than two steps.")
    figure = figure_class(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for name, points in curves.items():
        steps, losses = zip(*points, strict=True)
        axes.plot(steps, losses, label="training" if name == "loss" else "evaluation")
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    if path is not None:
        save_figure(figure, path)
    return figure


def plot_shapes(shapes: Sequence[Mapping[str, Any]], path: str | os.PathLike[str] | None = None) -> "Figure":
    """Plot the shapes of a budget: the depth against the width, colored by the best score that all of them have.

    Args:
        shapes: Entries with "width", "depth", "quick_loss" and "rule_score", as `ShapeCandidate.to_json` returns them; the
            best first.
        path: Where to write the figure; the suffix determines the format.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There are no shapes.
    """
    figure_class = _figure_class()
    if not shapes:
        raise ValueError("There are no shapes to plot.")
    kind = "quick_loss" if all(each["quick_loss"] is not None for each in shapes) else "rule_score"
    label = {"quick_loss": "held-out loss of an untrained start (nats)", "rule_score": "rule score (lower is better)"}[
        kind
    ]
    figure = figure_class(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    widths, depths = [each["width"] for each in shapes], [each["depth"] for each in shapes]
    points = axes.scatter(widths, depths, c=[each[kind] for each in shapes], cmap="viridis", s=60)
    axes.plot(widths[0], depths[0], "o", mfc="none", mec="red", ms=14)
    axes.set(xlabel="width", ylabel="blocks")
    axes.grid(alpha=0.3)
    figure.colorbar(points, label=label)
    if path is not None:
        save_figure(figure, path)
    return figure


def text_plot(curve: Curve, columns: int = 64, lines: int = 12) -> str:
    """Plot a cumulative curve in plain characters: explained variance upwards, width to the right."""
    columns = min(columns, len(curve))
    heights = [curve[(column + 1) * len(curve) // columns - 1] * lines for column in range(columns)]
    rows = []
    for line in range(lines, 0, -1):
        label = f"{line / lines:5.0%} |" if (lines - line) % 3 == 0 else "      |"
        rows.append((label + "".join("#" if height >= line - 0.5 else " " for height in heights)).rstrip())
    middle = str(len(curve) // 2).center(columns - 1 - len(str(len(curve))))
    return "\n".join([*rows, "      +" + "-" * columns, f"       1{middle}{len(curve)}"])


def save_figure(figure: "Figure", path: str | os.PathLike[str], dpi: int = 150) -> None:
    """Write a figure into a file atomically, in the format of its suffix; PNG without one.

    Raises:
        OptionError: matplotlib does not support the suffix.
    """
    file = figure_file(path)
    with atomic_write(file) as partial:
        figure.savefig(partial, dpi=dpi, format=file.suffix.removeprefix(".").lower())


def check_figure_output(path: str | os.PathLike[str]) -> None:
    """Check that a figure can be written to a path, before what it shows is computed.

    Raises:
        ImportError: matplotlib is not installed.
        OptionError: matplotlib does not support the suffix, or the path is a folder, or in none.
        PermissionError: The folder is not writable.
    """
    check_output_file(figure_file(path))


def figure_file(path: str | os.PathLike[str]) -> Path:
    """Return the file that a figure is written into: the path, with the suffix .png where it has none.

    Raises:
        ImportError: matplotlib is not installed.
        OptionError: matplotlib does not support the suffix.
    """
    known = _figure_class()().canvas.get_supported_filetypes()
    suffix = Path(path).suffix.removeprefix(".").lower()
    if suffix and suffix not in known:
        raise OptionError(f"{os.fspath(path)} must end in one of {', '.join(sorted(known))}; found {suffix!r}.")
    return Path(path) if suffix else Path(f"{os.fspath(path)}.png")


def _figure_class() -> "type[Figure]":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install matplotlib") from error
    return Figure
