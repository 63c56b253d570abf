"""How small a vocabulary costs how much, and whether its parameters are better spent on width and depth?

Of the tokenizer of SmolLM2-135M the pieces are kept that the training text uses. For each size and amount of that text: what
held-out text costs (share of its tokens that are kept, tokens it takes), and the teacher itself: with the kept rows alone,
with its distribution summed by the next piece, and so on its own tokens of the text. Then students of equal parameters,
calibrated and distilled from a cache of either. All in bits per byte of the same held-out text, which compares tokenizers;
seeds change the split of the text, the order, and whatever is random. One JSON line a seed and arm is appended to --output;
what is there already is not run again.

    python examples/benchmarks/vocabulary_size.py --output examples/benchmarks/results/vocabulary_size.jsonl --arms teacher
    python examples/benchmarks/vocabulary_size.py --output examples/benchmarks/results/vocabulary_size.jsonl --arms students
    python examples/benchmarks/vocabulary_size.py --output examples/benchmarks/results/vocabulary_size.jsonl --arms tokenizer
"""

import argparse
import copy
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
from examples.common.results import append_row, mean_and_spread, read_rows
from examples.common.teachers import default_language_model
from hf_guide import AutoStudentForCausalLM, from_teacher
from hf_guide.calibration.vocabulary import VocabularyReducer
from hf_guide.models.piece_mapping import map_pieces
from hf_guide.models.token_rows import attach_tokenizer, config_token_ids, select_token_rows
from hf_guide.tasks import Task
from hf_guide.teachers.forward import TeacherRunner
from hf_guide.teachers.retokenization import attached_retokenizer
from hf_guide.teachers.vocabulary import with_vocabulary_of

LENGTH = 256
SIZES = (4000, 8000, 16000, 24000)
BUDGET = 23_000_000
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64}
SHAPES = {"16000: 384 x 15": (16000, 384, 15), "49152: 240 x 14": (49152, 240, 14), "8000: 432 x 16": (8000, 432, 16)}
"""Vocabulary, width and blocks: the best of BUDGET parameters by the rule of `find_shapes`; of the whole vocabulary the shape
that student_shapes.py found. The width of the MLP follows."""


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
        nats = math.log(evaluate(model, blocks, 2, "bits", show_progress=False).perplexity)
        return nats * self.tokens_per_byte(tokenizer) / math.log(2)

    @torch.no_grad()
    def bits_of_sums(self, teacher: Any, tokenizer: Any, *, own_tokens: bool) -> float:
        """Return the bits that the whole teacher needs for a byte, where a smaller tokenizer's pieces are predicted.

        Args:
            own_tokens: Whether the teacher reads its own tokens of the text, or the pieces.
        """
        small = with_vocabulary_of(teacher, tokenizer)
        runner, both = TeacherRunner(small, Task.CAUSAL_LM, tokenizer), attached_retokenizer(small)
        nats = count = 0.0
        for ids in pack(self.texts, tokenizer, LENGTH).split(1):
            positions = torch.arange(ids.shape[1] - 1)
            if own_tokens or both is None:
                logits = runner.forward({"input_ids": ids}).logits_at(torch.zeros_like(positions), positions)
            else:
                whole = teacher(torch.tensor(both.kept_ids)[ids[:, :-1]]).logits[0]
                logits = both.merge(whole, torch.zeros_like(positions))
            nats += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            count += len(positions)
        return nats / count * self.tokens_per_byte(tokenizer) / math.log(2)

    def tokens_per_byte(self, tokenizer: Any) -> float:
        """Return how many tokens the text takes, per byte."""
        ids = tokenizer([f"{text}\n\n" for text in self.texts], add_special_tokens=False).input_ids
        return sum(map(len, ids)) / self.bytes


