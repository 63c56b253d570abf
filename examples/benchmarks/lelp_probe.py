"""Is the verdict of `probe_subclasses` right? Against what `lelp_comparison.py` measured, setting by setting.

    python examples/benchmarks/lelp_probe.py --sets digits -o results          # the options of lelp_comparison.py
    python examples/benchmarks/lelp_probe.py --report                          # the table of the probes kept in results/

For each set a probe by its defaults, of as many steps as the training that it is about but at most 900: students of the
benchmark by LELP and by KD on the examples that students learn from, of which another third is held out for each seed; it
does not read the parts for validation and test. Each probe is one line of
results/lelp_probe.jsonl (or of --probes), written when it is done; killed at any moment, the same command goes on. The report
compares verdicts with the gain of LELP over KD on the test part.
"""

import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from lelp_comparison import Runs, parser, plan, prepare
from lelp_models import Classifier, make_student, start_student
from lelp_runs import ADDED, RESULTS, points_above

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.common.results import append_row, read_rows
from hf_guide import SubclassProjector
from hf_guide.lelp.analysis.probe import STEPS, ProbeData, ProbeStudents, run_probe, split_folds
from hf_guide.lelp.analysis.probe_subclasses import MAX_LEARNING_RATE, MAX_SAMPLES, NUM_SEEDS, RATE_TIMES_WIDTH


def probe_set(name: str, args: Any) -> dict[str, Any]:
    """Probe one setting and return what was measured."""
    bench = prepare(name, args)
    batches, problem = bench.problem(args)
    if args.initialization != "scratch":
        bench.started = start_student(bench.teacher, batches, args.initialization, bench.tokens())
    embeddings, logits = problem.signals.embeddings.double(), problem.signals.logits.double()
    projector = SubclassProjector.fit(embeddings, problem.data.labels, problem.weight)
    chosen = torch.randperm(len(batches), generator=torch.Generator().manual_seed(0))[:MAX_SAMPLES]
    data = ProbeData(
        logits,
        torch.as_tensor(projector.transform(embeddings, logits)).flatten(1),
        problem.data.labels,
        None,
        [(chosen[train], chosen[held_out]) for train, held_out in split_folds(len(chosen), NUM_SEEDS)],
        batches.take,
    )

    def build() -> Classifier:
        return make_student(batches, args.student or args.images, problem.data.classes, bench.started)

    width = build().width
    rate = min(MAX_LEARNING_RATE, RATE_TIMES_WIDTH / width)
    students = ProbeStudents(build, lambda model, inputs: model(inputs), width, rate, "the benchmark's students")
    began = time.perf_counter()
    steps = args.probe_steps or min(STEPS, args.steps)
    probe = run_probe(data, students, steps=steps, show_progress=False)
    return probe.to_dict() | {"seconds": round(time.perf_counter() - began, 1)}


def measured_gain(runs: Runs, defaults: Runs, run: dict[str, Any]) -> tuple[float, float] | None:
    """Return the gain of LELP over KD in points, and its spread over the seeds; None where it was not measured.

    LELP has its tuned settings, or the defaults where these are better on the validation part, as where the tuned ones are
    those of another set.
    """
    (_, kd), candidates = runs.within(run, "kd"), [each.within(run, "lelp")[1] for each in (runs, defaults)]
    best = max(candidates, key=lambda found: statistics.mean([row["validation"] for row in found.values()] or [0.0]))
    return points_above(best, kd)


def report(probes: list[dict[str, Any]], runs: Runs, defaults: Runs) -> None:
    """Print a line for each probe, and how many are right.

    LELP helps where its gain exceeds the spread over the seeds, and loses where its loss does. A verdict is right that
    recommends LELP where it helps, and does not where it loses; where it does neither, both are right, and the number of
    recommendations is printed.
    """
    outcomes: Counter[tuple[str, bool]] = Counter()
    for row in probes:
        run, probe = row["run"], row["result"]
        measured = measured_gain(runs, defaults, run)
        name = ", ".join(str(run[each]) for each in ("set", "teacher", "transfer", "share", "initialization", "steps"))
        outcome = "not measured"
        if measured is not None:
            gain, spread = measured
            kind = "helps" if gain > spread else "loses" if gain < -spread else "neither"
            outcome = f"{gain:+5.2f} ± {spread:.2f} {kind}"
            outcomes[kind, probe["verdict"] == "likely to help"] += 1
        print(
            f"{name:55} probe {probe['gain']:+5.2f} ± {probe['gain_error']:.2f} {probe['verdict']:16} measured {outcome}"
        )
    wrong = outcomes["helps", False] + outcomes["loses", True]
    for kind in ("helps", "neither", "loses"):
        print(
            f"{kind}: recommended in {outcomes[kind, True]} of {outcomes[kind, True] + outcomes[kind, False]} settings"
        )
    print(f"{outcomes.total() - wrong} of {outcomes.total()} verdicts are right")


def main() -> int:
    options = parser(__doc__)
    options.add_argument(
        "--probes", type=Path, default=RESULTS / "lelp_probe.jsonl", help="file of probes, one a line"
    )
    options.add_argument("--probe-steps", type=int, help="of the probe's students, by default --steps, at most 900")
    args = options.parse_args()
    probes = read_rows(args.probes)
    if not args.report:
        if args.output is None:
            options.error("the folder of teachers is missing: -o FOLDER")
        args.output.mkdir(parents=True, exist_ok=True)
        print(f"command: python {' '.join(sys.argv)}", flush=True)
        for name in args.sets:
            run = plan(name, args)
            if all(ADDED | row["run"] != run for row in probes):
                probes.append({"run": run, "result": probe_set(name, args)})
                append_row(args.probes, probes[-1])
                print(f"{name}: {probes[-1]['result']['gain']:+.2f} {probes[-1]['result']['verdict']}", flush=True)
    rows = args.rows or RESULTS / "lelp_comparison.jsonl"
    report(probes, Runs(rows, args.tune_seeds), Runs(RESULTS / "lelp_defaults.jsonl", args.tune_seeds))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
