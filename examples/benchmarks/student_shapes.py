"""Which shape of equal parameters is best, and does a score that needs no training rank shapes as training does?

Students of SmolLM2-135M of about 8, 23 or 45 M parameters, initialized by `calibrated` and trained on the same tokens in the
same order with the same distillation loss (half CE, half forward KL), from one capture of the teacher, at one learning rate
with one cosine schedule: what is measured on the way is at a higher rate than at the end. Scored without training, or with
little: the rule score of `hf_guide.shapes`, the held-out loss of a start on an eighth of the calibration tokens, and that of
the whole start; the loss after the first steps; the variance that the student's width explains, and the summed influence of
its blocks. One JSON line per seed and shape is appended to --output; existing ones are not made again. The table has the rank
correlation (Spearman) of each score with the loss after training.

    python examples/benchmarks/student_shapes.py --output student_shapes.jsonl --seeds 0 --steps 50 --evaluate-at 10 25
    python examples/benchmarks/student_shapes.py --output student_shapes.jsonl --table
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainerCallback

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.common.data import pack, read_documents, split_documents
from examples.common.language_model import TrainingRecipe, cache_teacher, draw_blocks, evaluate, train
from examples.common.machine import describe_machine
from examples.common.malloc import keep_freed_memory
from examples.common.results import append_row, read_rows, spearman
from examples.common.teachers import default_language_model
from hf_guide import from_teacher
from hf_guide.shapes.candidates import rule_scores
from hf_guide.shapes.fields import SizeField, SizeFields, SizeRole

LENGTH = 256

SHAPES: dict[str, list[tuple[int, ...]]] = {
    "23M": [
        (240, 14, 6, 2, 64, 769),
        (288, 10, 9, 3, 32, 768),
        (240, 17, 6, 2, 64, 576),  # what num_parameters="23M" takes by the rule
        (240, 16, 6, 2, 64, 630),
        (288, 7, 6, 2, 64, 1122),
        (288, 10, 6, 2, 64, 682),
        (192, 20, 6, 2, 64, 837),
        (336, 5, 6, 2, 64, 944),
        (144, 30, 9, 3, 64, 716),
        (240, 14, 3, 1, 64, 940),
        (288, 12, 6, 2, 64, 512),
        (240, 11, 6, 2, 64, 1073),
        (192, 28, 6, 2, 64, 499),
        (288, 10, 3, 1, 64, 853),
        (288, 15, 9, 3, 32, 427),
        (288, 10, 9, 3, 64, 512),
    ],
    "8M": [
        (96, 12, 6, 2, 64, 608),  # what num_parameters="8M" takes by the rule, but for a block
        (96, 16, 3, 1, 64, 544),
        (96, 10, 6, 2, 32, 968),
        (72, 24, 3, 1, 64, 688),
        (120, 6, 3, 1, 64, 800),
        (96, 7, 6, 2, 64, 1288),
        (72, 14, 9, 3, 64, 960),
        (108, 10, 3, 1, 64, 656),
        (96, 20, 3, 1, 64, 400),
        (120, 8, 6, 2, 32, 560),
        (144, 3, 3, 1, 64, 544),
        (72, 20, 6, 2, 64, 688),
    ],
    "45M": [
        (384, 21, 6, 2, 64, 736),  # what num_parameters="45M" takes by the rule
        (432, 11, 9, 3, 32, 1408),
        (288, 30, 9, 3, 64, 680),
        (576, 8, 9, 3, 64, 696),
        (432, 15, 9, 3, 64, 712),
        (480, 12, 6, 2, 64, 896),
        (336, 25, 6, 2, 64, 792),
        (432, 24, 3, 1, 64, 592),
        (576, 10, 6, 2, 64, 624),
        (384, 15, 6, 2, 64, 1168),
        (288, 30, 6, 2, 64, 848),
        (432, 12, 9, 3, 48, 1144),
    ],
}
"""By budget: width, blocks, heads, key/value heads, size of a head, MLP."""


def overrides(shape: "tuple[int, ...] | list[int]") -> dict[str, int]:
    """Return the config fields of a shape."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    return dict(zip((*names, "intermediate_size"), shape, strict=True))


