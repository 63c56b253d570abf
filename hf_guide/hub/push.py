"""Save a student with its records, and push it to the Hub with a model card.

Does: check free disk space, write atomically, add `initialization_report.json` and `distillation.json` to the weights, and
upload all of it in one commit. Does not: change the student's class, or what the stock class writes.
"""

import copy
import dataclasses
import inspect
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
    hf_hub_download,
    is_offline_mode,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import PreTrainedModel
from transformers.utils import PushToHubMixin

from hf_guide.errors import OptionError
from hf_guide.hub.metadata import CARD_NAME, RECORD_NAME, DistillationRecord, check_repo_id, read_card, save_record
from hf_guide.hub.model_card import PLOT_NAME, TRAINING_PLOT_NAME, is_default_template, write_model_card
from hf_guide.hub.saved_model import saved_weights_fingerprint, stores_float16
from hf_guide.initialization.report import InitializationReport
from hf_guide.models.code_references import clean_saved_folder
from hf_guide.models.sentence_files import write_sentence_modules
from hf_guide.models.sentence_modules import attached_sentence_modules
from hf_guide.models.token_rows import attached_tokenizer
from hf_guide.utils.files import DiskError, atomic_write, check_disk_space, is_write_error, staged_update
from hf_guide.utils.finite import check_weights_finite

logger = logging.getLogger(__name__)

LOCAL_CARD_NAME = "_README.local.md"
"""A folder's card that another one from the Hub has replaced; `Trainer` pushes no file whose name begins with "_"."""


class StudentSaver:
    """A student's `save_pretrained`: its class's, plus the report.

    It is an attribute of the instance, so that the class stays the stock one, and an object rather than a function, so that
    it is copied and pickled with its student. It references the student as a bound method does.
    """

    def __init__(self, student: PreTrainedModel):
        self.student = student

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Save as the student's class does, and write `initialization_report.json` into the same folder."""
        save = type(self.student).save_pretrained
        save_student(self.student, save, save_directory, is_main_process, state_dict, push_to_hub, **options)


