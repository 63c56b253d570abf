"""The runs of the LELP benchmark that are done, which settings of an arm were best, and the tables of them."""

import argparse
import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lelp_data import DRAWN, FROM_TEXTS
from lelp_training import ARMS, Settings

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.common.results import append_row
from hf_guide.errors import OptionError

RUNS = "runs.jsonl"
ADDED: dict[str, Any] = {"fonts": None, "student": None, "views": 0, "view_targets": "own"}
"""What older rows do not state, for they had no such option."""

RESULTS = Path(__file__).parent / "results"


class Runs:
    """The runs that are done, by what they were; a line that was being written when killed is dropped."""

    def __init__(self, file: Path, tune_seeds: int = 2):
        self.file, self.tune_seeds = file, tune_seeds
        self.done: dict[str, dict[str, Any]] = {}
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
        whole = [line for line in lines if line.endswith("\n")]
        if len(whole) < len(lines):
            file.write_text("".join(whole), encoding="utf-8")
        for line in whole:
            row = json.loads(line)
            row["run"] = ADDED | row["run"]
            self.done[_key(row["run"])] = row

    def __call__(self, run: dict[str, Any]) -> dict | None:
        return self.done.get(_key(ADDED | run))

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Runs":
        """Return the runs that the options name: those of the output folder, or else those that are stored with the scripts.

        Raises:
            OptionError: nothing is kept there, and none are to be made.
        """
        file = args.rows or (args.output / RUNS if args.output else RESULTS / "lelp_comparison.jsonl")
        if args.report and not file.is_file():
            raise OptionError(
                f"No runs are kept in {file}: name the folder of an earlier run (-o), or a file (--rows)."
            )
        return cls(file, args.tune_seeds)

    def within(self, common: dict[str, Any], arm: str) -> tuple[Settings | None, dict[int, dict[str, Any]]]:
        """Return the settings chosen for an arm, by the seeds that tune, and the results with these by the other seeds.

        None and nothing where the arm was not run, or not all of its settings with each of these seeds.
        """
        mine = [each for each in self.done.values() if (common | {"arm": arm}).items() <= each["run"].items()]
        tried = {_key(each["run"]["settings"]): each["run"]["settings"] for each in mine}
        chosen = best_settings(self, common, arm, list(tried.values()), range(self.tune_seeds)) if tried else None
        if chosen is None:
            return None, {}
        own = [each for each in mine if each["run"]["settings"] == chosen]
        fresh = {each["run"]["seed"]: each["result"] for each in own if each["run"]["seed"] >= self.tune_seeds}
        return chosen, {seed: fresh[seed] for seed in sorted(fresh)}

    def tuned_on(self, name: str, arm: str) -> Settings | None:
        """Return the settings of an arm that were best on the validation split of another set; None where none were tried."""
        scores: dict[str, list[float]] = {}
        for each in self.done.values():
            run = each["run"]
            if run["set"] == name and run["arm"] == arm and run["seed"] < self.tune_seeds and "test" in each["result"]:
                scores.setdefault(_key(run["settings"]), []).append(each["result"]["validation"])
        return json.loads(max(scores, key=lambda key: statistics.mean(scores[key]))) if scores else None

    def add(self, run: dict[str, Any], result: dict[str, Any]) -> None:
        """Keep a run."""
        row = {"run": ADDED | run, "result": result}
        self.done[_key(row["run"])] = row
        append_row(self.file, row)


def _key(run: dict[str, Any]) -> str:
    return json.dumps(run, sort_keys=True)


def place_of(run: dict[str, Any]) -> tuple[Any, ...]:
    """Return what arms are compared within."""
    return tuple(run[name] for name in ("set", "teacher", "transfer", "share", "initialization", "steps"))


def teacher_kind(name: str, args: argparse.Namespace) -> str:
    """Return the kind of teacher that a set has, as the rows state it."""
    if name.startswith(FROM_TEXTS):
        return f"trigrams-{args.teacher}" if name.startswith("languages") else "mlp"
    return args.images if name.startswith(("digits", "fashion", *DRAWN)) else args.teacher


