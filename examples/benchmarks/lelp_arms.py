"""Does LELP help a student, and where? Every arm on equal steps, each tuned on a validation split, over several seeds.

    python examples/benchmarks/lelp_arms.py --sets digits trec-binary -o results
    python examples/benchmarks/lelp_arms.py --sets fashion-confusable --fashion FOLDER --transfer unseen -o results
    python examples/benchmarks/lelp_arms.py -o results --report        # only the tables of what is there

Each run is one line of OUTPUT/runs.jsonl, written when it is done; killed at any moment, the same command goes on. Of each
arm every setting is tried with the first `--tune-seeds` seeds, and the one best on the validation split is run with all.
Teachers: texts have all-MiniLM-L6-v2, frozen with a probe or (`--teacher tuned`) fine-tuned; images a small ResNet or ViT
that is trained here. `--transfer` says whether students learn from what the teacher was trained on or from other
examples; `--start teacher` starts them by `from_teacher`.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from lelp_data import SETS, Labelled, read_set, split
from lelp_models import Batches, Classifier, Signals, make_student, make_teacher, make_tokenizer
from lelp_training import (
    ARMS,
    ORACLES,
    Lesson,
    Settings,
    accuracy,
    fit_probe,
    loss_of,
    outputs_of,
    settings_of,
    train,
)
from safetensors.torch import load_file, save_file

RUNS = "runs.jsonl"
USUAL_ARMS = ("ce", "kd", "dkd", "embedding", "lelp", "kmeans", "random-partition", "oracle")


@dataclass
class Bench:
    """A set, its parts and its teacher.

    Attributes:
        seen, unseen: what the teacher was trained on, and what it was not.
        teacher_accuracy: on the test part.
    """

    name: str
    seen: Batches
    unseen: Batches
    validation: Batches
    test: Batches
    teacher: Classifier
    heard: dict[str, Signals]
    teacher_accuracy: float

    def lesson(self, transfer: str, share: float) -> tuple[Batches, Lesson]:
        """Return what students are trained on: a share of the seen or of the unseen part."""
        mine, other = (self.seen, self.unseen) if transfer == "seen" else (self.unseen, self.seen)
        rows = torch.arange(max(1, int(len(mine) * share)))
        signals = self.heard[transfer]
        if share < 1:
            mine = Batches(mine.data.take(rows), mine.tokenizer)
            signals = Signals(**{name: tensor[rows] for name, tensor in signals.tensors().items()})
        others = self.heard["unseen" if transfer == "seen" else "seen"]
        weight = self.teacher.head.weight.detach()
        return mine, Lesson(mine.data, signals, (others, other.data), weight)


def prepare(name: str, args: argparse.Namespace) -> Bench:
    """Read a set and have its teacher, from the output folder where it was trained before."""
    data = read_set(name, args.fashion)
    held = min(args.held_out, len(data) // 6)
    left = len(data) - 2 * held
    seen = min(args.seen, left * 2 // 3)
    sizes = [seen, min(args.unseen, left - seen), held, held]
    tokenizer = make_tokenizer(data)
    parts = [Batches(part, tokenizer) for part in split(data, sizes)]
    torch.manual_seed(0)
    teacher = make_teacher(data, args.images)
    kind = args.teacher if data.is_text else args.images
    file = args.output / f"{name}-{kind}-{'-'.join(map(str, sizes))}-{args.teacher_steps}.safetensors"
    if file.is_file():
        stored = load_file(file)
        teacher.load_state_dict({key[2:]: value for key, value in stored.items() if key.startswith("w ")})
        found = {
            part: {key.split()[1]: value for key, value in stored.items() if key.startswith(f"{part} ")}
            for part in ("seen", "unseen")
        }
        heard = {part: Signals(**tensors) for part, tensors in found.items()}
    else:
        teach(teacher, parts[0], data, args)
        heard = {
            part: Signals.hear(teacher, batches) for part, batches in zip(("seen", "unseen"), parts, strict=False)
        }
        stored = {f"w {key}": value for key, value in teacher.state_dict().items()}
        for part, signals in heard.items():
            stored |= {f"{part} {key}": value for key, value in signals.tensors().items()}
        save_file({key: value.contiguous() for key, value in stored.items()}, file)
    teacher.eval()
    return Bench(name, *parts, teacher, heard, accuracy(teacher, parts[3]))


def teach(teacher: Classifier, batches: Batches, data: Labelled, args: argparse.Namespace) -> None:
    """Train a teacher, or give a frozen one its probe."""
    labels = batches.data.labels
    if data.is_text and args.teacher == "frozen":
        teacher.eval()
        with torch.no_grad():
            embeddings = torch.cat([teacher.features(inputs) for inputs in batches.in_order()])
        fit_probe(teacher, embeddings, labels)
        return
    train(
        teacher,
        batches,
        lambda rows, _, mine: torch.nn.functional.cross_entropy(mine, labels[rows]),
        steps=args.teacher_steps,
        batch=32 if data.is_text else 64,
        rate=5e-5 if data.is_text else 1e-3,
        seed=0,
    )


def one_run(bench: Bench, batches: Batches, lesson: Lesson, run: dict[str, Any], args: argparse.Namespace) -> dict:
    """Train one student and return how it fares."""
    arm, settings, seed = run["arm"], run["settings"], run["seed"]
    began = time.perf_counter()
    outputs = outputs_of(arm, lesson, settings)
    torch.manual_seed(seed)
    start = bench.teacher if run["start"] == "teacher" else None
    student = make_student(batches.data, args.images, outputs, start)
    loss = loss_of(arm, lesson, settings, student, seed)
    train(student, batches, loss, steps=run["steps"], batch=args.batch, rate=args.rate, seed=seed)
    found = {"validation": accuracy(student, bench.validation), "test": accuracy(student, bench.test)}
    return found | {"teacher": bench.teacher_accuracy, "seconds": round(time.perf_counter() - began, 1)}


class Runs:
    """The runs that are done, by what they were; a line that was being written when killed is dropped."""

    def __init__(self, file: Path):
        self.file, self.done = file, {}
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
        whole = [line for line in lines if line.endswith("\n")]
        if len(whole) < len(lines):
            file.write_text("".join(whole), encoding="utf-8")
        for line in whole:
            found = json.loads(line)
            self.done[_key(found["run"])] = found

    def __call__(self, run: dict[str, Any]) -> dict | None:
        return self.done.get(_key(run))

    def add(self, run: dict[str, Any], result: dict[str, Any]) -> None:
        """Keep a run."""
        found = {"run": run, "result": result}
        self.done[_key(run)] = found
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")


def _key(run: dict[str, Any]) -> str:
    return json.dumps(run, sort_keys=True)


def place_of(run: dict[str, Any]) -> tuple[Any, ...]:
    """Return what arms are compared within."""
    return tuple(run[name] for name in ("set", "teacher", "transfer", "share", "start", "steps"))


def plan(name: str, text: bool, args: argparse.Namespace) -> dict[str, Any]:
    """Return what all runs of a set share."""
    return {
        "set": name,
        "teacher": args.teacher if text else args.images,
        "transfer": args.transfer,
        "share": args.share,
        "start": args.start,
        "steps": args.steps,
        "batch": args.batch,
        "rate": args.rate,
        "sizes": [args.seen, args.unseen, args.held_out, args.teacher_steps],
    }


def best_settings(runs: Runs, common: dict[str, Any], arm: str, tried: list[Settings], seeds: int) -> Settings | None:
    """Return the settings that are best on the validation split over the tuning seeds; None where a run is missing."""
    scores = []
    for settings in tried:
        found = [runs(common | {"arm": arm, "settings": settings, "seed": seed}) for seed in range(seeds)]
        if any(each is None for each in found):
            return None
        scores.append(statistics.mean(each["result"]["validation"] for each in found if each is not None))
    return tried[max(range(len(tried)), key=scores.__getitem__)]


def work(name: str, args: argparse.Namespace, runs: Runs) -> None:
    """Do all runs of a set that are not done."""
    bench = prepare(name, args)
    batches, lesson = bench.lesson(args.transfer, args.share)
    common = plan(name, bench.test.data.is_text, args)
    for arm in args.arms:
        if arm in ORACLES and lesson.data.finer is None:
            continue
        tried = settings_of(arm, args.grid, lesson.data.classes)
        if not tried:
            continue
        wanted: Iterator[tuple[Settings, int]] = itertools.product(tried, range(args.tune_seeds))
        for stage in ("tune", "all"):
            if stage == "all":
                chosen = best_settings(runs, common, arm, tried, args.tune_seeds)
                wanted = itertools.product([chosen or {}], range(args.seeds))
            for settings, seed in wanted:
                run = common | {"arm": arm, "settings": settings, "seed": seed}
                if runs(run) is None:
                    result = one_run(bench, batches, lesson, run, args)
                    runs.add(run, result)
                    print(
                        f"{name} {arm} {settings} seed {seed}: test {result['test']:.2%}, {result['seconds']} s",
                        flush=True,
                    )


def report(runs: Runs, args: argparse.Namespace) -> None:
    """Print a table for each set: mean and standard deviation on the test part, and the difference from KD, seed by seed."""
    places: dict[tuple[Any, ...], dict[str, Any]] = {}
    for found in runs.done.values():
        run = found["run"]
        common = {name: run[name] for name in run if name not in ("arm", "settings", "seed")}
        places.setdefault(place_of(run) + (_key(common),), common)
    for common in places.values():
        inside = [each for each in runs.done.values() if common.items() <= each["run"].items()]
        teacher = inside[0]["result"]["teacher"]
        print(f"\n{', '.join(f'{name} {value}' for name, value in common.items())}; teacher {teacher:.2%}")
        scores: dict[str, tuple[Settings, dict[int, float]]] = {}
        for arm in ARMS:
            mine = [each for each in inside if each["run"]["arm"] == arm]
            tried = {_key(each["run"]["settings"]): each["run"]["settings"] for each in mine}
            chosen = best_settings(runs, common, arm, list(tried.values()), args.tune_seeds) if tried else None
            if chosen is not None:
                own = {e["run"]["seed"]: e["result"]["test"] for e in mine if e["run"]["settings"] == chosen}
                scores[arm] = (chosen, own)
        against = scores.get("kd", ({}, {}))[1]
        for arm, (chosen, own) in scores.items():
            apart = [100 * (own[seed] - against[seed]) for seed in own if seed in against]
            told = _spread([100 * value for value in own.values()])
            print(f"  {arm:18} {told}   against KD {_spread(apart, sign='+')}   {len(own)} seeds  {chosen}")


def _spread(values: list[float], sign: str = "") -> str:
    if not values:
        return "-"
    spread = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):{sign}6.2f} ± {spread:4.2f}"


def parser(text: str | None) -> argparse.ArgumentParser:
    """Return what reads the options of a benchmark of arms."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=["digits"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(USUAL_ARMS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tune-seeds", type=int, default=1)
    parser.add_argument("--grid", choices=["one", "small", "full"], default="small", help="settings tried of each arm")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--fashion", type=Path, help="the folder of Fashion-MNIST's four files")
    parser.add_argument("--images", choices=["resnet", "vit"], default="resnet", help="teacher and student of images")
    parser.add_argument("--teacher", choices=["frozen", "tuned"], default="frozen", help="of texts")
    parser.add_argument("--transfer", choices=["seen", "unseen"], default="seen")
    parser.add_argument("--start", choices=["scratch", "teacher"], default="scratch")
    parser.add_argument("--share", type=float, default=1.0, help="of the transfer set that students are trained on")
    parser.add_argument("--seen", type=int, default=4000, help="examples that the teacher is trained on")
    parser.add_argument("--unseen", type=int, default=8000)
    parser.add_argument("--held-out", type=int, default=2000, help="examples of validation, and of test")
    parser.add_argument("--teacher-steps", type=int, default=800)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--report", action="store_true", help="only print the tables")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = parser(__doc__).parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    runs = Runs(args.output / RUNS)
    if not args.report:
        print(f"command: python {' '.join(sys.argv)}")
        print(
            f"machine: {os.cpu_count()} processors, {torch.get_num_threads()} threads, torch {torch.__version__}, "
            f"transformers {transformers.__version__}, load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
        for name in args.sets:
            work(name, args, runs)
    report(runs, args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
