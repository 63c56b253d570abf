"""Model cards: what a published student says about where it came from.

Does: draw the part of `README.md` that is ours, between two comments, and our keys of its metadata.
Does not: touch a word outside them, or upload anything (`hub/push.py` does).
"""

import contextlib
import json
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import CardData, EvalResult, RepoCard

from hf_guide.errors import HfGuideError
from hf_guide.hub.card_files import (
    CARD_NAME,
    LIBRARY_TAG,
    as_list,
    card_title,
    extract_section,
    is_default_template,
    merge_metadata,
    merge_results,
    read_card,
    replace_section,
    write_card,
)
from hf_guide.hub.metadata import (
    RECORD_NAME,
    SUBCLASS_HEAD_AGREEMENT,
    DistillationRecord,
    MetricRow,
    TeacherRecord,
    format_metric,
    load_record,
    result_rows,
    to_eval_results,
)
from hf_guide.hub.provenance import teacher_record, teacher_repo_id, to_repo_id
from hf_guide.hub.saved_model import SavedModel
from hf_guide.initialization.report import REPORT_NAME, InitializationReport, format_count
from hf_guide.tasks import pipeline_tag, task_of_class_name
from hf_guide.utils.escaping import escape_markdown, markdown_code, to_single_line
from hf_guide.utils.public_names import is_local
from hf_guide.visualization import loss_curves, plot_explained_variance, plot_training

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
    datasets: Sequence[str] | None = None,
    tags: Sequence[str] | None = None,
    results: Sequence[EvalResult] | None = None,
    token: str | bool | None = None,
) -> Path:
    """Draw our part of a student's `README.md`, with the plot it shows, and return the card's path.

    A card that is there keeps its text and its metadata; only what stands between `<!-- hf_guide:begin -->` and
    `<!-- hf_guide:end -->` is drawn again, and our keys of the metadata. A card without them gets the part at its end.

    Args:
        folder: where the student was saved.
        report: how the student was made; by default `initialization_report.json` in the folder, where there is one.
        record: how it was trained; by default `distillation.json` in the folder, where there is one.
        model_id: the student's name on the Hub; by default the card's title, if that is such a name, or the folder's.
        license: the licence's identifier on the Hub, such as "apache-2.0"; by default the card's own, or the teacher's.
        language: codes such as "en"; by default the card's own, the record's, or the teacher's.
        datasets: ids of the datasets that the student was trained on, besides those of the record.
        tags: tags besides ours.
        results: evaluations besides those of the record, shown as a table and in the card's metadata.
        token: access token for the teacher's card on the Hub.

    Raises:
        HfGuideError: there is neither a report nor a record; or the card that is there cannot be read.
    """
    folder = Path(folder)
    report = report or (InitializationReport.load(folder) if (folder / REPORT_NAME).is_file() else None)
    record = record or (load_record(folder) if (folder / RECORD_NAME).is_file() else None)
    if report is None and record is None:
        raise HfGuideError(
            f"{folder} holds neither {REPORT_NAME} nor {RECORD_NAME}, so there is nothing to tell of it; name the folder "
            "of a student that hf_guide made or trained."
        )
    path = folder / CARD_NAME
    card = read_card(path)
    data = card.data if card is not None else CardData()
    if is_default_template(card):
        card = None
    model_id = model_id or _repo_id_from_title(card) or folder.resolve().name
    teachers = _teacher_records(report, record, look_up=not (license or data.get("license")), token=token)
    saved = SavedModel.read(folder)
    student_class = saved.stock_class or _class_from_records(report, record)
    adapter = saved.adapter_base
    _remove_local_base_models(data)
    task = (record.task if record is not None else None) or pipeline_tag(student_class)
    from_record = to_eval_results(record) if record is not None else []
    merge_metadata(
        data,
        ours={"base_model": _base_models(report, teachers, adapter)} | _explicit_metadata(license, language),
        added={
            "datasets": [*(record.datasets if record is not None else []), *(datasets or [])],
            "tags": [*_default_tags(report, record), *(tags or [])],
        },
        defaults={"library_name": "transformers" if adapter is None else "peft", "pipeline_tag": task}
        | _inherited_licence(teachers)
        | {"language": (record.languages if record is not None else []) or _languages(teachers)},
    )
    told = merge_results(data, [*from_record, *(results or [])], model_id)
    figures = result_rows(record) if record is not None else []
    figures += [_metric_row(result) for result in told if result not in from_record]
    plots = draw_plots(report, record, folder)
    drawn = RepoCard.from_template(
        CardData(),
        template_str=resources.files("hf_guide.model_cards").joinpath("student.md").read_text(encoding="utf-8"),
        model_id=model_id,
        report=report,
        record=record,
        student_class=student_class,
        student_size=_format_student_size(report, record),
        teacher_size=format_count(report.teacher_parameters) if report is not None else None,
        teacher=_markdown_link(report.teacher_name, teacher_repo_id(report)) if report is not None else None,
        teachers=[(_markdown_link(one.name, to_repo_id(one.name, one.revision)), one) for one in teachers],
        adapter=adapter,
        adapter_on_hub=adapter is not None and to_repo_id(adapter, None) is not None,
        code_comment=to_single_line,
        auto_class=f"AutoPeftModel{_auto_class_suffix(student_class)}",
        code_class=saved.code_class,
        subclasses=_describe_subclasses(saved.config, record),
        processor=saved.processor,
        plot=PLOT_NAME if PLOT_NAME in plots else None,
        training_plot=TRAINING_PLOT_NAME if TRAINING_PLOT_NAME in plots else None,
        results=_results_table(figures),
        license=", ".join(map(str, as_list(data.get("license")))),
        inherited=data.get("license") in [teacher.license for teacher in teachers],
        format_count=format_count,
        format_figure=format_metric,
        markdown=escape_markdown,
        code=markdown_code,
        quoted=lambda text: json.dumps(to_single_line(text), ensure_ascii=False).replace("<!--", "<\\u0021--"),
    )
    if card is None:
        card = drawn
        card.data = data
    else:
        card.text = replace_section(card.text, extract_section(drawn.text), path)
    write_card(path, card)
    return path


