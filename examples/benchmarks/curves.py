"""Tables and plots of the curves of `initialization_comparison.py`."""

import math
import statistics
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.common.results import mean_and_spread

Row = dict[str, Any]


def tokens_until(curve: list[list[float]], target: float) -> float:
    """Return after how many tokens a curve is at `target`, between its points; infinity where it never is."""
    before = curve[0]
    if before[1] <= target:
        return 0.0
    for point in curve[1:]:
        if point[1] <= target:
            return before[0] + (before[1] - target) / (before[1] - point[1]) * (point[0] - before[0])
        before = point
    return math.inf


def setting(row: Row) -> tuple[str, float]:
    """Return what of a run its random baseline shares: the student's shape and the tokens for each of its parameters."""
    return row["shape"], row["tokens_per_parameter"]


def baselines(rows: list[Row]) -> dict[tuple[Any, ...], list[list[float]]]:
    """Return the curves of random students trained on labels, by setting and seed."""
    key = {"arm": "random", "objective": "labels", "tuning": False}
    return {(*setting(row), row["seed"]): row["curve"] for row in rows if key.items() <= row.items()}


def gap_closed(row: Row, baseline: list[list[float]]) -> float:
    """Return (random - x) / (random - teacher) in perplexity, in percent."""
    random, arm_rows, teacher = (math.exp(loss) for loss in (baseline[-1][1], row["curve"][-1][1], row["teacher"]))
    return 100 * (random - arm_rows) / (random - teacher)


def table(rows: list[Row]) -> str:
    """Return mean and standard deviation over seeds, a line for each setting, objective and arm."""
    rows = [row for row in rows if not row["tuning"]]
    width = max((len(row["arm"]) for row in rows), default=0)
    lines = [
        f"{'':{width + 2}} {'parameters':>10} {'rate':>6} {'perplexity':>16} {'gap closed, %':>16} {'tokens':>14}"
        f" {'start, s':>9} {'of run':>7}"
    ]
    random = baselines(rows)
    for (shape, budget), objective in dict.fromkeys((setting(row), row["objective"]) for row in rows):
        lines.append(f"{shape}, {budget:g} tokens a parameter, {objective}; gap and tokens against random on labels")
        for arm in dict.fromkeys(row["arm"] for row in rows):
            key = {"shape": shape, "tokens_per_parameter": budget, "objective": objective, "arm": arm}
            arm_rows = [row for row in rows if key.items() <= row.items() and (shape, budget, row["seed"]) in random]
            if not arm_rows:
                continue
            ends = [math.exp(row["curve"][-1][1]) for row in arm_rows]
            gaps, shares = [], []
            for row in arm_rows:
                baseline = random[shape, budget, row["seed"]]
                gaps.append(gap_closed(row, baseline))
                shares.append(tokens_until(row["curve"], baseline[-1][1]) / baseline[-1][0])
            cost = statistics.mean(row["initialization_seconds"] for row in arm_rows)
            share = statistics.mean(row["initialization_seconds"] / row["seconds"] for row in arm_rows)
            first = arm_rows[0]
            lines.append(
                f"  {arm:{width}} {first['parameters']:>10,} {first['learning_rate']:>6g} "
                f"{mean_and_spread(ends):>16} {mean_and_spread(gaps):>16} {mean_and_spread(shares):>14} "
                f"{cost:>9.1f} {share:>7.1%}"
            )
    weak = [row for row in rows if row["curve"][-1][1] < row["teacher"]]
    if weak:
        lines.append(
            f"In {len(weak)} runs the student overtook its teacher: no gap is left to close. Train it on more text."
        )
    return "\n".join(lines)


def interaction(rows: list[Row]) -> str:
    """Return the gap that each initialization closes with each objective, and its share of the sum of both gaps.

    The sum is the gap that the initialization closes on labels plus the gap that the objective closes from random, per seed.
    """
    rows = [row for row in rows if not row["tuning"]]
    random = baselines(rows)
    lines = []
    for shape, budget in dict.fromkeys(map(setting, rows)):
        selected = [row for row in rows if setting(row) == (shape, budget) and (shape, budget, row["seed"]) in random]
        gaps = _gaps(selected, random)
        objectives = list(dict.fromkeys(row["objective"] for row in selected))
        arms = _run_with(selected, objectives[-1:])
        if len(objectives) < 2 or not arms:
            continue
        lines.append(f"{shape}, {budget:g} tokens a parameter: gap closed, %, and its share of the sum of both")
        down, across = (objectives, arms) if len(arms) <= len(objectives) else (arms, objectives)
        left = max(16, *(len(name) + 4 for name in down))
        lines.append(" " * left + "".join(f"{name:>34}" for name in across))
        for row in down:
            pairs = [(name, row) if down is objectives else (row, name) for name in across]
            lines.append(f"  {row:{left - 2}}" + "".join(f"{_share(gaps, *pair):>34}" for pair in pairs))
    return "\n".join(lines)


def _gaps(rows: list[Row], random: dict[tuple[Any, ...], list[list[float]]]) -> dict[tuple[str, str, int], float]:
    """Return the gap closed by arm, objective and seed, of runs of one setting."""
    return {
        (row["arm"], row["objective"], row["seed"]): gap_closed(row, random[(*setting(row), row["seed"])])
        for row in rows
    }


