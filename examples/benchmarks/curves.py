"""What the curves of `starting_points.py` say: its table and its plot."""

import math
import statistics
from pathlib import Path
from typing import Any


def tokens_until(curve: list[list[float]], goal: float) -> float:
    """Return after how many tokens a curve is at `goal`, between its points; infinity where it never is."""
    before = curve[0]
    if before[1] <= goal:
        return 0.0
    for point in curve[1:]:
        if point[1] <= goal:
            return before[0] + (before[1] - goal) / (before[1] - point[1]) * (point[0] - before[0])
        before = point
    return math.inf


def table(rows: list[dict[str, Any]]) -> str:
    """Return mean and standard deviation over seeds, a line for each shape, objective and arm."""
    rows = [row for row in rows if not row["tuning"]]
    lines = [
        f"{'':26} {'parameters':>10} {'rate':>6} {'perplexity':>16} {'gap closed, %':>16} {'tokens':>14} {'start, s':>9}"
    ]
    random = {
        (row["shape"], row["seed"]): row["curve"]
        for row in rows
        if row["arm"] == "random" and row["objective"] == "labels"
    }
    for shape, objective in dict.fromkeys((row["shape"], row["objective"]) for row in rows):
        lines.append(f"{shape}, {objective}; gap and tokens against random on labels")
        for arm in dict.fromkeys(row["arm"] for row in rows):
            wanted = {"shape": shape, "objective": objective, "arm": arm}
            own = [row for row in rows if wanted.items() <= row.items() and (shape, row["seed"]) in random]
            if not own:
                continue
            ends = [math.exp(row["curve"][-1][1]) for row in own]
            gaps, shares = [], []
            for row, end in zip(own, ends, strict=True):
                tokens, loss = random[shape, row["seed"]][-1]
                gaps.append(100 * (math.exp(loss) - end) / (math.exp(loss) - math.exp(row["teacher"])))
                shares.append(tokens_until(row["curve"], loss) / tokens)
            lines.append(
                f"  {arm:24} {own[0]['parameters']:>10,} {own[0]['rate']:>6g} {spread(ends):>16} {spread(gaps):>16} "
                f"{spread(shares):>14} {statistics.mean(row['start_seconds'] for row in own):>9.1f}"
            )
    weak = [row for row in rows if row["curve"][-1][1] < row["teacher"]]
    if weak:
        lines.append(
            f"In {len(weak)} runs the student overtook its teacher: no gap is left to close. Train it on more text."
        )
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Return mean and standard deviation as text; of values that are not all finite, how many are."""
    if not all(map(math.isfinite, values)):
        return f"{sum(map(math.isfinite, values))} of {len(values)}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.2f}"


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw held-out loss against tokens, a panel for each shape and objective, the mean over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if not row["tuning"]]
    panels = list(dict.fromkeys((row["shape"], row["objective"]) for row in rows))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(6 * len(panels), 4), squeeze=False)
    for axis, (shape, objective) in zip(axes[0], panels, strict=True):
        for arm in dict.fromkeys(row["arm"] for row in rows):
            wanted = {"shape": shape, "objective": objective, "arm": arm}
            curves = [row["curve"] for row in rows if wanted.items() <= row.items()]
            if curves:
                means = [statistics.mean(point[1] for point in points) for points in zip(*curves, strict=False)]
                axis.plot([point[0] for point in curves[0]][: len(means)], means, label=arm)
        here = [row for row in rows if (row["shape"], row["objective"]) == (shape, objective)]
        goal = statistics.mean(row["teacher"] for row in here)
        axis.axhline(goal, color="black", linestyle="--", label="teacher")
        late = [point[1] for row in here for point in row["curve"][1:]]  # where it starts is off the panel's top
        axis.set_ylim(min([goal, *late]) - 0.1, max([goal, *late]) + 0.1)
        axis.set(title=f"{shape}, {objective}", xlabel="tokens", ylabel="held-out loss")
    axes[0][0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)
