"""Model cards: what a student published on the Hub says about where it came from."""

import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_guide.initialization.report import InitializationReport, format_count


def write_model_card(
    folder: str | os.PathLike[str],
    report: InitializationReport,
    *,
    model_id: str | None = None,
    license: str | None = None,
    datasets: Sequence[str] | None = None,
    results: Sequence[EvalResult] | None = None,
) -> Path:
    """Write `README.md` into a student's folder and return its path. One that is there already is left as it is.

    Args:
        folder: where the student was saved.
        report: how the student was made.
        model_id: the student's name on the Hub; by default the folder's name.
        license: the licence's identifier on the Hub, such as "apache-2.0".
        datasets: ids of the datasets that the student was trained on.
        results: evaluations, shown as a table and in the card's metadata.
    """
    path = Path(folder) / "README.md"
    if path.exists():
        return path
    model_id = model_id or Path(folder).resolve().name
    results = list(results or [])
    data = ModelCardData(
        base_model=teacher_repo_id(report),
        library_name="transformers",
        license=license,
        datasets=list(datasets) if datasets else None,
        tags=["hf_guide", str(report.options["method"])],
        eval_results=results or None,
        model_name=model_id if results else None,
    )
    card = ModelCard.from_template(
        data,
        template_str=resources.files("hf_guide.model_cards").joinpath("student.md").read_text(encoding="utf-8"),
        report=report,
        model_id=model_id,
        student_size=format_count(report.student_parameters),
        teacher_size=format_count(report.teacher_parameters),
        results=results,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    card.save(path)
    return path


def teacher_repo_id(report: InitializationReport) -> str | None:
    """The teacher's id on the Hub, or None where the teacher was a folder or a model without one."""
    names_a_folder = report.teacher_name != report.teacher
    # A name without an owner is an id only if the Hub gave a commit for it; otherwise it is a model's class.
    if names_a_folder or ("/" not in report.teacher and report.revision is None):
        return None
    try:
        validate_repo_id(report.teacher)
    except HFValidationError:
        return None
    return report.teacher
