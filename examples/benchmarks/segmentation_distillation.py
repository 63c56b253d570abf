"""Is a segmentation student better that starts from its teacher, and that is distilled, at equal steps?

    python examples/benchmarks/segmentation_distillation.py --fashion FOLDER --output results/segmentation.jsonl
    python examples/benchmarks/segmentation_distillation.py --output examples/benchmarks/results/segmentation.jsonl --table

The data are composed: four garments of Fashion-MNIST on a canvas of 64 x 64 pixels with a random texture, later ones above
earlier ones; the class of a pixel is that of the garment that covers it, or background. Teacher, students and test use
different garments. The teacher is a SegFormer that is trained here; a student has half its width and half its blocks. Every
arm takes the learning rate that is best on the validation canvases with a seed of its own, and then runs with other seeds.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from lelp_data import fashion_images
from torch import Tensor
from torch.utils.data import Dataset
from transformers import SegformerConfig, SegformerForSemanticSegmentation, Trainer, TrainingArguments, set_seed

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.common.results import append_row, mean_and_spread, read_rows
from hf_guide import AutoStudentForSemanticSegmentation, DistillationArguments, DistillationTrainer

SIDE, GARMENTS, THRESHOLD = 64, 4, 20
CLASSES = "background T-shirt trouser pullover dress coat sandal shirt sneaker bag boot".split()
TEACHER = {"hidden_sizes": [32, 64, 96, 128], "decoder_hidden_size": 128, "depths": [2, 2, 2, 2]}
STUDENT = {"hidden_sizes": [16, 32, 48, 64], "decoder_hidden_size": 64, "depths": [1, 1, 1, 1]}
HEADS = {"num_attention_heads": [1, 2, 3, 4]}
ARMS: dict[str, tuple[str, dict[str, float]]] = {
    "random, labels": ("random", {"ce": 1.0}),
    "calibrated, distilled": ("calibrated", {"ce": 0.5, "kd": 0.5}),
    "random, distilled": ("random", {"ce": 0.5, "kd": 0.5}),
    "calibrated, labels": ("calibrated", {"ce": 1.0}),
}
RATES = (1e-3, 3e-3)
BATCH_SIZE, TUNING_SEED = 16, 100


class Canvases(Dataset):
    """Canvases with garments, each drawn from its number alone.

    Args:
        images: Garments, (count, 28, 28), 0 to 255.
        labels: Their classes.
        count: How many canvases there are.
        seed: The same seed gives the same canvases.
    """

    def __init__(self, images: Tensor, labels: Tensor, count: int, seed: int):
        self.images, self.labels, self.count, self.seed = images, labels, count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        if not 0 <= number < self.count:
            raise IndexError(number)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        texture = torch.rand(1, 1, 8, 8, generator=generator)
        canvas = 120 * torch.nn.functional.interpolate(texture, size=(SIDE, SIDE), mode="bilinear")[0, 0]
        classes = torch.zeros(SIDE, SIDE, dtype=torch.long)
        for index in torch.randint(len(self.images), (GARMENTS,), generator=generator).tolist():
            garment, (top, left) = self.images[index], torch.randint(SIDE - 27, (2,), generator=generator).tolist()
            shown = garment > THRESHOLD
            canvas[top : top + 28, left : left + 28][shown] = garment[shown]
            classes[top : top + 28, left : left + 28][shown] = self.labels[index] + 1
        return {"pixel_values": (canvas / 127.5 - 1).expand(3, -1, -1), "labels": classes}


def read_canvases(folder: Path) -> dict[str, Canvases]:
    """Return the canvases of the teacher, of the students, of validation and of the test; no garment is in two of them."""
    data = fashion_images(folder, range(10))
    images, labels = (data.inputs[:, 0] + 1) * 127.5, data.labels
    parts = {"teacher": (0, 40000, 8000), "train": (40000, 57000, 4000), "validation": (57000, 60000, 100)}
    parts["test"] = (60000, 70000, 300)
    return {
        name: Canvases(images[start:stop], labels[start:stop], count, seed)
        for seed, (name, (start, stop, count)) in enumerate(parts.items())
    }


def collate(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack the canvases and their classes."""
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}


@torch.no_grad()
def mean_iou(model: Any, data: Canvases) -> float:
    """Return the mean over the classes of the intersection over union, in percent."""
    model.eval()
    counts = torch.zeros(len(CLASSES), len(CLASSES), dtype=torch.long)
    for start in range(0, len(data), 50):
        batch = collate([data[number] for number in range(start, min(start + 50, len(data)))])
        logits = torch.nn.functional.interpolate(
            model(batch["pixel_values"]).logits, size=(SIDE, SIDE), mode="bilinear"
        )
        pairs = len(CLASSES) * batch["labels"].flatten() + logits.argmax(1).flatten()
        counts += torch.bincount(pairs, minlength=len(CLASSES) ** 2).view_as(counts)
    correct = counts.diag().double()
    return 100 * float((correct / (counts.sum(0) + counts.sum(1) - correct).clamp(min=1)).mean())


def options(folder: str, steps: int, rate: float, seed: int) -> dict[str, Any]:
    """Return the arguments that every training has."""
    return {
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": BATCH_SIZE,
        "learning_rate": rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": steps // 10,
        "seed": seed,
        "save_strategy": "no",
        "report_to": "none",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "use_cpu": True,
    }


