"""How a student is saved: as its stock class saves it, with `initialization_report.json` beside the weights.

Does: check the disk's room first, leave nothing half-written behind, push what was saved and a model card with it.
Does not: change the student's class, or what the stock class writes.
"""

import copy
import inspect
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME, PushToHubMixin, cached_file

from hf_guide.errors import TeacherError
from hf_guide.hub.metadata import DistillationRecord, save_record
from hf_guide.hub.model_card import write_model_card
from hf_guide.hub.provenance import fetch_card
from hf_guide.initialization.report import InitializationReport
from hf_guide.models.code_references import clean_saved_folder
from hf_guide.models.pretrained import unreadable_as
from hf_guide.utils.files import DiskError, check_disk_space, staged_update
from hf_guide.utils.finite import check_weights_finite


class StudentSaver:
    """A student's own `save_pretrained`: its class's, and the report beside the weights.

    It stands in the instance, so that the class stays the stock one, and is an object, so that it is copied and pickled
    with its student. It holds the student as a bound method would: `from_teacher(...).save_pretrained(...)` must work.
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
        """Save as the student's class does, and write `initialization_report.json` beside the weights."""
        save = type(self.student).save_pretrained
        save_student(self.student, save, save_directory, is_main_process, state_dict, push_to_hub, **options)


