"""At equal parameters and tokens of the small teacher: which shape, and which variant of `calibrated`, trains best?

    python examples/benchmarks/small_shapes.py --output small_shapes.jsonl --seeds 1000
    python examples/benchmarks/small_shapes.py --output small_shapes.jsonl --shapes 0 1 --objectives labels KD
    python examples/benchmarks/small_shapes.py --output small_shapes.jsonl --shapes 0 --starts calibrated "neurons merged"
    python examples/benchmarks/small_shapes.py --output small_shapes.jsonl --table

Students of the teacher of small_teacher.py with as many parameters as at half its width and half its depth, which is the first
shape; the recipe of initialization_comparison.py, with the learning rates that it found for `calibrated`. Seed 1000 is
evaluated on the held-out text of tuning, to choose by, all others on the rest. One JSON line a run is appended to --output;
a run that is there already is not made again. The table has the rank correlation (Spearman) of scores without training with
the loss after it, and the differences to the first start, seed by seed.
"""

import argparse
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from initialization_comparison import TUNING_SEED, Bench, drawn, learn, loss_of
from small_teacher import BATCH, LENGTH
from start_variants import STARTS, group_rates
from student_shapes import overrides, rule_score

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.common.machine import describe_machine
from examples.common.malloc import keep_freed_memory
from examples.common.results import append_row, mean_and_spread, read_rows, spearman
from hf_guide import AutoStudentForCausalLM

SHAPES = [
    (32, 4, 2, 1, 16, 96),  # half the width and half the depth
    (40, 4, 2, 1, 16, 53),
    (32, 5, 2, 1, 16, 70),
    (32, 4, 4, 2, 16, 64),
    (40, 3, 2, 1, 16, 81),
    (24, 5, 4, 2, 16, 95),
    (24, 6, 2, 1, 16, 100),
    (32, 7, 2, 1, 16, 40),
    (24, 7, 2, 1, 16, 81),
    (48, 3, 2, 1, 16, 43),
    (32, 3, 2, 1, 16, 138),
    (48, 2, 2, 1, 16, 81),
]
"""Width, blocks, heads, key/value heads, size of a head, MLP."""

RATES = {"labels": 0.006, "KD": 0.02}
CALIBRATION_TOKENS = 8192
POINTS = 4