def make_teacher(folder: Path, data: dict[str, Canvases], steps: int) -> SegformerForSemanticSegmentation:
    """Return the teacher of `folder`, which is trained and saved there if there is none."""
    if not (folder / "config.json").is_file():
        set_seed(0)
        names = dict(enumerate(CLASSES))
        config = SegformerConfig(**TEACHER, **HEADS, id2label=names, label2id={name: n for n, name in names.items()})
        model = SegformerForSemanticSegmentation(config)
        with tempfile.TemporaryDirectory() as output:
            args = TrainingArguments(**options(output, steps, 1e-3, 0))
            Trainer(model, args, train_dataset=data["teacher"], data_collator=collate).train()
        model.save_pretrained(folder)
    return SegformerForSemanticSegmentation.from_pretrained(folder).eval()


def train_student(
    teacher: Any, data: dict[str, Canvases], arm: str, rate: float, steps: int, seed: int
) -> dict[str, Any]:
    """Train a student of an arm, and return what it reaches."""
    name, losses = ARMS[arm]
    method = {"method": name, "seed": seed} | ({"calibration_tokens": 16384} if name == "calibrated" else {})
    order = torch.randperm(len(data["train"]), generator=torch.Generator().manual_seed(seed))[:128].tolist()
    calibration = [
        collate([data["train"][number] for number in order[start : start + 16]]) for start in range(0, 128, 16)
    ]
    student = AutoStudentForSemanticSegmentation.from_teacher(
        teacher,
        method=method,
        calibration_dataset=[{"pixel_values": batch["pixel_values"]} for batch in calibration]
        if name == "calibrated"
        else None,
        show_progress=False,
        **STUDENT,
    )
    before = mean_iou(student, data["validation"])
    with tempfile.TemporaryDirectory() as output:
        args = DistillationArguments(**options(output, steps, rate, seed), losses=losses, temperature=2.0)
        needed = teacher if "kd" in losses else None
        trainer = DistillationTrainer(
            student, teacher=needed, args=args, train_dataset=data["train"], data_collator=collate
        )
        trainer.train()
    scores = {part: mean_iou(student, data[part]) for part in ("validation", "test")}
    return {"arm": arm, "learning_rate": rate, "steps": steps, "seed": seed, "validation_before": before, **scores}


def run(args: argparse.Namespace) -> None:
    """Run what is missing in the output file."""
    data = read_canvases(args.fashion)
    teacher = make_teacher(args.teacher, data, args.teacher_steps)
    rows = read_rows(args.output)
    if not any(row["arm"] == "teacher" for row in rows):
        scores = {part: mean_iou(teacher, data[part]) for part in ("validation", "test")}
        write_row(
            args.output,
            {"arm": "teacher", "steps": args.teacher_steps, "parameters": teacher.num_parameters(), **scores},
        )
    for arm in ARMS:
        for rate in RATES:
            run_once(args, teacher, data, arm, rate, TUNING_SEED)
        tuned = [row for row in read_rows(args.output) if row["arm"] == arm and row["seed"] == TUNING_SEED]
        best = max(tuned, key=lambda row: row["validation"])["learning_rate"]
        for seed in range(args.seeds):
            run_once(args, teacher, data, arm, best, seed)


def run_once(
    args: argparse.Namespace, teacher: Any, data: dict[str, Canvases], arm: str, rate: float, seed: int
) -> None:
    """Run an arm with a learning rate and a seed, unless the output file has it."""
    wanted = {"arm": arm, "learning_rate": rate, "seed": seed}
    if not any(wanted.items() <= row.items() for row in read_rows(args.output)):
        write_row(args.output, train_student(teacher, data, arm, rate, args.steps, seed))


def write_row(path: Path, row: dict[str, Any]) -> None:
    """Append a run to a file, and print it."""
    print(row, flush=True)
    append_row(path, row)


def table(rows: list[dict[str, Any]]) -> str:
    """Return the table of the runs: mean and standard deviation of the test's mean IoU over the seeds."""
    lines = ["| arm | learning rate | before training (validation) | mean IoU (test) |", "|---|---|---|---|"]
    for arm in ARMS:
        runs = [row for row in rows if row["arm"] == arm and row["seed"] != TUNING_SEED]
        if not runs:
            continue
        before = statistics.mean(row["validation_before"] for row in runs)
        test = mean_and_spread([row["test"] for row in runs], 1)
        lines.append(f"| {arm} | {runs[0]['learning_rate']:g} | {before:.1f} | {test} |")
    lines += [f"| teacher | 0.001 | – | {row['test']:.1f} |" for row in rows if row["arm"] == "teacher"]
    return "\n".join(lines)


def main() -> None:
    """Run the arms, or print the table of their runs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--output", type=Path, required=True, help="file with a run a line; what it has is not run again"
    )
    parser.add_argument("--fashion", type=Path, help="the folder of Fashion-MNIST's four files")
    parser.add_argument(
        "--teacher", type=Path, default=Path("segmentation-teacher"), help="where the teacher is saved"
    )
    parser.add_argument("--teacher-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=120, help="of a student")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="only print the table of the file")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if not args.table:
        run(args)
    print(table(read_rows(args.output)))


if __name__ == "__main__":
    main()
