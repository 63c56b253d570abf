"""Records of how a student was trained, and the metadata of model cards.

Does: write and read `distillation.json`; look up a teacher's license and languages; read a card and merge its YAML metadata.
Does not: draw a card's text (`model_card.py`), or upload anything (`push.py`).
"""

import dataclasses
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import CardData, EvalResult, RepoCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id

from hf_guide.errors import HfGuideError, OptionError
from hf_guide.initialization.report import (
    REPORT_NAME,
    InitializationReport,
    StageRecord,
    TeacherRecord,
    TrainingSummary,
)
from hf_guide.methods import list_methods
from hf_guide.utils.files import atomic_write_text
from hf_guide.utils.fingerprint import files_fingerprint
from hf_guide.utils.public_names import Source, is_local, name_source, public_name, to_repo_id
from hf_guide.utils.typed_json import read_json_record

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

CARD_NAME = "README.md"
RECORD_NAME = "distillation.json"
LIBRARY_TAG = "hf_guide"
MODEL_INDEX = "model-index"
SUBCLASS_HEAD_AGREEMENT = "agreement_with_subclass_head"
"""Metric of a head that was refitted from subclasses to classes: the fraction of examples with the same predicted class."""

REPORTED_ARGUMENTS = (
    "learning_rate",
    "lr_scheduler_type",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "seed",
)
"""Training arguments that a record always holds."""
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
"""Training arguments that a record holds where they are set."""

_BOOLEAN = "tag:yaml.org,2002:bool"
_TEXT_KEYS = ("license", "license_name", "license_link", "language", "datasets", "tags", "base_model", "pipeline_tag")
_TEACHER_KEYS = ("license", "license_name", "license_link", "language")
_NON_RESULT_SUFFIXES = ("runtime", "per_second", "_time", "epoch", "step", "total_flos", "num_input_tokens_seen")
"""Suffixes of metrics that describe the machine or the progress of the run, not the model."""


# The training record


@dataclass
class DistillationRecord:
    """How a student was trained, saved next to its weights as `distillation.json`.

    Scalars of NumPy and torch become numbers; numbers that are not finite, which JSON cannot represent, become None.

    Attributes:
        teachers: The teachers.
        losses: Weight of each loss, such as {"ce": 0.5, "kd": 0.5}.
        temperature: Divisor of both models' logits in the distillation loss.
        kd_loss_type: Which divergence the loss "kd" was, such as "forward_kl"; None without that loss.
        student_class: Name of the stock model class.
        student_parameters: Number of parameters, tied ones counted once.
        task: Pipeline tag of the Hub, such as "text-generation".
        datasets: Hub ids of the training datasets.
        evaluated_on: Name of the evaluation dataset; None means the first of `datasets`.
        languages: Language codes such as "en".
        steps, epochs: Optimizer steps and passes over the dataset.
        items: Number of targets, tokens or examples, in all training steps.
        tokens: Number of input tokens in all training steps, where `include_num_input_tokens_seen` has them counted.
        training: Training arguments, see `reported_arguments`.
        metrics: Last evaluation, as `Trainer.evaluate` returns it.
        teacher_metrics, random_metrics: The same of the teacher, and of an equal student trained from random initialization.
        history: Evaluations during training, each with its "step".
        earlier: The trainings before this one, the first one first.
        hf_guide_version, transformers_version: Versions used for training; by default the installed ones.
        weights: Fingerprint of the saved weights that the metrics are of, see `saved_weights_fingerprint`; None if not known.

    Raises:
        HfGuideError: A field holds a value that is not a string, number, list or mapping.

    Example:
        >>> record = DistillationRecord(
        ...     [TeacherRecord("org/teacher")], losses={"kd": 1.0}, metrics={"eval_loss": 2.5}
        ... )
        >>> [(row.metric, row.student) for row in result_rows(record)]
        [('loss', 2.5)]
    """

    teachers: list[TeacherRecord] = field(default_factory=list)
    losses: dict[str, float] = field(default_factory=dict)
    temperature: float = 1.0
    kd_loss_type: str | None = None
    student_class: str | None = None
    student_parameters: int | None = None
    task: str | None = None
    datasets: list[str] = field(default_factory=list)
    evaluated_on: str | None = None
    languages: list[str] = field(default_factory=list)
    steps: int = 0
    epochs: float | None = None
    items: int | None = None
    tokens: int | None = None
    training: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float | None] = field(default_factory=dict)
    teacher_metrics: dict[str, float | None] = field(default_factory=dict)
    random_metrics: dict[str, float | None] = field(default_factory=dict)
    history: list[dict[str, float | None]] = field(default_factory=list)
    earlier: list[TrainingSummary] = field(default_factory=list)
    hf_guide_version: str | None = None
    transformers_version: str | None = None
    weights: str | None = None

    def __post_init__(self) -> None:
        import transformers

        from hf_guide.version import __version__

        self.hf_guide_version = self.hf_guide_version or __version__
        self.transformers_version = self.transformers_version or transformers.__version__
        for name in ("losses", "training", "metrics", "teacher_metrics", "random_metrics", "history"):
            setattr(self, name, _to_json_types(getattr(self, name), name))

    @property
    def trainings(self) -> list[TrainingSummary]:
        """All trainings of the student, this one last if it has begun."""
        this = TrainingSummary(self.teachers, self.losses, self.steps, self.tokens, self.datasets)
        return [*self.earlier, this] if self.steps else list(self.earlier)


