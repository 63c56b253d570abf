"""What remains of SmolLM2-135M when about a quarter of its parameters is removed, before and after a short distillation?

    python examples/benchmarks/mild_cuts.py --output mild_cuts.jsonl --seeds 0 --steps 0
    python examples/benchmarks/mild_cuts.py --output mild_cuts.jsonl --seeds 0 --steps 50
    python examples/benchmarks/mild_cuts.py --output mild_cuts.jsonl --table

Students of 99 M parameters. Fewer blocks at full width: those of the least influence dropped, as ShortGPT does (arXiv
2403.03853), and by `calibrated`, which refits the rest. All blocks at a smaller width: one PCA of activations and nothing
refitted (SliceGPT, arXiv 2401.15024, has one for each block, and an untied head), weight subcloning, Minitron
(`published_methods.py`), and `calibrated`. Narrower MLPs: `calibrated`. All calibrate on the same text, and are distilled
(half CE, half forward KL) from one capture at one learning rate. One JSON line a seed and arm is appended to --output;
existing ones are not made again.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from baselines import NOTHING_FITTED
from published_methods import (
    collect_activity,
    length_of_means,
    most_active,
    pruned_as_minitron,
    subcloned,
    with_blocks,
)
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.common.data import pack, read_documents, split_documents
from examples.common.language_model import TrainingRecipe, cache_teacher, draw_blocks, evaluate, train
from examples.common.machine import describe_machine
from examples.common.malloc import keep_freed_memory
from examples.common.results import append_row, mean_and_spread, read_rows
from examples.common.teachers import default_language_model
from hf_guide import from_teacher

LENGTH = 256
FEWER_BLOCKS = {"num_hidden_layers": 20}
NARROWER = {"hidden_size": 423}
NARROWER_MLPS = {"intermediate_size": 853}
RULE = {"num_hidden_layers": 27, "intermediate_size": 1008}  # what num_parameters="99.1M" takes without data

Maker = Callable[[LlamaForCausalLM, str, "list[Tensor]", int], PreTrainedModel]
"""Makes a student from the teacher, its folder, batches of token ids, (batch, length), and a seed."""


def short(teacher: LlamaForCausalLM, name: str, batches: "list[Tensor]", seed: int) -> PreTrainedModel:
    """Return the blocks of the most influence, at full width."""
    influence = torch.tensor(collect_activity(teacher, batches, length_of_means).influence)
    return with_blocks(teacher, most_active(influence, FEWER_BLOCKS["num_hidden_layers"]).tolist())


def by(shape: "dict[str, int]", method: str = "calibrated", **options: Any) -> Maker:
    """Return the maker of a method of hf_guide, and a shape."""

    def make(teacher: LlamaForCausalLM, name: str, batches: "list[Tensor]", seed: int) -> PreTrainedModel:
        tokens = sum(batch.numel() for batch in batches)
        return from_teacher(
            name,
            method={"method": method, "calibration_tokens": tokens, "seed": seed, **options},
            calibration_dataset=[{"input_ids": batch} for batch in batches],
            dtype=torch.float32,
            show_progress=False,
            **shape,
        )

    return make


def published(make: "Callable[[LlamaForCausalLM, LlamaConfig, list[Tensor]], PreTrainedModel]") -> Maker:
    """Return the maker of a published method at the smaller width."""
    return lambda teacher, name, batches, seed: make(
        teacher, LlamaConfig.from_dict({**teacher.config.to_dict(), **NARROWER}), batches
    )


ARMS: dict[str, Maker] = {
    "20 of 30 blocks, as ShortGPT": short,
    "20 of 30 blocks, calibrated": by(FEWER_BLOCKS, layer_selection="block_influence"),
    "20 of 30 blocks, calibrated, local search": by(FEWER_BLOCKS, layer_selection="local_search"),
    "423 of 576 wide, activation PCA": by(NARROWER, "calibrated_basis_only", **NOTHING_FITTED),
    "423 of 576 wide, activation PCA, logit scale fitted": by(NARROWER, "calibrated_basis_only", refit="none"),
    "423 of 576 wide, subcloning": published(subcloned),
    "423 of 576 wide, as Minitron": published(pruned_as_minitron),
    "423 of 576 wide, calibrated": by(NARROWER),
    "MLPs 853 of 1536 wide, calibrated": by(NARROWER_MLPS),
    "27 blocks, MLPs 1008 wide, calibrated": by(RULE),
}


def run_seed(arms: "list[str]", seed: int, args: argparse.Namespace) -> "list[dict[str, Any]]":
    """Make, distil and evaluate students from one seed, and append a row for each to the output."""
    name = args.teacher or default_language_model(None)
    tokenizer = AutoTokenizer.from_pretrained(name)
    texts = split_documents(read_documents("wikipedia"), seed=seed)
    packed = pack(texts.train, tokenizer, LENGTH)
    recipe = TrainingRecipe(args.steps, args.batch_size, seed=seed)
    text = draw_blocks(packed, max(args.steps * args.batch_size, args.calibration_tokens // LENGTH), seed)
    held_out = draw_blocks(pack(texts.held_out, tokenizer, LENGTH), args.held_out_blocks, seed)
    teacher = LlamaForCausalLM.from_pretrained(name, dtype=torch.float32)
    batches = list(text[: args.calibration_tokens // LENGTH, :LENGTH].split(2))

    def loss(model: PreTrainedModel) -> float:
        return math.log(evaluate(model, held_out, args.batch_size, "held out", show_progress=False).perplexity)

    target, rows = loss(teacher), []
    with tempfile.TemporaryDirectory(prefix="mild-cuts-") as scratch:
        trained_on = text[: args.steps * args.batch_size]
        cache = cache_teacher(teacher, trained_on, Path(scratch, "capture"), recipe) if args.steps else None
        for arm in arms:
            clock = time.process_time()
            student = ARMS[arm](teacher, name, batches, seed)
            row = {"arm": arm, "seed": seed, "steps": args.steps, "teacher": target, "untrained": loss(student)}
            row |= {"parameters": student.num_parameters(), "tokens": trained_on[:, 1:].numel()}
            row |= {"calibration_tokens": args.calibration_tokens, "learning_rate": args.learning_rate}
            if cache is not None:
                train(student, cache, trained_on, args.learning_rate, recipe, Path(scratch), show_progress=False)
                row["trained"] = loss(student)
            rows.append({**row, "cpu_seconds": round(time.process_time() - clock)})
            print(json.dumps(rows[-1]), flush=True)
            append_row(args.output, rows[-1])
    return rows


def table(rows: "list[dict[str, Any]]") -> str:
    """Return the perplexities of each arm, mean and standard deviation over seeds."""
    lines = [f"{'':42} {'calibration':>11} {'parameters':>11} {'untrained':>16} {'trained':>22}"]
    for arm, tokens in dict.fromkeys((row["arm"], row["calibration_tokens"]) for row in rows):
        found = [row for row in rows if (row["arm"], row["calibration_tokens"]) == (arm, tokens)]
        untrained = {row["seed"]: row["untrained"] for row in found}
        trained: dict[int, list[float]] = {}
        for row in found:
            if "trained" in row:
                trained.setdefault(row["tokens"], []).append(row["trained"])
        after = "; ".join(f"{perplexities(losses)} after {count:,} tokens" for count, losses in trained.items())
        lines.append(
            f"{arm:42} {tokens:11,} {found[0]['parameters']:11,} {perplexities(untrained.values()):>16} {after}"
        )
    return "\n".join(lines)


def perplexities(losses: "Iterable[float]") -> str:
    """Return mean and standard deviation of the perplexities of some losses."""
    return mean_and_spread([math.exp(loss) for loss in losses], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("mild_cuts.jsonl"))
    parser.add_argument("--table", action="store_true", help="only print the table of existing rows")
    parser.add_argument("--teacher", help="by default SmolLM2-135M")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=50, help="of distillation; 0 for none")
    parser.add_argument("--batch-size", type=int, default=2, help="blocks of 256 tokens in a step")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--calibration-tokens", type=int, default=4096)
    parser.add_argument("--held-out-blocks", type=int, default=16)
    args = parser.parse_args()
    keep_freed_memory()
    rows = read_rows(args.output)
    for seed in [] if args.table else args.seeds:
        run = (seed, args.steps, args.calibration_tokens)
        done = {row["arm"] for row in rows if (row["seed"], row["steps"], row["calibration_tokens"]) == run}
        todo = [arm for arm in args.arms if arm not in done]
        rows += run_seed(todo, seed, args) if todo else []
    print(describe_machine())
    print(table(rows))


if __name__ == "__main__":
    main()
