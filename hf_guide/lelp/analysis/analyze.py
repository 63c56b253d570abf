"""What `hf-guide subclasses` does: read a dataset, listen to the teacher, forecast, and write the page."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer

from hf_guide.data.arguments import DataArguments
from hf_guide.data.class_labels import label_encoder
from hf_guide.data.loading import class_names, default_columns, find_column, load_splits
from hf_guide.data.preprocessing import preprocess
from hf_guide.errors import OptionError, SubclassError, TeacherError
from hf_guide.lelp.analysis.features import AnalysisFeatures, collect_features
from hf_guide.lelp.analysis.probe import GainEstimate, estimate_gain
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
    """What was found, and where it was written.

    Attributes:
        view: what was measured.
        page: the HTML file.
        figures: one a class, where they were asked for.
    """

    view: SubclassSummary
    page: Path
    figures: list[Path]


def analyze(
    projector: SubclassProjector,
    data: DataArguments,
    page: str | os.PathLike[str],
    *,
    teacher: str | os.PathLike[str] | None = None,
    processor: str | None = None,
    finer_column: str | None = None,
    figures: str | os.PathLike[str] | None = None,
    examples: int = 6,
    batch_size: int = 32,
    forecast: bool = True,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    show_progress: bool = True,
) -> SubclassReport:
    """Look at a projector's subclasses on a dataset, and write a page of them.

    Args:
        projector: what `SubclassProjector.from_pretrained` gives.
        data: the dataset; of its splits only `train_split` is read, and of that `max_train_examples`, drawn at random.
        page: the HTML file to write.
        teacher: a Hub id or a folder; by default what the projector was fitted to.
        processor: the tokenizer or image processor; by default the teacher's.
        finer_column: a column of finer labels to compare the subclasses with.
        figures: a folder for one figure a class as well, and for what was measured as JSON.
        examples: how many nearest examples of each subclass are shown.
        forecast: whether tiny students are trained to tell what to expect.

    Raises:
        SubclassError: the projector is of another teacher, or its teacher is not known.
        TeacherError: its teacher cannot be loaded.
        OptionError: a column that is not there.
    """
    source: dict[str, Any] = {"revision": revision, "token": token, "trust_remote_code": trust_remote_code}
    name = teacher or projector.teacher
    if not name:
        raise SubclassError("This projector does not say what its teacher is; name it with --teacher.")
    try:
        model = load_teacher(name, device=distributed_state().device, **source)
    except TeacherError as error:
        if teacher is not None:
            raise
        raise TeacherError(
            f"{error} The projector says that its teacher is {name!r}; name it with --teacher."
        ) from error
    projector.check_teacher(model)
    if projector.scores.needs_fine_labels and finer_column is None:
        raise OptionError("This projector splits by finer labels; name their column with --finer-column.")
    task = task_of(model)
    whole = load_splits(replace(data, validation_share=0.0, max_train_examples=None))[0]
    labels = list(projector.id2label.values())
    raw = mark_missing_labels(subsample(whole, data.max_train_examples), task, data, labels)
    if finer_column is not None and finer_column not in raw.column_names:
        raise OptionError(
            f"{data.name} has no column {finer_column!r}; it has {raw.column_names}."
            f"{did_you_mean(finer_column, raw.column_names)}"
        )
    of_images = task is Task.IMAGE_CLASSIFICATION
    loader = AutoImageProcessor if of_images else AutoTokenizer
    processing_class = load_processing_class(loader, processor or name, **({} if processor else source))
    prepared = preprocess(task, raw, None, processing_class, data, labels=labels, config=model.config)
    heard = collect_features(
        model, prepared.train, prepared.collator, batch_size=batch_size, show_progress=show_progress
    )
    finer = None if finer_column is None else encode_labels(raw, finer_column)
    found, why_not = _estimate_gain_or_reason(projector, heard, finer) if forecast else (None, None)
    view = summarize_subclasses(
        projector,
        heard.embeddings,
        heard.logits,
        heard.labels,
        finer,
        examples=examples,
        forecast=found,
        no_forecast=why_not,
        subclass_labels=finer if projector.scores.needs_fine_labels else None,
        title=f"Subclasses of {data.name}",
    )
    column = find_column(raw, task, "image" if of_images else "text", data)

    def show(row: int) -> Any:
        return raw[row][column]

    written = write_page(view, page, show)
    return SubclassReport(view, written, [] if figures is None else _write_figures(view, Path(figures)))


def subsample(raw: Dataset, count: int | None) -> Dataset:
    """Return so many examples, drawn with a fixed seed, for data may lie in order of their classes."""
    return raw if count is None or len(raw) <= count else raw.shuffle(seed=0).select(range(count))


def mark_missing_labels(raw: Dataset, task: Task, options: DataArguments, labels: list[str]) -> Dataset:
    """Return a dataset with a column of labels that says of each example without one, None or -1, that there is none.

    Args:
        labels: the names of the teacher's classes, whose numbers stand for labels where one is missing.

    Raises:
        OptionError: a column that is not there, or a label that is none of the classes.
    """
    known = any(name in raw.column_names for name in default_columns(task, "label"))
    if options.label_column is None and not known:
        return raw.add_column("label", [IGNORE_INDEX] * len(raw))
    column = find_column(raw, task, "label", options)
    values = list(raw[column])
    there = [row for row, value in enumerate(values) if value is not None and value not in MISSING_LABELS]
    if len(there) == len(values):
        return raw
    numbers = [IGNORE_INDEX] * len(values)
    if there:
        names = class_names(raw.select_columns([column]).select(there), column)
        number = label_encoder(names, labels, column)
        for row in there:
            numbers[row] = number(values[row])
    return raw.remove_columns(column).add_column(column, numbers)


def encode_labels(raw: Dataset, column: str) -> Tensor:
    """Return a column of labels as numbers, (N,): names in their order, whole numbers as they stand.

    Raises:
        OptionError: the labels are neither.
    """
    values = list(raw[column])
    if all(isinstance(value, int) for value in values):
        return torch.tensor(values).long()
    if not all(isinstance(value, str) for value in values):
        kinds = sorted({type(value).__name__ for value in values})
        raise OptionError(f"The column {column!r} holds {', '.join(kinds)}; labels are whole numbers or names.")
    places = {name: number for number, name in enumerate(sorted(set(values)))}
    return torch.tensor([places[value] for value in values])


def _estimate_gain_or_reason(
    projector: SubclassProjector, heard: AnalysisFeatures, finer: Tensor | None
) -> tuple[GainEstimate | None, str | None]:
    """Return a forecast, or why there is none: the rest of the page does without."""
    try:
        found = estimate_gain(
            projector,
            heard.embeddings,
            heard.logits,
            heard.features,
            heard.labels,
            classifier_weight=heard.classifier_weight,
            subclass_labels=finer if projector.scores.needs_fine_labels else None,
        )
    except SubclassError as error:
        return None, str(error)
    return found, None


def _write_figures(view: SubclassSummary, folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for each in view.classes:
        path = folder / f"class_{each.number}.png"
        plot_class(each, path)
        paths.append(path)
    facts: dict[str, Any] = {
        "classes": {
            each.name: {
                "examples": len(each.rows),
                "sizes": each.sizes.tolist(),
                "explained": each.explained,
                "nearest": each.nearest,
            }
            for each in view.classes
        }
    }
    if view.forecast is not None:
        facts["forecast"] = view.forecast.to_dict()
    if view.no_forecast is not None:
        facts["no_forecast"] = view.no_forecast
    if view.knowledge is not None:
        facts["finer_labels"] = {"told": view.knowledge.told, "entropy": view.knowledge.entropy}
        facts["finer_labels"] |= {"by_chance": view.knowledge.by_chance, "share": view.knowledge.share}
    atomic_write_text(folder / "subclasses.json", json.dumps(facts, indent=2) + "\n")
    return paths
