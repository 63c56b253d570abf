"""Files of a teacher's folder, whose origin is not trusted: read and copied only if they are inside that folder.

A symbolic link may point to any file of this machine, and a copy of it would be published with the student. The links of the
Hub's cache, from a snapshot to the blobs of the same repository, are followed.
"""

import fnmatch
import json
import logging
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from transformers.utils import CHAT_TEMPLATE_DIR

from hf_guide.errors import TeacherError

logger = logging.getLogger(__name__)

WEIGHTS_AND_CONFIGS = (
    "config.json",
    "generation_config.json",
    "adapter_*",
    "*.safetensors",
    "*.bin",
    "*.index.json",
    "*.gguf",
    "*.py",
)
"""Patterns of the files that hold a model: its weights, configs and code."""

PROCESSOR_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "*vocab*.json",
    "merges.txt",
    "*.model",
    "*.spm",
    "*.tokenizer",
    "bpe.codes",
    "byte_maps.json",
    "dict.txt",
    "emoji.json",
    "normalizer.json",
    "word_pronunciation.json",
    "word_shape.json",
    "chat_template*",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
"""Files of a tokenizer or processor, which a student shares with its teacher bit by bit."""

NAMED_CHAT_TEMPLATES = f"{CHAT_TEMPLATE_DIR}/*.jinja"
"""Chat templates other than the default one, such as that for tool use, in a folder of their own."""


def is_outside_folder(path: Path, folder: Path) -> bool:
    """Return whether a file is outside of `folder` once links are resolved; a snapshot's blobs are inside."""
    root, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    repository = root.parent.parent
    if root.parent.name == "snapshots" and repository.name.startswith("models--"):
        root = repository
    return not target.is_relative_to(root)


def regular_files(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """Return the files of a folder that match one of `patterns`, in the order of the patterns and then by name.

    What is not a regular file, or is outside of the folder, is skipped with a warning that names it.
    """
    files: dict[Path, None] = {}
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            if is_outside_folder(path, folder):
                logger.warning("%s is a link to %s, outside of its folder: not copied.", path, os.path.realpath(path))
            elif not path.exists() or not stat.S_ISREG(path.stat().st_mode):
                logger.warning("%s is not a regular file: not copied.", path)
            else:
                files[path] = None
    return list(files)


def no_such_folder(name: str) -> str:
    """Return what an error about a model that is neither a folder nor on the Hub adds to its first clause.

    Example:
        >>> no_such_folder("/no/such/folder"), no_such_folder(os.getcwd())
        (': there is no such folder, and as a Hub id', '')
    """
    return "" if os.path.exists(name) else ": there is no such folder, and as a Hub id"


def check_model_folder(name: str | os.PathLike[str], patterns: Sequence[str] = WEIGHTS_AND_CONFIGS) -> None:
    """Check that no file of a model in a folder is a link out of it, and that no index names files outside of it.

    A Hub id is not checked: the Hub's client keeps its files together.

    Raises:
        TeacherError: a file is outside of the folder; or the name is that of a file, or begins with '~', which only a shell
            expands.
    """
    folder = Path(name)
    if folder.parts[:1] == ("~",) and not folder.exists():
        raise TeacherError(
            f"There is no folder {name}: '~' is expanded by a shell only. Write the whole path, {folder.expanduser()}."
        )
    if folder.is_file():
        gguf = f", with gguf_file={folder.name!r}" if folder.suffix == ".gguf" else ""
        raise TeacherError(f"{name} is a file; pass its folder{gguf}.")
    if not folder.is_dir():
        return
    for path in [*folder.iterdir(), *folder.glob(NAMED_CHAT_TEMPLATES)]:
        if not any(fnmatch.fnmatch(path.relative_to(folder).as_posix(), pattern) for pattern in patterns):
            continue
        if is_outside_folder(path, folder):
            raise TeacherError(
                f"{path} is a link to {os.path.realpath(path)}, outside of its folder; its content would be published with "
                "the student. If you made the link, replace it with the file."
            )
        if path.name.endswith(".index.json") and path.is_file():
            read_shard_index(path)


def read_shard_index(path: Path) -> dict[str, Any]:
    """Return an index of shards, all of which are in its own folder.

    Raises:
        TeacherError: it cannot be read, or names a file outside of its folder.
    """
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TeacherError(f"{path} is not a readable index of shards ({error}). Fetch it again.") from error
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
        raise TeacherError(
            f"{path} is not a readable index of shards: weight_map must map tensor names to file names. Fetch it again."
        )
    for shard in sorted(set(shards.values())):
        if _is_outside(shard):
            raise TeacherError(
                f"{path} names the shard {shard!r}, which is not in its folder; a shard must be a file next to the index."
            )
    return index


def _is_outside(shard: str) -> bool:
    parts = {*PurePosixPath(shard).parts, *PureWindowsPath(shard).parts}
    return not shard or ".." in parts or PurePosixPath(shard).is_absolute() or bool(PureWindowsPath(shard).anchor)
