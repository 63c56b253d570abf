"""Draw a student's model card: its section of `README.md`, between two comments, and its plots.

Does: render `model_cards/student.md` from the initialization report, the training record and the folder's configs; replace
only that section and our keys of the metadata. Does not: change other text of the card, or upload anything (`push.py`).
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import CardData, EvalResult, ModelCard, ModelCardData, RepoCard

from hf_guide.errors import HfGuideError
from hf_guide.hub.licenses import (
    check_license,
    is_inherited,
    license_names,
    set_license,
    source_languages,
    source_models,
)
from hf_guide.hub.metadata import (
    CARD_NAME,
    LIBRARY_TAG,
    MODEL_INDEX,
    RECORD_NAME,
    SUBCLASS_HEAD_AGREEMENT,
    DistillationRecord,
    MetricRow,
    as_list,
    check_languages,
    check_repo_id,
    load_record,
    merge_metadata,
    merge_results,
    read_card,
    result_rows,
    to_eval_results,
    training_of_stage,
    training_teachers,
)
from hf_guide.hub.saved_model import SavedModel, saved_weights_fingerprint, stored_sizes
from hf_guide.initialization.report import (
    REPORT_NAME,
    InitializationReport,
    TeacherRecord,
    format_count,
    format_ranges,
)
from hf_guide.tasks import SENTENCE_PIPELINE_TAGS, SENTENCE_TAGS, pipeline_tag, task_of_class_name
from hf_guide.utils.escaping import escape_markdown, markdown_code, to_single_line
from hf_guide.utils.files import atomic_write
from hf_guide.utils.public_names import is_local, to_repo_id
from hf_guide.visualization import loss_curves, plot_explained_variance, plot_training

logger = logging.getLogger(__name__)

BEGIN = "<!-- hf_guide:begin -->"
END = "<!-- hf_guide:end -->"
PLOT_NAME = "variance_explained.png"
TRAINING_PLOT_NAME = "training.png"

_PEFT_AUTO_CLASSES = ("ForCausalLM", "ForSeq2SeqLM", "ForSequenceClassification", "ForTokenClassification")
"""How the names of PEFT's Auto classes end; `AutoPeftModel` itself finds the class of any other."""


