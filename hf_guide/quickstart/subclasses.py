"""The second act: a classifier of few classes, taught by hard labels, by a teacher's word, and by its pseudo-subclasses.

A small text encoder is fine-tuned into the teacher; students of a third of its depth start inside it, all alike, and
learn from the same texts in the same order for as many steps. The one that learned by LELP is saved.
"""

import dataclasses
import json
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
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

from hf_guide.distillation.arguments import DistillationArguments
from hf_guide.distillation.trainer import DistillationTrainer
from hf_guide.distillation.training_record import build_training_record
from hf_guide.errors import TeacherError
from hf_guide.hub.metadata import DistillationRecord
from hf_guide.hub.push import attach_record
from hf_guide.lelp.collator import SubclassLabelCollator
from hf_guide.lelp.export import save_subclass_student
from hf_guide.lelp.fitting import fit_subclasses
from hf_guide.modeling import AutoStudentForSequenceClassification
from hf_guide.models.pretrained import load_config, load_processing_class, unreadable_as
from hf_guide.quickstart import LelpOptions
from hf_guide.quickstart.memory import keep_freed_memory
from hf_guide.quickstart.run import RESULTS_NAME, check_output
from hf_guide.quickstart.teacher import ENCODER_ID, default_encoder
from hf_guide.quickstart.topics import Topics, split_topics, tokenized
from hf_guide.signal_cache.reader import Capture
from hf_guide.utils.checksums import check_written_model
from hf_guide.utils.files import atomic_folder
from hf_guide.utils.public_names import public_value

