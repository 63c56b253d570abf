"""Write pseudo-labels: a copy of a dataset whose transcripts, targets or classes are a teacher's. What `hf-guide label` does.

The output is a folder of JSON Lines files that `datasets` loads by its path. A killed run leaves whole files; the same call
writes the missing ones, and all bytes are those of a run that was never killed.

Does: divide the rows among files and processes, filter by word error rate, record the teacher. Does not: run the teacher
(`teacher_labels.py`).
"""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from accelerate import PartialState
from datasets import Audio, ClassLabel, Dataset, Image
from tqdm.auto import tqdm

from hf_guide.data.arguments import DataArguments
from hf_guide.data.loading import find_column, load_splits
from hf_guide.errors import OptionError
from hf_guide.metrics.word_error_rate.word_error_rate import edit_distance
from hf_guide.models.modes import eval_mode
from hf_guide.scripts.label_config import LabelConfig
from hf_guide.scripts.teacher_labels import TeacherLabels, load_teacher_labels, resolved_path
from hf_guide.utils.checksums import DamagedFileError, read_json, write_json
from hf_guide.utils.distributed import barrier
from hf_guide.utils.files import atomic_write_text
from hf_guide.utils.fingerprint import files_fingerprint, tokenizer_fingerprint, weights_fingerprint
from hf_guide.utils.public_names import public_name
from hf_guide.utils.resumable import ResumableFolder, resumable_write
from hf_guide.version import __version__

MANIFEST_NAME = "labels.json"
FILES_FOLDER = "files"
FORMAT_VERSION = 1
EVALUATION_SPLIT = "validation"
"""Its rows keep the labels that they have, so that an evaluation on them measures the truth."""


def label_folder(path: Path) -> ResumableFolder:
    """Return the folder of pseudo-labels."""
    return ResumableFolder(path, MANIFEST_NAME, "The folder of labels", OptionError)


@dataclass(frozen=True)
class LabelResult:
    """What was written: rows of the dataset, and rows with a label, by split."""

    rows: Mapping[str, int]
    labeled: Mapping[str, int]


def label_dataset(
    teacher: str,
    output_dir: str | os.PathLike[str],
    data: DataArguments,
    config: LabelConfig,
    state: PartialState,
    *,
    processing_class_name_or_path: str | None = None,
    train_only: bool = False,
    hub_kwargs: Mapping[str, Any],
    dtype: str | None = None,
    show_progress: bool = True,
) -> LabelResult:
    """Label a dataset by a teacher, and write it with the labels in place of its own, which become `reference_...`.

    Rows of the evaluation split keep the labels that they have.

    Args:
        teacher: Hub id or folder.
        output_dir: Folder of the labeled dataset: new, empty, or unfinished.
        data: Dataset and columns.
        config: Generation and filter.
        state: The processes, as `signal_cache.writer.distributed_state` returns them; they share the work.
        processing_class_name_or_path: Tokenizer or processor; by default the teacher's.
        train_only: Leave out the evaluation split.
        hub_kwargs: `revision`, `token` and `trust_remote_code` of the teacher.
        dtype: Of the teacher; None takes the checkpoint's.
        show_progress: Whether the first process shows a progress bar.

    Raises:
        OptionError: Options that contradict each other, the dataset or the unfinished folder.
        TaskError, TeacherError: The teacher's task has no labels that can be written, or it cannot be loaded.
    """
    folder = Path(output_dir)
    label_folder(folder).check()
    train, held_out = load_splits(data)
    splits = {"train": train} | ({} if held_out is None or train_only else {EVALUATION_SPLIT: held_out})
    generation_kwargs: Any = config.generation_kwargs  # parsed by now
    labels = load_teacher_labels(
        teacher,
        train.features,
        data,
        generation_kwargs,
        state.device,
        processing_class_name_or_path,
        hub_kwargs,
        dtype,
    )
    writer = _LabelWriter(folder, labels, data, config, splits)
    with eval_mode(labels.model):
        writer.begin(teacher)
        writer.write_missing(state, show_progress)
    return writer.finish(state)