def write_model_card(
    folder: str | os.PathLike[str],
    report: InitializationReport | None = None,
    *,
    record: DistillationRecord | None = None,
    model_id: str | None = None,
    license: str | None = None,
    language: str | Sequence[str] | None = None,
    datasets: str | Sequence[str] | None = None,
    tags: str | Sequence[str] | None = None,
    results: Sequence[EvalResult] | None = None,
    saved_in: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
) -> Path:
    """Draw our section of a student's `README.md` and its plots, and return the card's path.

    An existing card keeps its text and metadata: only the section between `<!-- hf_guide:begin -->` and
    `<!-- hf_guide:end -->`, and our keys of the metadata, are replaced. A card without these comments gets the section at
    its end. Results of other weights than those in the folder, as the last drawing and the record show, are left out, with a
    warning when these weights are first found.

    Args:
        folder: Folder of the saved student.
        report: How it was initialized; by default `initialization_report.json` of the folder, if there is one.
        record: How it was trained; by default `distillation.json` of the folder, if there is one.
        model_id: Hub id of the student; by default the one in our section of the card, otherwise the folder's name.
        license: License identifier of the Hub, such as "apache-2.0"; by default the card's, otherwise the teacher's.
        language: Language codes such as "en"; by default the card's, the record's, otherwise the teacher's.
        datasets: Ids of training datasets in addition to the record's.
        tags: Tags in addition to ours.
        results: Evaluations in addition to the record's, for the table and the metadata.
        saved_in: Folder of the student and its report where `folder` has only the card yet.
        token: Access token for the teacher's card on the Hub.

    Raises:
        OptionError: The license, a language or a dataset is none that the Hub accepts in a card.
        HfGuideError: There is neither a report nor a record, or the existing card cannot be read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write_model_card(folder, record=DistillationRecord(steps=100), model_id="me/student")
        ...     "100 steps" in path.read_text()
        True
    """
    languages, datasets, tags = (_strings(each) for each in (language, datasets, tags))
    if license:
        check_license(license)
    check_languages(languages)
    for each in datasets:
        check_repo_id("dataset_name", each)
    folder = Path(folder)
    saved_in = folder if saved_in is None else Path(saved_in)
    report = report or (InitializationReport.load(saved_in) if (saved_in / REPORT_NAME).is_file() else None)
    record = record or (load_record(folder) if (folder / RECORD_NAME).is_file() else None)
    if report is None and record is None:
        raise HfGuideError(
            f"{folder} contains neither {REPORT_NAME} nor {RECORD_NAME}, so there is nothing to write a card from; name the "
            "folder of a student that hf_guide initialized or trained."
        )
    path = folder / CARD_NAME
    card = read_card(path)
    data = card.data if card is not None else CardData()
    if is_default_template(card):
        card = None
    model_id = model_id or _recorded_repo_id(card) or folder.resolve().name
    sources = source_models(report, record, look_up=not (license or data.get("license")), token=token)
    teachers = (record.teachers if record is not None else []) or sources[:1]
    saved = SavedModel.read(saved_in)
    student_class = saved.stock_class or _class_from_records(report, record)
    former, weights = _recorded_weights(card), saved_weights_fingerprint(saved_in)
    removed = _remove_former_results(data, former, weights, path)
    is_changed = record is not None and None not in (record.weights, weights) and record.weights != weights
    if record is not None and is_changed:
        if record.metrics and former != weights and not removed:
            logger.warning(
                "The results in %s were measured on other weights than the student has now: it was trained further or edited "
                "by something other than hf_guide. They are not in %s. Evaluate it again, and add the new ones.",
                folder / RECORD_NAME,
                path,
            )
        record = dataclasses.replace(record, metrics={})
    _remove_local_base_models(data)
    record_results = to_eval_results(record) if record is not None else []
    merge_metadata(
        data,
        updates={"base_model": _base_models(report, record, saved.adapter_base)}
        | {"language": language if language is None or isinstance(language, str) else [*language]},
        appended={
            "datasets": [*(record.datasets if record is not None else []), *datasets],
            "tags": [*_default_tags(report, record), *SENTENCE_TAGS.get(saved.sentence_class, []), *tags],
        },
        defaults={
            "library_name": _library_name(saved),
            "pipeline_tag": SENTENCE_PIPELINE_TAGS.get(saved.sentence_class)
            or (record.task if record is not None else None)
            or pipeline_tag(student_class),
            "language": (record.languages if record is not None else []) or source_languages(sources),
        },
    )
    set_license(data, license, sources)
    all_results = merge_results(data, [*record_results, *(results or [])], model_id)
    rows = result_rows(record) if record is not None else []
    rows += [_metric_row(result) for result in all_results if result not in record_results]
    rendered = RepoCard.from_template(
        CardData(),
        template_str=resources.files("hf_guide.model_cards").joinpath("student.md").read_text(encoding="utf-8"),
        model_id=model_id,
        weights=weights or former,
        student_class=student_class,
        results=_results_table(rows),
        is_changed=is_changed,
        **_license_values(data, sources),
        **_report_and_record_values(report, record, teachers, draw_plots(report, record, folder)),
        student_size=_format_student_size(report, record, saved_in),
        **_saved_model_values(saved, student_class, record),
        **_FILTERS,
    )
    if card is None:
        card = rendered
        card.data = data
    else:
        card.text = replace_section(card.text, extract_section(rendered.text), path)
    write_card(path, card)
    return path


