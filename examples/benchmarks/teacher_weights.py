"""Who should set `teacher_weights`: a classifier of digits distilled from a good and a worse teacher, alone and together.

    python examples/benchmarks/teacher_weights.py --output teacher_weights.jsonl

The 1,797 digits of scikit-learn: 1,000 to train on and 400 to test, another split for each seed; nothing was tuned. Both
teachers are the same vision transformer; the good one has all training images, the worse one 100 of them with a third of the
labels drawn at random. Students have half the width and half the depth, are random at first, and learn from the teachers
alone. One JSON line per run is appended to --output; existing ones are not made again.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.common.results import append_row, mean_and_spread, read_rows
from hf_guide import DistillationArguments, DistillationTrainer

SHAPE = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
TEACHER = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
STUDENT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
ARMS: dict[str, dict[str, Any]] = {
    "the good one": {"teachers": ["good"]},
    "the worse one": {"teachers": ["worse"]},
    "both, weights 1 and 1": {"teachers": ["good", "worse"]},
    "both, weights 4 and 1": {"teachers": ["good", "worse"], "teacher_weights": [4, 1]},
    "both, weights 16 and 1": {"teachers": ["good", "worse"], "teacher_weights": [16, 1]},
}


def examples(images: Tensor, labels: Tensor) -> list[dict[str, Tensor]]:
    """Return the examples of a dataset."""
    return [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]


def options(folder: str, steps: int, seed: int) -> dict[str, Any]:
    """Return the arguments that teachers and students share."""
    return {
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": 32,
        "learning_rate": 2e-3,
        "warmup_steps": 20,
        "lr_scheduler_type": "cosine",
        "seed": seed,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }


@torch.no_grad()
def accuracy(model: ViTForImageClassification, images: Tensor, labels: Tensor) -> float:
    """Return the share of images that a model classifies right, in percent."""
    return 100 * (model.eval()(images).logits.argmax(-1) == labels).double().mean().item()


def run_seed(seed: int, arms: list[str], steps: int) -> list[dict[str, Any]]:
    """Train both teachers and the students of some arms on one split; return a row for each model."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
    images = (torch.tensor(digits.images, dtype=torch.float32)[order, None] - 8) / 8
    labels = torch.tensor(digits.target)[order]
    train, test = slice(0, 1000), slice(1397, None)
    noisy = labels[:100].clone()
    noisy[:33] = torch.randint(0, 10, (33,), generator=torch.Generator().manual_seed(seed))
    seen = {"good": (images[train], labels[train]), "worse": (images[:100], noisy)}
    rows: list[dict[str, Any]] = []
    teachers = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, data in seen.items():
            set_seed(seed)
            teachers[name] = ViTForImageClassification(ViTConfig(**SHAPE, **TEACHER))
            Trainer(
                teachers[name], TrainingArguments(**options(folder, steps, seed)), train_dataset=examples(*data)
            ).train()
            rows.append(
                {
                    "arm": f"teacher, {name}",
                    "seed": seed,
                    "accuracy": accuracy(teachers[name], images[test], labels[test]),
                }
            )
        for arm in arms:
            chosen = dict(ARMS[arm])
            set_seed(seed)
            student = ViTForImageClassification(ViTConfig(**SHAPE, **STUDENT))
            names = chosen.pop("teachers")
            args = DistillationArguments(**options(folder, steps, seed), losses="kd", temperature=2.0, **chosen)
            teacher = [teachers[name] for name in names]
            DistillationTrainer(
                student, args, train_dataset=examples(images[train], labels[train]), teacher=teacher
            ).train()
            rows.append({"arm": arm, "seed": seed, "accuracy": accuracy(student, images[test], labels[test])})
    return rows


def main() -> int:
    """Run what --output lacks, and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("teacher_weights.jsonl"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    rows = read_rows(args.output)
    for seed in args.seeds:
        made = {row["arm"] for row in rows if row["seed"] == seed}
        if missing := [arm for arm in ARMS if arm not in made]:
            new = [row for row in run_seed(seed, missing, args.steps) if row["arm"] not in made]
            rows += new
            for row in new:
                append_row(args.output, row)
    print("| teachers | accuracy |\n|---|---|")
    for arm in dict.fromkeys(row["arm"] for row in rows):
        print(f"| {arm} | {mean_and_spread([row['accuracy'] for row in rows if row['arm'] == arm], 1)} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