def run_teacher(seed: int, done: set[str], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield what each vocabulary costs, and the bits per byte of the teacher with its rows alone."""
    for texts in args.texts:
        bench = Bench(seed, args, texts)
        for size in args.sizes:
            arm = f"teacher, {size}" + (f", {texts} texts" if texts else "")
            if arm in done:
                continue
            model, tokenizer, facts = bench.with_vocabulary(size)
            row = {"arm": arm, **facts, "bits_per_byte": bench.held_out.bits_per_byte(model, tokenizer)}
            for name, own in (("summed", False), ("own_tokens", True)):
                row[name] = bench.held_out.bits_of_sums(bench.teacher, tokenizer, own_tokens=own)
            yield row


def run_students(seed: int, done: set[str], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield students of equal parameters, one for each of `SHAPES`, before and after training."""
    bench = Bench(seed, args)
    recipe = TrainingRecipe(args.steps, args.batch_size, 0.5, seed)
    for arm, (size, width, blocks) in SHAPES.items():
        whole_vocabulary = size == bench.teacher.config.vocab_size
        signals = [
            name for name in (args.signals[:1] if whole_vocabulary else args.signals) if f"{arm}, {name}" not in done
        ]
        if not signals or size not in args.sizes:
            continue
        cut, tokenizer, facts = bench.with_vocabulary(size)
        shape = shape_of(size, width, blocks)
        whole = {} if whole_vocabulary else {"vocab_size": size}
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
        facts |= {"parameters": student.num_parameters(), **shape, "bits_per_byte_before": before}
        rows = draw_blocks(pack(bench.texts.train, tokenizer, LENGTH), args.steps * args.batch_size, seed)
        for name in signals:
            trained, teacher = copy.deepcopy(student), cut if name == "kept rows" else bench.teacher
            with tempfile.TemporaryDirectory(prefix="vocabulary-") as scratch:
                cache = cache_teacher(teacher, rows, Path(scratch, "cache"), recipe, tokenizer, show_progress=False)
                train(trained, cache, rows, args.learning_rate, recipe, Path(scratch), show_progress=False)
            after = bench.held_out.bits_per_byte(trained, tokenizer)
            row = {"arm": f"{arm}, {name}", **facts, "bits_per_byte": after, "tokens": rows[:, 1:].numel()}
            yield row | {"learning_rate": args.learning_rate}


def run_tokenizer(seed: int, done: set[str], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the bits per byte of the teacher with the tokens of another tokenizer that is trained on the text, untrained.

    Once with rows composed of the teacher's pieces, and once with the mean of all rows instead.
    """
    bench = Bench(seed, args)
    for size in args.sizes:
        if f"another tokenizer, {size}, composed" in done or size > 40000:
            continue
        other = bench.tokenizer.train_new_from_iterator(bench.texts.train, size)
        model = from_teacher(bench.name, tokenizer=other, method="uniform", dtype=torch.float32, show_progress=False)
        facts = dict(model.initialization_report.vocabulary)
        mapping = map_pieces(other, bench.tokenizer)
        composed = [index for index, parts in enumerate(mapping.parts) if len(parts) > 1]
        yield {
            "arm": f"another tokenizer, {size}, composed",
            **facts,
            "tokens_per_byte": bench.held_out.tokens_per_byte(other),
            "bits_per_byte": bench.held_out.bits_per_byte(model, other),
        }
        with torch.no_grad():
            table = model.get_input_embeddings().weight
            table[composed] = bench.teacher.get_input_embeddings().weight.mean(0)
        bits = bench.held_out.bits_per_byte(model, other)
        yield {"arm": f"another tokenizer, {size}, mean row", **facts, "bits_per_byte": bits}


class Bench:
    """The teacher, and one split of the text.

    Args:
        texts: How many of the training texts choose the pieces; 0 for all.
    """

    def __init__(self, seed: int, args: argparse.Namespace, texts: int = 0):
        self.name = args.teacher or default_language_model(None)
        self.tokenizer = AutoTokenizer.from_pretrained(self.name)
        self.teacher = AutoModelForCausalLM.from_pretrained(self.name, dtype=torch.float32).eval()
        self.texts = split_documents(read_documents("wikipedia"), seed=seed)
        self.held_out = HeldOut(self.texts.held_out, args.held_out_documents)
        required = config_token_ids(self.teacher.config)
        chosen = self.texts.train[:texts] if texts else self.texts.train
        self.reducer = VocabularyReducer(self.tokenizer, chosen, required)

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
        cut = select_token_rows(self.teacher, vocabulary.kept_ids)
        attach_tokenizer(cut, vocabulary.tokenizer)
        return cut, vocabulary.tokenizer, facts


def table(rows: list[dict[str, Any]]) -> str:
    """Return mean and spread (standard deviation) over seeds, as Markdown."""
    lines = [
        "| arm | tokens kept, % | tokens, times | bits per byte untrained | summed | on own tokens | bits per byte trained |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == arm]
        untrained = "bits_per_byte_before" if "parameters" in mine[0] else "bits_per_byte"
        columns = [
            [100 * row["share_kept"] for row in mine if "share_kept" in row],
            [row["token_ratio"] for row in mine if "token_ratio" in row],
            [row[untrained] for row in mine],
            [row["summed"] for row in mine if "summed" in row],
            [row["own_tokens"] for row in mine if "own_tokens" in row],
            [row["bits_per_byte"] for row in mine if "tokens" in row],
        ]
        cells = [mean_and_spread(column, digits=3, none="") for column in columns]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("vocabulary_size.jsonl"))
    parser.add_argument("--teacher", help="by default SmolLM2-135M")
    parser.add_argument("--arms", choices=["teacher", "students", "tokenizer"], default="teacher")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sizes", type=int, nargs="+", default=[*SIZES, 49152], help="vocabularies")
    parser.add_argument(
        "--texts", type=int, nargs="+", default=[0], help="that choose the pieces of the teacher; 0: all"
    )
    signals: Any = ["own tokens", "kept rows"]
    parser.add_argument(
        "--signals", nargs="+", choices=signals, default=signals, help="what the teacher of a student reads"
    )
    parser.add_argument("--steps", type=int, default=100, help="of training")
    parser.add_argument("--batch-size", type=int, default=2, help="blocks of 256 tokens in a step")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="peak")
    parser.add_argument("--held-out-documents", type=int, default=16)
    parser.add_argument("--table", action="store_true", help="print the table of --output alone")
    args = parser.parse_args()
    keep_freed_memory()
    rows = read_rows(args.output)
    for seed in [] if args.table else args.seeds:
        done = {row["arm"] for row in rows if row["seed"] == seed}
        runs = {"teacher": run_teacher, "students": run_students, "tokenizer": run_tokenizer}
        for row in runs[args.arms](seed, done, args):
            rows.append({"seed": seed, **row, "held_out_documents": args.held_out_documents})
            append_row(args.output, rows[-1])
            print(rows[-1], flush=True)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
