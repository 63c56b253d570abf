"""How small a vocabulary costs how much, and whether its parameters are better spent on width and depth?

Of the tokenizer of SmolLM2-135M the pieces are kept that the training text uses. For each size: what held-out text costs
(share of its tokens that are kept, tokens it takes), the teacher itself with the kept rows alone, and students of equal
parameters, calibrated and then distilled from a cache of the teacher cut to their vocabulary. All in bits per byte of the same
held-out text, which compares tokenizers; seeds change the split of the text, the order, and whatever is random. One JSON line
a seed and arm is appended to --output; what is there already is not run again.

    python examples/benchmarks/vocabulary_size.py --output examples/benchmarks/results/vocabulary_size.jsonl --arms teacher
    python examples/benchmarks/vocabulary_size.py --output examples/benchmarks/results/vocabulary_size.jsonl --arms students
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.common.data import pack, read_documents, split_documents
from examples.common.language_model import TrainingRecipe, cache_teacher, draw_blocks, evaluate, train
from examples.common.malloc import keep_freed_memory
from examples.common.teachers import default_language_model
from hf_guide import AutoStudentForCausalLM
from hf_guide.calibration.vocabulary import VocabularyReducer
from hf_guide.models.token_rows import config_token_ids, select_token_rows

LENGTH = 256
SIZES = (4000, 8000, 16000, 24000)
BUDGET = 23_000_000
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64}
SHAPES = {"49152: 240 x 14": (49152, 240, 14), "16000: 320 x 14": (16000, 320, 14), "8000: 336 x 15": (8000, 336, 15)}
"""Vocabulary, width and blocks; the width of the MLP makes BUDGET parameters."""


def shape_of(vocabulary: int, width: int, blocks: int) -> dict[str, Any]:
    """Return overrides for a Llama with tied embeddings of BUDGET parameters."""
    heads, groups, size = HEADS.values()
    attention = 2 * width * size * (heads + groups)
    per_block = (BUDGET - vocabulary * width - width) / blocks - attention - 2 * width
    return {
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "intermediate_size": round(per_block / (3 * width)),
        **HEADS,
    }


class HeldOut:
    """Held-out text and how a tokenizer reads it."""

    def __init__(self, texts: list[str], documents: int):
        self.texts = texts[:documents]
        self.bytes = sum(len(f"{text}\n\n".encode()) for text in self.texts)

    def bits_per_byte(self, model: Any, tokenizer: Any) -> float:
        """Return the bits that a model needs for a byte of the text: its loss per token times the tokens per byte."""
        blocks = pack(self.texts, tokenizer, LENGTH)
        ids = tokenizer([f"{text}\n\n" for text in self.texts], add_special_tokens=False).input_ids
        tokens = sum(map(len, ids))
        nats = math.log(evaluate(model, blocks, 2, "bits", show_progress=False).perplexity)
        return nats * tokens / self.bytes / math.log(2)


def run_teacher(seed: int, done: set[str], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield what each vocabulary costs, and the bits per byte of the teacher with its rows alone."""
    bench = Bench(seed, args)
    arms = {f"teacher, {size}": size for size in (*SIZES, bench.teacher.config.vocab_size)}
    for arm, size in arms.items():
        if arm in done:
            continue
        model, tokenizer, facts = bench.with_vocabulary(size)
        yield {"arm": arm, **facts, "bits_per_byte": bench.held_out.bits_per_byte(model, tokenizer)}