class StudentPusher:
    """A student's own `push_to_hub`: the files that the stock one uploads, and a card that tells of the student.

    As `StudentSaver` it stands in the instance. It takes the same keywords as `transformers.utils.PushToHubMixin`.
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
    ) -> CommitInfo:
        """Upload the student in one commit; of a card that the repository has, all that is not ours is kept."""
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            _create_branch(api, repo_id, revision, create_pr)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            fetch_card(repo_id, folder, token=token, revision=revision)
            self.student.save_pretrained(folder, max_shard_size=max_shard_size)
            report: Any = self.student.initialization_report
            model_tags = [*(self.student.model_tags or []), *(tags or [])]
            write_model_card(folder, report, model_id=repo_id, tags=model_tags, token=token)
            kind = type(self.student).__name__
            return api.create_commit(
                repo_id=repo_id,
                operations=[
                    CommitOperationAdd(file.relative_to(folder).as_posix(), file)
                    for file in sorted(folder.rglob("*"))
                    if file.is_file()
                ],
                commit_message=commit_message
                or f"Upload {'model' if 'Model' in kind else kind}",  # the stock one's words
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )


def _create_branch(api: HfApi, repo_id: str, branch: str, create_pr: bool) -> None:
    try:
        api.create_branch(repo_id, branch=branch, exist_ok=True)
    except HfHubHTTPError as error:
        # Who may only propose a change cannot make a branch; if it is missing, the proposal itself will say so.
        if not (create_pr and error.response.status_code == 403):
            raise


def attach_report(student: PreTrainedModel, report: InitializationReport) -> None:
    """Give `student` its `initialization_report`, a `save_pretrained` that writes it and a `push_to_hub` that tells of it.

    A class that declares the report (`FromTeacherMixin`) saves it itself; a `push_to_hub` of its own is left alone.
    """
    student.initialization_report = report  # type: ignore[assignment]
    if not hasattr(type(student), "initialization_report"):
        student.save_pretrained = StudentSaver(student)  # type: ignore[method-assign,assignment]
    if type(student).push_to_hub is PreTrainedModel.push_to_hub:
        student.push_to_hub = StudentPusher(student)  # type: ignore[assignment]


def attach_record(student: PreTrainedModel, record: DistillationRecord) -> None:
    """Let a student of `from_teacher` save `distillation.json`, how it was trained, and tell of it when pushed."""
    student.distillation_record = record  # type: ignore[assignment]


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
    """Save a student by `save`, an unbound `save_pretrained`, with its report; then push both where that is wanted.

    `architecture` is the class that the saved config names where it is not the student's own. `options` are all others
    of the stock `save_pretrained`, which also takes keywords of times gone by.

    Raises:
        NotADirectoryError: a file stands where the folder should be.
        NotFiniteError: a weight is NaN or infinite; nothing is written.
        OSError: the disk has no room, or broke off; the folder is as it was.
    """
    folder = Path(save_directory)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; name a folder to save the student in.")
    if not is_main_process:
        save(student, folder, is_main_process=False, state_dict=state_dict, **options)
        return
    check_weights_finite(student if state_dict is None else state_dict)
    home = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    check_disk_space(home, student.get_memory_footprint())
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
                save_record(new, record)
            clean_saved_folder(new)
    except SafetensorError as error:
        raise DiskError(
            f"The student could not be written to {folder}: {error}. What was there is as it was."
        ) from error
    if push_to_hub:  # only now: the stock class would have pushed before the report was there
        known = inspect.signature(PushToHubMixin.push_to_hub).parameters
        hub = {name: value for name, value in options.items() if name in known and name != "repo_id"}
        student.push_to_hub(options.get("repo_id", folder.name), **hub)


def copy_generation_config(student: PreTrainedModel, source: Any, **where: Any) -> None:
    """Give a student that generates its teacher's generation config, where the teacher has one of its own.

    What it says of blocks and heads follows those that the student's report says were kept.
    """
    if not student.can_generate():
        return
    if isinstance(source, PreTrainedModel):
        found = copy.deepcopy(getattr(source, "generation_config", None))
    else:
        name = os.fspath(source)
        with unreadable_as(TeacherError, f"{GENERATION_CONFIG_NAME} of {name} cannot be read"):
            path = cached_file(name, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **where)
            found = None if path is None else GenerationConfig.from_pretrained(name, **where)
    if found is not None:
        report = getattr(student, "initialization_report", None)
        if report is not None:
            report.notes += remap_generation_config(found, report.blocks, report.heads)
        student.generation_config = found


def remap_generation_config(
    generation: GenerationConfig, blocks: Mapping[str, list[int]], heads: Mapping[str, list[list[int]]]
) -> list[str]:
    """Set what a generation config says of blocks and heads for those that a student keeps; return what was dropped.

    Whisper's `alignment_heads` are pairs of a decoder block and a head of its attention to the encoder;
    `assistant_early_exit` and `dola_layers` count blocks that have been passed.

    Args:
        blocks: by stack the teacher's block that feeds each of the student's.
        heads: by attention module the teacher's heads that each of the student's blocks keeps, where those are fewer.
    """
    stacks = [stack for stack in blocks if "decoder" in stack] or [stack for stack in blocks if "encoder" not in stack]
    of_text = [stack for stack in stacks if "language" in stack or "text" in stack] or stacks
    if not of_text:
        if getattr(generation, "alignment_heads", None) is None:
            return []
        generation.alignment_heads = None  # type: ignore[attr-defined]
        return [
            "generation_config.alignment_heads names heads of the teacher's, none of which feeds the student: dropped."
        ]
    stack = of_text[0]
    kept = blocks[stack]
    notes = []
    pairs = getattr(generation, "alignment_heads", None)
    if pairs is not None:
        generation.alignment_heads = _remap_alignment_heads(pairs, stack, kept, heads) or None  # type: ignore[attr-defined]
        dropped = len(pairs) - len(generation.alignment_heads or [])  # type: ignore[attr-defined]
        if dropped > 0:
            left = (
                "none is left, so there are no timestamps of tokens" if dropped == len(pairs) else "the others follow"
            )
            notes.append(
                f"generation_config.alignment_heads names {dropped} heads that the student does not have: {left}."
            )
    if isinstance(generation.assistant_early_exit, int):
        generation.assistant_early_exit = sum(block < generation.assistant_early_exit for block in kept) or None
    if isinstance(generation.dola_layers, list):
        generation.dola_layers = sorted({sum(block < layer for block in kept) for layer in generation.dola_layers})
    return notes


def _remap_alignment_heads(
    pairs: list[list[int]], stack: str, kept: list[int], heads: Mapping[str, list[list[int]]]
) -> list[list[int]]:
    """Return the pairs of a block and a head that a student still has, in its own numbers."""
    of_stack = {module: of_blocks for module, of_blocks in heads.items() if module.startswith(stack + ".")}
    crossing = [of_blocks for module, of_blocks in of_stack.items() if re.search("encoder_attn|cross|EncDec", module)]
    aligned = []
    for block, head in pairs:
        for number, fed in enumerate(kept):
            of_block = crossing[0][number] if crossing else None
            if fed == block and (of_block is None or head in of_block):
                aligned.append([number, head if of_block is None else of_block.index(head)])
    return aligned
