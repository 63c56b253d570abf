"""Where a student came from, as the Hub knows it: ids, teachers' licences, and the card a repository has already.

Does: read from the Hub or a folder; keep this machine's paths out of what is published.
Does not: write or upload a card (`hub/model_card.py` and `hub/push.py` do).
"""

import logging
import os
import shutil
from pathlib import Path

from huggingface_hub import CardData, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from hf_guide.errors import HfGuideError
from hf_guide.hub.card_files import CARD_NAME, as_list, is_default_template, read_card
from hf_guide.hub.metadata import TeacherRecord
from hf_guide.initialization.report import InitializationReport
from hf_guide.utils.fingerprint import files_fingerprint
from hf_guide.utils.public_names import is_local, public_name

logger = logging.getLogger(__name__)


def fetch_card(
    repo_id: str,
    folder: str | os.PathLike[str],
    *,
    token: str | bool | None = None,
    revision: str | None = None,
) -> Path | None:
    """Put the card that a repository on the Hub has into a folder that has none, so that its text is kept by a push.

    A card that nobody filled in counts as none.

    Returns:
        The card's path in the folder, or None where neither has one.

    Raises:
        OSError: the Hub cannot be asked: then nothing is known of the text that a push might overwrite.
        HfGuideError: the card in the folder cannot be read.
    """
    path = Path(folder) / CARD_NAME
    here = path if path.is_file() else None
    if here is not None and not is_default_template(read_card(path)):
        return path
    try:
        found = hf_hub_download(repo_id, CARD_NAME, token=token, revision=revision)
    except (RemoteEntryNotFoundError, RevisionNotFoundError, RepositoryNotFoundError):
        return here
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(found, path)
    return path


def teacher_record(
    name: str,
    *,
    revision: str | None = None,
    weight: float = 1.0,
    captured: bool = False,
    token: str | bool | None = None,
) -> TeacherRecord:
    """Return a teacher as a record tells of it: its public name, and the licence and languages its own card names.

    Args:
        name: an id on the Hub, a folder, or a model's class. Of a folder only the last part of its path is told.
        revision, token: for its card on the Hub. Where that cannot be had, the licence is not known.
    """
    path: Path | None
    fingerprint = None
    if is_local(name):
        path = Path(name).expanduser() / CARD_NAME
        fingerprint = files_fingerprint(path.parent) if path.parent.is_dir() else None
        name = public_name(name)
        revision = revision if "/" in name else None
    else:
        path = _download_card(name, revision, token)
    data = CardData()
    try:
        card = read_card(path) if path is not None else None
        data = card.data if card is not None else data
    except HfGuideError as error:
        logger.warning("The teacher's licence is not known: %s", error)
    licence = {key: data.get(key) for key in ("license", "license_name", "license_link")}
    licence["license"] = next(iter(as_list(licence["license"])), None)
    licence = {key: None if value is None else str(value) for key, value in licence.items()}
    languages = [str(language) for language in as_list(data.get("language"))]
    return TeacherRecord(name, revision, weight, captured, languages=languages, fingerprint=fingerprint, **licence)


def teacher_repo_id(report: InitializationReport) -> str | None:
    """The teacher's id on the Hub, or None where the teacher was a folder or a model without one."""
    return to_repo_id(report.teacher_name, report.public_revision)


def to_repo_id(name: str, revision: str | None) -> str | None:
    """A public name as an id on the Hub, or None where it is that of a folder or of a class.

    A name without an owner is an id only if the Hub gave a commit for it.
    """
    if "/" not in name and revision is None:
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _download_card(name: str, revision: str | None, token: str | bool | None) -> Path | None:
    if to_repo_id(name, revision) is None:
        return None
    try:
        return Path(hf_hub_download(name, CARD_NAME, revision=revision, token=token))
    except (EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled) as error:
        logger.info("The card of %s could not be had: %s", name, error)
        return None