def run_students(seed: int, done: set[str], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield students of equal parameters, one for each of `SHAPES`, before and after training."""
    bench = Bench(seed, args)
    recipe = TrainingRecipe(args.steps, args.batch_size, 0.5, seed)
    for arm, (size, width, blocks) in SHAPES.items():
        if arm in done:
            continue
        teacher, tokenizer, facts = bench.with_vocabulary(size)
        shape = shape_of(size, width, blocks)
        whole = {} if size == bench.teacher.config.vocab_size else {"vocab_size": size}
        student = AutoStudentForCausalLM.from_teacher(
            bench.name,
            method={"method": "calibrated", "seed": seed},
            dtype=torch.float32,
            calibration_dataset=bench.texts.train,
            show_progress=False,
            **shape,
            **whole,
        )
        before = bench.held_out.bits_per_byte(student, tokenizer)
        row = {"arm": arm, **facts, "parameters": student.num_parameters(), **shape, "bits_per_byte_before": before}
        if args.steps:
            rows = draw_blocks(pack(bench.texts.train, tokenizer, LENGTH), args.steps * args.batch_size, seed)
            with tempfile.TemporaryDirectory(prefix="vocabulary-") as scratch:
                cache = cache_teacher(teacher, rows, Path(scratch, "cache"), recipe, show_progress=False)
                train(student, cache, rows, args.learning_rate, recipe, Path(scratch), show_progress=False)
            after = bench.held_out.bits_per_byte(student, tokenizer)
            row |= {"bits_per_byte": after, "tokens": rows[:, 1:].numel(), "learning_rate": args.learning_rate}
        yield row


class Bench:
    """The teacher, and one split of the text."""

    def __init__(self, seed: int, args: argparse.Namespace):
        self.name = args.teacher or default_language_model(None)
        self.tokenizer = AutoTokenizer.from_pretrained(self.name)
        self.teacher = AutoModelForCausalLM.from_pretrained(self.name, dtype=torch.float32).eval()
        self.texts = split_documents(read_documents("wikipedia"), seed=seed)
        self.held_out = HeldOut(self.texts.held_out, args.held_out_documents)
        required = config_token_ids(self.teacher.config)
        self.reducer = VocabularyReducer(self.tokenizer, self.texts.train, required)

    def with_vocabulary(self, size: int) -> tuple[Any, Any, dict[str, Any]]:
        """Return the teacher with the rows of a vocabulary alone, its tokenizer, and what the held-out text costs."""
        if size == self.teacher.config.vocab_size:
            return self.teacher, self.tokenizer, {"vocab_size": size, "share_kept": 1.0, "token_ratio": 1.0}
        vocabulary = self.reducer.reduce(size)
        kept, texts = set(vocabulary.kept_ids), self.held_out.texts
        old, new = (
            [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
            for tokenizer in (self.tokenizer, vocabulary.tokenizer)
        )
        share = sum(token in kept for token in old) / len(old)
        facts = {"vocab_size": size, "share_kept": share, "token_ratio": len(new) / len(old)}
        return select_token_rows(self.teacher, vocabulary.kept_ids), vocabulary.tokenizer, facts


def table(rows: list[dict[str, Any]]) -> str:
    """Return mean and spread (standard deviation) over seeds, as Markdown."""
    lines = [
        "| arm | tokens kept, % | tokens, times | bits per byte untrained | bits per byte trained |",
        "|---|---|---|---|---|",
    ]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == arm]
        untrained = "bits_per_byte_before" if "parameters" in mine[0] else "bits_per_byte"
        trained = _spread([row["bits_per_byte"] for row in mine if "tokens" in row])
        columns = [[100 * row["share_kept"] for row in mine], [row["token_ratio"] for row in mine]]
        cells = [*map(_spread, columns), _spread([row[untrained] for row in mine]), trained]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1))
    return f"{mean:.3f} ± {spread:.3f}" if len(values) > 1 else f"{mean:.3f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("vocabulary_size.jsonl"))
    parser.add_argument("--teacher", help="by default SmolLM2-135M")
    parser.add_argument("--arms", choices=["teacher", "students"], default="teacher")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100, help="of training; 0 leaves the students untrained")
    parser.add_argument("--batch-size", type=int, default=2, help="blocks of 256 tokens in a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak")
    parser.add_argument("--held-out-documents", type=int, default=16)
    parser.add_argument("--table", action="store_true", help="print the table of --output alone")
    args = parser.parse_args()
    keep_freed_memory()
    rows = [json.loads(line) for line in args.output.read_text().splitlines()] if args.output.exists() else []
    for seed in [] if args.table else args.seeds:
        done = {row["arm"] for row in rows if row["seed"] == seed}
        for row in {"teacher": run_teacher, "students": run_students}[args.arms](seed, done, args):
            rows.append({"seed": seed, **row, "held_out_documents": args.held_out_documents})
            with args.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(rows[-1], flush=True)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
