"""Does initialization from the teacher carry over to an encoder, an image classifier and an encoder-decoder?

    python examples/benchmarks/other_families.py --families encoder encoder-decoder --output other_families.jsonl
    python examples/benchmarks/other_families.py --families vision --fashion FOLDER     # of Debian's dataset-fashion-mnist
    python examples/benchmarks/other_families.py --output other_families.jsonl --table

Students have half the width and half the depth of their teachers, which are those of family_teachers.py: all-MiniLM-L6-v2,
whose embeddings are regressed, and a ViT and a T5, which are trained first and distilled by 0.5 CE + 0.5 KD. Each arm has
the learning rate that did best on a run a third as long, with its own seed and its own held-out part. An encoder's student
has a linear layer onto the teacher's embeddings, which in every arm is fitted by least squares before the first step.
One JSON line a run is appended to --output; a run that is there already is not made again.
"""

import argparse
import copy
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from curves import tokens_until
from family_teachers import FAMILIES, Examples, Setting
from transformers import PreTrainedModel, default_data_collator

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.common.malloc import keep_freed_memory
from examples.common.results import append_row, mean_and_spread, read_rows
from hf_guide import DistillationArguments, DistillationTrainer, from_teacher

ARMS: dict[str, dict[str, Any]] = {
    "random": {"method": "random"},
    "uniform": {"method": "uniform", "layer_selection": "uniform"},
    "guide": {"method": "guide", "layer_selection": "uniform"},
    "guide, first and last blocks": {"method": "guide", "layer_selection": "first_last"},
    "calibrated": {"method": "calibrated"},
}
BATCH = 32
TUNING_SEED = 1000
TUNING_SHARE = 3
SHOWN = (0, 0.1, 0.25, 0.5, 1)  # of a run, in the table of curves


def make(setting: Setting, arm: str, seed: int) -> PreTrainedModel:
    """Return the student of an arm."""
    student = from_teacher(
        setting.teacher,
        model_class=setting.model_class,
        method=ARMS[arm] | {"seed": seed},
        calibration_dataset=setting.calibration if arm == "calibrated" else None,
        dtype="float32",
        show_progress=False,
        **setting.changes,
        **setting.fixed,
    )
    setting.settle(student)
    return student


def trainer_of(
    model: PreTrainedModel,
    setting: Setting,
    watched: Examples,
    objective: dict[str, float],
    output_dir: str,
    **more: Any,
) -> DistillationTrainer:
    """Return a trainer that measures on `watched`."""
    return DistillationTrainer(
        model,
        DistillationArguments(
            output_dir,
            losses=objective,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=128,
            logging_strategy="no",
            save_strategy="no",
            dataloader_pin_memory=False,
            report_to="none",
            disable_tqdm=True,
            **more,
        ),
        data_collator=default_data_collator,
        train_dataset=setting.train_data,
        eval_dataset=watched,
        compute_metrics=setting.measure,
        teacher=setting.teacher if set(objective) != {"ce"} else None,
    )


