"""Which blocks to keep: those of greatest influence, or a set chosen by a local search from these?

Students of SmolLM2-135M at its full width and a third, half or two thirds of its depth, made by `calibrated`. Each seed draws
its own calibration text, training text and held-out text. The perplexity is of held-out text, untrained and, with --steps,
after distillation (half CE, half forward KL) from a capture. One JSON line per seed, depth and arm is appended to --output;
existing ones are not made again.

    python examples/benchmarks/block_selection.py --output block_selection.jsonl --seeds 0 1 2 3 --depths 10
    python examples/benchmarks/block_selection.py --output block_selection.jsonl --table
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
ARMS = ("block_influence", "local_search")


def run_arm(
    arm: str, depth: int, name: str, train_blocks: Tensor, held_out: Tensor, cache: Any, args: argparse.Namespace
) -> dict[str, Any]:
    """Make one student, and train it if there are steps; return its row."""

    def perplexity(model: PreTrainedModel) -> float:
        return evaluate(model, held_out, args.batch_size, "held out", show_progress=False).perplexity

    method = {"method": "calibrated", "calibration_tokens": args.calibration_tokens, "seed": args.seed}
    started = time.process_time()
    student = from_teacher(
        name,
        method=method | {"layer_selection": arm},
        calibration_dataset=[{"input_ids": rows} for rows in train_blocks.split(8)],
        dtype=torch.float32,
        show_progress=False,
        num_hidden_layers=depth,
    )
    seconds = time.process_time() - started
    report = student.initialization_report
    row = {"seed": args.seed, "depth": depth, "arm": arm, "calibration_tokens": args.calibration_tokens}
    row |= {"blocks": report.blocks["layers"], "untrained": perplexity(student), "cpu_seconds": round(seconds)}
    if args.steps:
        recipe = TrainingRecipe(args.steps, args.batch_size, args.kd_weight, args.seed)
        blocks = train_blocks[: args.steps * args.batch_size]
        with tempfile.TemporaryDirectory() as scratch:
            train(student, cache, blocks, args.learning_rate, recipe, Path(scratch), show_progress=False)
        row |= {"tokens": blocks[:, 1:].numel(), "trained": perplexity(student), "learning_rate": args.learning_rate}
    return row


def run_seed(todo: "list[tuple[int, str]]", args: argparse.Namespace) -> list[dict[str, Any]]:
    """Make the students of pairs of a depth and an arm from one seed, and append a row for each to the output."""
    texts = split_documents(read_documents("wikipedia"), seed=args.seed)
    name = default_language_model(None)
    tokenizer = AutoTokenizer.from_pretrained(name)
    recipe = TrainingRecipe(args.steps, args.batch_size, args.kd_weight, args.seed)
    count = max(args.steps * args.batch_size, -(-args.calibration_tokens // LENGTH))
    train_blocks = draw_blocks(pack(texts.train, tokenizer, LENGTH), count, args.seed)
    held_out = draw_blocks(pack(texts.held_out, tokenizer, LENGTH), args.held_out_blocks, args.seed)
    rows = []
    with tempfile.TemporaryDirectory(prefix="block-selection-") as scratch:
        cache = None
        if args.steps:
            teacher = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
            blocks = train_blocks[: args.steps * args.batch_size]
            cache = cache_teacher(teacher, blocks, Path(scratch, "capture"), recipe, show_progress=False)
            del teacher
        for depth, arm in todo:
            row = run_arm(arm, depth, name, train_blocks, held_out, cache, args)
            print(json.dumps(row), flush=True)
            append_row(args.output, row)
            rows.append(row)
    return rows


def table(rows: "list[dict[str, Any]]") -> str:
    """Return a line for each depth and arm: mean and deviation over seeds of the perplexities, and of each seed the blocks."""
    lines = []
    keys = ("depth", "calibration_tokens", "arm", "tokens")
    for key in dict.fromkeys(tuple(row.get(name) for name in keys) for row in rows):
        of_arm = [row for row in rows if tuple(row.get(name) for name in keys) == key]
        cells = [f"{key[0]} blocks, {key[1]:,} calibration tokens, {key[2]:16}"]
        for name in ("untrained", "trained"):
            found = [row[name] for row in of_arm if name in row]
            if found:
                cells.append(f"{name} {mean_and_spread(found, 1)} ({len(found)})")
        cost = statistics.mean(row["cpu_seconds"] for row in of_arm)
        lines.append(", ".join([*cells, f"{cost:.0f} CPU seconds"]))
        lines += [f"    seed {row['seed']}: {row['untrained']:.1f}, {row['blocks']}" for row in of_arm]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("block_selection.jsonl"))
    parser.add_argument("--table", action="store_true", help="only print the table of existing rows")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--depths", type=int, nargs="+", default=[10, 15])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=2, help="blocks of 256 tokens in a step")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--calibration-tokens", type=int, default=4096)
    parser.add_argument("--held-out-blocks", type=int, default=16)
    parser.add_argument("--kd-weight", type=float, default=0.5)
    args = parser.parse_args()
    keep_freed_memory()
    rows = read_rows(args.output)
    for seed in [] if args.table else args.seeds:
        args.seed = seed
        tokens = args.steps * args.batch_size * LENGTH  # a block has LENGTH + 1: the last one is a target alone
        run = (seed, tokens, args.calibration_tokens)
        same = [row for row in rows if (row["seed"], row.get("tokens", 0), row["calibration_tokens"]) == run]
        done = {(row["depth"], row["arm"]) for row in same}
        todo = [(depth, arm) for depth in args.depths for arm in args.arms if (depth, arm) not in done]
        if todo:
            rows += run_seed(todo, args)
    print(f"\n{describe_machine()}")
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
