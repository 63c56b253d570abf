"""What a card tells of a student's training: the record that stands beside the weights, and its figures.

Does: say in JSON who taught, by what objective, on what, and with what result; put the teacher's figures and a random
start's beside the student's.
Does not: write a card (`hub/model_card.py` does), or know the trainer.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult

from hf_guide.errors import HfGuideError
from hf_guide.utils.escaping import escape_markdown
from hf_guide.utils.files import atomic_write_text
from hf_guide.utils.typed_json import check_field_types

if TYPE_CHECKING:
    from transformers import TrainingArguments

RECORD_NAME = "distillation.json"
SUBCLASS_HEAD_AGREEMENT = "agreement_with_subclass_head"
"""The metric of a head that was refitted from subclasses to classes: the share of examples whose class is the same."""

# The training arguments that make a run what it is; the first are always told, the others where they are set.
REPORTED_ARGUMENTS = (
    "learning_rate",
    "lr_scheduler_type",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "seed",
)
REPORTED_ARGUMENTS_IF_SET = (
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "label_smoothing_factor",
    "bf16",
    "fp16",
    "activation_checkpointing",
    "torch_compile",
)

# Endings of metrics that are about the machine, or about where the run stood.
_NON_RESULT_SUFFIXES = ("runtime", "per_second", "_time", "epoch", "step", "total_flos", "num_input_tokens_seen")


@dataclass
class TeacherRecord:
    """One teacher of a student.

    Attributes:
        name: its id on the Hub, or the bare name of its folder or class: a record is published with the weights.
        revision: its commit, where known.
        weight: its share in what the student was told.
        captured: whether its signals came from disk.
        fingerprint: of a folder, a hash of its weights (see `fingerprints.files_fingerprint`).
        license, license_name, license_link, languages: what its own card says, see `provenance.describe_teacher`.
    """

    name: str
    revision: str | None = None
    weight: float = 1.0
    captured: bool = False
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    languages: list[str] = field(default_factory=list)
    fingerprint: str | None = None


@dataclass
class DistillationRecord:
    """How a student was trained, saved beside its weights as `distillation.json`.

    Attributes:
        teachers: who taught.
        objective: the terms of the loss and their weights, such as {"ce": 0.5, "kd": 0.5}.
        temperature: what both models' logits were divided by.
        divergence: between teacher and student, such as "forward_kl"; None where no term has one.
        student_class: the stock model class.
        student_parameters: how many numbers it holds, tied ones counted once.
        task: the kind of task as the Hub calls it, such as "text-generation".
        datasets: ids on the Hub of what the student was trained on.
        evaluated_on: name of what the metrics were measured on; by default the first of the datasets.
        languages: codes such as "en".
        steps, epochs: updates of the weights; passes over the dataset.
        items: targets the loss was averaged over, tokens or examples, over all of the training.
        training: the training arguments worth telling.
        metrics: the last evaluation, as `Trainer.evaluate` returns it.
        teacher_metrics, random_metrics: the same of the teacher and of an equal student that started at random.
        history: one mapping for each evaluation during the training, with its "step".
        hf_guide_version, transformers_version: what trained it.

    Scalars of NumPy and torch become numbers, and numbers that are not finite, which JSON cannot hold, None.

    Raises:
        HfGuideError: a field holds something that is no text, number, list or mapping.
    """

    teachers: list[TeacherRecord] = field(default_factory=list)
    objective: dict[str, float] = field(default_factory=dict)
    temperature: float = 1.0
    divergence: str | None = None
    student_class: str | None = None
    student_parameters: int | None = None
    task: str | None = None
    datasets: list[str] = field(default_factory=list)
    evaluated_on: str | None = None
    languages: list[str] = field(default_factory=list)
    steps: int = 0
    epochs: float | None = None
    items: int | None = None
    training: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float | None] = field(default_factory=dict)
    teacher_metrics: dict[str, float | None] = field(default_factory=dict)
    random_metrics: dict[str, float | None] = field(default_factory=dict)
    history: list[dict[str, float | None]] = field(default_factory=list)
    hf_guide_version: str | None = None
    transformers_version: str | None = None

    def __post_init__(self) -> None:
        import transformers

        from hf_guide.version import __version__

        self.hf_guide_version = self.hf_guide_version or __version__
        self.transformers_version = self.transformers_version or transformers.__version__
        for name in ("objective", "training", "metrics", "teacher_metrics", "random_metrics", "history"):
            setattr(self, name, _to_json_types(getattr(self, name), name))


def save_record(folder: str | os.PathLike[str], record: DistillationRecord) -> Path:
    """Write `distillation.json` into a folder, which is made if need be, and return the file's path."""
    path = Path(folder) / RECORD_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    content = _to_json_types(dataclasses.asdict(record), RECORD_NAME)
    atomic_write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
    return path


