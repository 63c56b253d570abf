"""Which text should `calibrated` be given: of which kind, how varied, and what if there is none?

    python examples/benchmarks/calibration_text.py --teacher small_teacher --output calibration_text.jsonl
    python examples/benchmarks/calibration_text.py --output calibration_text.jsonl --table

The teacher of small_teacher.py, trained on several kinds of text; students of half its width and half its depth, calibrated on
8,192 tokens of all kinds, of each kind alone, of 512 tokens repeated, and of text that the teacher generates; and `guide`,
which reads none. Each is evaluated on held-out text of every kind, untrained and after training on labels of all kinds. One
JSON line a run is appended to --output; a run that is there already is not made again.
"""

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from initialization_comparison import drawn, learn, loss_of
from small_shapes import CALIBRATION_TOKENS, RATES, SHAPES
from small_teacher import BATCH, LENGTH, texts, train_teacher
from student_shapes import overrides
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.common.data import clean_text, pack, read_documents
from examples.common.machine import describe_machine
from examples.common.malloc import keep_freed_memory
from examples.common.results import append_row, mean_and_spread, read_rows
from hf_guide import AutoStudentForCausalLM

ALL, REPEATED, GENERATED, NONE = "all kinds", "all kinds, 512 tokens 16 times", "self-generated", "none (guide)"
HELD_OUT_BLOCKS = 64
"""Of each kind."""


def kind_of(source: str) -> str:
    """Return what the table calls a source: its name, or that of the package whose `_sources` it is."""
    path = Path(source)
    return path.parts[-3] if path.name == "_sources" else path.name


def blocks_by_kind(folder: Path) -> "tuple[dict[str, Tensor], dict[str, Tensor]]":
    """Return by kind of text the blocks that the teacher of a folder learned from, and some that it did not."""
    sources, tokenizer = train_teacher(folder)["text"], AutoTokenizer.from_pretrained(folder)
    split = texts(tuple(sources))
    found: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
    for source in sources:
        documents = set(map(clean_text, read_documents(source)))
        for blocks, part in zip(found, (split.train, split.held_out), strict=True):
            blocks[kind_of(source)] = pack([text for text in part if text in documents], tokenizer, LENGTH)
    train, held_out = found
    return train, {kind: drawn(each, HELD_OUT_BLOCKS, seed=0) for kind, each in held_out.items()}


def calibration_rows(name: str, train: "dict[str, Tensor]", seed: int) -> "Tensor | str | None":
    """Return the rows of an arm's calibration text, (rows, LENGTH), or what `from_teacher` takes instead."""
    rows = CALIBRATION_TOKENS // LENGTH
    if name == NONE:
        return None
    if name == GENERATED:
        return "self_generated"
    if name in train:
        return drawn(train[name], rows, seed)[:, :LENGTH]
    mixed = torch.cat([drawn(each, rows // len(train), seed) for each in train.values()])[:, :LENGTH]
    mixed = drawn(mixed, len(mixed), seed)
    return mixed if name == ALL else drawn(mixed[: len(mixed) // 16], len(mixed), seed)


def make_student(folder: Path, name: str, train: "dict[str, Tensor]", seed: int) -> PreTrainedModel:
    """Return the student of an arm."""
    rows = calibration_rows(name, train, seed)
    method: dict[str, Any] = {"method": "guide" if rows is None else "calibrated", "seed": seed}
    if rows is not None:
        method["calibration_tokens"] = CALIBRATION_TOKENS
    if isinstance(rows, Tensor):
        rows = [{"input_ids": batch} for batch in rows.split(16)]  # type: ignore[assignment]
    return AutoStudentForCausalLM.from_teacher(
        folder,
        method=method,
        calibration_dataset=rows,
        dtype=torch.float32,
        show_progress=False,
        **overrides(list(SHAPES[0])),
    )


@torch.no_grad()
def losses_of(model: PreTrainedModel, held_out: "dict[str, Tensor]") -> "dict[str, float]":
    """Return a model's loss a token on each kind of text."""
    return {kind: round(loss_of(model.eval(), blocks), 5) for kind, blocks in held_out.items()}


def run(args: argparse.Namespace) -> None:
    """Make every run that is not there yet."""
    rows = read_rows(args.output)
    train, held_out = blocks_by_kind(args.teacher)
    teacher = LlamaForCausalLM.from_pretrained(args.teacher, dtype=torch.float32)
    mixed, watched = torch.cat(list(train.values())), next(iter(held_out.values()))
    for seed in args.seeds:
        for name in (ALL, *train, REPEATED, GENERATED, NONE):
            job = {"text": name, "seed": seed, "steps": args.steps}
            if any(job.items() <= row.items() for row in rows):
                continue
            clock = time.process_time()
            student = make_student(args.teacher, name, train, seed)
            untrained = losses_of(student, held_out)
            blocks = drawn(mixed, args.steps * BATCH, seed)
            learn(student, teacher, "labels", blocks, watched, RATES["labels"], 1, seed)
            row = {
                "teacher": losses_of(teacher, held_out),
                "untrained": untrained,
                "trained": losses_of(student, held_out),
                "seconds": round(time.process_time() - clock, 1),
            }
            append_row(args.output, job | row)
            print(job, {key: row[key] for key in ("untrained", "trained")}, flush=True)


def table(rows: "list[dict[str, Any]]") -> str:
    """Return a line for each calibration text: perplexity on each kind, and over all after training."""
    kinds = list(rows[0]["untrained"])
    lines = [
        f"{'calibration text':32} " + " ".join(f"{kind:>16}" for kind in kinds) + f"{'all':>16}{'all, trained':>18}"
    ]
    for name in dict.fromkeys(row["text"] for row in rows):
        group = [row for row in rows if row["text"] == name]

        def perplexity(stage: str, over: "list[str]", group: "list[dict[str, Any]]" = group) -> str:
            means = (sum(row[stage][kind] for kind in over) / len(over) for row in group)
            return mean_and_spread([math.exp(loss) for loss in means], digits=1)

        cells = [*(perplexity("untrained", [kind]) for kind in kinds), perplexity("untrained", kinds)]
        lines.append(f"{name:32} " + " ".join(f"{each:>16}" for each in [*cells, perplexity("trained", kinds)]))
    teacher = rows[0]["teacher"]
    return "\n".join([*lines, f"teacher: { {kind: round(math.exp(loss), 1) for kind, loss in teacher.items()} }"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("calibration_text.jsonl"))
    parser.add_argument("--table", action="store_true", help="only print the table of existing rows")
    parser.add_argument("--teacher", type=Path, default=Path("small_teacher"), help="the folder of small_teacher.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100, help=f"of training, {BATCH * LENGTH} tokens each")
    args = parser.parse_args()
    keep_freed_memory()
    if not args.table:
        run(args)
    print(describe_machine())
    print(table(read_rows(args.output)))


if __name__ == "__main__":
    main()