class Evaluations(TrainerCallback):
    """Evaluates a student after some steps of its training."""

    def __init__(self, steps: "list[int]", loss: "Callable[[PreTrainedModel], float]"):
        self.steps, self.loss = set(steps), loss
        self.losses: dict[str, float] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Evaluate after a step that was asked for."""
        if state.global_step in self.steps:
            self.losses[str(state.global_step)] = self.loss(model)


def run_shape(
    shape: "tuple[int, ...]", name: str, train_blocks: Tensor, held_out: Tensor, cache: Any, args: argparse.Namespace
) -> dict[str, Any]:
    """Make, train and evaluate one student; return its row."""

    def loss(model: PreTrainedModel) -> float:
        return math.log(evaluate(model, held_out, args.batch_size, "held out", show_progress=False).perplexity)

    def start(**options: Any) -> PreTrainedModel:
        return from_teacher(
            name,
            method={
                "method": "calibrated",
                "calibration_tokens": args.calibration_tokens,
                "seed": args.seed,
                "layer_selection": args.layer_selection,
                **options,
            },
            calibration_dataset=[{"input_ids": rows} for rows in train_blocks.split(8)],
            dtype=torch.float32,
            show_progress=False,
            **overrides(shape),
        )

    started = time.process_time()
    quick = loss(start(calibration_tokens=args.calibration_tokens // 8)) if args.quick else None
    cheap = time.process_time()
    student = start()
    untrained = loss(student)
    whole = time.process_time()
    recipe = TrainingRecipe(args.steps, args.batch_size, args.kd_weight, args.seed)
    on_the_way = Evaluations(args.evaluate_at, loss)
    with tempfile.TemporaryDirectory() as scratch:
        train(
            student,
            cache,
            train_blocks,
            args.learning_rate,
            recipe,
            Path(scratch),
            callbacks=[on_the_way],
            show_progress=False,
        )
    report: Any = student.initialization_report
    (blocks,) = report.blocks.values()
    (influence,) = report.calibration["block_influence"].values()
    return {
        "budget": args.budget,
        "seed": args.seed,
        "shape": list(shape),
        "parameters": student.num_parameters(),
        "tokens": train_blocks[:, 1:].numel(),
        "learning_rate": args.learning_rate,
        "calibration_tokens": args.calibration_tokens,
        "layer_selection": args.layer_selection,
        "blocks": list(blocks),
        "held_out_tokens": held_out[:, 1:].numel(),
        "quick": quick,
        "untrained": untrained,
        "after_steps": on_the_way.losses,
        "trained": loss(student),
        "variance_explained": report.variance_explained.get("embed", 1.0),  # the width may be the teacher's
        "influence": sum(influence[block] for block in blocks),
        "cpu_seconds": {
            "quick": round(cheap - started),
            "calibrated": round(whole - cheap),
            "training": round(time.process_time() - whole),
        },
    }


def run_seed(shapes: "list[tuple[int, ...]]", args: argparse.Namespace) -> list[dict[str, Any]]:
    """Train students of `shapes` from one seed, and append a row for each to the output."""
    texts = split_documents(read_documents("wikipedia"), seed=args.seed)
    name = args.teacher or default_language_model(None)
    tokenizer = AutoTokenizer.from_pretrained(name)
    teacher = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    recipe = TrainingRecipe(args.steps, args.batch_size, args.kd_weight, args.seed)
    train_blocks = draw_blocks(pack(texts.train, tokenizer, LENGTH), recipe.steps * recipe.batch_size, args.seed)
    held_out = draw_blocks(pack(texts.held_out, tokenizer, LENGTH), args.held_out_blocks, args.seed)
    target = math.log(evaluate(teacher, held_out, args.batch_size, "teacher", show_progress=False).perplexity)
    rows = []
    with tempfile.TemporaryDirectory(prefix="student-shapes-") as scratch:
        folder = Path(args.capture or scratch, f"seed-{args.seed}-{len(train_blocks)}-blocks")
        cache = cache_teacher(teacher, train_blocks, folder, recipe, show_progress=False)
        del teacher
        for shape in shapes:
            row = {**run_shape(shape, name, train_blocks, held_out, cache, args), "teacher": target}
            print(json.dumps(row), flush=True)
            append_row(args.output, row)
            rows.append(row)
    return rows


def rule_score(
    shape: "list[int]", teacher: "tuple[int, ...]" = (576, 30, 9, 1536), teacher_head_size: int = 64
) -> float:
    """Return the rule score of a shape; the teacher's width, blocks, heads and MLP are by default SmolLM2-135M's."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    roles = (SizeRole.WIDTH, SizeRole.DEPTH, SizeRole.HEADS, SizeRole.MLP)
    fields = tuple(SizeField(*each) for each in zip(names, teacher, roles, strict=True))
    width, blocks, heads, _, head_size, mlp = shape
    sizes = {name: np.array([size]) for name, size in zip(names, (width, blocks, heads, mlp), strict=True)}
    return float(rule_scores(sizes, SizeFields(fields, head_size, teacher_head_size, False, {}, {}))[0])


SCORES = {
    "quick": lambda row: row["quick"],
    "untrained": lambda row: row["untrained"],
    "rule": lambda row: rule_score(row["shape"]),
    "variance left": lambda row: 1 - row["variance_explained"] if "variance_explained" in row else None,
    "influence left": lambda row: -row["influence"] if "influence" in row else None,
}
"""Of each score its value for a row, lower for what it takes to be better; None where the row has none."""