def _share(gaps: dict[tuple[str, str, int], float], arm: str, objective: str) -> str:
    """Return the gap that an arm closes with an objective, and its share of what both close alone, as text."""
    seeds = _seeds(gaps, arm, objective)
    arm_rows = [gaps[arm, objective, seed] for seed in seeds]
    sums = [gaps.get((arm, "labels", s), math.nan) + gaps.get(("random", objective, s), math.nan) for s in seeds]
    none = arm == "random" or objective == "labels" or not arm_rows or min(sums) <= 0  # of less than nothing
    share = "" if none else f" ({mean_and_spread([a / b for a, b in zip(arm_rows, sums, strict=True)])})"
    return mean_and_spread(arm_rows) + share


def _run_with(rows: list[Row], objectives: Collection[str]) -> list[str]:
    """Return the arms that were run with each of these objectives, in the order of the rows."""
    run = {(row["arm"], row["objective"]) for row in rows}
    arms = dict.fromkeys(row["arm"] for row in rows)
    return [arm for arm in arms if all((arm, objective) in run for objective in objectives)]


def _seeds(gaps: dict[tuple[str, str, int], float], arm: str, objective: str) -> list[int]:
    return [seed for its_arm, its_objective, seed in gaps if (its_arm, its_objective) == (arm, objective)]


def plot_interaction(rows: list[Row], file: Path) -> None:
    """Draw the gap that each initialization closes with each objective, mean and standard deviation; a panel for each
    setting.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if not row["tuning"]]
    random = baselines(rows)
    rows = [row for row in rows if (*setting(row), row["seed"]) in random]
    with_kd = [setting(row) for row in rows if row["objective"] == "KD"]
    settings = list(dict.fromkeys(with_kd))
    if not settings:
        return
    figure, axes = pyplot.subplots(1, len(settings), figsize=(6 * len(settings), 4), squeeze=False)
    for axis, panel in zip(axes[0], settings, strict=True):
        selected = [row for row in rows if setting(row) == panel]
        gaps, objectives = _gaps(selected, random), list(dict.fromkeys(row["objective"] for row in selected))
        arms = _run_with(selected, objectives[-1:])
        for number, arm in enumerate(arms):
            values_by_objective = [[gaps[arm, name, seed] for seed in _seeds(gaps, arm, name)] for name in objectives]
            positions = [at + (number - (len(arms) - 1) / 2) * 0.8 / len(arms) for at in range(len(objectives))]
            axis.bar(
                positions,
                [statistics.mean(values) if values else 0.0 for values in values_by_objective],
                0.8 / len(arms),
                yerr=[statistics.stdev(values) if len(values) > 1 else 0.0 for values in values_by_objective],
                label=arm,
            )
        axis.set_xticks(range(len(objectives)), objectives, fontsize="small")
        axis.set(title=f"{panel[0]}, {panel[1]:g} tokens a parameter", ylabel="gap closed, %")
        axis.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3)
    figure.tight_layout()
    figure.savefig(file, dpi=80)
    pyplot.close(figure)


def plot(rows: list[Row], file: Path) -> None:
    """Draw held-out loss against tokens, the mean over seeds; a row for each setting, a column for labels and for KD.

    Of each shape the largest budget is drawn, and the arms that were run with all objectives; variants of an arm have its
    colour.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    most = {
        shape: max(row["tokens_per_parameter"] for row in rows if row["shape"] == shape)
        for shape, _ in map(setting, rows)
    }
    rows = [
        row
        for row in rows
        if not row["tuning"]
        and row["objective"] in ("labels", "KD")
        and row["tokens_per_parameter"] == most[row["shape"]]
    ]
    if not rows:
        return  # so far only learning rates were chosen
    settings = list(dict.fromkeys(map(setting, rows)))
    objectives = list(dict.fromkeys(row["objective"] for row in rows))
    kinds = list(dict.fromkeys(_kind(row["arm"]) for row in rows))
    figure, axes = pyplot.subplots(
        len(settings), len(objectives), figsize=(6 * len(objectives), 4 * len(settings)), squeeze=False
    )
    for axis, (shape, budget), objective in (
        (axes[line][column], each, name)
        for line, each in enumerate(settings)
        for column, name in enumerate(objectives)
    ):
        run = [row for row in rows if setting(row) == (shape, budget)]
        arms = _run_with(run, {row["objective"] for row in run})
        selected = [row for row in run if row["objective"] == objective and row["arm"] in arms]
        axis.set(title=f"{shape}, {budget:g} tokens a parameter\n{objective}", xlabel="tokens", ylabel="held-out loss")
        if not selected:
            axis.set_axis_off()
            continue
        for arm in arms:
            curves = [row["curve"] for row in selected if row["arm"] == arm]
            means = [statistics.mean(point[1] for point in points) for points in zip(*curves, strict=False)]
            tokens = [point[0] for point in curves[0]][: len(means)]
            variants = [each for each in arms if _kind(each) == _kind(arm)]
            style = ("-", "--", "-.", ":")[variants.index(arm) % 4]
            axis.plot(tokens, means, style, color=f"C{kinds.index(_kind(arm)) % 10}", label=arm)
        target = statistics.mean(row["teacher"] for row in selected)
        axis.axhline(target, color="black", linestyle=":", label="teacher")
        # The first points are above the panel.
        late = [loss for row in selected for tokens, loss in row["curve"] if tokens > row["curve"][-1][0] / 12]
        axis.set_ylim(min([target, *late]) - 0.1, max([target, *late]) + 0.1)
        axis.legend(fontsize="small", loc="best")
    figure.tight_layout()
    figure.savefig(file, dpi=80)
    pyplot.close(figure)


def _kind(arm: str) -> str:
    """Return what an arm is a variant of: "guide" of "guide, first and last blocks"."""
    return arm.partition(",")[0]