class StudentPusher:
    """A student's `push_to_hub`: the files that the stock method uploads, and a model card.

    An attribute of the instance, as `StudentSaver`. It takes the keyword arguments of `transformers.utils.PushToHubMixin`, and
    `save_options`: other arguments of `save_pretrained`, such as `state_dict` and `variant`.
    """

    def __init__(self, student: PreTrainedModel):
        self.student = student

    def __call__(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "50GB",
        tags: list[str] | None = None,
        save_options: Mapping[str, Any] | None = None,
    ) -> CommitInfo:
        """Upload the student in one commit; an existing card of the repository keeps all text outside of our section.

        The record and the plots of a former student, which this one does not have, are deleted in the same commit.
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            _create_branch(api, repo_id, revision, create_pr)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            fetch_card(repo_id, folder, token=token, revision=revision)
            self.student.save_pretrained(folder, max_shard_size=max_shard_size, **(save_options or {}))
            report: Any = self.student.initialization_report
            model_tags = [*(self.student.model_tags or []), *(tags or [])]
            write_model_card(folder, report, model_id=repo_id, tags=model_tags, token=token)
            class_name = type(self.student).__name__
            files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
            former = [
                name
                for name in (RECORD_NAME, TRAINING_PLOT_NAME, PLOT_NAME)
                if name not in files and api.file_exists(repo_id, name, revision=revision)
            ]
            return api.create_commit(
                repo_id=repo_id,
                operations=[
                    *(CommitOperationAdd(name, file) for name, file in files.items()),
                    *(CommitOperationDelete(name) for name in former),
                ],
                commit_message=commit_message
                or f"Upload {'model' if 'Model' in class_name else class_name}",  # as the stock method prints it
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )


def _create_branch(api: HfApi, repo_id: str, branch: str, create_pr: bool) -> None:
    try:
        api.create_branch(repo_id, branch=branch, exist_ok=True)
    except HfHubHTTPError as error:
        # Users who may only open a pull request cannot create a branch; a missing one fails in the commit.
        if not (create_pr and error.response.status_code == 403):
            raise


def fetch_card(
    repo_id: str,
    folder: str | os.PathLike[str],
    *,
    token: str | bool | None = None,
    revision: str | None = None,
    seen: set[bytes] | None = None,
) -> Path | None:
    """Put a repository's model card into a folder where the folder's own is not made from it, so that a push keeps its text.

    The folder's card stays where the repository has none, the same, or one in `seen`: nobody has changed it since, so only
    the folder's can have new text. Otherwise the repository's replaces it. If the folder's is not in `seen` either, both may
    have text of people; it is then moved to `_README.local.md`, with a warning. An unfilled template counts as no card.

    Args:
        repo_id: The repository.
        folder: The folder that is pushed to it.
        token, revision: As in `hf_hub_download`.
        seen: Cards that were fetched into this folder or pushed from it; a card that is fetched is added.

    Returns:
        The card's path in the folder, or None if neither the folder nor the repository has one.

    Raises:
        OSError: The Hub does not return the card, so a push could overwrite text that was not seen. Where it cannot be reached
            at all, the folder's card stays if there is one.
        HfGuideError: The card in the folder cannot be read.
    """
    path = Path(folder) / CARD_NAME
    seen = set() if seen is None else seen
    local = path.read_bytes() if path.is_file() and not is_default_template(read_card(path)) else None
    try:
        published = _published_card(repo_id, token=token, revision=revision)
    except LocalEntryNotFoundError as error:
        if local is None or isinstance(error.__cause__, HfHubHTTPError):
            raise
        return path
    if published is None:
        return path if path.is_file() else None
    unchanged, fetched = local is not None and published in {local, *seen}, local in seen
    seen.add(published)
    if unchanged:
        return path
    if local is not None and not fetched:
        path.replace(path.with_name(LOCAL_CARD_NAME))
        logger.warning(
            "The model card of %s on the Hub has other text than %s, and is kept. The other one is now %s: copy from it what "
            "the card should have.",
            repo_id,
            path,
            LOCAL_CARD_NAME,
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        partial.write_bytes(published)
    return path


def _published_card(repo_id: str, *, token: str | bool | None, revision: str | None) -> bytes | None:
    """Return a repository's model card; None without one. Not from the cache, which may have an older one.

    Raises:
        OSError: The Hub cannot be reached, or does not return the card.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            downloaded = hf_hub_download(repo_id, CARD_NAME, token=token, revision=revision, local_dir=folder)
        except (RemoteEntryNotFoundError, RevisionNotFoundError, RepositoryNotFoundError):
            return None
        return Path(downloaded).read_bytes()


def check_hub_target(repo_id: str, token: str | bool | None) -> None:
    """Check, before a training, that what is pushed after it can have this id, and that there is a token.

    Raises:
        OptionError: Names what to set.
    """
    check_repo_id("hub_model_id (by default the name of output_dir)", repo_id)
    if is_offline_mode():
        raise OptionError("push_to_hub needs the Hub, and HF_HUB_OFFLINE is set. Unset it, or leave push_to_hub out.")
    if not token and get_token() is None:
        raise OptionError(
            "push_to_hub needs a token of the Hub: log in with `hf auth login`, or set HF_TOKEN or hub_token."
        )


def attach_report(student: PreTrainedModel, report: InitializationReport) -> None:
    """Set `student.initialization_report`, a `save_pretrained` that writes it, and a `push_to_hub` with a model card.

    A class that declares the report (`FromTeacherMixin`) saves it itself; a user's own `push_to_hub` is not replaced.
    """
    student.initialization_report = report  # type: ignore[assignment]
    if not hasattr(type(student), "initialization_report"):
        student.save_pretrained = StudentSaver(student)  # type: ignore[method-assign,assignment]
    if type(student).push_to_hub is PreTrainedModel.push_to_hub:
        student.push_to_hub = StudentPusher(student)  # type: ignore[assignment]


