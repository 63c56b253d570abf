"""Distill a classifier of few classes by hard labels, by KD and by LELP's pseudo-subclasses, and compare them.

    python examples/quickstart/classification.py            # minutes on two cores
    python examples/quickstart/classification.py --help

The images are of 64 characters, the classes are "even" and "odd", the number of a character: a hard function of many hidden
classes, which is where subclasses pay. A small ResNet is trained on images in some fonts; students of an eighth of its size
learn from a quarter of these images, and all are measured on images in fonts of other families. The first student that was
trained by LELP is saved, with a picture of the subclasses. The fonts are those of the package `trdg`, or a folder's.
"""

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult
from PIL import Image
from transformers import (
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.common.characters import draw_characters, read_glyphs, split_fonts, trdg_fonts
from examples.common.malloc import keep_freed_memory
from examples.quickstart.output import RESULTS_NAME, check_output_dir, format_table, run_in_fresh_process, run_script
from hf_guide import (
    AutoStudentForImageClassification,
    Capture,
    DistillationArguments,
    DistillationTrainer,
    SubclassLabelCollator,
    SubclassProjector,
    fit_subclasses,
    save_subclass_student,
)
from hf_guide.distillation.training_record import build_training_record
from hf_guide.errors import OptionError
from hf_guide.hub.metadata import DistillationRecord
from hf_guide.hub.model_card import write_model_card
from hf_guide.hub.push import attach_record
from hf_guide.lelp.analysis.features import collect_features
from hf_guide.lelp.analysis.report import summarize_subclasses
from hf_guide.utils.checksums import check_written_model
from hf_guide.utils.files import atomic_folder
from hf_guide.utils.public_names import public_value

OBJECTIVES = {"hard labels": "ce", "KD": "kd", "LELP": "lelp"}
CLASSES = {0: "even", 1: "odd"}
TEACHER = {"embedding_size": 32, "hidden_sizes": [32, 64, 128], "depths": [2, 2, 2]}
STUDENT = {"embedding_size": 8, "hidden_sizes": [8, 16, 32], "depths": [1, 1, 1]}
TEACHER_LEARNING_RATE, STUDENT_LEARNING_RATE = 1e-3, 2e-3
HELD_OUT = "characters in other fonts (held out)"
PICTURE_NAME, PICTURE_COLUMNS, PICTURE_GAP = "subclasses.png", 12, 16

Examples = list[dict[str, Any]]


@dataclass(frozen=True)
class ClassificationArguments:
    """Arguments of the classification quickstart.

    Raises:
        OptionError: A number is out of range.
    """

    output_dir: str = field(
        default="build/quickstart-classification",
        metadata={"help": "folder for the student: new, empty, or an earlier quickstart's, which is replaced"},
    )
    fonts: str | None = field(
        default=None, metadata={"help": "a folder of TTF files of several families; by default the package trdg's"}
    )
    teacher_images: int = field(default=8000, metadata={"help": "images that the teacher is trained on"})
    student_images: int = field(default=2000, metadata={"help": "how many of these the students are trained on"})
    held_out: int = field(default=2000, metadata={"help": "images to measure on, in fonts of other families"})
    teacher_steps: int = field(default=1000, metadata={"help": "training steps of the teacher"})
    steps: int = field(default=600, metadata={"help": "training steps of each student"})
    batch_size: int = field(default=64, metadata={"help": "images per step"})
    seeds: int = field(default=3, metadata={"help": "students of each objective"})
    num_subclasses: int | None = field(
        default=None,
        metadata={"help": "pseudo-subclasses of each class; by default as many as the data allow, 2 to 16"},
    )
    subclass_temperature: float = field(
        default=0.5, metadata={"help": "temperature of the subclasses of a class: a larger one makes them more alike"}
    )
    temperature: float = field(default=1.0, metadata={"help": "temperature of the teacher's and the students' logits"})
    seed: int = field(default=0, metadata={"help": "of the images and the teacher; that of the first student"})

    def __post_init__(self) -> None:
        for name in ("teacher_images", "student_images", "held_out", "teacher_steps", "steps", "batch_size", "seeds"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if self.student_images > self.teacher_images:
            raise OptionError(
                f"student_images must be at most teacher_images, {self.teacher_images}; got {self.student_images}."
            )
        if self.num_subclasses is not None and self.num_subclasses < 2:
            raise OptionError(f"num_subclasses must be at least 2 (1 is plain KD); got {self.num_subclasses}.")
        for name in ("subclass_temperature", "temperature"):
            if not getattr(self, name) > 0:
                raise OptionError(f"{name} must be positive; got {getattr(self, name)}.")


@dataclass(frozen=True)
class ResultRow:
    """One line of the table.

    Attributes:
        parameters: Number of parameters.
        accuracies: Share of the held-out images that are classified correctly, for each seed; the teacher has one.
        against_kd: Mean difference from KD's accuracy, seed by seed; None for KD itself and the teacher.
        spread: Standard deviation of that difference over the seeds; 0 for one seed.
        seconds: Mean training time; of the teacher with fitting the subclasses.
    """

    name: str
    parameters: int
    accuracies: tuple[float, ...]
    against_kd: float | None
    spread: float
    seconds: float

    @property
    def accuracy(self) -> float:
        """Mean over the seeds."""
        return statistics.mean(self.accuracies)


@dataclass(frozen=True)
class Drawings:
    """Images to train on and to measure on; no family of fonts is in both."""

    teacher: Examples
    student: Examples
    held_out: Examples
    num_fonts: tuple[int, int]


@dataclass
class Trained:
    """The students of one objective so far."""

    accuracies: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    parameters: int = 0


def quickstart(args: ClassificationArguments, *, show_progress: bool = True) -> list[ResultRow]:
    """Train students of one teacher by three objectives, compare them, and save the first one trained by LELP.

    The saved student is a stock classifier; a fresh process that never imports hf_guide loads it.

    Returns:
        The printed table: the teacher first, then one row per objective.

    Raises:
        OptionError: An unusable option; before any work.
    """
    output = Path(args.output_dir)
    check_output_dir(output)
    keep_freed_memory()
    started = time.perf_counter()
    images = draw_images(args)
    print(
        f"images: {len(images.teacher):,} in {images.num_fonts[0]} fonts for the teacher, {len(images.student):,} of them for "
        f"the students; {len(images.held_out):,} held out, in {images.num_fonts[1]} fonts of other families"
    )
    with tempfile.TemporaryDirectory(prefix="quickstart-") as scratch:
        clock = time.perf_counter()
        folder = Path(scratch, "resnet-of-characters")  # its name in the card
        teacher = train_teacher(images.teacher, args, folder, show_progress)
        projector = fit_subclasses(
            teacher,
            images.student,
            args.num_subclasses,
            subclass_temperature=args.subclass_temperature,
            temperature=args.temperature,
            capture=Path(scratch, "cache"),
            show_progress=show_progress,
        )
        print(f"{projector.num_subclasses} subclasses of each class: {projector.num_subclasses_rule or 'as asked'}")
        teacher_seconds = time.perf_counter() - clock
        correct = Trainer(
            teacher, TrainingArguments(scratch, **_common(args, args.seed, False)), default_data_collator
        )
        target = accuracy(correct.predict(images.held_out))["accuracy"]  # type: ignore[arg-type]
        cache = Capture.open(Path(scratch, "cache"))
        trained = {name: Trained() for name in OBJECTIVES}
        best: DistillationTrainer | None = None
        for seed in range(args.seed, args.seed + args.seeds):
            for name, objective in OBJECTIVES.items():
                print(f"training by {name}, seed {seed}", flush=True)
                trainer = build_trainer(objective, folder, cache, projector, images, args, seed, show_progress)
                clock = time.perf_counter()
                trainer.train()
                trained[name].seconds.append(time.perf_counter() - clock)
                trained[name].accuracies.append(trainer.evaluate()["eval_accuracy"])
                trained[name].parameters = trainer.model.num_parameters()
                if objective == "lelp" and best is None:
                    best = trainer
        assert best is not None
        rows = result_rows(target, teacher.num_parameters(), teacher_seconds, trained)
        record = build_training_record(best)
        print(f"\n{results_table(rows)}\n")
        print(verdict(rows))
        picture = draw_subclasses(teacher, projector, images.student)
        saved = save(best.model, record, rows, args, output, images, picture, show_progress)
    checked = check_stock(saved, output, images.held_out[:64])
    print(
        f"The first student trained by LELP is saved in {output}, as a stock model of {len(CLASSES)} classes. A fresh process "
        f"loads it with Transformers alone and gives the same class to {checked} of {checked} images."
    )
    print(f"{output / PICTURE_NAME} shows the characters nearest to each subclass, a row each.")
    print(f"{(time.perf_counter() - started) / 60:.1f} minutes in all.")
    return rows


def draw_images(args: ClassificationArguments) -> Drawings:
    """Draw all images, those to measure on in fonts of other families.

    Raises:
        OptionError: The fonts are of one family.
    """
    files = trdg_fonts() if args.fonts is None else sorted(Path(args.fonts).glob("*.ttf"))
    if not files:
        raise OptionError(f"There are no TTF files in {args.fonts}.")
    glyphs = read_glyphs(files)
    trained_on, held_out = split_fonts(glyphs, [0.5, 0.5], args.seed)
    if not len(trained_on) or not len(held_out):
        raise OptionError(f"Fonts of two families or more are needed; {args.fonts} has {len(glyphs)} usable ones.")

    def examples(fonts: torch.Tensor, count: int, seed: int) -> Examples:
        pixels, characters = draw_characters(glyphs, fonts, count, seed)
        return [
            {"pixel_values": image, "labels": number % len(CLASSES)}
            for image, number in zip(pixels, characters.tolist(), strict=True)
        ]

    teacher = examples(trained_on, args.teacher_images, 2 * args.seed)
    return Drawings(
        teacher,
        teacher[: args.student_images],
        examples(held_out, args.held_out, 2 * args.seed + 1),
        (len(trained_on), len(held_out)),
    )


def train_teacher(
    examples: Examples, args: ClassificationArguments, folder: Path, show_progress: bool
) -> PreTrainedModel:
    """Train a ResNet on labels by the stock `Trainer`, and save it in `folder`."""
    torch.manual_seed(args.seed)
    names = {"id2label": CLASSES, "label2id": {name: number for number, name in CLASSES.items()}}
    teacher = ResNetForImageClassification(ResNetConfig(num_channels=1, layer_type="basic", **TEACHER, **names))
    training_args = TrainingArguments(
        str(folder),
        max_steps=args.teacher_steps,
        learning_rate=TEACHER_LEARNING_RATE,
        **_schedule(args.teacher_steps),
        **_common(args, args.seed, show_progress),
    )
    Trainer(teacher, training_args, default_data_collator, examples).train()  # type: ignore[arg-type]
    teacher.save_pretrained(folder)
    return teacher.eval()


def build_trainer(
    objective: str,
    teacher: Path,
    cache: Capture,
    projector: SubclassProjector,
    images: Drawings,
    args: ClassificationArguments,
    seed: int,
    show_progress: bool,
) -> DistillationTrainer:
    """Return the trainer of a new student; students of one seed differ in their objective and head alone."""
    student = AutoStudentForImageClassification.from_teacher(
        str(teacher),
        method={"method": "random", "seed": seed},
        num_subclasses=projector.num_subclasses if objective == "lelp" else None,
        dtype=torch.float32,
        show_progress=show_progress,
        **STUDENT,
    )
    training_args = DistillationArguments(
        str(teacher.parent / f"{objective}-{seed}"),
        losses=objective,
        temperature=args.temperature,
        max_steps=args.steps,
        learning_rate=STUDENT_LEARNING_RATE,
        **_schedule(args.steps),
        **_common(args, seed, show_progress),
    )
    return DistillationTrainer(
        student,
        training_args,
        data_collator=SubclassLabelCollator(projector) if objective == "lelp" else default_data_collator,
        train_dataset=images.student,
        eval_dataset=images.held_out,
        compute_metrics=accuracy,
        teacher=None if objective == "ce" else cache,
    )


def _schedule(steps: int) -> dict[str, Any]:
    return {"lr_scheduler_type": "cosine", "warmup_steps": max(1, steps // 20), "weight_decay": 0.01}


def _common(args: ClassificationArguments, seed: int, show_progress: bool) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": args.batch_size,
        "per_device_eval_batch_size": 256,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": not show_progress,
        "seed": seed,
    }


def accuracy(prediction: Any) -> dict[str, float]:
    """Return the share of correct classes, as `compute_metrics` of a `Trainer`."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def result_rows(target: float, parameters: int, seconds: float, trained: dict[str, Trained]) -> list[ResultRow]:
    """Return the lines of the table; differences from KD are seed by seed."""
    rows = [ResultRow("teacher", parameters, (target,), None, 0.0, seconds)]
    for name, students in trained.items():
        pairs = zip(students.accuracies, trained["KD"].accuracies, strict=True)
        differences = [own - kd for own, kd in pairs]
        rows.append(
            ResultRow(
                name,
                students.parameters,
                tuple(students.accuracies),
                None if name == "KD" else statistics.mean(differences),
                statistics.stdev(differences) if len(differences) > 1 else 0.0,
                statistics.mean(students.seconds),
            )
        )
    return rows


def results_table(rows: list[ResultRow]) -> str:
    """Return the rows as text with aligned columns."""
    lines = [["", "parameters", "accuracy", "against KD", "seconds"]]
    for each in rows:
        difference = "-" if each.against_kd is None else f"{100 * each.against_kd:+.1f} ± {100 * each.spread:.1f}"
        lines.append(
            [each.name, f"{each.parameters / 1e3:.0f} k", f"{each.accuracy:.1%}", difference, f"{each.seconds:.0f}"]
        )
    return format_table(lines)


def verdict(rows: list[ResultRow]) -> str:
    """Compare LELP with KD in one sentence."""
    last = rows[-1]
    difference, count = last.against_kd or 0.0, len(last.accuracies)
    rest = "Whether it is for your data, `hf-guide analyze-subclasses` measures before you train."
    if abs(difference) <= last.spread or difference == 0:
        return f"Here LELP and KD differ by no more than their spread over {count} seeds. {rest}"
    return (
        f"Here LELP is {'above' if difference > 0 else 'below'} KD by more than the spread over {count} seeds. {rest}"
    )


def draw_subclasses(teacher: PreTrainedModel, projector: SubclassProjector, examples: Examples) -> Image.Image:
    """Return a picture of each class: in a row for each subclass the images of highest probability."""
    features = collect_features(teacher, examples, default_data_collator, batch_size=256, show_progress=False)
    summary = summarize_subclasses(
        projector, features.embeddings, features.logits, features.labels, num_examples=PICTURE_COLUMNS
    )
    blocks = []
    for each in summary.classes:
        block = torch.full((projector.num_subclasses, 28, PICTURE_COLUMNS, 28), -1.0)
        for row, numbers in enumerate(each.top_examples):
            for column, number in enumerate(numbers):
                block[row, :, column] = examples[number]["pixel_values"][0]
        blocks += [block.flatten(2).flatten(0, 1), torch.ones(28 * projector.num_subclasses, PICTURE_GAP)]
    pixels = torch.cat(blocks[:-1], 1).clamp(-1, 1)
    return Image.fromarray((127.5 * (1 - pixels)).round().byte().numpy())


def save(
    student: PreTrainedModel,
    record: DistillationRecord,
    rows: list[ResultRow],
    args: ClassificationArguments,
    output: Path,
    images: Drawings,
    picture: Image.Image,
    show_progress: bool,
) -> PreTrainedModel:
    """Write the student, its head refitted to the classes, with card, table and picture; whole or not at all."""
    attach_record(student, record)
    results = {"args": public_value(dataclasses.asdict(args)), "rows": [dataclasses.asdict(each) for each in rows]}
    with atomic_folder(output, replaces=(output / RESULTS_NAME).is_file(), check=check_written_model) as folder:
        saved = save_subclass_student(
            student,
            folder,
            export_format="refit_head",
            dataset=images.student,
            eval_dataset=images.held_out,
            data_collator=default_data_collator,
            show_progress=show_progress,
        )
        measured = share_correct(saved, images.held_out)
        result = EvalResult("image-classification", "custom", HELD_OUT, "accuracy", measured)
        write_model_card(folder, results=[result])
        picture.save(folder / PICTURE_NAME)
        (folder / RESULTS_NAME).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return saved


def share_correct(model: PreTrainedModel, examples: Examples) -> float:
    """Return on which share of the images a model predicts the right class."""
    correct = 0
    with torch.no_grad():
        for start in range(0, len(examples), 256):
            batch = default_data_collator(examples[start : start + 256])
            logits = model.eval()(pixel_values=batch["pixel_values"].to(model.device)).logits
            correct += int((logits.argmax(-1).cpu() == batch["labels"]).sum())
    return correct / len(examples)


def check_stock(model: PreTrainedModel, folder: Path, examples: Examples) -> int:
    """Load `folder` in a process that has Transformers alone; return on how many images it agrees with the saved student.

    Raises:
        RuntimeError: The process fails, or its model is not the student.
    """
    pixels = torch.stack([each["pixel_values"] for each in examples])
    answer = run_in_fresh_process({"folder": str(folder), "images": pixels.tolist()})
    with torch.no_grad():
        logits = model.eval()(pixel_values=pixels).logits
    if not torch.allclose(torch.tensor(answer["logits"]), logits, atol=1e-4):
        raise RuntimeError(f"In a fresh process the student in {folder} gives other logits than the one saved there.")
    return len(examples)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the quickstart with the arguments of the command line; return the exit code."""
    return run_script(quickstart, ClassificationArguments, argv)


if __name__ == "__main__":
    raise SystemExit(main())
