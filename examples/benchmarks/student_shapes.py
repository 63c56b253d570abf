"""Which shape of equal parameters is best, and does a score that needs no training rank shapes as training does?

Students of SmolLM2-135M of about 23 M parameters, initialized by `calibrated` and trained on the same tokens in the same
order with the same distillation loss (half CE, half forward KL), from one capture of the teacher, at one learning rate.
Scored without training: the rule score of `hf_guide.shapes`, the held-out loss of a start on an eighth of the calibration
tokens, and that of the whole start. One JSON line per seed and shape is appended to --output; existing ones are not made
again. The table has the rank correlation (Spearman) of each score with the loss after training.

    python examples/benchmarks/student_shapes.py --output student_shapes.jsonl --seeds 0 --steps 50
    python examples/benchmarks/student_shapes.py --output student_shapes.jsonl --table
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.common.data import pack, read_documents, split_documents
from examples.common.language_model import TrainingRecipe, cache_teacher, draw_blocks, evaluate, train
from examples.common.malloc import keep_freed_memory
from examples.common.teachers import default_language_model
from hf_guide import from_teacher
from hf_guide.shapes.candidates import rule_scores
from hf_guide.shapes.fields import SizeField, SizeFields, SizeRole

LENGTH = 256

# width, blocks, heads, key/value heads, size of a head, MLP
SHAPES = [
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
]


def overrides(shape: "tuple[int, ...] | list[int]") -> dict[str, int]:
    """Return the config fields of a shape."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    return dict(zip((*names, "intermediate_size"), shape, strict=True))


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
                **options,
            },
            calibration_dataset=[{"input_ids": rows} for rows in train_blocks.split(8)],
            dtype=torch.float32,
            show_progress=False,
            **overrides(shape),
        )

    started = time.process_time()
    quick = loss(start(calibration_tokens=args.calibration_tokens // 8))
    cheap = time.process_time()
    student = start()
    untrained = loss(student)
    whole = time.process_time()
    recipe = TrainingRecipe(args.steps, args.batch_size, args.kd_weight, args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        train(student, cache, train_blocks, args.learning_rate, recipe, Path(scratch), show_progress=False)
    return {
        "seed": args.seed,
        "shape": list(shape),
        "parameters": student.num_parameters(),
        "tokens": train_blocks[:, 1:].numel(),
        "learning_rate": args.learning_rate,
        "calibration_tokens": args.calibration_tokens,
        "quick": quick,
        "untrained": untrained,
        "trained": loss(student),
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
        cache = cache_teacher(teacher, train_blocks, Path(scratch, "capture"), recipe, show_progress=False)
        del teacher
        for shape in shapes:
            row = {**run_shape(shape, name, train_blocks, held_out, cache, args), "teacher": target}
            print(json.dumps(row), flush=True)
            with args.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            rows.append(row)
    return rows


def rule_score(shape: "list[int]") -> float:
    """Return the rule score of a shape of SmolLM2-135M."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    roles = (SizeRole.WIDTH, SizeRole.DEPTH, SizeRole.HEADS, SizeRole.MLP)
    teacher = tuple(SizeField(*each) for each in zip(names, (576, 30, 9, 1536), roles, strict=True))
    width, blocks, heads, _, head_size, mlp = shape
    sizes = zip(names, (width, blocks, heads, mlp), strict=True)
    fields = SizeFields(teacher, head_size, 64, "head_dim", False, {}, {})
    return float(rule_scores({name: np.array([size]) for name, size in sizes}, fields)[0])


def spearman(first: "list[float]", second: "list[float]") -> float:
    """Return the rank correlation of two lists without ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1])


def table(rows: "list[dict[str, Any]]") -> str:
    """Return a line for each seed and shape, and the correlation of each score with the loss after training."""
    lines = [f"{'seed':>4} {'shape':34} {'rule':>6} {'quick':>9} {'untrained':>9} {'trained':>8}"]
    for row in sorted(rows, key=lambda row: (row["seed"], row["trained"])):
        losses = f"{row['quick']:9.3f} {row['untrained']:9.3f} {row['trained']:8.3f}"
        lines.append(f"{row['seed']:4} {row['shape']!s:34} {rule_score(row['shape']):6.2f} {losses}")
    for seed in sorted({row["seed"] for row in rows}):
        of_seed = [row for row in rows if row["seed"] == seed]
        if len(of_seed) < 4:
            continue
        trained = [row["trained"] for row in of_seed]
        scores = {name: [row[name] for row in of_seed] for name in ("quick", "untrained")}
        scores["rule"] = [rule_score(row["shape"]) for row in of_seed]
        found = ", ".join(f"{name} {spearman(values, trained):.2f}" for name, values in scores.items())
        lines.append(f"seed {seed}, {len(of_seed)} shapes, rank correlation with the trained loss: {found}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("student_shapes.jsonl"))
    parser.add_argument("--table", action="store_true", help="only print the table of existing rows")
    parser.add_argument("--teacher", help="by default SmolLM2-135M")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="how many of the shapes, the first ones")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=2, help="blocks of 256 tokens in a step")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--calibration-tokens", type=int, default=4096)
    parser.add_argument("--held-out-blocks", type=int, default=32)
    parser.add_argument("--kd-weight", type=float, default=0.5)
    args = parser.parse_args()
    keep_freed_memory()
    rows = [json.loads(line) for line in args.output.read_text().splitlines()] if args.output.exists() else []
    tokens = args.steps * args.batch_size * (LENGTH - 1)
    for seed in [] if args.table else args.seeds:
        args.seed = seed
        done = {tuple(row["shape"]) for row in rows if (row["seed"], row["tokens"]) == (args.seed, tokens)}
        todo = [shape for shape in SHAPES[: args.shapes] if shape not in done]
        if todo:
            rows += run_seed(todo, args)
    print(
        f"\n{os.cpu_count()} processors, python {sys.version.split()[0]}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )
    print(table([row for row in rows if row["tokens"] == tokens]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