def load_record(path: str | os.PathLike[str]) -> DistillationRecord:
    """Read a record from its file, or from the folder it was saved into.

    Raises:
        FileNotFoundError: there is no such file.
        HfGuideError: the file is not a record.
    """
    path = Path(path)
    path = path / RECORD_NAME if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        teachers = [TeacherRecord(**teacher) for teacher in content.pop("teachers")]
        record = DistillationRecord(teachers=teachers, **content)
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        raise HfGuideError(
            f"{path} is not a record of a distillation, or one of another version of hf_guide: {error}. "
            "Remove it, or train again to get a fresh one."
        ) from error
    check_field_types(record, str(path))
    return record


def reported_arguments(args: "TrainingArguments") -> dict[str, Any]:
    """Return those of the training arguments that a reader of a card wants to know."""
    told = {name: getattr(args, name) for name in REPORTED_ARGUMENTS}
    told |= {
        name: getattr(args, name) for name in REPORTED_ARGUMENTS_IF_SET if getattr(args, name, None)
    }  # not all have each
    if args.world_size > 1:
        told["processes"] = args.world_size
    told["total_train_batch_size"] = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {name: value.value if isinstance(value, Enum) else value for name, value in told.items()}


@dataclass(frozen=True)
class MetricRow:
    """One line of a card's results: a metric of the student, the teacher and a random start, None where not known."""

    dataset: str
    metric: str
    student: float | str | None
    teacher: float | None = None
    random: float | None = None

    @property
    def gap_closed(self) -> float | None:
        """(random - student) / (random - teacher): 0 is as good as a random start, 1 as good as the teacher."""
        if not isinstance(self.student, int | float) or self.teacher is None or self.random is None:
            return None
        return (self.random - self.student) / (self.random - self.teacher) if self.random != self.teacher else None


def result_rows(record: DistillationRecord) -> list[MetricRow]:
    """Return the lines of a record's results, in the order of its metrics."""
    dataset = eval_dataset_name(record) or "evaluation set"
    student, teacher, random = map(_result_metrics, (record.metrics, record.teacher_metrics, record.random_metrics))
    return [MetricRow(dataset, name, value, teacher.get(name), random.get(name)) for name, value in student.items()]


def to_eval_results(record: DistillationRecord) -> list[EvalResult]:
    """Return a record's results for a card's metadata: none where the task or the dataset has no name."""
    dataset = eval_dataset_name(record)
    if record.task is None or dataset is None:
        return []
    kind = record.datasets[0] if record.datasets else "custom"
    return [
        EvalResult(record.task, kind, dataset, name, value) for name, value in _result_metrics(record.metrics).items()
    ]


def eval_dataset_name(record: DistillationRecord) -> str | None:
    """Return the name of what a record's metrics were measured on."""
    return record.evaluated_on or (record.datasets[0] if record.datasets else None)


def format_metric(value: object) -> str:
    """A figure as it stands in a table: four digits of a fraction, a dash for what is not known."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else escape_markdown(value)


def _result_metrics(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """Return the metrics that say how good a model is, without the prefix that `Trainer` gives them."""
    named = {name.removeprefix("eval_").removeprefix("test_"): value for name, value in metrics.items()}
    return {
        name: value
        for name, value in named.items()
        if isinstance(value, int | float) and math.isfinite(value) and not name.endswith(_NON_RESULT_SUFFIXES)
    }


def _to_json_types(value: Any, where: str) -> Any:
    """Return `value` in JSON's own types."""
    if isinstance(value, Enum):
        return _to_json_types(value.value, where)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _to_json_types(inner, f"{where}[{key!r}]") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json_types(inner, f"{where}[{place}]") for place, inner in enumerate(value)]
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # a scalar of NumPy's or torch's
        return _to_json_types(value.item(), where)
    raise HfGuideError(
        f"{where} is a {type(value).__name__}, which cannot be written as JSON; give a text, a number, a list or a mapping."
    )
