"""Licenses and languages of the models that a student was made from, for its card.

Does: list the models that its weights and its training come from; combine their licenses and languages.
Does not: read their cards (`metadata.py`), or draw the student's (`model_card.py`).
"""

from typing import Any

from huggingface_hub import CardData

from hf_guide.hub.metadata import DistillationRecord, TeacherRecord, as_list, teacher_record
from hf_guide.initialization.report import InitializationReport


def source_models(
    report: InitializationReport | None,
    record: DistillationRecord | None,
    *,
    look_up: bool,
    token: str | bool | None,
) -> list[TeacherRecord]:
    """Return the models that a student was made from: the one that it was initialized from, then those of its training.

    Of a student that was made in stages it is the first teacher, and the student before it if its card names a license.

    Args:
        report, record: How the student was initialized and trained.
        look_up: Whether to read the card of a model that the record does not describe.
        token: Access token for that card on the Hub.
    """
    teachers = record.teachers if record is not None else []
    if report is None:
        return teachers
    name, revision, _ = report.first_teacher
    sources: list[TeacherRecord] = []
    if not _is_among(teachers, name, None if report.lineage else report.teacher_fingerprint):
        location = name if report.lineage else report.teacher
        first = teacher_record(location, revision=revision, token=token) if look_up else TeacherRecord(name, revision)
        sources.append(first)
    if look_up and report.lineage and not _is_among(teachers, report.teacher_name, report.teacher_fingerprint):
        direct = teacher_record(report.teacher, revision=report.public_revision, token=token)
        sources += [direct] if direct.license else []
    return [*sources, *teachers]


def _is_among(teachers: list[TeacherRecord], name: str, fingerprint: str | None) -> bool:
    """Return whether a model is one of the teachers: two folders of one name may hold different models."""
    known = (None, fingerprint)
    return any(each.name == name and (fingerprint is None or each.fingerprint in known) for each in teachers)


def inherited_license(sources: list[TeacherRecord]) -> dict[str, Any]:
    """Return the license of the models that a student was made from, if they all have the same single one."""
    if not sources or not all(isinstance(each.license, str) for each in sources):
        return {}
    (first, *others) = sources
    if any((each.license, each.license_name) != (first.license, first.license_name) for each in others):
        return {}
    return {"license": first.license, "license_name": first.license_name, "license_link": first.license_link}


def is_inherited(data: CardData, sources: list[TeacherRecord]) -> bool:
    """Return whether the license in a card's metadata is that of every model that the student was made from."""
    chosen = as_list(data.get("license"))
    return bool(chosen) and bool(sources) and all(as_list(each.license) == chosen for each in sources)


def source_languages(sources: list[TeacherRecord]) -> list[str]:
    """Return the languages of all models that a student was made from."""
    return list(dict.fromkeys(language for each in sources for language in each.languages))