class _LabelWriter:
    """Writes the files of labels that are missing."""

    def __init__(
        self,
        folder: Path,
        labels: TeacherLabels,
        data: DataArguments,
        config: LabelConfig,
        splits: Mapping[str, Dataset],
    ):
        self.folder, self.labels, self.data, self.config = folder, labels, data, config
        self.splits = {name: _undecoded(split) for name, split in splits.items()}
        self.reference = _reference_column(next(iter(splits.values())), labels, data, config)

    def begin(self, teacher: str) -> None:
        """Write the manifest, or compare it with the one in the folder.

        Raises:
            OptionError: The folder was begun by another call.
        """
        manifest = self._manifest(teacher)
        folder = label_folder(self.folder)
        folder.begin(lambda: write_json(self.folder / MANIFEST_NAME, manifest))
        try:
            recorded, _ = read_json(self.folder / MANIFEST_NAME)
        except DamagedFileError as error:
            raise OptionError(f"{error} Label again into a new folder.") from error
        folder.check_same_call(recorded, manifest)

    def write_missing(self, state: PartialState, show_progress: bool) -> None:
        """Write the missing files of this process."""
        missing = [each for each in self._shards() if not (self.folder / each[0]).exists()]
        barrier()  # or a file that one process writes would be missing from another's list
        own = missing[state.process_index :: state.num_processes]
        with tqdm(
            total=sum(len(rows) for _, _, rows in own),
            unit="row",
            desc="Running the teacher",
            disable=not (show_progress and state.is_main_process),
        ) as bar:
            for file, name, rows in own:
                with resumable_write(self.folder / file, OptionError):
                    lines = [json.dumps(row, ensure_ascii=False) for row in self._labeled(name, rows, bar.update)]
                    atomic_write_text(self.folder / file, "".join(line + "\n" for line in lines))

    def finish(self, state: PartialState) -> LabelResult:
        """Wait for the other processes, and count what is in the files.

        Raises:
            OptionError: No row has a label.
        """
        barrier()
        labeled = dict.fromkeys(self.splits, 0)
        for file, name, _ in self._shards():
            with (self.folder / file).open("rb") as lines:
                labeled[name] += sum(1 for _ in lines)
        if not labeled["train"]:
            raise OptionError(
                f"No row of {self.data.name} has a label: the teacher's texts are empty, or their word error rates are above "
                "max_wer."
            )
        return LabelResult({name: len(split) for name, split in self.splits.items()}, labeled)

    def _shards(self) -> Iterator[tuple[str, str, range]]:
        """Yield the file, the split and the rows of each shard."""
        size = self.config.shard_size
        for name, split in self.splits.items():
            count = -(-len(split) // size)
            for number in range(count):
                rows = range(number * size, min((number + 1) * size, len(split)))
                yield f"{name}-{number:05d}-of-{count:05d}.jsonl", name, rows

    def _manifest(self, teacher: str) -> dict[str, Any]:
        model = self.labels.model
        options = dataclasses.asdict(self.config)
        return {
            "format": FORMAT_VERSION,
            "hf_guide_version": __version__,
            "teacher": public_name(teacher),
            "teacher_revision": getattr(model.config, "_commit_hash", None),
            "teacher_class": type(model).__name__,
            "teacher_dtype": str(model.dtype).removeprefix("torch."),
            "weights": weights_fingerprint(model),
            "files": files_fingerprint(teacher) if os.path.isdir(teacher) else None,
            "tokenizer": tokenizer_fingerprint(self.labels.processor),
            "task": str(self.labels.task),
            "dataset": self.data.name,
            "rows": {name: len(split) for name, split in self.splits.items()},
            "checksums": {name: _rows_checksum(split) for name, split in self.splits.items()},
            "columns": {"read": self.labels.column, "written": self.labels.target},
            "language": self.data.language,
            "speech_task": self.data.speech_task,
            "config": options,
        }

    def _labeled(self, name: str, rows: range, update: Callable[[int], Any]) -> Iterator[dict[str, Any]]:
        """Yield the rows that have a label."""
        split, size = self.splits[name], self.config.batch_size
        for start in range(rows.start, rows.stop, size):
            numbers = range(start, min(start + size, rows.stop))
            examples = [split[number] for number in numbers]
            own = [self.labels.own_label(example) if name == EVALUATION_SPLIT else None for example in examples]
            missing = [index for index, label in enumerate(own) if label is None]
            torch.manual_seed(self.config.seed + start)  # so that a resumed run samples the same
            made = (
                self.labels([examples[index] for index in missing], [numbers[index] for index in missing])
                if missing
                else []
            )
            by_index = dict(zip(missing, made, strict=True))
            for index, (number, example) in enumerate(zip(numbers, examples, strict=True)):
                label = by_index[index] if index in by_index else own[index]
                if label is not None and (index not in by_index or self._is_close(label, example)):
                    yield self._row(name, number, example, label)
            update(len(numbers))

    def _is_close(self, label: Any, example: Mapping[str, Any]) -> bool:
        if self.config.max_wer is None:
            return True
        normalize = _normalizer()
        predicted, true = (normalize(text).split() for text in (label, example[self.reference] or ""))
        return bool(true) and edit_distance(predicted, true) <= self.config.max_wer * len(true)

    def _row(self, name: str, number: int, example: Mapping[str, Any], label: Any) -> dict[str, Any]:
        row = {}
        new = self.labels.new_columns(example, label)
        for column, value in example.items():
            kept = f"reference_{column}" if column in new else column
            row[kept] = self._plain(value, f"{list(self.splits).index(name)}-{number:07d}", column)
        return row | new

    def _plain(self, value: Any, name: str, column: str) -> Any:
        """Return a value that JSON can hold; the bytes of a sound or an image become a file."""
        if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
            suffix = Path(value.get("path") or "").suffix or (".wav" if value["bytes"][:4] == b"RIFF" else ".bin")
            path = self.folder / FILES_FOLDER / f"{name}-{column}{suffix}"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(value["bytes"])
            return f"{FILES_FOLDER}/{path.name}"
        if isinstance(value, Mapping) and set(value) == {"bytes", "path"}:
            value = value["path"]
        if isinstance(value, str) and column == self.labels.column and self.labels.has_files:
            return resolved_path(value, self.data)
        try:
            json.dumps(value)
        except TypeError as error:
            raise OptionError(
                f"{self.data.name}: column {column!r} has a {type(value).__name__}, which a JSON file cannot hold. Remove the "
                "column."
            ) from error
        return value


def _undecoded(split: Dataset) -> Dataset:
    """Return a split whose files are paths or bytes, and whose classes are names."""
    for column, feature in split.features.items():
        if isinstance(feature, (Audio, Image)):
            split = split.cast_column(column, type(feature)(decode=False))
        elif isinstance(feature, ClassLabel):
            names = [None if value is None else feature.int2str(value) for value in split[column]]
            split = split.remove_columns(column).add_column(column, names)
    return split


def _reference_column(split: Dataset, labels: TeacherLabels, data: DataArguments, config: LabelConfig) -> str:
    """Return the column of the dataset's own texts, which the word error rate is against; "" without that filter.

    Raises:
        OptionError: There is no such column, or the labels are no texts.
    """
    if config.max_wer is None:
        return ""
    if not labels.are_transcripts:
        raise OptionError(f"max_wer is for transcripts of speech; the teacher's task is {labels.task}. Leave it out.")
    return find_column(split, labels.task, "text", data)


def _rows_checksum(split: Dataset) -> str:
    """Return a checksum of all rows, of files by their paths."""
    state = xxhash.xxh3_128()
    for row in split:
        for column, value in row.items():
            content = value.get("bytes") if isinstance(value, Mapping) else None
            state.update(f"\0{column}\0".encode())
            state.update(content if isinstance(content, bytes) else repr(value).encode())
    return state.hexdigest()


def _normalizer() -> Callable[[str], str]:
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    return BasicTextNormalizer()
