"""Is it better to cut a teacher in stages, training between the cuts, than to cut it at once?

Students of SmolLM2-135M, made by `calibrated` and trained with half CE and half forward KL from one capture of the teacher.
With two stages the first student has the teacher's width and the target's depth; the second is made from it, trained, at
the target's width. Both arms see the same tokens, each once; in both the signals are the teacher's. One JSON line per seed,
target and arm is appended to --output; existing ones are not made again.

    python examples/benchmarks/cut_in_stages.py --output cut_in_stages.jsonl --targets 23M --seeds 0 1 2 --steps 100
    python examples/benchmarks/cut_in_stages.py --output cut_in_stages.jsonl --table
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.common.data import pack, read_documents, split_documents
from examples.common.language_model import TrainingRecipe, cache_teacher, draw_blocks, evaluate, train
from examples.common.machine import describe_machine
from examples.common.malloc import keep_freed_memory
from examples.common.results import append_row, mean_and_spread, read_rows
from examples.common.teachers import default_language_model
from hf_guide import from_teacher

LENGTH = 256

TARGETS = {
    "23M": {
        "hidden_size": 240,
        "num_hidden_layers": 14,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 768,
    },
    "half": {
        "hidden_size": 432,
        "num_hidden_layers": 24,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 1152,
    },
}
ARMS = ("one cut", "depth, then width")


def cut(source: Any, shape: dict[str, int], blocks: Tensor, args: argparse.Namespace) -> PreTrainedModel:
    """Return a calibrated student of `source`."""
    return from_teacher(
        source,
        method={"method": "calibrated", "calibration_tokens": args.calibration_tokens, "seed": args.seed},
        calibration_dataset=[{"input_ids": rows} for rows in blocks.split(8)],
        dtype=torch.float32,
        show_progress=False,
        **shape,
    )


def run_arm(
    arm: str, name: str, target: str, train_blocks: Tensor, held_out: Tensor, cache: Any, args: argparse.Namespace
) -> dict[str, Any]:
    """Make and train the student of one arm; return its row."""

    def perplexity(model: PreTrainedModel) -> float:
        return evaluate(model, held_out, args.batch_size, "held out", show_progress=False).perplexity

    shape, first = TARGETS[target], round(args.first_share * args.steps)
    stages = [(shape, args.steps)]
    if arm != "one cut":
        stages = [({"num_hidden_layers": shape["num_hidden_layers"]}, first), (shape, args.steps - first)]
    started, source, done, rows = time.process_time(), name, 0, []
    for changes, steps in stages:
        student = cut(source, changes, train_blocks, args)
        untrained = perplexity(student)
        blocks = train_blocks[args.batch_size * done : args.batch_size * (done + steps)]
        recipe = TrainingRecipe(steps, args.batch_size, args.kd_weight, args.seed)
        with tempfile.TemporaryDirectory() as scratch:
            train(student, cache, blocks, args.learning_rate, recipe, Path(scratch), show_progress=False)
        done += steps
        rows.append({"parameters": student.num_parameters(), "tokens": blocks[:, 1:].numel()})
        rows[-1] |= {"untrained": untrained, "perplexity": perplexity(student)}
        source = student
    return {
        "seed": args.seed,
        "target": target,
        "arm": arm,
        "tokens": train_blocks[:, 1:].numel(),
        "learning_rate": args.learning_rate,
        "first_share": args.first_share,
        "calibration_tokens": args.calibration_tokens,
        "stages": rows,
        "perplexity": rows[-1]["perplexity"],
        "cpu_seconds": round(time.process_time() - started),
    }


def run_seed(todo: "list[tuple[str, str]]", args: argparse.Namespace) -> list[dict[str, Any]]:
    """Train the students of pairs of a target and an arm from one seed, and append a row for each to the output."""
    texts = split_documents(read_documents("wikipedia"), seed=args.seed)
    name = default_language_model(None)
    tokenizer = AutoTokenizer.from_pretrained(name)
    teacher = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    recipe = TrainingRecipe(args.steps, args.batch_size, args.kd_weight, args.seed)
    train_blocks = draw_blocks(pack(texts.train, tokenizer, LENGTH), recipe.steps * recipe.batch_size, args.seed)
    held_out = draw_blocks(pack(texts.held_out, tokenizer, LENGTH), args.held_out_blocks, args.seed)
    reference = evaluate(teacher, held_out, args.batch_size, "teacher", show_progress=False).perplexity
    rows = []
    with tempfile.TemporaryDirectory(prefix="cut-in-stages-") as scratch:
        cache = cache_teacher(teacher, train_blocks, Path(scratch, "capture"), recipe, show_progress=False)
        del teacher
        for target, arm in todo:
            row = {**run_arm(arm, name, target, train_blocks, held_out, cache, args), "teacher": reference}
            print(json.dumps(row), flush=True)
            append_row(args.output, row)
            rows.append(row)
    return rows


def table(rows: "list[dict[str, Any]]") -> str:
    """Return a line for each target, number of tokens and arm: perplexities of the seeds, their mean and deviation."""
    lines = [f"{'target':8} {'tokens':>7} {'arm':20} {'perplexity':>16}  seeds; CPU seconds"]
    for key in dict.fromkeys((row["target"], row["tokens"], row["arm"]) for row in rows):
        of_arm = [row for row in rows if (row["target"], row["tokens"], row["arm"]) == key]
        found = [row["perplexity"] for row in of_arm]
        cost = statistics.mean(row["cpu_seconds"] for row in of_arm)
        seeds = ", ".join(f"{value:.1f}" for value in found)
        lines.append(f"{key[0]:8} {key[1]:7} {key[2]:20} {mean_and_spread(found, 1):>16}  {seeds}; {cost:.0f}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("cut_in_stages.jsonl"))
    parser.add_argument("--table", action="store_true", help="only print the table of existing rows")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--first-share", type=float, default=0.25, help="of the steps, those of the first stage")
    parser.add_argument("--batch-size", type=int, default=2, help="blocks of 256 tokens in a step")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--calibration-tokens", type=int, default=4096)
    parser.add_argument("--held-out-blocks", type=int, default=32)
    parser.add_argument("--kd-weight", type=float, default=0.5)
    args = parser.parse_args()
    keep_freed_memory()
    rows = read_rows(args.output)
    tokens = args.steps * args.batch_size * LENGTH  # a block has LENGTH + 1: the last one is a target alone
    for seed in [] if args.table else args.seeds:
        args.seed = seed
        done = {(row["target"], row["arm"]) for row in rows if (row["seed"], row["tokens"]) == (seed, tokens)}
        todo = [(target, arm) for target in args.targets for arm in ARMS if (target, arm) not in done]
        if todo:
            rows += run_seed(todo, args)
    print(f"\n{describe_machine()}")
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