ARMS = {"hard labels": "ce", "KD": "kd", "LELP": "lelp"}
TEACHER_RATE, TEACHER_BATCH = 5e-5, 16
STUDENT_RATE = 5e-4


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        parameters: number of parameters.
        accuracy: share of the held-out texts whose class is found.
        against_kd: accuracy less that of KD, None for KD itself.
        error: the standard error of that difference, from the texts on which the two disagree.
        seconds: how long it trained; of the teacher, for fine-tuning and for being heard.
    """

    name: str
    parameters: int
    accuracy: float
    against_kd: float | None
    error: float | None
    seconds: float


def quickstart_lelp(options: LelpOptions, *, show_progress: bool = True) -> list[Row]:
    """Teach three students of one teacher in three ways, compare them, and save the one with pseudo-subclasses.

    The saved student is a stock model of classes; a fresh process that never imports hf_guide loads it.

    Returns:
        The printed table: the teacher first, then one row per way.

    Raises:
        OptionError: an unusable option; before any work.
        OSError: the teacher cannot be had.
    """
    output = Path(options.output)
    check_output(output)
    keep_freed_memory()
    started = time.perf_counter()
    topics = split_topics(options.text, examples=options.examples, held_out=options.held_out, seed=options.seed)
    name = options.teacher or default_encoder()
    tokenizer = load_processing_class(AutoTokenizer, name)
    train, held_out = (tokenized(part, tokenizer, options.sequence_length) for part in (topics.train, topics.held_out))
    print(f"teacher: {name}, fine-tuned here for {options.teacher_steps} steps; students start by {options.method}")
    print(f"text: {options.text}, {' or '.join(topics.names)}; {len(train):,} to train on, {len(held_out):,} held out")
    truth = np.asarray(held_out["labels"])
    with tempfile.TemporaryDirectory(prefix="quickstart-") as place:
        folder = Path(place, f"{Path(options.teacher or ENCODER_ID).name}-fine-tuned")  # cards call the teacher so
        clock = time.perf_counter()
        teacher = fine_tuned(name, train, topics, tokenizer, options, folder, show_progress)
        projector = fit_subclasses(
            teacher,
            train,
            options.num_subclasses,
            subclass_temperature=options.subclass_temperature,
            temperature=options.temperature,
            processing_class=tokenizer,
            capture=Path(place, "capture"),
            show_progress=show_progress,
        )
        spent = {"teacher": time.perf_counter() - clock}
        heard = Capture.open(Path(place, "capture"))
        found = {"teacher": predictions(teacher, held_out, tokenizer, Path(place), show_progress)}
        sizes = {"teacher": teacher.num_parameters()}
        for arm, term in ARMS.items():
            print(f"training {arm}")
            student = make_student(str(folder), teacher, train, term, options, show_progress)
            collator = DataCollatorWithPadding(tokenizer)
            trainer = DistillationTrainer(
                student,
                arguments(term, options, Path(place, term), show_progress),
                data_collator=SubclassLabelCollator(projector, collator) if term == "lelp" else collator,
                train_dataset=train,
                eval_dataset=held_out,
                compute_metrics=accuracy,
                teacher=None if term == "ce" else heard,
            )
            clock = time.perf_counter()
            trainer.train()
            spent[arm] = time.perf_counter() - clock
            found[arm] = chosen(trainer, held_out)
            sizes[arm] = student.num_parameters()
        # The last student is the one with subclasses.
        trainer.evaluate()
        record = build_training_record(trainer, evaluated_on=[f"{Path(options.text).name} (held out)"])
        rows = [row(each, sizes[each], found, truth, spent[each]) for each in ("teacher", *ARMS)]
        record.teacher_metrics["eval_accuracy"] = rows[0].accuracy
        print(f"\n{table(rows)}\n")
        print(verdict(rows))
        saved = save(student, record, rows, options, output, train, held_out, tokenizer, show_progress)
    same = check_stock(saved, output, topics.held_out["text"][:64], tokenizer, options.sequence_length)
    print(
        f"The student that learned by LELP is saved in {output}, as a stock model of {len(topics.names)} classes. A fresh "
        f"process loads it with Transformers alone and gives the same class to {same} of {same} texts."
    )
    print(f"{(time.perf_counter() - started) / 60:.1f} minutes in all.")
    return rows


def fine_tuned(
    name: str,
    train: Dataset,
    topics: Topics,
    tokenizer: PreTrainedTokenizerBase,
    options: LelpOptions,
    folder: Path,
    show_progress: bool,
) -> PreTrainedModel:
    """Return an encoder with a head for the classes, fine-tuned on the texts by the stock `Trainer` and saved in `folder`."""
    torch.manual_seed(options.seed)
    names = dict(enumerate(topics.names))
    load_config(name)
    with unreadable_as(TeacherError, f"The teacher {name} cannot be loaded"):
        teacher, found = AutoModelForSequenceClassification.from_pretrained(
            name,
            output_loading_info=True,
            dtype=torch.float32,
            num_labels=len(names),
            id2label=names,
            label2id={label: number for number, label in names.items()},
        )
    missing = sorted(key for key in found["missing_keys"] if key.startswith(f"{teacher.base_model_prefix}.embeddings"))
    if missing:
        raise TeacherError(f"{name} has no {', '.join(missing[:3])}; it must be a text encoder's checkpoint.")
    args = TrainingArguments(
        str(folder),
        max_steps=options.teacher_steps,
        per_device_train_batch_size=TEACHER_BATCH,
        learning_rate=TEACHER_RATE,
        warmup_steps=max(1, options.teacher_steps // 10),
        **_common(options, show_progress),
    )
    trainer = Trainer(teacher, args, DataCollatorWithPadding(tokenizer), train)
    trainer.train()
    teacher.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return teacher.eval()


def make_student(
    name: str, teacher: PreTrainedModel, train: Dataset, term: str, options: LelpOptions, show_progress: bool
) -> PreTrainedModel:
    """Return a student of half the teacher's width and a third of its depth; a calibrated one has listened to `train`.

    Those without subclasses begin as the one with them: its rows of a class begin alike, as the teacher's.
    """
    config = teacher.config
    return AutoStudentForSequenceClassification.from_teacher(
        name,
        method=options.method,
        calibration_dataset=train if options.method == "calibrated" else None,
        dtype=torch.float32,
        hidden_size=config.hidden_size // 2,
        intermediate_size=config.intermediate_size // 2,
        num_hidden_layers=max(1, config.num_hidden_layers // 3),
        num_subclasses=options.num_subclasses if term == "lelp" else None,
        show_progress=show_progress,
    )


def arguments(term: str, options: LelpOptions, folder: Path, show_progress: bool) -> DistillationArguments:
    """Return what every student is trained with; only the objective is each one's own."""
    return DistillationArguments(
        str(folder),
        objective=term,
        temperature=options.temperature,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=64,
        learning_rate=STUDENT_RATE,
        warmup_steps=max(1, options.steps // 10),
        lr_scheduler_type="cosine",
        **_common(options, show_progress),
    )


def _common(options: LelpOptions, show_progress: bool) -> dict[str, Any]:
    return {
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": not show_progress,
        "seed": options.seed,
    }


def predictions(
    model: PreTrainedModel, data: Dataset, tokenizer: PreTrainedTokenizerBase, folder: Path, show_progress: bool
) -> np.ndarray:
    """Return the class, (N,), that a stock classifier gives each example."""
    args = TrainingArguments(
        str(folder), per_device_eval_batch_size=64, report_to="none", disable_tqdm=not show_progress
    )
    return chosen(Trainer(model, args, DataCollatorWithPadding(tokenizer)), data)


def chosen(trainer: Trainer, data: Dataset) -> np.ndarray:
    """Return the class, (N,), that a trainer's model gives each example."""
    return np.asarray(trainer.predict(data).predictions).argmax(-1)


def accuracy(told: Any) -> dict[str, float]:
    """Return the share of classes found, as `Trainer` asks for metrics."""
    return {"accuracy": float((told.predictions.argmax(-1) == told.label_ids).mean())}


def row(name: str, parameters: int, found: dict[str, np.ndarray], truth: np.ndarray, seconds: float) -> Row:
    """Return a line of the table; the difference from KD is over the same texts."""
    right = found[name] == truth
    if name == "KD":
        return Row(name, parameters, float(right.mean()), None, None, seconds)
    apart = right.astype(float) - (found["KD"] == truth)
    error = float(apart.std() / math.sqrt(len(apart)))
    return Row(name, parameters, float(right.mean()), float(apart.mean()), error, seconds)


def table(rows: list[Row]) -> str:
    """Return the rows as text with aligned columns."""
    lines = [["", "parameters", "accuracy", "against KD", "seconds"]]
    for each in rows:
        apart = "-" if each.against_kd is None else f"{100 * each.against_kd:+.2f} ± {100 * (each.error or 0):.2f}"
        lines.append(
            [each.name, f"{each.parameters / 1e6:.1f} M", f"{each.accuracy:.2%}", apart, f"{each.seconds:.0f}"]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    name, *others = widths
    return "\n".join("  ".join([line[0].ljust(name), *map(str.rjust, line[1:], others)]) for line in lines)


def verdict(rows: list[Row]) -> str:
    """Return what the table says of LELP against KD, in one sentence."""
    last = rows[-1]
    apart, error = last.against_kd or 0.0, last.error or 0.0
    rest = "One seed and one set say little; `hf-guide subclasses` forecasts for yours."
    if abs(apart) <= 2 * error or apart == 0:
        return f"Here LELP and KD differ by no more than two standard errors. {rest}"
    return f"Here LELP is {'above' if apart > 0 else 'below'} KD by more than two standard errors. {rest}"


def save(
    student: PreTrainedModel,
    record: DistillationRecord,
    rows: list[Row],
    options: LelpOptions,
    output: Path,
    train: Dataset,
    held_out: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    show_progress: bool,
) -> PreTrainedModel:
    """Write the student with one row a class, its tokenizer, its card and the table into `output`, whole or not at all."""
    attach_record(student, record)
    told = {"options": public_value(dataclasses.asdict(options)), "rows": [dataclasses.asdict(each) for each in rows]}
    with atomic_folder(output, replaces=(output / RESULTS_NAME).is_file(), check=check_written_model) as folder:
        saved = save_subclass_student(
            student,
            folder,
            way="classes",
            dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            show_progress=show_progress,
        )
        (folder / RESULTS_NAME).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return saved


def check_stock(
    model: PreTrainedModel, folder: Path, texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int
) -> int:
    """Load `folder` in a process that knows Transformers alone; return on how many texts it was the saved student.

    Raises:
        RuntimeError: the process fails, or its model is not the student.
    """
    script = Path(__file__).with_name("stock_classes.py")
    asked = json.dumps({"folder": str(folder), "texts": texts, "length": length})
    done = subprocess.run([sys.executable, "-I", script], input=asked, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"The student in {folder} does not load in a fresh process:\n{done.stderr}")
    answer = json.loads(done.stdout)
    batch = tokenizer(texts, truncation=True, max_length=length, padding=True, return_tensors="pt")
    with torch.no_grad():
        here = model.eval()(**batch).logits
    if not torch.allclose(torch.tensor(answer["logits"]), here, atol=1e-4):
        raise RuntimeError(f"In a fresh process the student in {folder} says something else than the one saved there.")
    return len(texts)
