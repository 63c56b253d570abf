"""Licenses and languages of the models that a student was made from, for its card.

Does: list the models that its weights and its training come from; combine their licenses and languages.
Does not: read their cards (`metadata.py`), or draw the student's (`model_card.py`).
"""

import logging
import os
import re
from typing import Any
from urllib.parse import quote

from huggingface_hub import CardData

from hf_guide.errors import OptionError
from hf_guide.hub.metadata import DistillationRecord, as_list, recorded_teacher, teacher_record, training_teachers
from hf_guide.initialization.report import InitializationReport, TeacherRecord
from hf_guide.validation import did_you_mean

logger = logging.getLogger(__name__)

HUB_LICENSES = frozenset(
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m afl-3.0 "
    "artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 "
    "cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 "
    "cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 "
    "cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl "
    "lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 "
    "openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license "
    "fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown "
    "other".split()
)
"""The license identifiers that the Hub accepts in a card: https://huggingface.co/docs/hub/repositories-licenses."""

_LICENSE_KEYS = ("license", "license_name", "license_link")


def source_models(
    report: InitializationReport | None,
    record: DistillationRecord | None,
    *,
    look_up: bool,
    token: str | bool | None,
) -> list[TeacherRecord]:
    """Return the models that a student was made from: the one that it was initialized from, then those of its training.

    Of a student that was made in stages the first is the first teacher, and the student before it if its card names a license.

    Args:
        report, record: How the student was initialized and trained.
        look_up: Whether to read the card of a model that the record does not describe.
        token: Access token for that card on the Hub.
    """
    teachers = training_teachers(report, record)
    if report is None:
        return teachers
    first = report.first_stage
    sources: list[TeacherRecord] = []
    if not _is_among(teachers, first.teacher, None if report.lineage else report.teacher_fingerprint):
        if not look_up:
            sources.append(TeacherRecord(first.teacher, first.revision, source=first.teacher_source))
        elif report.lineage:
            where: Any = {"revision": first.revision, "source": first.teacher_source, "token": token}
            sources.append(recorded_teacher(first.teacher, **where))
        else:
            sources.append(_direct_teacher(report, token))
    if look_up and report.lineage and not _is_among(teachers, report.teacher_name, report.teacher_fingerprint):
        direct = _direct_teacher(report, token)
        sources += [direct] if direct.license else []
    return [*sources, *teachers]


def _direct_teacher(report: InitializationReport, token: str | bool | None) -> TeacherRecord:
    """Return the record of the model that a student was cut from: only a report that was not read from a file has its path."""
    where: Any = {"revision": report.public_revision, "source": report.teacher_source, "token": token}
    if os.path.isabs(report.teacher):
        return teacher_record(report.teacher, **where)
    return recorded_teacher(report.teacher, fingerprint=report.teacher_fingerprint, **where)


def _is_among(teachers: list[TeacherRecord], name: str, fingerprint: str | None) -> bool:
    """Return whether a model is one of the teachers: two folders of one name may hold different models."""
    known = (None, fingerprint)
    return any(each.name == name and (fingerprint is None or each.fingerprint in known) for each in teachers)


def check_license(license: str) -> None:
    """Check that a license is an identifier of the Hub, which refuses a card with another one.

    The Hub's list may have grown: one that only is not known here is a warning.

    Raises:
        OptionError: It has a form that no identifier has; names the nearest one.
    """
    if license in HUB_LICENSES:
        return
    nearest = did_you_mean(license.lower().replace(" ", "-"), sorted(HUB_LICENSES))
    advice = (
        f"{nearest} For a license that is not among them use other, and set license_name and license_link in the card."
    )
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise OptionError(f"license must be an identifier of the Hub, such as apache-2.0; found {license!r}.{advice}")
    logger.warning("The Hub is not known to have the license %r, and may refuse the card.%s", license, advice)


def set_license(data: CardData, license: str | None, sources: list[TeacherRecord]) -> None:
    """Set the license of a card's metadata: the chosen one, or the card's own, or that of all sources.

    The name and the link of a license belong to it: they are replaced with it.
    """
    if data.get("license") and license in (None, "", data["license"]):
        return
    values = {"license": license} if license else _inherited_license(sources)
    if values:
        for key in _LICENSE_KEYS:
            data.pop(key)
        for key, value in values.items():
            data[key] = value


def _inherited_license(sources: list[TeacherRecord]) -> dict[str, Any]:
    """Return the license of the models that a student was made from, if they all have the same single one."""
    if not sources or not all(isinstance(each.license, str) for each in sources):
        return {}
    (first, *others) = sources
    if any((each.license, each.license_name) != (first.license, first.license_name) for each in others):
        return {}
    links = [link for each in sources if (link := _absolute_link(each)) is not None]
    values = {"license": first.license, "license_name": first.license_name, "license_link": next(iter(links), None)}
    return {key: value for key, value in values.items() if value is not None}


def _absolute_link(teacher: TeacherRecord) -> str | None:
    """Return the link to a teacher's license: a path in its repository becomes a URL, one in a folder None."""
    link, repo_id = teacher.license_link, teacher.repo_id
    if link is None or "://" in link:
        return link
    path = quote(link.removeprefix("./"))
    return (
        f"https://huggingface.co/{repo_id}/blob/{teacher.revision or 'main'}/{path}" if repo_id is not None else None
    )


def is_inherited(data: CardData, sources: list[TeacherRecord]) -> bool:
    """Return whether the license in a card's metadata is that of every model that the student was made from."""
    chosen, name = as_list(data.get("license")), data.get("license_name")
    same = [as_list(each.license) == chosen and each.license_name == name for each in sources]
    return bool(chosen) and bool(same) and all(same)


def license_names(license: Any, license_name: str | None) -> list[str]:
    """Return the names of licenses: that of `other`, which only refers to one, is in a key of its own."""
    return [license_name if each == "other" and license_name else str(each) for each in as_list(license)]


def source_languages(sources: list[TeacherRecord]) -> list[str]:
    """Return the languages of all models that a student was made from."""
    return list(dict.fromkeys(language for each in sources for language in each.languages))