def _run_of(row: "dict[str, Any]") -> tuple[int, int, str]:
    """Return the tokens of training and of the calibration, and how blocks were selected; that is not known of early rows.

    Rows of a former rule of selection have it in `version`.
    """
    selection = [str(row.get("layer_selection", "")), *filter(None, [row.get("version")])]
    return row["tokens"], row["calibration_tokens"], ", ".join(selection)


def table(rows: "list[dict[str, Any]]") -> str:
    """Return a line for each run and shape, and the correlation of each score with the losses of training."""
    lines = []
    runs = [(row.get("budget", "23M"), row["seed"], *_run_of(row)) for row in rows]
    for run in sorted(set(runs)):
        group = [row for row, other in zip(rows, runs, strict=True) if other == run]
        budget, seed, tokens, calibration, selection = run
        title = f"{budget}, seed {seed}, {calibration:,} calibration tokens, {selection}, {tokens:,} of training"
        lines.append(f"\n{title}, teacher {group[0]['teacher']:.3f}")
        stops = [name for name in group[0].get("after_steps", {}) if all(name in row["after_steps"] for row in group)]
        lines.append(
            f"{'shape':28} {'params':>11} {'rule':>6} {'quick':>7} {'untrained':>9}"
            + "".join(f"{'step ' + name:>9}" for name in stops)
            + "  trained"
        )
        for row in sorted(group, key=lambda row: row["trained"]):
            quick = f"{row['quick']:7.3f}" if row["quick"] is not None else "      -"
            lines.append(
                f"{row['shape']!s:28} {row['parameters']:11,} {rule_score(row['shape']):6.2f} {quick} {row['untrained']:9.3f}"
                + "".join(f"{row['after_steps'][name]:9.3f}" for name in stops)
                + f"{row['trained']:9.3f}"
            )
        if len(group) >= 4:
            lines += correlations(group, stops)
    return "\n".join(lines)


def layer_selection(value: str) -> "str | list[int]":
    """Return the rule, or the blocks of a list such as "0,1,28,29"; argparse reports anything else."""
    if value in ("local_search", "block_influence"):
        return value
    return [int(block) for block in value.split(",")]


def correlations(rows: "list[dict[str, Any]]", stops: "list[str]") -> "list[str]":
    """Return the rank correlation of each score with the loss at each stop and at the end, a line for each score."""
    ends = {f"step {name}": [row["after_steps"][name] for row in rows] for name in stops}
    ends["the end"] = [row["trained"] for row in rows]
    lines = [f"rank correlation over {len(rows)} shapes with the loss at {', '.join(ends)}:"]
    scores = {name: [score(row) for row in rows] for name, score in SCORES.items()}
    scores |= {name: values for name, values in ends.items() if name != "the end"}
    for name, values in scores.items():
        if None in values:
            continue
        found = ", ".join(f"{spearman(values, end):5.2f}" for end in ends.values())
        lines.append(f"    {name:15} {found}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("student_shapes.jsonl"))
    parser.add_argument("--table", action="store_true", help="only print the table of existing rows")
    parser.add_argument("--teacher", help="by default SmolLM2-135M")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--budget", choices=SHAPES, default="23M")
    parser.add_argument("--shapes", type=int, nargs="+", metavar="I", help="numbers of the budget's shapes, from 0")
    parser.add_argument(
        "--evaluate-at", type=int, nargs="*", default=[], metavar="STEP", help="also after these steps"
    )
    parser.add_argument(
        "--no-quick", dest="quick", action="store_false", help="make no start on an eighth of the tokens"
    )
    parser.add_argument("--capture", type=Path, help="where the teacher's outputs are kept for later runs")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=2, help="blocks of 256 tokens in a step")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--calibration-tokens", type=int, default=4096)
    parser.add_argument("--layer-selection", type=layer_selection, default="local_search", metavar="RULE|BLOCKS")
    parser.add_argument("--held-out-blocks", type=int, default=32)
    parser.add_argument("--kd-weight", type=float, default=0.5)
    args = parser.parse_args()
    keep_freed_memory()
    rows = read_rows(args.output)
    tokens = args.steps * args.batch_size * LENGTH  # a block has LENGTH + 1: the last one is a target alone
    for seed in [] if args.table else args.seeds:
        args.seed = seed
        run = (tokens, args.calibration_tokens, str(args.layer_selection))
        done = {tuple(row["shape"]) for row in rows if row["seed"] == seed and _run_of(row) == run}
        asked = SHAPES[args.budget] if args.shapes is None else [SHAPES[args.budget][each] for each in args.shapes]
        todo = [shape for shape in asked if shape not in done]
        if todo:
            rows += run_seed(todo, args)
    print(f"\n{describe_machine()}")
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