def save_record(folder: str | os.PathLike[str], record: DistillationRecord) -> Path:
    """Write `distillation.json` into a folder, creating the folder if necessary, and return the file's path."""
    path = Path(folder) / RECORD_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    content = _to_json_types(dataclasses.asdict(record), RECORD_NAME)
    atomic_write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
    return path


def load_record(path: str | os.PathLike[str]) -> DistillationRecord:
    """Read a record from its file, or from the folder that contains it.

    Raises:
        FileNotFoundError: There is no such file.
        HfGuideError: The file is not a record.
    """
    path = Path(path)
    return read_json_record(
        path / RECORD_NAME if path.is_dir() else path,
        _parse_record,
        "a distillation record",
        "Remove it, or train again to write a new one.",
    )


def _parse_record(content: dict[str, Any]) -> DistillationRecord:
    teachers = [TeacherRecord(**teacher) for teacher in content.pop("teachers")]
    earlier = [TrainingSummary.parse(each) for each in content.pop("earlier", [])]
    return DistillationRecord(teachers=teachers, earlier=earlier, **_present_keys(content))


def _present_keys(content: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a record that an earlier version may have written, under their present keys."""
    renamed = {"objective": "losses", "divergence": "kd_loss_type"}
    content = {renamed.get(key, key): value for key, value in content.items()}
    if isinstance(content.get("losses"), dict):
        losses = {"embedding": "features", "hidden": "hidden_states"}
        content["losses"] = {losses.get(name, name): weight for name, weight in content["losses"].items()}
    return content


def reported_arguments(args: "TrainingArguments") -> dict[str, Any]:
    """Return the training arguments that a model card reports."""
    reported = {name: getattr(args, name) for name in REPORTED_ARGUMENTS}
    reported |= {name: getattr(args, name) for name in REPORTED_ARGUMENTS_IF_SET if getattr(args, name, None)}
    if args.world_size > 1:
        reported["processes"] = args.world_size
    reported["total_train_batch_size"] = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {name: value.value if isinstance(value, Enum) else value for name, value in reported.items()}


def _to_json_types(value: Any, path: str) -> Any:
    """Convert `value` to types that JSON has; `path` names it in errors."""
    if isinstance(value, Enum):
        return _to_json_types(value.value, path)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _to_json_types(entry, f"{path}[{key!r}]") for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json_types(entry, f"{path}[{index}]") for index, entry in enumerate(value)]
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # a NumPy or torch scalar
        return _to_json_types(value.item(), path)
    raise HfGuideError(
        f"{path} is of type {type(value).__name__}, which cannot be written as JSON; it must be a string, a number, a list "
        "or a mapping."
    )


# Results


@dataclass(frozen=True)
class MetricRow:
    """One row of a card's results: a metric of student, teacher and randomly initialized student, None if unknown."""

    dataset: str
    metric: str
    student: float | str | None
    teacher: float | None = None
    random: float | None = None

    @property
    def gap_closed(self) -> float | None:
        """(random - student) / (random - teacher): 0 equals random initialization, 1 equals the teacher."""
        if not isinstance(self.student, int | float) or self.teacher is None or self.random is None:
            return None
        return (self.random - self.student) / (self.random - self.teacher) if self.random != self.teacher else None


def result_rows(record: DistillationRecord) -> list[MetricRow]:
    """Return the results of a record, in the order of its metrics."""
    dataset = eval_dataset_name(record) or "evaluation set"
    student, teacher, random = map(_result_metrics, (record.metrics, record.teacher_metrics, record.random_metrics))
    return [MetricRow(dataset, name, value, teacher.get(name), random.get(name)) for name, value in student.items()]


def to_eval_results(record: DistillationRecord) -> list[EvalResult]:
    """Return a record's results for a card's metadata; empty if the task or the dataset is not known."""
    dataset = eval_dataset_name(record)
    if record.task is None or dataset is None:
        return []
    dataset_type = record.datasets[0] if record.datasets else "custom"
    metrics = _result_metrics(record.metrics)
    return [EvalResult(record.task, dataset_type, dataset, name, value) for name, value in metrics.items()]


def eval_dataset_name(record: DistillationRecord) -> str | None:
    """Return the name of the dataset that a record's metrics were measured on."""
    return record.evaluated_on or (record.datasets[0] if record.datasets else None)


def _result_metrics(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """Return the metrics that describe the model, without `Trainer`'s prefix."""
    unprefixed = {name.removeprefix("eval_").removeprefix("test_"): value for name, value in metrics.items()}
    return {
        name: value
        for name, value in unprefixed.items()
        if isinstance(value, int | float) and math.isfinite(value) and not name.endswith(_NON_RESULT_SUFFIXES)
    }


# Teachers and their Hub ids


def teacher_record(
    name: str,
    *,
    revision: str | None = None,
    weight: float = 1.0,
    captured: bool = False,
    source: Source | None = None,
    token: str | bool | None = None,
) -> TeacherRecord:
    """Return the record of a teacher: its public name, and the license and languages from its model card.

    Args:
        name: Hub id, folder, or name of a model class. Only the last component of a folder's path is recorded.
        revision, token: To download its card. If that fails, the license is left unknown.
        source: Where it was loaded from, as recorded at that time; by default a name that exists on this machine is a path.
    """
    path: Path | None
    fingerprint = None
    source = source or name_source(name, revision)
    if source == "local" or (is_local(name) and public_name(name, source) != name):  # or a snapshot in the Hub's cache
        path = Path(name).expanduser() / CARD_NAME
        fingerprint = files_fingerprint(path.parent)
        name = public_name(name, source)
        revision = revision if source == "hub" else None
    else:
        path = _download_card(name, revision, source, token)
    data = CardData()
    try:
        card = read_card(path) if path is not None else None
        data = card.data if card is not None else data
    except HfGuideError as error:
        logger.warning("The teacher's license is not known: %s", error)
    texts = {key: [str(value) for value in as_list(data.get(key)) if value is not None] for key in _TEACHER_KEYS}
    return TeacherRecord(
        name,
        revision,
        weight,
        captured,
        license=texts["license"] if len(texts["license"]) > 1 else next(iter(texts["license"]), None),
        license_name=next(iter(texts["license_name"]), None),
        license_link=next(iter(texts["license_link"]), None),
        languages=texts["language"],
        fingerprint=fingerprint,
        source=source,
    )


def recorded_teacher(
    name: str,
    *,
    revision: str | None,
    source: Source | None,
    fingerprint: str | None = None,
    token: str | bool | None = None,
) -> TeacherRecord:
    """Return the record of a teacher that a file of hf_guide names, which has no path of a folder.

    A folder of that name in the working directory may hold another model: its card is read if the fingerprint is the same.
    """
    if source == "local" and (fingerprint is None or files_fingerprint(name) != fingerprint):
        return TeacherRecord(name, fingerprint=fingerprint, source=source)
    return teacher_record(name, revision=revision, source=source, token=token)


def lineage_of(source: Any) -> list[StageRecord]:
    """Return the stages by which a teacher was made, if hf_guide made it from another one; empty for others.

    Args:
        source: A model, or the folder of one, with the report and the record of its training. The Hub is not asked.
    """
    report: Any = getattr(source, "initialization_report", None)
    record: Any = getattr(source, "distillation_record", None)
    folder = Path(source).expanduser() if isinstance(source, (str, os.PathLike)) else None
    if folder is not None and (folder / REPORT_NAME).is_file():
        try:
            report = InitializationReport.load(folder)
            record = load_record(folder) if (folder / RECORD_NAME).is_file() else None
        except HfGuideError as error:
            logger.warning("How the teacher was made is not recorded with the student: %s", error)
            return []
    if not isinstance(report, InitializationReport):
        return []
    training = training_of_stage(record) if isinstance(record, DistillationRecord) else {}
    return [*report.lineage, report.as_stage(**training)]


def training_of_stage(record: DistillationRecord) -> dict[str, Any]:
    """Return the fields of a `StageRecord` about training: all teachers and the whole length, and the last losses."""
    tokens = [each.tokens for each in record.trainings]
    teachers = [teacher for each in record.trainings for teacher in each.teachers]
    return {
        "steps": sum(each.steps for each in record.trainings),
        "tokens": None if None in tokens else sum(tokens) or None,
        "losses": dict(record.losses),
        "training_teachers": unique_teachers(teachers),
    }


def training_teachers(report: InitializationReport | None, record: DistillationRecord | None) -> list[TeacherRecord]:
    """Return the teachers of all trainings on the way to a student, those of stages before it first."""
    lineage = report.lineage if report is not None else []
    teachers = [teacher for stage in lineage for teacher in stage.training_teachers]
    if record is not None:
        teachers += [teacher for each in record.earlier for teacher in each.teachers] + record.teachers
    return unique_teachers(teachers)


def unique_teachers(teachers: Iterable[TeacherRecord]) -> list[TeacherRecord]:
    """Return each teacher once, as it is recorded last."""
    return list({(each.name, each.revision, each.fingerprint): each for each in teachers}.values())


def _download_card(name: str, revision: str | None, source: Source | None, token: str | bool | None) -> Path | None:
    if to_repo_id(name, revision, source) is None:
        return None
    try:
        return Path(hf_hub_download(name, CARD_NAME, revision=revision, token=token))
    except (EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled) as error:
        logger.info("The model card of %s could not be downloaded: %s", name, error)
        return None


# The metadata of a card


class _HubLoader(yaml.SafeLoader):
    """Loader of the YAML 1.2 that the Hub reads, in which `no`, the code of Norwegian, is text and not a boolean."""


_HubLoader.yaml_implicit_resolvers = {
    character: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOLEAN]
    for character, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_HubLoader.add_implicit_resolver(_BOOLEAN, re.compile("(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def read_card(path: Path) -> RepoCard | None:
    """Return the card in a file with its metadata unchanged, or None if there is no file.

    Raises:
        HfGuideError: The text is not UTF-8, or the metadata are not a YAML mapping.
    """
    if not path.is_file():
        return None
    try:
        text = path.read_bytes().decode("utf-8-sig")
        card = RepoCard(text if text.lstrip().startswith("---") else f"---\n{{}}\n---\n{text}")
        block = REGEX_YAML_BLOCK.search(text)
        if block is not None:
            card.data = CardData(**(yaml.load(block[2], Loader=_HubLoader) or {}))
    except (UnicodeDecodeError, yaml.YAMLError, ValueError) as error:
        raise HfGuideError(
            f"The model card {path} cannot be read: {error}. Correct the metadata between the two lines of dashes, or "
            "move the file away to get a new one."
        ) from error
    for key in _TEXT_KEYS:
        if any(isinstance(value, (Mapping, list)) for value in as_list(card.data.get(key))):
            raise HfGuideError(
                f"The metadata of the model card {path} cannot be read: {key} must be a string or a list of strings, found "
                f"{card.data.get(key)!r}. Change it, or move the file away to get a new one."
            )
    return card


def merge_metadata(
    data: CardData, *, updates: Mapping[str, Any], appended: Mapping[str, Iterable[str]], defaults: Mapping[str, Any]
) -> None:
    """Change a card's metadata in place.

    Args:
        updates: Replace existing values, except where they are None.
        appended: Extend existing lists.
        defaults: Fill in missing values.
    """
    for key, value in updates.items():
        if value:
            data[key] = value
    for key, value in defaults.items():
        if value and not data.get(key):
            data[key] = value
    for key, values in appended.items():
        values, existing = list(values), as_list(data.get(key))
        if key == "tags" and LIBRARY_TAG in existing:  # our section may have named another method before
            outdated = set(list_methods()) - set(values)
            existing = [tag for tag in existing if tag not in outdated]
        merged = list(dict.fromkeys([*existing, *values]))
        if merged:
            data[key] = merged


def merge_results(data: CardData, results: Sequence[EvalResult], model_id: str) -> list[EvalResult]:
    """Add results to a card's metadata, replacing older ones of the same metric, and return all results.

    A model index that the Hub's own parser does not understand is left unchanged.
    """
    index = data.get(MODEL_INDEX)
    existing: list[EvalResult] = []
    if index:
        try:
            model_id, existing = model_index_to_eval_results(index)
        except (KeyError, TypeError, AttributeError, ValueError):
            return list(results)
    unchanged = [old for old in existing if not any(new.is_equal_except_value(old) for new in results)]
    merged = [*unchanged, *results]
    if merged:
        data[MODEL_INDEX] = eval_results_to_model_index(model_id, merged)
    return merged


def check_repo_id(option: str, value: str) -> None:
    """Check that a value can be the id of a repository.

    Raises:
        OptionError: Names the option, and the rule that the value breaks.
    """
    try:
        validate_repo_id(value)
    except HFValidationError as error:
        raise OptionError(
            f"{option} must be the id of a repository on the Hub, such as me/student: {error}"
        ) from error


def check_languages(languages: Iterable[str]) -> None:
    """Check that languages are codes that the Hub accepts in a card.

    Raises:
        OptionError: Names the one that is not.
    """
    for language in languages:
        if not re.fullmatch("[a-z]{2,3}|code|multilingual", language):
            raise OptionError(
                f"language must be an ISO 639 code of two or three small letters, such as en, or code or multilingual; found "
                f"{language!r}. The Hub refuses a card with another one."
            )


def as_list(value: Any) -> list[Any]:
    """Return a metadata value, which may be one string, a list or missing, as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