def run(bench: Bench, job: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Make one student, train it, and return its row."""
    sizes, method = overrides(job["shape"]), {"method": STARTS[job["start"]], "seed": job["seed"]}
    parameters = AutoStudentForCausalLM.from_teacher(
        bench.folder, method="random", dtype=torch.float32, show_progress=False, **sizes
    ).num_parameters()
    count = math.ceil(parameters * job["tokens_per_parameter"] / (BATCH * LENGTH)) * BATCH
    text = drawn(bench.train_blocks, count, job["seed"])
    batches = [{"input_ids": rows} for rows in text[: args.calibration_blocks, :LENGTH].split(16)]
    torch.manual_seed(job["seed"])
    clock = time.process_time()
    student = AutoStudentForCausalLM.from_teacher(
        bench.folder,
        method=method | {"calibration_tokens": CALIBRATION_TOKENS},
        calibration_dataset=batches,
        dtype=torch.float32,
        show_progress=False,
        **sizes,
    )
    initialized = time.process_time()
    watched = bench.tuning if job["seed"] == TUNING_SEED else bench.measured
    curve = learn(
        student,
        bench.teacher,
        job["objective"],
        text,
        watched,
        RATES[job["objective"]],
        POINTS,
        job["seed"],
        groups=group_rates(job["start"], student),
    )
    report: Any = student.initialization_report
    (blocks,), (influence,) = report.blocks.values(), report.calibration["block_influence"].values()
    return job | {
        "parameters": parameters,
        "tokens": curve[-1][0],
        "learning_rate": RATES[job["objective"]],
        "teacher": round(loss_of(bench.teacher, watched), 5),
        "curve": [(tokens, round(loss, 5)) for tokens, loss in curve],
        "variance_explained": report.variance_explained["embed"],
        "influence": sum(influence[block] for block in blocks),
        "initialization_seconds": round(initialized - clock, 1),
        "seconds": round(time.process_time() - initialized, 1),
    }


SCORES = {
    "untrained": lambda row: row["curve"][0][1],
    f"1/{POINTS} of the tokens": lambda row: row["curve"][1][1],
    "rule": lambda row: rule_score(row["shape"], (64, 8, 4, 192), 16),
    "variance left": lambda row: 1 - row["variance_explained"],
    "influence left": lambda row: -row["influence"],
}
"""Of each score its value for a row, lower for what it takes to be better."""


def table(rows: "list[dict[str, Any]]") -> str:
    """Return a line for each shape, start and objective, the differences of starts, and the correlations of scores."""
    lines = [f"{'shape':24} {'start':28} {'objective':9} {'untrained':>9} {'perplexity after training':>26}"]
    first = next(iter(STARTS))
    for chooses, tokens in sorted({(row["seed"] == TUNING_SEED, row["tokens_per_parameter"]) for row in rows}):
        group = [row for row in rows if (row["seed"] == TUNING_SEED, row["tokens_per_parameter"]) == (chooses, tokens)]
        lines.append(f"seeds {sorted({row['seed'] for row in group})}, {tokens:g} tokens a parameter")
        ends = {
            (tuple(row["shape"]), row["start"], row["objective"], row["seed"]): row["curve"][-1][1] for row in group
        }
        for shape, start, objective in dict.fromkeys(key[:3] for key in ends):
            found = {key[3]: loss for key, loss in ends.items() if key[:3] == (shape, start, objective)}
            untrained = [row["curve"][0][1] for row in group if (tuple(row["shape"]), row["start"]) == (shape, start)]
            change = [
                100 * math.expm1(loss - ends[shape, first, objective, seed])
                for seed, loss in found.items()
                if start != first and (shape, first, objective, seed) in ends
            ]
            lines.append(
                f"{shape!s:24} {start:28} {objective:9} {math.exp(statistics.mean(untrained)):9.1f} "
                f"{mean_and_spread([math.exp(loss) for loss in found.values()]):>20} ({len(found)})"
                + (f"  {mean_and_spread(change)} %" if change else "")
            )
        lines += correlations([row for row in group if row["start"] == first and row["objective"] == "labels"])
    return "\n".join(lines)


def correlations(rows: "list[dict[str, Any]]") -> "list[str]":
    """Return the rank correlation of each score with the loss after training, where one seed has several shapes."""
    if len(rows) < 4 or len({row["seed"] for row in rows}) > 1:
        return []
    ends = [row["curve"][-1][1] for row in rows]
    return [f"rank correlation with the loss after training, {len(rows)} shapes, labels:"] + [
        f"    {name:22} {spearman(list(map(score, rows)), ends):5.2f}" for name, score in SCORES.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("small_shapes.jsonl"))
    parser.add_argument("--table", action="store_true", help="only print the table of existing rows")
    parser.add_argument("--teacher", type=Path, default=Path("small_teacher"), help="the folder of small_teacher.py")
    parser.add_argument("--shapes", type=int, nargs="+", metavar="I", default=list(range(len(SHAPES))), help="from 0")
    parser.add_argument("--starts", nargs="+", choices=list(STARTS), default=[next(iter(STARTS))])
    parser.add_argument("--objectives", nargs="+", choices=list(RATES), default=["labels"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens-per-parameter", type=float, default=20.0, help="of the student")
    parser.add_argument(
        "--held-out-blocks", type=int, default=256, help="to tune on, and as many others to measure on"
    )
    parser.add_argument("--calibration-blocks", type=int, default=256, help="blocks of text for calibration")
    args = parser.parse_args()
    keep_freed_memory()
    rows = read_rows(args.output)
    jobs = [
        {"shape": list(SHAPES[shape]), "start": start, "objective": objective, "seed": seed}
        | {"tokens_per_parameter": args.tokens_per_parameter}
        for seed in args.seeds
        for objective in args.objectives
        for shape in args.shapes
        for start in args.starts
    ]
    todo = [] if args.table else [job for job in jobs if not any(job.items() <= row.items() for row in rows)]
    bench = Bench.prepare(args) if todo else None
    for job in todo:
        assert bench is not None
        rows.append(run(bench, job, args))
        append_row(args.output, rows[-1])
        print(job, [round(loss, 3) for _, loss in rows[-1]["curve"]], flush=True)
    print(describe_machine())
    print(table(rows))


if __name__ == "__main__":
    main()
