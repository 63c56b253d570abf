"""`analyze`, the work of `hf-guide analyze-subclasses`: read a dataset, run the teacher, train the probe, write the page."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedModel

from hf_guide.data.arguments import DataArguments
from hf_guide.data.class_labels import class_names, label_encoder
from hf_guide.data.loading import default_columns, find_column, load_splits
from hf_guide.data.preprocessing import preprocess
from hf_guide.errors import OptionError, SubclassError, TeacherError
from hf_guide.lelp.analysis.features import AnalysisFeatures, collect_features
from hf_guide.lelp.analysis.probe import NUM_SEEDS, STEPS, ProbeStudents, SubclassProbe
from hf_guide.lelp.analysis.probe_subclasses import ProbeFeatures, build_students, check_student_inputs, probe_features
from hf_guide.lelp.analysis.report import SubclassSummary, plot_class, summarize_subclasses, write_page
from hf_guide.lelp.projector import SubclassProjector
from hf_guide.lelp.validation import MISSING_LABELS
from hf_guide.models.pretrained import load_processing_class
from hf_guide.signal_cache.writer import distributed_state
from hf_guide.tasks import Task, task_of
from hf_guide.teachers.loading import load_teacher
from hf_guide.utils.files import atomic_write_text
from hf_guide.utils.labels import IGNORE_INDEX
from hf_guide.validation import did_you_mean


@dataclass(frozen=True)
class SubclassReport:
    """The result of `analyze`.

    Attributes:
        summary: What was measured.
        page: The HTML file.
        figures: One for each class, if they were asked for.
    """

    summary: SubclassSummary
    page: Path
    figures: list[Path]


def analyze(
    projector: SubclassProjector,
    data: DataArguments,
    page: str | os.PathLike[str],
    *,
    teacher: str | os.PathLike[str] | None = None,
    processor: str | None = None,
    fine_label_column: str | None = None,
    figures: str | os.PathLike[str] | None = None,
    num_examples: int = 6,
    batch_size: int = 32,
    train_probes: bool = True,
    student: str | os.PathLike[str] | None = None,
    steps: int = STEPS,
    num_seeds: int = NUM_SEEDS,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    show_progress: bool = True,
) -> SubclassReport:
    """Analyze a projector's subclasses on a dataset, and write a page about them.

    Args:
        projector: As `SubclassProjector.from_pretrained` returns it.
        data: The dataset; only its training split is read, and of that a random sample of the maximum number of samples.
        page: The HTML file to write.
        teacher: A Hub id or a folder; None takes the teacher that the projector was fitted to.
        processor: The tokenizer or image processor; None takes the teacher's.
        fine_label_column: A column of fine labels to compare the subclasses with.
        figures: A folder for one figure of each class as well, and for all measurements as JSON.
        num_examples: How many examples of each subclass are shown.
        batch_size: Examples of a forward pass.
        train_probes: Whether students are trained by LELP and by KD, to decide whether subclasses help; with
            `fine_label_column` also some that learn the fine labels.
        student: A Hub id or folder of the student to train; None takes a smaller model of the teacher's class.
        steps, num_seeds: Of these students, as of `probe_subclasses`.
        revision, token, trust_remote_code: Of the teacher.
        show_progress: Whether to show a bar.

    Raises:
        SubclassError: The projector was fitted to another teacher, or its teacher is not known.
        TeacherError: Its teacher cannot be loaded.
        OptionError: A column is missing.
    """
    hub: dict[str, Any] = {"revision": revision, "token": token, "trust_remote_code": trust_remote_code}
    model, name = _load_teacher(projector, teacher, hub)
    if projector.scores.needs_fine_labels and fine_label_column is None:
        raise OptionError("This projector splits by fine labels; name their column with --fine-label-column.")
    task = task_of(model)
    whole = load_splits(replace(data, validation_split_percentage=0, max_train_samples=None))[0]
    teacher_classes = list(projector.id2label.values())
    raw = mark_missing_labels(subsample(whole, data.max_train_samples), task, data, teacher_classes)
    if fine_label_column is not None and fine_label_column not in raw.column_names:
        raise OptionError(
            f"{data.name} has no column {fine_label_column!r}; it has {raw.column_names}."
            f"{did_you_mean(fine_label_column, raw.column_names)}"
        )
    is_image_task = task is Task.IMAGE_CLASSIFICATION
    loader = AutoImageProcessor if is_image_task else AutoTokenizer
    processing_class = load_processing_class(loader, processor or name, **({} if processor else hub))
    processed = preprocess(task, raw, None, processing_class, data, labels=teacher_classes, config=model.config)
    students: ProbeStudents | None = None
    if train_probes:
        students = build_students(model, None if student is None else load_teacher(student, **hub))
        check_student_inputs(students, processed.collator([processed.train[0]]))
    features = collect_features(
        model, processed.train, processed.collator, batch_size=batch_size, show_progress=show_progress
    )
    compared_labels = None if fine_label_column is None else encode_labels(raw, fine_label_column)
    fine_labels = compared_labels if projector.scores.needs_fine_labels else None
    probe, reason = None, None
    if students is not None:
        options = {"steps": steps, "num_seeds": num_seeds, "show_progress": show_progress}
        probe, reason = _probe_or_reason(students, processed, projector, features, compared_labels, options)
    summary = summarize_subclasses(
        projector,
        features.embeddings,
        features.logits,
        features.labels,
        compared_labels,
        num_examples=num_examples,
        probe=probe,
        no_probe=reason,
        fine_labels=fine_labels,
        title=f"Subclasses of {data.name}",
    )
    column = find_column(raw, task, "image" if is_image_task else "text", data)
    written = write_page(summary, page, lambda row: raw[row][column])
    return SubclassReport(summary, written, [] if figures is None else _write_figures(summary, Path(figures)))


def _load_teacher(
    projector: SubclassProjector, teacher: str | os.PathLike[str] | None, hub: dict[str, Any]
) -> tuple[PreTrainedModel, str | os.PathLike[str]]:
    """Return the teacher that a projector was fitted to, and its name or folder."""
    name = teacher or projector.teacher
    if not name:
        raise SubclassError("This projector does not state its teacher; name it with --teacher.")
    try:
        model = load_teacher(name, device=distributed_state().device, **hub)
    except TeacherError as error:
        if teacher is not None:
            raise
        raise TeacherError(
            f"{error} The projector states that its teacher is {name!r}; name it with --teacher."
        ) from error
    projector.check_teacher(model)
    return model, name


def subsample(raw: Dataset, count: int | None) -> Dataset:
    """Return `count` examples, drawn with a fixed seed, since data may be in order of their classes; None returns all."""
    return raw if count is None or len(raw) <= count else raw.shuffle(seed=0).select(range(count))


def mark_missing_labels(raw: Dataset, task: Task, options: DataArguments, labels: list[str]) -> Dataset:
    """Return a dataset whose column of labels holds -100 for missing ones (None, -1), and class numbers if any is missing.

    Args:
        labels: The names of the teacher's classes.

    Raises:
        OptionError: A column is missing, or a label is not one of the classes.
    """
    has_labels = any(name in raw.column_names for name in default_columns(task, "label"))
    if options.label_column is None and not has_labels:
        return raw.add_column("label", [IGNORE_INDEX] * len(raw))
    column = find_column(raw, task, "label", options)
    values = list(raw[column])
    labelled = [row for row, value in enumerate(values) if value is not None and value not in MISSING_LABELS]
    if len(labelled) == len(values):
        return raw
    numbers = [IGNORE_INDEX] * len(values)
    if labelled:
        names = class_names(raw.select_columns([column]).select(labelled), column)
        number = label_encoder(names, labels, column)
        for row in labelled:
            numbers[row] = number(values[row])
    return raw.remove_columns(column).add_column(column, numbers)


def encode_labels(raw: Dataset, column: str) -> Tensor:
    """Return a column of labels as numbers, (N,): names in sorted order, whole numbers as they are.

    Raises:
        OptionError: The labels are neither.
    """
    values = list(raw[column])
    if all(isinstance(value, int) for value in values):
        return torch.tensor(values).long()
    if not all(isinstance(value, str) for value in values):
        kinds = sorted({type(value).__name__ for value in values})
        raise OptionError(f"The column {column!r} holds {', '.join(kinds)}; labels must be whole numbers or names.")
    numbers = {name: number for number, name in enumerate(sorted(set(values)))}
    return torch.tensor([numbers[value] for value in values])


def _probe_or_reason(
    students: ProbeStudents,
    processed: Any,
    projector: SubclassProjector,
    features: AnalysisFeatures,
    fine_labels: Tensor | None,
    options: dict[str, Any],
) -> tuple[SubclassProbe | None, str | None]:
    """Return what the probe measured, or the reason why there is none: the rest of the page does not need it."""
    count = len(features.labels)
    print(
        f"Probe: {2 * options['num_seeds'] * (1 if fine_labels is None else 2)} students, {students.description}, for "
        f"{options['steps']} steps{'' if fine_labels is None else ', half of them for three times as many'}."
    )
    try:
        probe = probe_features(
            students,
            processed.train,
            processed.collator,
            projector,
            ProbeFeatures(features.embeddings, features.logits, features.labels, fine_labels),
            num_train=count,
            **options,
        )
    except SubclassError as error:
        return None, str(error)
    return probe, None


def _write_figures(summary: SubclassSummary, folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for class_summary in summary.classes:
        path = folder / f"class_{class_summary.number}.png"
        plot_class(class_summary, path)
        paths.append(path)
    atomic_write_text(folder / "subclasses.json", json.dumps(_to_json(summary), indent=2) + "\n")
    return paths


def _to_json(summary: SubclassSummary) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "classes": {
            class_summary.name: {
                "examples": len(class_summary.rows),
                "sizes": class_summary.sizes.tolist(),
                "explained_variance_ratio": class_summary.explained_variance_ratio,
                "top_examples": class_summary.top_examples,
            }
            for class_summary in summary.classes
        }
    }
    if summary.probe is not None:
        facts["probe"] = summary.probe.to_dict()
    if summary.no_probe is not None:
        facts["no_probe"] = summary.no_probe
    information = summary.fine_label_information
    if information is not None:
        facts["fine_labels"] = {
            "bits": information.bits,
            "entropy": information.entropy,
            "chance": information.chance,
            "adjusted": information.adjusted,
        }
    return facts