def redraw_card(folder: str | os.PathLike[str], **told: Any) -> Path:
    """Draw our part of the card of a folder again, from what is saved in the folder, and return the card's path.

    `told` are the keywords of `write_model_card`.

    Raises:
        NotADirectoryError: there is no such folder.
        HfGuideError: it holds no student of ours, or a card that cannot be read.
    """
    if not Path(folder).is_dir():
        raise NotADirectoryError(f"{folder} is not a folder; name the one that a student was saved in.")
    return write_model_card(folder, **told)


def draw_plots(report: InitializationReport | None, record: DistillationRecord | None, folder: Path) -> set[str]:
    """Draw what a card shows beside it, where there is something to draw and matplotlib; return the names of the plots.

    The variance that each width keeps, and the losses during the training.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = set()
    with contextlib.suppress(ImportError):  # then plots of an earlier time still stand
        if report is not None and report.explained_variance:
            wanted.add(PLOT_NAME)
            plot_explained_variance(report, folder / PLOT_NAME)
    with contextlib.suppress(ImportError):
        if record is not None and loss_curves(record.history):
            wanted.add(TRAINING_PLOT_NAME)
            plot_training(record.history, folder / TRAINING_PLOT_NAME)
    return {name for name in wanted if (folder / name).is_file()}


def _teacher_records(
    report: InitializationReport | None,
    record: DistillationRecord | None,
    *,
    look_up: bool,
    token: str | bool | None,
) -> list[TeacherRecord]:
    """Return who taught; where nobody did, the teacher that the student was made of."""
    if record is not None and record.teachers:
        return record.teachers
    if report is None:
        return []
    if look_up:
        return [teacher_record(report.teacher, revision=report.revision, token=token)]
    return [TeacherRecord(report.teacher_name, report.public_revision)]


def _base_models(
    report: InitializationReport | None, teachers: list[TeacherRecord], adapter: str | None
) -> str | list[str] | None:
    if adapter is not None:
        return to_repo_id(adapter, None)
    made_of = [teacher_repo_id(report)] if report is not None else []
    found = [*made_of, *(to_repo_id(teacher.name, teacher.revision) for teacher in teachers)]
    ids = list(dict.fromkeys(name for name in found if name is not None))
    return ids[0] if len(ids) == 1 else ids or None


def remove_local_paths(folder: Path) -> None:
    """Take folders of this machine out of the metadata of a card that PEFT wrote into `folder`, where there is one."""
    path = folder / CARD_NAME
    card = read_card(path)
    if card is not None and any(is_local(str(name)) for name in as_list(card.data.get("base_model"))):
        _remove_local_base_models(card.data)
        write_card(path, card)


def _remove_local_base_models(data: CardData) -> None:
    """Take folders of this machine out of a card's metadata: PEFT names the base of an adapter by where it was loaded."""
    bases = as_list(data.get("base_model"))
    known = [name for name in bases if not is_local(str(name))]
    if len(known) < len(bases):
        data["base_model"] = known or None
        gone = {f"base_model:adapter:{name}" for name in bases if name not in known}
        data["tags"] = [tag for tag in as_list(data.get("tags")) if tag not in gone] or None


