"""Plot what LELP gains over KD against the headroom, and against what embedding regression gains, over all settings.

    python examples/benchmarks/lelp_headroom.py -o examples/benchmarks/lelp_headroom.png

Headroom is what a student that is given the hidden classes gains over KD: "oracle-long", trained three times as long, where
it was run, and "oracle" elsewhere. Reads the rows of `lelp_comparison.py` and prints these gains, setting by setting; those
without runs of an oracle are left out.
"""

import argparse
from pathlib import Path
from typing import Any

from lelp_runs import RESULTS, Runs, points_above

from hf_guide.errors import OptionError

PLACE = ("set", "fonts", "teacher", "student", "transfer", "share", "steps", "initialization", "sizes")
MARKERS = {"characters": "o", "languages": "^", "definitions": "D", "glosses": "v", "garments, other texts": "s"}
"""Of the sets whose names begin so; the last one's of all others."""

Spread = tuple[float, float]


def gain(runs: Runs, common: dict[str, Any], arm: str) -> Spread | None:
    """Return mean and standard deviation of an arm's test accuracy over KD's, seed by seed, in points; None without both."""
    return points_above(*(runs.within(common, each)[1] for each in (arm, "kd")))


def settings_of_rows(runs: Runs) -> list[tuple[str, Spread, Spread, Spread | None]]:
    """Return (name, headroom, gain of LELP, gain of embedding regression) of each setting."""
    places: dict[str, dict[str, Any]] = {}
    for row in runs.done.values():
        common = {name: value for name, value in row["run"].items() if name not in ("arm", "settings", "seed")}
        places[str(common)] = common
    found = []
    for common in places.values():
        lelp = gain(runs, common, "lelp")
        headroom = gain(runs, common, "oracle-long") or gain(runs, common, "oracle")
        if lelp is not None and headroom is not None:
            name = ", ".join(str(common[part]) for part in PLACE if common.get(part) is not None)
            found.append((name, headroom, lelp, gain(runs, common, "features")))
    return found


def group_of(name: str) -> str:
    """Return the group of `MARKERS` that a setting is in."""
    return next((group for group in MARKERS if name.startswith(group)), list(MARKERS)[-1])


def draw(found: list[tuple[str, Spread, Spread, Spread | None]], file: Path) -> None:
    """Write the plot."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    titles = ("headroom: given the hidden classes, against KD", "embedding regression against KD")
    for axis, title, number in zip(axes, titles, (1, 3), strict=True):
        for place, (group, marker) in enumerate(MARKERS.items()):
            points = [(each[number], each[2]) for each in found if group_of(each[0]) == group and each[number]]
            if not points:
                continue
            across, up = zip(*points, strict=True)
            axis.errorbar(
                [x[0] for x in across],
                [y[0] for y in up],
                xerr=[x[1] for x in across],
                yerr=[y[1] for y in up],
                fmt=marker,
                color=f"C{place}",
                markersize=4,
                linewidth=0.8,
                label=group,
            )
        axis.axhline(0, color="gray", linewidth=0.6)
        axis.axvline(0, color="gray", linewidth=0.6)
        axis.set_xlabel(f"{title}, points")
    axes[0].set_ylabel("LELP against KD, points")
    axes[0].legend(loc="upper left")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", type=Path, default=RESULTS / "lelp_comparison.jsonl", help="file of runs, one a line"
    )
    parser.add_argument("-o", "--output", type=Path, help="image to write")
    args = parser.parse_args()
    if not args.rows.is_file():
        raise OptionError(f"No runs are kept in {args.rows}: name a file that lelp_comparison.py wrote (--rows).")
    found = sorted(settings_of_rows(Runs(args.rows)), key=lambda each: each[1][0])
    for name, *values in found:
        print(f"{name:110}", *("-" if each is None else f"{each[0]:+6.2f} ± {each[1]:4.2f}" for each in values))
    if args.output:
        draw(found, args.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
