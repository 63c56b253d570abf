"""The tokenizer and processor that a student shares with its teacher, put beside its weights."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from hf_guide.errors import TeacherError
from hf_guide.hub.saved_model import PROCESSOR_CLASSES
from hf_guide.models.code_references import CONFIG_FILES, clean_saved_folder, has_code_references
from hf_guide.models.model_files import PROCESSOR_FILES, check_model_folder, regular_files

logger = logging.getLogger(__name__)

_EXECUTABLE_SUFFIXES = (".py", ".pyc", ".so", ".pkl", ".pickle", ".pt", ".pth", ".bin")


def copy_tokenizer_files(
    teacher: str,
    folder: Path,
    *,
    gguf_file: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Put the teacher's tokenizer and processor beside the student: its own files, or those a GGUF file describes.

    Only regular files that lie in the teacher's folder are copied. A tokenizer or processor in code of its own is saved with
    that code where `trust_remote_code` allows to run it; otherwise what refers to the code is left out, with a warning.
    """
    where: dict[str, Any] = {"revision": revision, "token": token, "trust_remote_code": trust_remote_code}
    if gguf_file:
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(teacher, gguf_file=gguf_file, **where).save_pretrained(folder)
        clean_saved_folder(folder)
        return
    source = Path(teacher)
    if not source.is_dir():
        from huggingface_hub import snapshot_download

        patterns = list(PROCESSOR_FILES)
        source = Path(snapshot_download(teacher, revision=revision, token=token, allow_patterns=patterns))
    files = [file for file in regular_files(source, PROCESSOR_FILES) if file.suffix not in _EXECUTABLE_SUFFIXES]
    in_code = [
        file.name for file in files if file.name in CONFIG_FILES and has_code_references(_read_json_or_none(file))
    ]
    for file in files:
        if not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
    if in_code and trust_remote_code:
        _save_with_code(teacher, folder, in_code, where)
    elif in_code:
        logger.warning(
            "%s of %s refer to Python code that comes with the teacher; the student is saved without it. If its tokenizer or "
            "processor is needed, read that code and pass trust_remote_code=True.",
            ", ".join(in_code),
            teacher,
        )
    clean_saved_folder(folder)


def check_tokenizer_files(
    teacher: str, *, gguf_file: str | None = None, revision: str | None = None, token: str | None = None
) -> None:
    """Refuse a teacher whose tokenizer's or processor's files are cut or no JSON, before a student is made.

    Raises:
        TeacherError: names the file.
    """
    from transformers.utils import cached_file

    from hf_guide.models.pretrained import unreadable_as

    check_model_folder(teacher)
    if gguf_file is not None:
        return
    hub: dict[str, Any] = {"revision": revision, "token": token}
    for name in ("tokenizer.json", *CONFIG_FILES):
        with unreadable_as(TeacherError, f"{name} of {teacher} cannot be read"):
            path = cached_file(teacher, name, _raise_exceptions_for_missing_entries=False, **hub)
            if path is not None and not isinstance(json.loads(Path(path).read_text(encoding="utf-8")), dict):
                raise TeacherError(f"{name} of {teacher} must be a mapping in JSON. Fetch it again.")


def _save_with_code(teacher: str, folder: Path, in_code: list[str], where: dict[str, Any]) -> None:
    """Save what these configs describe as its own class does, which puts its code beside it."""
    import transformers

    for name, auto_class in PROCESSOR_CLASSES.items():
        if name in in_code:
            getattr(transformers, auto_class).from_pretrained(teacher, **where).save_pretrained(folder)


def _read_json_or_none(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return None