def attach_record(student: PreTrainedModel, record: DistillationRecord | None) -> None:
    """Set `student.distillation_record`, which is then saved as `distillation.json` and shown in the pushed card.

    None removes it: the student has been changed since.
    """
    student.distillation_record = record  # type: ignore[assignment]


def with_weights_of(record: DistillationRecord, folder: Path) -> DistillationRecord:
    """Return a record with the fingerprint of the weights that are saved in a folder, if it has none yet.

    One that it has stays: where it differs, the weights were changed since the record was made, and what reads both sees it.
    Only a cast to float16 can change the fingerprint of the same weights, so it is replaced there.
    """
    weights = saved_weights_fingerprint(folder)
    is_known = record.weights is not None and not (record.weights != weights and stores_float16(folder))
    return record if is_known else dataclasses.replace(record, weights=weights)


def save_student(
    student: PreTrainedModel,
    save: Callable[..., Any],
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    push_to_hub: bool = False,
    *,
    architecture: str | None = None,
    **options: Any,
) -> None:
    """Save a student and its records atomically; push them if `push_to_hub`.

    A record in the folder of how another student was trained is removed. It stays if this one was loaded from that folder, or
    has no report, so that hf_guide did not make it in this process.

    Args:
        student: The model.
        save: An unbound `save_pretrained`.
        save_directory, is_main_process, state_dict, push_to_hub: As in `PreTrainedModel.save_pretrained`.
        architecture: Class name for the saved config, if it is not the student's own class.
        **options: Other arguments of the stock `save_pretrained`, deprecated ones included.

    Raises:
        NotADirectoryError: `save_directory` is a file.
        NotFiniteError: A weight is NaN or infinite; nothing is written.
        OSError: The disk is full or failed; the folder is unchanged.
    """
    folder = Path(save_directory)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; save_directory must be a folder.")
    if not is_main_process:
        save(student, folder, is_main_process=False, state_dict=state_dict, **options)
        return
    check_weights_finite(student if state_dict is None else state_dict)
    pushed = dict(state_dict) if push_to_hub and state_dict is not None else None  # the stock method empties its own
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    check_disk_space(existing, student.get_memory_footprint())
    try:
        with staged_update(folder) as new:
            save(student, new, is_main_process=True, state_dict=state_dict, **options)
            if architecture is not None:
                config = copy.deepcopy(student.config)
                config.architectures = [architecture]
                config.save_pretrained(new)
            report = getattr(student, "initialization_report", None)
            if report is not None:
                report.save(new)
            record = getattr(student, "distillation_record", None)
            if record is not None:
                save_record(new, with_weights_of(record, new))
            tokenizer = attached_tokenizer(student)
            if tokenizer is not None:
                tokenizer.save_pretrained(new)
            modules = attached_sentence_modules(student)
            if modules is not None:
                write_sentence_modules(modules, new)
            clean_saved_folder(new)
        if report is not None and record is None and not _is_loaded_from(student, folder):
            (folder / RECORD_NAME).unlink(missing_ok=True)
    except Exception as error:
        if isinstance(error, OSError) or not is_write_error(error):
            raise
        raise DiskError(f"The student could not be written to {folder}: {error}. The folder is unchanged.") from error
    if push_to_hub:  # only now: the stock class would have pushed before the report was written
        _push_saved(student, options.pop("repo_id", folder.name), options | {"state_dict": pushed})


def _is_loaded_from(student: PreTrainedModel, folder: Path) -> bool:
    source = student.name_or_path
    return source is not None and source != "" and Path(source).is_dir() and Path(source).samefile(folder)


def _push_saved(student: PreTrainedModel, repo_id: str, options: Mapping[str, Any]) -> None:
    """Push a student as it was saved with these arguments of `save_pretrained`, some of which are those of `push_to_hub`."""
    parameters = inspect.signature(PushToHubMixin.push_to_hub).parameters
    push_options = {name: value for name, value in options.items() if name in parameters}
    push: Any = student.push_to_hub
    if isinstance(push, StudentPusher):  # another one has no argument for them
        push_options["save_options"] = {name: value for name, value in options.items() if name not in parameters}
    push(repo_id, **push_options)