def learn(
    student: PreTrainedModel, setting: Setting, watched: Examples, rate: float, steps: int, points: int, seed: int
) -> list[dict[str, float]]:
    """Train a student; return its held-out loss and measure after so many steps, from none on."""
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = trainer_of(
            student,
            setting,
            watched,
            setting.objective,
            output_dir,
            max_steps=steps,
            learning_rate=rate,
            warmup_steps=max(1, steps // 20),
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.05},
            weight_decay=0.01,
            eval_strategy="steps",
            eval_steps=max(1, steps // points),
            eval_on_start=True,
            seed=seed,
        )
        trainer.train()
    entries = [entry for entry in trainer.state.log_history if "eval_ce" in entry]
    return [{"step": entry["step"]} | eval_metrics(entry) for entry in entries]


def eval_metrics(entry: dict[str, float]) -> dict[str, float]:
    """Return the loss of an evaluation, and the metric if the family has one."""
    kept = {"loss": entry["eval_ce"]}
    return kept | ({"metric": entry["eval_metric"]} if "eval_metric" in entry else {})


def teacher_metrics(setting: Setting, watched: Examples) -> dict[str, float]:
    """Return what the teacher itself is measured as."""
    if setting.best is not None:
        return setting.best
    teacher = setting.model_class.from_pretrained(setting.teacher)
    with tempfile.TemporaryDirectory() as output_dir:
        return eval_metrics(trainer_of(teacher, setting, watched, {"ce": 1.0}, output_dir).evaluate())


def run(args: argparse.Namespace, family: str) -> None:
    """Make every run of a family that is not there yet."""
    setting = FAMILIES[family](args.folder / family, args.fashion)
    teacher_metrics_by_split = {
        True: teacher_metrics(setting, setting.tuning),
        False: teacher_metrics(setting, setting.held_out),
    }
    for arm in args.arms:
        jobs = [(TUNING_SEED, rate, args.steps // TUNING_SHARE, setting.tuning) for rate in setting.rates]
        jobs += [(seed, None, args.steps, setting.held_out) for seed in args.seeds]
        students: dict[int, tuple[PreTrainedModel, float]] = {}
        for seed, rate, steps, watched in jobs:
            rows = read_rows(args.output)
            key = {"family": family, "budget": args.steps, "arm": arm, "seed": seed, "tuning": rate is not None}
            key |= {"learning_rate": rate or best_rate(rows, family, args.steps, arm), "steps": steps}
            if any(key.items() <= row.items() for row in rows):
                continue
            if seed not in students:
                clock = time.process_time()
                student = make(setting, arm, seed)
                students = {seed: (student, time.process_time() - clock)}
            student, clock = copy.deepcopy(students[seed][0]), time.process_time()
            curve = learn(student, setting, watched, key["learning_rate"], steps, args.points, seed)
            row = key | {
                "parameters": student.num_parameters(),
                "curve": curve,
                "teacher": teacher_metrics_by_split[key["tuning"]],
            }
            row |= {
                "initialization_seconds": students[seed][1],
                "seconds": time.process_time() - clock,
                "batch": BATCH,
            }
            row |= {"torch": torch.__version__, "transformers": transformers.__version__}
            row |= {"machine": f"{os.cpu_count()} CPUs, {platform.machine()}, {torch.get_num_threads()} threads"}
            append_row(args.output, row)
            print(f"{family}; {arm}; seed {seed}; {key['learning_rate']:g}: {curve[0]} -> {curve[-1]}", flush=True)


def best_rate(rows: list[dict[str, Any]], family: str, budget: int, arm: str) -> float:
    """Return the learning rate at which an arm's short run ended best."""
    key_of_arm = {"family": family, "budget": budget, "arm": arm, "tuning": True}
    ends = {row["learning_rate"]: row["curve"][-1]["loss"] for row in rows if key_of_arm.items() <= row.items()}
    return float(min(ends, key=lambda rate: ends[rate] if math.isfinite(ends[rate]) else math.inf))


def at_chosen_rates(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the runs at the rate that was chosen for their arm: others are older than that rate in the grid."""
    arms = {(row["family"], row["budget"], row["arm"]) for row in rows if row["tuning"]}
    chosen = {arm: best_rate(rows, *arm) for arm in arms}
    return [
        row
        for row in rows
        if not row["tuning"]
        and row["learning_rate"] == chosen.get((row["family"], row["budget"], row["arm"]), row["learning_rate"])
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Return mean and standard deviation over seeds, and the mean curves.

    *Gap closed* is (random - x) / (random - teacher) in held-out loss, seed by seed; *steps* the share of its steps after
    which an arm is where random ends.
    """
    lines, rates = [], {}
    for row in rows:
        if row["tuning"]:
            rates.setdefault((row["family"], row["budget"], row["arm"]), set()).add(row["learning_rate"])
    rows = at_chosen_rates(rows)
    for family, budget in dict.fromkeys((row["family"], row["budget"]) for row in rows):
        family_rows = [row for row in rows if (row["family"], row["budget"]) == (family, budget)]
        random = {row["seed"]: row["curve"][-1] for row in family_rows if row["arm"] == "random"}
        target = family_rows[0]["teacher"]
        lines.append(
            f"{family}: {budget} steps of {family_rows[0]['batch']}, teacher "
            + ", ".join(f"{name} {value:.4f}" for name, value in target.items())
        )
        lines.append(
            f"  {'':19} {'parameters':>10} {'rate':>7} {'loss':>17} {'metric':>17} {'gap closed, %':>15} "
            f"{'steps':>13} {'start, s':>8}   "
            + "; ".join(f"{name} after " + ", ".join(f"{share:.0%}" for share in SHOWN) for name in target)
        )
        for arm in dict.fromkeys(row["arm"] for row in family_rows):
            runs = [row for row in family_rows if row["arm"] == arm and row["seed"] in random]
            ends = [row["curve"][-1] for row in runs]
            gaps, shares = [], []
            for row in runs:
                last = random[row["seed"]]["loss"]
                gaps.append(100 * (last - row["curve"][-1]["loss"]) / (last - row["teacher"]["loss"]))
                curve = [[point["step"], point["loss"]] for point in row["curve"]]
                shares.append(tokens_until(curve, last) / row["curve"][-1]["step"])
            if not runs:
                continue
            rate, grid = runs[0]["learning_rate"], rates.get((family, budget, arm), set())
            edge = "*" if rate in (min(grid, default=None), max(grid, default=None)) else " "
            loss, metric = (
                mean_and_spread([end[name] for end in ends if name in end], 4) for name in ("loss", "metric")
            )
            lines.append(
                f"  {arm:19} {runs[0]['parameters']:>10,} {rate:>6g}{edge} {loss:>17} "
                f"{metric:>17} {mean_and_spread(gaps):>15} {mean_and_spread(shares):>13} "
                f"{statistics.mean(row['initialization_seconds'] for row in runs):>8.1f}   "
                + "; ".join(along(runs, name) for name in target)
            )
    lines.append("* the learning rate is at an end of its grid")
    return "\n".join(lines)


def along(runs: list[dict[str, Any]], name: str) -> str:
    """Return the mean over runs of a loss or a measure, at the points of the curves that are `SHOWN`."""
    last = len(runs[0]["curve"]) - 1
    return ", ".join(
        f"{statistics.mean(run['curve'][round(part * last)][name] for run in runs):.3f}" for part in SHOWN
    )


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw held-out loss against examples, a panel for each family and number of steps, the mean over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = at_chosen_rates(rows)
    panels = list(dict.fromkeys((row["family"], row["budget"]) for row in rows))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(6 * len(panels), 4), squeeze=False)
    for axis, (family, budget) in zip(axes[0], panels, strict=True):
        family_rows = [row for row in rows if (row["family"], row["budget"]) == (family, budget)]
        for arm in dict.fromkeys(row["arm"] for row in family_rows):
            curves = [row["curve"] for row in family_rows if row["arm"] == arm]
            means = [statistics.mean(point["loss"] for point in points) for points in zip(*curves, strict=True)]
            axis.plot([point["step"] * family_rows[0]["batch"] for point in curves[0]], means, label=arm)
        axis.axhline(family_rows[0]["teacher"]["loss"], color="black", linestyle="--", label="teacher")
        late = [
            point["loss"] for row in family_rows for point in row["curve"][1:]
        ]  # the first points are above the panel
        axis.set_ylim(top=max(late) * 1.05)
        axis.set(title=f"{family}, half the width and depth", xlabel="examples", ylabel="held-out loss")
        axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("other_families.jsonl"))
    parser.add_argument("--folder", type=Path, default=Path("family_teachers"), help="folder of the teachers")
    parser.add_argument("--fashion", type=Path, help="the folder with train-images-idx3-ubyte.gz")
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600, help=f"of {BATCH} examples")
    parser.add_argument("--points", type=int, default=10, help="of each curve")
    parser.add_argument(
        "--table", action="store_true", help="print the table and draw the plot of what is there, and stop"
    )
    args = parser.parse_args(words)
    keep_freed_memory()
    if not args.table:
        print(f"command: python {' '.join(sys.argv)}")
        for family in args.families:
            run(args, family)
    rows = read_rows(args.output)
    print(table(rows))
    if not all(row["tuning"] for row in rows):
        plot(rows, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