def _explicit_metadata(license: str | None, language: str | Sequence[str] | None) -> dict[str, Any]:
    return {"license": license, "language": language if language is None or isinstance(language, str) else [*language]}


def _inherited_licence(teachers: list[TeacherRecord]) -> dict[str, str | None]:
    """Return the licence of the teachers, where they have one in common."""
    if len({(teacher.license, teacher.license_name) for teacher in teachers}) != 1:
        return {}
    (first, *_) = teachers
    return {"license": first.license, "license_name": first.license_name, "license_link": first.license_link}


def _languages(teachers: list[TeacherRecord]) -> list[str]:
    return list(dict.fromkeys(language for teacher in teachers for language in teacher.languages))


def _default_tags(report: InitializationReport | None, record: DistillationRecord | None) -> list[str]:
    tags = [LIBRARY_TAG]
    if report is not None and "method" in report.options:
        tags.append(str(report.options["method"]))
    return [*tags, "distillation"] if record is not None else tags


def _repo_id_from_title(card: RepoCard | None) -> str | None:
    title = card_title(card)
    return to_repo_id(title, None) if title is not None else None


def _class_from_records(report: InitializationReport | None, record: DistillationRecord | None) -> str:
    known = report.student_class if report is not None else record.student_class if record is not None else None
    return known if known and known.isidentifier() else "AutoModel"


def _describe_subclasses(config: dict[str, Any], record: DistillationRecord | None) -> str | None:
    """Return what a classifier's labels have to do with subclasses; None where it never had any."""
    count = config.get("num_subclasses")
    count = count if isinstance(count, int) else 1
    if count > 1 and "student" in config:
        return (
            f"Its labels are classes. The stock model within tells {count} pseudo-subclasses of each apart, and a class's "
            "logit is the log-sum-exp of theirs, exactly as it was trained and measured."
        )
    if count > 1:
        return (
            f"Its labels are {count} pseudo-subclasses of each class, class by class: the probability of a class is the sum "
            "of its subclasses'."
        )
    if record is not None and SUBCLASS_HEAD_AGREEMENT in record.metrics:
        return (
            "It was trained on pseudo-subclasses; its head was then refitted to one row a class, which says nearly the "
            f"same: on examples that it was not fitted to, it chooses the same class in {record.metrics[SUBCLASS_HEAD_AGREEMENT]:.2%}."
        )
    return None


def _auto_class_suffix(student_class: str) -> str:
    task = task_of_class_name(student_class)
    suffix = "" if task is None else task.row.auto_class.removeprefix("AutoModel")
    return suffix if suffix in _PEFT_AUTO_CLASSES else ""


def _format_student_size(report: InitializationReport | None, record: DistillationRecord | None) -> str | None:
    known = (
        report.student_parameters if report is not None else record.student_parameters if record is not None else None
    )
    return format_count(known) if known else None


def _markdown_link(name: str, repo_id: str | None) -> str:
    return (
        f"[{escape_markdown(name)}](https://huggingface.co/{repo_id})" if repo_id is not None else markdown_code(name)
    )


def _metric_row(result: EvalResult) -> MetricRow:
    return MetricRow(result.dataset_name, result.metric_name or result.metric_type, result.metric_value)


def _results_table(figures: list[MetricRow]) -> list[list[str]]:
    """Return the results as rows of cells, the header first; without the columns of which nothing is known."""
    columns: dict[str, list[Any]] = {
        "dataset": [figure.dataset for figure in figures],
        "metric": [figure.metric for figure in figures],
        "this student": [figure.student for figure in figures],
        "its teacher": [figure.teacher for figure in figures],
        "a random start": [figure.random for figure in figures],
        "gap closed": [None if figure.gap_closed is None else f"{figure.gap_closed:.1%}" for figure in figures],
    }
    known = {name: cells for name, cells in columns.items() if any(cell is not None for cell in cells)}
    return [list(known), *([format_metric(cell) for cell in row] for row in zip(*known.values(), strict=True))]