def _strings(value: str | Sequence[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else [*(value or ())]


def _report_and_record_values(
    report: InitializationReport | None,
    record: DistillationRecord | None,
    teachers: list[TeacherRecord],
    plots: set[str],
) -> dict[str, Any]:
    """Return the template's variables about initialization and training."""
    first = report.first_stage if report is not None else None
    return {
        "report": report,
        "record": record,
        "teacher_size": format_count(first.teacher_parameters) if first is not None else None,
        "teacher": _markdown_link(first.teacher, first.repo_id) if first is not None else None,
        "stages": _stages_table(report, record) if report is not None and report.lineage else [],
        "teachers": [(_markdown_link(each.name, each.repo_id), each) for each in teachers],
        "earlier": [
            format_training(each.steps, each.tokens, each.losses, each.teachers)
            for each in (record.earlier if record is not None else [])
        ],
        "plot": PLOT_NAME if PLOT_NAME in plots else None,
        "training_plot": TRAINING_PLOT_NAME if TRAINING_PLOT_NAME in plots else None,
    }


def _license_values(data: CardData, sources: list[TeacherRecord]) -> dict[str, Any]:
    """Return the template's variables about the license of the student and of the models that it was made from."""
    inherited = is_inherited(data, sources)
    known = any(source.license for source in sources)
    named = [
        (
            _markdown_link(each.name, each.repo_id),
            " and ".join(license_names(each.license, each.license_name)),
        )
        for each in sources
    ]
    return {
        "license": ", ".join(license_names(data.get("license"), data.get("license_name"))),
        "inherited": inherited,
        "source_licenses": named if known and not inherited else [],
        "several_sources": len(sources) > 1,
    }


def _saved_model_values(saved: SavedModel, student_class: str, record: DistillationRecord | None) -> dict[str, Any]:
    """Return the template's variables about how the folder is loaded."""
    adapter = saved.adapter_base
    return {
        "adapter": adapter,
        "adapter_on_hub": adapter is not None and to_repo_id(adapter, None) is not None,
        "auto_class": f"AutoPeftModel{_auto_class_suffix(student_class)}",
        "code_class": saved.code_class,
        "sentence_class": saved.sentence_class,
        "subclasses": _describe_subclasses(saved.config, record),
        "processor": saved.processor,
    }


def redraw_card(folder: str | os.PathLike[str], **card_options: Any) -> Path:
    """Draw our section of a folder's card again from the folder's files, and return the card's path.

    Args:
        folder: Folder of a student that hf_guide initialized or trained.
        **card_options: Keyword arguments of `write_model_card`.

    Raises:
        OptionError: An option is none that the Hub accepts in a card, or the id of a repository that it cannot have.
        NotADirectoryError: There is no such folder.
        HfGuideError: It contains no report and no record, or a card that cannot be read.
    """
    if card_options.get("model_id") is not None:
        check_repo_id("model_id", card_options["model_id"])
    if not Path(folder).is_dir():
        raise NotADirectoryError(f"{folder} is not a folder; name the folder that a student was saved in.")
    return write_model_card(folder, **card_options)


def draw_plots(report: InitializationReport | None, record: DistillationRecord | None, folder: Path) -> set[str]:
    """Draw the plots of a card where there is data and matplotlib is installed; return the names of the files.

    They show the variance retained at each width, and the losses during training. Plots of an earlier call stay if
    matplotlib is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = set()
    with contextlib.suppress(ImportError):
        if report is not None and report.explained_variance:
            names.add(PLOT_NAME)
            plot_explained_variance(report, folder / PLOT_NAME)
    with contextlib.suppress(ImportError):
        if record is not None and loss_curves(record.history):
            names.add(TRAINING_PLOT_NAME)
            plot_training(record.history, folder / TRAINING_PLOT_NAME)
    return {name for name in names if (folder / name).is_file()}


# The file


def write_card(path: Path, card: RepoCard) -> None:
    """Write a card atomically: an existing one may contain someone's work."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        partial.write_bytes(str(card).encode("utf-8"))


def is_default_template(card: RepoCard | None) -> bool:
    """Return whether a card is the Hub's unfilled template, with which PEFT saves every adapter."""
    template = ModelCard.from_template(ModelCardData()).text.strip()
    return card is not None and card.text.strip().startswith(template)


def replace_section(text: str, section: str, path: Path) -> str:
    """Return a card's text with our section in it: instead of an older one, or at the end.

    Args:
        text: The card below its metadata.
        section: From one comment to the other, both included.
        path: Path of the card, for the error.

    Raises:
        HfGuideError: The text contains one of the two comments without the other after it.
    """
    if "\r\n" in text:
        section = section.replace("\n", "\r\n")
    begin = text.find(BEGIN)
    end = text.find(END, max(begin, 0))
    if (begin < 0) != (end < 0) or END in text[: max(begin, 0)]:
        raise HfGuideError(
            f"{path} has only one of the comments {BEGIN} and {END}, or has them in the wrong order, so the section to "
            "replace cannot be found. Restore the missing comment, or remove both comments and the section's text."
        )
    if begin < 0:
        line = "\r\n" if "\r\n" in text else "\n"
        return f"{text.rstrip()}{line * 2}{section}{line}" if text.strip() else f"{line}{section}{line}"
    return text[:begin] + section + text[end + len(END) :]


def extract_section(text: str) -> str:
    """Return our section of a text that has one, both comments included."""
    return text[text.index(BEGIN) : text.index(END) + len(END)]


def remove_local_paths(folder: Path) -> None:
    """Remove paths of this machine from the metadata of a card that PEFT wrote into `folder`, if there is one."""
    path = folder / CARD_NAME
    card = read_card(path)
    if card is not None and any(is_local(str(name)) for name in as_list(card.data.get("base_model"))):
        _remove_local_base_models(card.data)
        write_card(path, card)


# The metadata


def _base_models(
    report: InitializationReport | None, record: DistillationRecord | None, adapter: str | None
) -> str | list[str] | None:
    if adapter is not None:
        return to_repo_id(adapter, None)
    candidates = [report.first_stage.repo_id] if report is not None else []
    candidates += [teacher.repo_id for teacher in training_teachers(report, record)]
    ids = list(dict.fromkeys(name for name in candidates if name is not None))
    return ids[0] if len(ids) == 1 else ids or None


def _remove_local_base_models(data: CardData) -> None:
    """Remove paths of this machine from a card's metadata: PEFT writes the path of an adapter's base model."""
    bases = as_list(data.get("base_model"))
    public = [name for name in bases if not is_local(str(name))]
    if len(public) < len(bases):
        data["base_model"] = public or None
        local_tags = {f"base_model:adapter:{name}" for name in bases if name not in public}
        data["tags"] = [tag for tag in as_list(data.get("tags")) if tag not in local_tags] or None


def _remove_former_results(data: CardData, former: str | None, weights: str | None, path: Path) -> bool:
    """Remove a card's results if they were measured on other weights than those that are saved now; return whether it had any.

    Both are fingerprints; without either it is not known, and the results stay.
    """
    if former is None or weights is None or former == weights or not data.get(MODEL_INDEX):
        return False
    logger.warning(
        "The results in the metadata of %s were measured on other weights than the student has now, and are removed: %s. "
        "Evaluate it again, and add the new ones.",
        path,
        data.pop(MODEL_INDEX),
    )
    return True


def _recorded_weights(card: RepoCard | None) -> str | None:
    """Return the fingerprint of the weights that our section of a card was drawn for; None if it has none."""
    found = re.search(r"<!-- hf_guide:weights ([0-9a-f]+) -->", _section_of(card))
    return found[1] if found is not None else None


def _library_name(saved: SavedModel) -> str:
    if saved.adapter_base is not None:
        return "peft"
    return "transformers" if saved.sentence_class is None else "sentence-transformers"


def _default_tags(report: InitializationReport | None, record: DistillationRecord | None) -> list[str]:
    tags = [LIBRARY_TAG]
    if report is not None and "method" in report.options:
        tags.append(str(report.options["method"]))
    return [*tags, "distillation"] if record is not None else tags


def _section_of(card: RepoCard | None) -> str:
    return card.text.partition(BEGIN)[2].partition(END)[0] if card is not None else ""


def _recorded_repo_id(card: RepoCard | None) -> str | None:
    """Return the Hub id in our section of a card, which is the first string of its code; None for a folder's name."""
    name = re.match(r'[^"`]*"([^"\\]+)"', _section_of(card).partition("```python")[2])
    return to_repo_id(name[1], None) if name is not None else None


# The text


def _class_from_records(report: InitializationReport | None, record: DistillationRecord | None) -> str:
    name = report.student_class if report is not None else record.student_class if record is not None else None
    return name if name and name.isidentifier() else "AutoModel"


def _describe_subclasses(config: dict[str, Any], record: DistillationRecord | None) -> str | None:
    """Describe how a classifier's labels relate to pseudo-subclasses; None if it was not trained with any."""
    count = config.get("num_subclasses")
    count = count if isinstance(count, int) else 1
    if count > 1 and "student" in config:
        return (
            f"Its labels are classes. The stock model inside it distinguishes {count} pseudo-subclasses of each class; the "
            "logit of a class is the log-sum-exp of its subclasses' logits, exactly as in training and evaluation."
        )
    if count > 1:
        return (
            f"Its labels are {count} pseudo-subclasses of each class, ordered by class: the probability of a class is the sum "
            "of its subclasses' probabilities."
        )
    if record is not None and SUBCLASS_HEAD_AGREEMENT in record.metrics:
        return (
            "It was trained on pseudo-subclasses; its head was then refitted to one row per class. On examples held out from "
            f"that fit, both heads predict the same class in {record.metrics[SUBCLASS_HEAD_AGREEMENT]:.2%} of cases."
        )
    return None


def _auto_class_suffix(student_class: str) -> str:
    task = task_of_class_name(student_class)
    suffix = "" if task is None else task.row.auto_class.removeprefix("AutoModel")
    return suffix if suffix in _PEFT_AUTO_CLASSES else ""


def _format_student_size(
    report: InitializationReport | None, record: DistillationRecord | None, folder: Path
) -> str | None:
    """Return the number of parameters, those of which the saved weights have another size than the report counted anew."""
    if report is None:
        return format_count(record.student_parameters) if record is not None and record.student_parameters else None
    saved = stored_sizes(folder)
    initialized = {each.name: math.prod(each.shape) for each in report.parameters}
    change = sum(saved[name] - size for name, size in initialized.items() if name in saved)
    return format_count(report.student_parameters + change) if report.student_parameters else None


def _markdown_link(name: str, repo_id: str | None) -> str:
    if repo_id is None:
        return markdown_code(name)
    return f"[{escape_markdown(name)}](https://huggingface.co/{repo_id})"


def _metric_row(result: EvalResult) -> MetricRow:
    return MetricRow(result.dataset_name, result.metric_name or result.metric_type, result.metric_value)


def _results_table(rows: list[MetricRow]) -> list[list[str]]:
    """Return the results as rows of cells, the header first; columns without any value are left out."""
    columns: dict[str, list[Any]] = {
        "dataset": [row.dataset for row in rows],
        "metric": [row.metric for row in rows],
        "this model": [row.student for row in rows],
        "teacher": [row.teacher for row in rows],
        "random initialization": [row.random for row in rows],
        "gap closed": [None if row.gap_closed is None else f"{row.gap_closed:.1%}" for row in rows],
    }
    shown = {name: cells for name, cells in columns.items() if any(cell is not None for cell in cells)}
    return [list(shown), *([format_metric(cell) for cell in cells] for cells in zip(*shown.values(), strict=True))]


def _stages_table(report: InitializationReport, record: DistillationRecord | None) -> list[list[str]]:
    """Return how a student was cut in stages as rows of cells, the header first."""
    training = {} if record is None else training_of_stage(record)
    rows = [["stage", "made from", "parameters", "method", "sizes", "blocks", "training"]]
    for number, stage in enumerate([*report.lineage, report.as_stage(**training)], 1):
        blocks = [f"{stack}: {format_ranges(sources)}" for stack, sources in stage.blocks.items()]
        trained = format_training(stage.steps, stage.tokens, stage.losses, stage.training_teachers)
        sizes = [f"{axis} {old} -> {new}" for axis, (old, new) in stage.sizes.items() if old != new]
        counts = f"{format_count(stage.teacher_parameters)} -> {format_count(stage.student_parameters)}"
        cells = [number, stage.teacher, counts, stage.method, ", ".join(sizes), "; ".join(blocks), trained]
        rows.append([escape_markdown(str(cell)) for cell in cells])
    return rows


def format_training(
    steps: int, tokens: int | None, losses: Mapping[str, float], teachers: Sequence[TeacherRecord]
) -> str:
    """Return how long a student was trained, on what and by whom, as one phrase.

    >>> format_training(100, None, {"kd": 1.0}, [TeacherRecord("org/teacher")])
    '100 steps: 1 x kd, teacher org/teacher'
    """
    if not steps and not losses:
        return "not recorded"
    length = f"{steps:,} steps" + ("" if tokens is None else f", {format_count(tokens)} tokens")
    terms = [f"{format_metric(weight)} x {name}" for name, weight in losses.items()]
    names = [each.name for each in teachers]
    parts = [" + ".join(terms)] if terms else []
    parts += [f"teacher{'s' if len(names) > 1 else ''} {' and '.join(names)}"] if names else []
    return f"{length}: {', '.join(parts)}" if parts else length


def format_metric(value: object) -> str:
    """Format a value for a table: a float in four digits, a dash for None.

    >>> format_metric(0.123456), format_metric(None)
    ('0.1235', '–')
    """
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else escape_markdown(value)


def _python_string(text: str) -> str:
    """Return a string literal for the card's code."""
    return json.dumps(to_single_line(text), ensure_ascii=False).replace("<!--", "<\\u0021--")


_FILTERS: dict[str, Any] = {
    "code": markdown_code,
    "code_comment": to_single_line,
    "format_count": format_count,
    "format_metric": format_metric,
    "markdown": escape_markdown,
    "quoted": _python_string,
}
"""Functions that the template calls."""
