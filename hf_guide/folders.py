"""A student's folder: all of it or nothing, with its teacher's tokenizer beside it; and files that are whole or not there."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "bpe.codes",
    "normalizer.json",
    "chat_template*",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
"""Files of a tokenizer or processor, which a student shares with its teacher bit by bit."""


def check_output(output: Path) -> None:
    """Refuse an output that is there and is not an empty folder."""
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"The output {output} is a file; name a folder that is new or empty.")
    if output.is_dir() and any(output.iterdir()):
        raise FileExistsError(f"The output folder {output} is not empty; name a new one, or empty it first.")


def check_space(folder: Path, needed: int) -> None:
    """Refuse to begin a write into `folder`, which need not be there yet, that the disk has no room for."""
    free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
    if free < needed:
        raise OSError(
            f"The student takes {needed / 2**20:.1f} MiB, but {folder.parent} has only {free / 2**20:.1f} MiB free. "
            "Free some space or choose another disk."
        )


def partial_path(path: Path) -> Path:
    """Return the name under which `path` is written until it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def remove_partials(folder: Path) -> None:
    """Remove what a killed run left half-written."""
    for path in folder.glob(".*.partial"):
        path.unlink(missing_ok=True)


def publish(partial: Path, path: Path) -> None:
    """Give a file that was written whole its name, once it is on the disk."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a text file, UTF-8, all of it or nothing."""
    partial = partial_path(path)
    try:
        partial.write_text(text, encoding="utf-8")
        publish(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Give a folder to write into that becomes `output` when all went well, and vanishes when anything did not."""
    output = output.resolve()
    home = next(parent for parent in output.parents if parent.exists())
    folder = home / f".{output.name}.{os.getpid()}.partial"
    try:
        folder.mkdir()  # within, or an interruption right after it would leave the folder
        yield folder
        check_output(output)
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.exists():
            output.rmdir()
        folder.rename(output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
