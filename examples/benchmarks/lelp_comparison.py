"""Does LELP help a student, and where? Every arm on equal steps, each tuned on a validation split, over several seeds.

    python examples/benchmarks/lelp_comparison.py --sets digits trec-binary -o results
    python examples/benchmarks/lelp_comparison.py --sets fashion-confusable --fashion FOLDER --transfer unseen -o results
    python examples/benchmarks/lelp_comparison.py --report             # the tables of the runs kept in results/

Each run is one line of OUTPUT/runs.jsonl (or of --rows), written when it is done; killed at any moment, the same command
goes on. Of each arm every setting is tried with the first `--tune-seeds` seeds, and the one best on the validation split is
run with `--seeds` others, of which the tables are; variants of LELP, and the random partition, take LELP's. Settings that
the data are too few for are left out, and the tables mark them. Seeds differ in the student; the parts of the set and the
teacher are the same.
Teachers: texts have all-MiniLM-L6-v2, frozen with a probe or (`--teacher tuned`) fine-tuned; images a small ResNet or ViT
that is trained here. `--transfer` sets whether students learn from what the teacher was trained on or from other
examples; `--initialization guide` and `--initialization calibrated` start them by `from_teacher`.
"""

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from lelp_data import SETS, read_set, split
from lelp_models import (
    LENGTH,
    Batches,
    Classifier,
    Signals,
    collect_cached,
    make_student,
    make_teacher,
    make_tokenizer,
    start_student,
)
from lelp_runs import Runs, best_settings, plan, report
from lelp_training import (
    ARMS,
    ORACLES,
    SPLITTERS,
    Settings,
    TrainingProblem,
    accuracy,
    fit_probe,
    loss_of,
    outputs_of,
    settings_of,
    train,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_guide.errors import SubclassError

USUAL_ARMS = ("ce", "kd", "dkd", "features", "lelp", "kmeans", "random-partition", "oracle")


@dataclass
class Bench:
    """A set, its parts and its teacher.

    Attributes:
        seen, unseen: what the teacher was trained on, and what it was not.
        teacher_accuracy: on the test part.
        started: the student that all runs copy, where `from_teacher` starts them.
    """

    name: str
    seen: Batches
    unseen: Batches
    validation: Batches
    test: Batches
    teacher: Classifier
    part_signals: dict[str, Signals]
    teacher_accuracy: float
    started: Classifier | None = None

    def tokens(self) -> Tensor | None:
        """Return the tokens of all parts of a set of texts, each once."""
        if not self.seen.data.is_text:
            return None
        parts = (self.seen, self.unseen, self.validation, self.test)
        return torch.cat([part.known_tokens() for part in parts]).unique()

    def problem(self, transfer: str, share: float) -> tuple[Batches, TrainingProblem]:
        """Return what students are trained on: a share of the seen or of the unseen part."""
        mine, other = (self.seen, self.unseen) if transfer == "seen" else (self.unseen, self.seen)
        rows = torch.arange(max(1, int(len(mine) * share)))
        signals = self.part_signals[transfer]
        if share < 1:
            mine = Batches(mine.data.take(rows), mine.tokenizer, mine.length)
            signals = Signals(**{name: tensor[rows] for name, tensor in signals.tensors().items()})
        others = self.part_signals["unseen" if transfer == "seen" else "seen"]
        weight = self.teacher.head.weight.detach()
        return mine, TrainingProblem(mine.data, signals, (others, other.data), weight)


def prepare(name: str, args: argparse.Namespace) -> Bench:
    """Read a set and have its teacher, from the output folder where it was trained before."""
    data = read_set(name, args.fashion)
    held = min(args.held_out, len(data) // 6)
    left = len(data) - 2 * held
    seen = min(args.seen, left * 2 // 3)
    sizes = [seen, min(args.unseen, left - seen), held, held]
    tokenizer = make_tokenizer(data)
    parts = [Batches(part, tokenizer, args.length) for part in split(data, sizes)]
    torch.manual_seed(0)
    teacher = make_teacher(data, args.images)
    kind = args.teacher if data.is_text else args.images
    views = not data.is_text or any(arm.endswith("-stable") for arm in args.arms)  # of images they cost little
    marks = [name, kind, *map(str, sizes), str(args.teacher_steps), str(args.length), *(["views"] if views else [])]
    file = args.output / f"{'-'.join(marks)}.safetensors"
    batches_by_part = dict(zip(("seen", "unseen", "test"), (*parts[:2], parts[3]), strict=True))
    if file.is_file():
        stored = load_file(file)
        teacher.load_state_dict({key[2:]: value for key, value in stored.items() if key.startswith("w ")})
        stored_signals = {
            part: {key.split()[1]: value for key, value in stored.items() if key.startswith(f"{part} ")}
            for part in batches_by_part
        }
        part_signals = {part: Signals(**tensors) for part, tensors in stored_signals.items()}
    else:
        if kind == "frozen":
            part_signals = {
                part: collect_cached(teacher, each, args.output, views=views) for part, each in batches_by_part.items()
            }
            fit_probe(teacher, part_signals["seen"].embeddings, parts[0].data.labels)
            with torch.no_grad():
                part_signals = {
                    part: replace(each, logits=teacher.head(each.embeddings)) for part, each in part_signals.items()
                }
        else:
            teach(teacher, parts[0], args.teacher_steps)
            part_signals = {
                part: Signals.collect(teacher, each, views=views) for part, each in batches_by_part.items()
            }
        stored = {f"w {key}": value for key, value in teacher.state_dict().items()}
        for part, signals in part_signals.items():
            stored |= {f"{part} {key}": value for key, value in signals.tensors().items()}
        save_file({key: value.contiguous() for key, value in stored.items()}, file)
    teacher.eval()
    right = part_signals["test"].logits.argmax(1) == parts[3].data.labels
    return Bench(name, *parts, teacher, part_signals, right.float().mean().item())


def teach(teacher: Classifier, batches: Batches, steps: int) -> None:
    """Train a teacher on labels."""
    labels, text = batches.data.labels, batches.data.is_text
    train(
        teacher,
        batches,
        lambda rows, _, mine: torch.nn.functional.cross_entropy(mine, labels[rows]),
        steps=steps,
        batch=32 if text else 64,
        rate=5e-5 if text else 1e-3,
        seed=0,
    )


def one_run(
    bench: Bench, batches: Batches, problem: TrainingProblem, run: dict[str, Any], args: argparse.Namespace
) -> dict:
    """Train one student and return how it fares."""
    arm, settings, seed = run["arm"], run["settings"], run["seed"]
    began = time.perf_counter()
    try:
        outputs = outputs_of(arm, problem, settings)
    except SubclassError as too_few:
        return {"skipped": f"{arm} {settings}: {too_few}"}
    torch.manual_seed(seed)
    student = make_student(batches, args.images, outputs, bench.started)
    loss = loss_of(arm, problem, settings, student, seed)
    train(student, batches, loss, steps=run["steps"], batch=args.batch, rate=args.rate, seed=seed)
    accuracies = {"validation": accuracy(student, bench.validation), "test": accuracy(student, bench.test)}
    return accuracies | {"teacher": bench.teacher_accuracy, "seconds": round(time.perf_counter() - began, 1)}


def work(name: str, args: argparse.Namespace, runs: Runs) -> None:
    """Do all runs of a set that are not done."""
    bench = prepare(name, args)
    batches, problem = bench.problem(args.transfer, args.share)
    if args.initialization != "scratch":
        bench.started = start_student(bench.teacher, batches, args.initialization, bench.tokens())
    common = plan(name, bench.test.data.is_text, args)
    for arm in args.arms:
        if arm in ORACLES and problem.data.fine_labels is None:
            continue
        lelp = settings_of("lelp", args.grid, problem.data.classes)
        lelp_settings = best_settings(runs, common, "lelp", lelp, range(args.tune_seeds))
        tried = settings_of(arm, args.grid, problem.data.classes, lelp_settings)
        if args.settings is not None and arm in SPLITTERS:
            tried = [args.settings]
        if not tried:
            continue
        wanted: Iterator[tuple[Settings, int]] = itertools.product(tried, range(args.tune_seeds))
        for stage in ("tune", "all"):
            if stage == "all":
                chosen = best_settings(runs, common, arm, tried, range(args.tune_seeds))
                fresh = range(args.tune_seeds, args.tune_seeds + args.seeds)
                wanted = itertools.product([] if chosen is None else [chosen], fresh)
            for settings, seed in wanted:
                run = common | {"arm": arm, "settings": settings, "seed": seed}
                if runs(run) is None:
                    result = one_run(bench, batches, problem, run, args)
                    runs.add(run, result)
                    outcome = f"test {result['test']:.2%}, {result['seconds']} s" if "test" in result else "left out"
                    print(f"{name} {arm} {settings} seed {seed}: {outcome}", flush=True)


def parser(text: str | None) -> argparse.ArgumentParser:
    """Return what reads the options of a benchmark of arms."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=["digits"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(USUAL_ARMS))
    parser.add_argument("--seeds", type=int, default=5, help="that the chosen setting is measured with")
    parser.add_argument("--tune-seeds", type=int, default=2, help="that each setting is tried with")
    parser.add_argument("--grid", choices=["one", "small", "full"], default="small", help="settings tried of each arm")
    parser.add_argument(
        "--settings",
        type=json.loads,
        metavar="JSON",
        help="of arms of subclasses, in place of a grid: tau, S and beta",
    )
    parser.add_argument(
        "-o", "--output", type=Path, help="folder of teachers, and of runs unless --rows names another folder"
    )
    parser.add_argument("--rows", type=Path, help="file of runs, one a line")
    parser.add_argument("--fashion", type=Path, help="the folder of Fashion-MNIST's four files")
    parser.add_argument("--images", choices=["resnet", "vit"], default="resnet", help="teacher and student of images")
    parser.add_argument("--teacher", choices=["frozen", "tuned"], default="frozen", help="of texts")
    parser.add_argument("--transfer", choices=["seen", "unseen"], default="seen")
    parser.add_argument("--initialization", choices=["scratch", "guide", "calibrated"], default="scratch")
    parser.add_argument("--share", type=float, default=1.0, help="of the transfer set that students are trained on")
    parser.add_argument("--seen", type=int, default=4000, help="examples that the teacher is trained on")
    parser.add_argument("--unseen", type=int, default=8000)
    parser.add_argument("--held-out", type=int, default=2000, help="examples of validation, and of test")
    parser.add_argument("--teacher-steps", type=int, default=800)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of a text that teacher and students see")
    parser.add_argument("--report", action="store_true", help="only print the tables")
    return parser


def main(argv: list[str] | None = None) -> int:
    options = parser(__doc__)
    args = options.parse_args(argv)
    if args.output is None and not args.report:
        options.error("the folder of teachers is missing: -o FOLDER")
    runs = Runs.of(args)
    if not args.report:
        for folder in (args.output, runs.file.parent):
            folder.mkdir(parents=True, exist_ok=True)
        print(f"command: python {' '.join(sys.argv)}")
        print(
            f"machine: {os.cpu_count()} processors, {torch.get_num_threads()} threads, torch {torch.__version__}, "
            f"transformers {transformers.__version__}, load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
        for name in args.sets:
            work(name, args, runs)
    report(runs)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
