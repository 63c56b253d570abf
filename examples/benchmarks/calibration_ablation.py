"""What each ingredient of `calibrated` contributes and costs: loss on held-out text without any training.

Students of SmolLM2-135M at several widths and depths, with a head of their own or tied, each made by `method="calibrated"`
with one ingredient switched at a time. Calibration text and held-out text are other documents of the same corpus. One JSON
line per student is appended to --output; existing ones are not made again. The rows have the teacher's
loss and a unigram model's, whose counts are those of the text that the calibration text is drawn from. Each seed parts the
corpus anew into text to calibrate on and text held out, and draws from both.

    python examples/benchmarks/calibration_ablation.py --output calibration_ablation.jsonl --tokens 8192
    python examples/benchmarks/calibration_ablation.py --shapes half --arms calibrated "no refit" --tokens 32768 --seeds 0 1 2
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.common.data import pack, read_documents, split_documents
from examples.common.language_model import draw_blocks, evaluate
from examples.common.machine import describe_machine
from examples.common.malloc import keep_freed_memory
from examples.common.results import append_row, mean_and_spread, read_rows
from examples.common.teachers import default_language_model
from hf_guide import from_teacher

LENGTH = 256

# Only the named size is reduced: the width of the residual stream, or the number of blocks.
SHAPES = {
    "whole": (1.0, 1.0, False),
    "three quarters": (0.75, 1.0, False),
    "half": (0.5, 1.0, False),
    "half, tied": (0.5, 1.0, True),
    "half, half the blocks": (0.5, 0.5, False),
    "half, a third of the blocks": (0.5, 1 / 3, False),
    "whole, half the blocks": (1.0, 0.5, False),
    "half in everything": (0.5, 0.5, False),
    "the quickstart's": (0.5, 1 / 3, True),
}

NOTHING_FITTED = {"refit": "none", "fit_logit_scale": False}
ARMS: dict[str, dict[str, Any]] = {
    "guide": {"method": "guide"},
    "calibrated": {},
    "no fitting": NOTHING_FITTED,
    "no fitting, embedding basis": {**NOTHING_FITTED, "basis": "embeddings"},
    "no refit": {"refit": "none"},
    "output projections only": {"refit": "output_projections"},
    "ridge 0.1": {"ridge": 0.1},
    "ridge 0.03": {"ridge": 0.03},
    "embedding basis": {"basis": "embeddings"},
    "channel selection": {"basis": "channels"},
    "uniform blocks": {"layer_selection": "uniform"},
    "logit scale not fitted": {"fit_logit_scale": False},
    "self-generated text": {},
    "self-generated text, no fitting": NOTHING_FITTED,
    "random tokens": {},
}


def student_shape(teacher: PreTrainedModel, shape: str) -> dict[str, Any]:
    """Return what a student's config changes; heads and neurons are halved "in everything", or their size is."""
    width, depth, tied = SHAPES[shape]
    teacher_config = teacher.config
    heads, groups = teacher_config.num_attention_heads, teacher_config.num_key_value_heads
    changes = {
        "hidden_size": round(teacher_config.hidden_size * width),
        "num_hidden_layers": round(teacher_config.num_hidden_layers * depth),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": teacher_config.hidden_size // heads,
        "tie_word_embeddings": tied,
    }
    if shape == "half in everything":
        kept = max(1, groups // 2)
        changes |= {"num_key_value_heads": kept, "num_attention_heads": heads // groups * kept}
        changes |= {"intermediate_size": teacher_config.intermediate_size // 2}
    if shape == "the quickstart's":
        changes |= {"head_dim": changes["head_dim"] // 2, "intermediate_size": teacher_config.intermediate_size // 2}
    return changes


def unigram_loss(train_blocks: Tensor, held_out: Tensor, size: int) -> float:
    """Return the loss of a unigram model, in nats per token."""
    counts = torch.bincount(train_blocks.flatten(), minlength=size).double() + 0.1
    return -(counts / counts.sum()).log()[held_out[:, 1:].flatten()].mean().item()


def make(
    teacher: PreTrainedModel, shape: str, arm: str, train_blocks: Tensor, args: argparse.Namespace
) -> PreTrainedModel:
    """Return one student."""
    method = {"method": "calibrated", **ARMS[arm]}
    data: Any = None
    if method["method"] == "calibrated":
        method |= {"calibration_tokens": args.tokens}
        if arm == "random tokens":
            train_blocks = torch.randint(
                teacher.config.vocab_size, train_blocks.shape, generator=torch.Generator().manual_seed(0)
            )
        batches = [{"input_ids": rows} for rows in train_blocks[:, :LENGTH].split(args.batch_size)]
        data = "self_generated" if arm.startswith("self-generated text") else batches
    return from_teacher(
        teacher,
        method=method,
        calibration_dataset=data,
        dtype=torch.float32,
        show_progress=False,
        **student_shape(teacher, shape),
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Return the losses as text, an arm a line and a shape a column: of several seeds the mean and the standard deviation."""
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    lines = [f"{'':34}" + "".join(f"{shape[:27]:>29}" for shape in shapes)]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        cells = []
        for shape in shapes:
            losses = [row["loss"] for row in rows if row["arm"] == arm and row["shape"] == shape]
            cells.append(mean_and_spread(losses) + (f" ({len(losses)})" if len(losses) > 1 else ""))
        lines.append(f"{arm:34}" + "".join(f"{cell:>29}" for cell in cells))
    return "\n".join(lines)


@dataclass
class Texts:
    """What one seed draws: text to calibrate on, text held out, and a unigram model's loss on it."""

    train_blocks: Tensor
    held_out: Tensor
    unigram: float


def draw(seed: int, tokenizer: Any, size: int, args: argparse.Namespace) -> Texts:
    """Part the corpus by `seed` into documents to calibrate on and others held out, and draw blocks of both; `size` is V."""
    texts = split_documents(read_documents("wikipedia"), seed=seed)
    packed = pack(texts.train, tokenizer, LENGTH)
    train_blocks = draw_blocks(packed, min(len(packed), -(-args.tokens // LENGTH)), seed)
    held_out = draw_blocks(pack(texts.held_out, tokenizer, LENGTH), args.held_out_blocks, seed)
    return Texts(train_blocks, held_out, unigram_loss(packed, held_out, size))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("calibration_ablation.jsonl"))
    parser.add_argument("--teacher", help="by default SmolLM2-135M")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--tokens", type=int, default=8192, help="of calibration text")
    parser.add_argument("--batch-size", type=int, default=8, help=f"rows of {LENGTH} tokens at once")
    parser.add_argument("--held-out-blocks", type=int, default=32, help=f"of {LENGTH} tokens")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the text that is drawn")
    args = parser.parse_args()
    keep_freed_memory()

    name = args.teacher or default_language_model(None)
    tokenizer = AutoTokenizer.from_pretrained(name)
    teacher = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    rows = read_rows(args.output)
    keys = []
    for seed in args.seeds:
        setting = {"tokens": args.tokens, "held_out_blocks": args.held_out_blocks, "seed": seed}
        keys += [{"shape": shape, "arm": arm, **setting} for shape in args.shapes for arm in args.arms]
        todo = [key for key in keys if key["seed"] == seed and not any(key.items() <= row.items() for row in rows)]
        if not todo:
            continue
        texts = draw(seed, tokenizer, teacher.config.vocab_size, args)

        def loss(model: PreTrainedModel, held_out: Tensor = texts.held_out) -> float:
            return math.log(evaluate(model, held_out, args.batch_size, "held out", show_progress=False).perplexity)

        references = {"teacher": loss(teacher), "unigram": texts.unigram}
        print(f"seed {seed}: teacher {references['teacher']:.3f}, unigram {references['unigram']:.3f}", flush=True)
        for key in todo:
            student = make(teacher, str(key["shape"]), str(key["arm"]), texts.train_blocks, args)
            report = student.initialization_report
            row = key | {
                "loss": loss(student),
                **references,
                "seconds": report.seconds,
                "parameters": report.student_parameters,
                "blocks": report.blocks,
                "lost": report.calibration.get("lost"),
                "logit_scale": report.calibration.get("logit_scale"),
            }
            print(
                f"{key['shape']:28} {key['arm']:34} {row['loss']:7.3f}  {sum(report.seconds.values()):6.0f} s",
                flush=True,
            )
            append_row(args.output, row)
            rows.append(row)
    print(
        f"\n{describe_machine()}\n{args.tokens} tokens of calibration text, loss in nats on "
        f"{args.held_out_blocks * (LENGTH - 1)} tokens held out"
    )
    print(table([row for row in rows if any(key.items() <= row.items() for key in keys)]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