def plan(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return what all runs of a set share."""
    teacher = teacher_kind(name, args)
    text = teacher == args.teacher
    return {
        "set": name,
        "teacher": teacher,
        "transfer": args.transfer,
        "share": args.share,
        "initialization": args.initialization,
        "steps": args.steps,
        "batch": args.batch,
        "learning_rate": args.rate,
        "length": args.length if text else None,
        "sizes": [args.seen, args.unseen, args.held_out, args.teacher_steps],
        "fonts": (args.fonts.name if args.fonts else "trdg") if name.startswith(DRAWN) else None,
        "student": None if text else args.student,
        "views": args.views,
        "view_targets": args.view_targets,
    }


def best_settings(
    runs: Runs, common: dict[str, Any], arm: str, tried: list[Settings], seeds: Iterable[int]
) -> Settings | None:
    """Return the settings that are best on the validation split over the tuning seeds.

    Settings without an alternative need no run. None where a run is missing, or where the data are too few for any of them.
    """
    scores = []
    if len(tried) == 1 and all(
        runs(common | {"arm": arm, "settings": tried[0], "seed": seed}) is None for seed in seeds
    ):
        return tried[0]
    for settings in tried:
        rows = [runs(common | {"arm": arm, "settings": settings, "seed": seed}) for seed in seeds]
        accuracies = [each["result"].get("validation", -1.0) for each in rows if each is not None]
        if len(accuracies) < len(rows):
            return None
        scores.append(statistics.mean(accuracies))
    best = max(range(len(tried)), key=scores.__getitem__)
    return tried[best] if scores[best] >= 0 else None


def points_above(own: dict[int, dict[str, Any]], kd: dict[int, dict[str, Any]]) -> tuple[float, float] | None:
    """Return mean and standard deviation of test accuracy over KD's, seed by seed, in points; None with fewer than two seeds.

    Args:
        own, kd: The results of both by seed, as `Runs.within` returns them.
    """
    apart = [100 * (own[seed]["test"] - kd[seed]["test"]) for seed in own if seed in kd]
    return (statistics.mean(apart), statistics.stdev(apart)) if len(apart) > 1 else None


def report(runs: Runs) -> None:
    """Print a table for each set: mean and standard deviation on the test part, and the difference from KD, seed by seed."""
    places: dict[tuple[Any, ...], dict[str, Any]] = {}
    for found in runs.done.values():
        run = found["run"]
        common = {name: run[name] for name in run if name not in ("arm", "settings", "seed")}
        places.setdefault(place_of(run) + (_key(common),), common)
    for common in places.values():
        both = [each for each in runs.done.values() if common.items() <= each["run"].items()]
        inside = [each for each in both if "skipped" not in each["result"]]
        teacher = inside[0]["result"]["teacher"] if inside else float("nan")
        print(f"\n{', '.join(f'{name} {value}' for name, value in common.items())}; teacher {teacher:.2%}")
        scores: dict[str, tuple[Settings, dict[int, float]]] = {}
        for arm in ARMS:
            chosen, results = runs.within(common, arm)
            if chosen is not None:
                scores[arm] = (chosen, {seed: result["test"] for seed, result in results.items()})
        against = scores.get("kd", ({}, {}))[1]
        for arm, (chosen, own) in scores.items():
            apart = [100 * (own[seed] - against[seed]) for seed in own if seed in against]
            spread = _spread([100 * value for value in own.values()])
            print(f"  {arm:18} {spread}   against KD {_spread(apart, sign='+')}   {len(own)} seeds  {chosen}")
        left_out = {each["result"]["skipped"] for each in both if "skipped" in each["result"]}
        for reason in sorted(left_out):
            print(f"  left out: {reason}")


def _spread(values: list[float], sign: str = "") -> str:
    if not values:
        return "-"
    spread = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):{sign}6.2f} ± {spread:4.2f}"
