"""A teacher's signals read back from disk, in place of the teacher.

Does: map a capture, check that it is whole and of whom it should be, find an example's signals, add them to a batch.
Does not: load a capture into memory, or need the teacher.
"""

import logging
import mmap
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_guide.errors import CaptureError, OptionError
from hf_guide.hub.metadata import to_repo_id
from hf_guide.models.adapters import without_adapter
from hf_guide.models.pretrained import load_config
from hf_guide.signal_cache.codec import COLUMN_PREFIX, CapturedExample, decode_example
from hf_guide.signal_cache.keys import example_keys, token_positions
from hf_guide.signal_cache.manifest import CaptureManifest
from hf_guide.signal_cache.shards import DAMAGED_HINT, INDEX_NAME, Arrays, KeyIndex, Shard, shard_name
from hf_guide.tasks import Task
from hf_guide.teachers.loading import check_is_teacher, load_teacher
from hf_guide.utils.checksums import DamagedFileError, verify_checksum
from hf_guide.utils.fingerprint import (
    comparable_config,
    files_fingerprint,
    tokenizer_fingerprint,
    weights_fingerprint,
)

logger = logging.getLogger(__name__)

MAX_OPEN_SHARDS = 128  # each holds a file descriptor


class Capture:
    """A teacher's signals on disk, read-only. It is cheap to send to another process, which opens the files itself.

    Each file is compared with its checksum when it is first read: once, also by several workers of a dataloader where these
    are forked, and once in each worker where they are spawned.

    Attributes:
        folder: where it is.
        manifest: what it is of.
    """

    def __init__(self, folder: Path, manifest: CaptureManifest):
        self.folder, self.manifest = folder, manifest
        # One byte a shard, in memory that forked processes share: whether its checksum was found right.
        self._checked = mmap.mmap(-1, max(1, manifest.shard_count))
        self._check_file(INDEX_NAME)
        self._index = KeyIndex(folder / INDEX_NAME)
        if len(self._index) != manifest.examples:
            raise CaptureError(
                f"{folder / INDEX_NAME} knows {len(self._index)} examples; the manifest says {manifest.examples}. Run the "
                "same capture again."
            )
        self._columns = manifest.columns
        self._shards: OrderedDict[int, Shard] = OrderedDict()

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, processing_class: Any = None, teacher: Any = None) -> "Capture":
        """Open a capture, mapped and read-only; nothing but the manifest is read.

        Args:
            folder: what `capture_teacher` or `hf-guide capture` wrote.
            processing_class, teacher: what it should be of, where known; see `check`.

        Raises:
            CaptureError: no capture, one that is not complete, a file that is missing, truncated or damaged, or another
                teacher or tokenizer; it names what differs.
        """
        manifest = CaptureManifest.load(folder)
        manifest.check_files(Path(folder))
        if not manifest.checksums:
            logger.warning(
                "%s has no checksums, so that damage to it cannot be seen: an earlier version or another program wrote it. "
                "Run the same capture again to add them; the teacher does not run for it.",
                folder,
            )
        capture = cls(Path(folder), manifest)
        capture.check(processing_class=processing_class, teacher=teacher)
        return capture

    @property
    def task(self) -> Task:
        """What the teacher's head is for."""
        return Task(self.manifest.task)

    def check(self, *, processing_class: Any = None, teacher: Any = None, dataset: Any = None) -> None:
        """Refuse to be taken for the signals of another teacher, tokenizer or dataset. What is None is not looked at.

        Args:
            processing_class: the tokenizer or processor that makes the student's input.
            teacher: a loaded model, or a folder or Hub id, whose files are compared, and which is loaded where these differ.
            dataset: its number of examples is compared; that each is there shows when it is looked up.

        Raises:
            CaptureError: names what differs.
        """
        found = tokenizer_fingerprint(processing_class)
        if found is not None and self.manifest.tokenizer is not None and found != self.manifest.tokenizer:
            raise CaptureError(
                f"{self.folder} was captured with another tokenizer or processor than this {type(processing_class).__name__} "
                f"(fingerprint {self.manifest.tokenizer} there, {found} here). Use that of {self.manifest.teacher}, or "
                "capture again with this one."
            )
        if teacher is not None:
            self._check_teacher(teacher)
        if dataset is not None and len(dataset) > self.manifest.examples:
            raise CaptureError(
                f"{self.folder} holds {self.manifest.examples} examples and the dataset has {len(dataset)}. Capture the "
                "dataset that you train on."
            )

    def teacher_source(self) -> str:
        """Return what `from_pretrained` loads the captured teacher from.

        That is its Hub id, or a folder of its name with the same weights, beside the capture, in the working directory or in
        a folder of that: a capture does not hold the paths of the machine that it was made on.

        Raises:
            CaptureError: there is no such folder.
        """
        manifest = self.manifest
        if manifest.files is None and to_repo_id(manifest.teacher, manifest.teacher_revision) is not None:
            return manifest.teacher
        places = dict.fromkeys([self.folder.resolve().parent, Path.cwd()])
        below = sorted(Path.cwd().glob("[!.]*/"))
        for candidate in (place / manifest.teacher for place in (*places, *below)):
            if manifest.files is not None and candidate.is_dir() and files_fingerprint(candidate) == manifest.files:
                return str(candidate)
        searched = " and ".join(str(place / manifest.teacher) for place in places)
        raise CaptureError(
            f"{self.folder} was captured from {manifest.teacher!r}, a folder or a loaded model, and does not hold its path; "
            f"looked for the same weights in {searched}, and in the folders of the working "
            "directory. Name the teacher's folder: processor_name_or_path for its tokenizer, and teacher among the arguments "
            "of student for a student that is made of it."
        )

    def summary(self) -> str:
        """Return what it holds, of whom, and how large it is, in a few lines."""
        manifest = self.manifest
        kept = [
            f"all {manifest.classes} logits"
            if manifest.is_dense
            else f"the largest {manifest.config.top_k} and the rest"
        ]
        if manifest.temperatures is not None:
            kept.append("at temperatures " + ", ".join(f"{value:g}" for value in manifest.temperatures))
        kept += [name.replace("hidden_", "hidden states of layer ") for name in manifest.shapes]
        size = sum(manifest.shards) / 2**20
        return (
            f"{self.folder}: {manifest.examples:,} examples of {manifest.teacher} ({manifest.teacher_class})\n"
            f"{'; '.join(kept)}\n{manifest.shard_count} shards, {size:,.1f} MiB"
        )

    def __len__(self) -> int:
        return self.manifest.examples

    def __contains__(self, key: object) -> bool:
        return isinstance(key, bytes) and self._row(key) is not None

    def keys(self, batch: Mapping[str, Any]) -> list[bytes]:
        """Return the keys of a collated batch's examples, as this capture has them."""
        return example_keys(batch, self.task, ignore=self.manifest.config.ignored_inputs)

    def lookup(self, keys: Iterable[bytes], *, temperature: float = 1.0) -> list[CapturedExample]:
        """Return what the teacher said of these examples.

        Args:
            keys: as `keys` or `example_keys` give them.
            temperature: what `log_normalizer` is for; of a capture without all classes it must be a captured one.

        Raises:
            CaptureError: an example that is not there, a temperature that was not captured, a damaged shard.
        """
        self.check_temperature(temperature)
        found = []
        for key in keys:
            row = self._row(key)
            if row is None:
                raise CaptureError(f"The example {key.hex()} is not in {self.folder}. {MISSING_EXAMPLE_HINT}")
            found.append(decode_example(self.manifest, self._arrays(row), temperature))
        return found

    def check_temperature(self, temperature: float) -> None:
        """Refuse a temperature at which the mass of the tail was not captured.

        Raises:
            CaptureError: names those that were.
        """
        known = self.manifest.temperatures
        if known is not None and temperature not in known:
            raise CaptureError(
                f"temperature={temperature} was not captured; {self.folder} has {known}. Train at one of these, or capture "
                f"again with temperatures=[{temperature}]."
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return Capture, (self.folder, self.manifest)

    def _check_teacher(self, teacher: Any) -> None:
        wanted = self.manifest
        if isinstance(teacher, (str, os.PathLike)):
            if wanted.files is not None and files_fingerprint(teacher) == wanted.files:
                return
            config = load_config(os.fspath(teacher))
        else:
            check_is_teacher(teacher)
            config = without_adapter(teacher).config
        there, here = comparable_config(wanted.teacher_config), comparable_config(config)
        # What only one has may be of another version of Transformers; the weights tell.
        differing = sorted(name for name in there.keys() & here.keys() if there[name] != here[name])
        if differing:
            shown = "; ".join(f"{name} is {there[name]!r} there and {here[name]!r} here" for name in differing[:5])
            raise CaptureError(f"{self.folder} was captured from another teacher, {wanted.teacher}: {shown}.")
        model = load_teacher(teacher)
        if wanted.weights is None:
            logger.warning(
                "%s has no fingerprint of its teacher's weights, so only the configs were compared.", self.folder
            )
        elif weights_fingerprint(model) != wanted.weights:
            raise CaptureError(
                f"{self.folder} was captured from another teacher, {wanted.teacher}: the shapes agree, the weights differ. "
                "Capture again with this one."
            )

    def _row(self, key: bytes) -> int | None:
        for row in self._index.rows(key):
            shard, place = self._shard_of(row)
            if shard.key(place) == key:
                return row
        return None

    def shard(self, number: int) -> Shard:
        """Return a shard, opened and compared with its checksum.

        Raises:
            CaptureError: it is missing or damaged, or of another capture.
        """
        path, expected = self.folder / shard_name(number), len(self.manifest.shard_examples(number))
        if not self._checked[number]:
            self._check_file(path.name)
            self._checked[number] = 1
        shard = Shard(path, self._columns)
        if len(shard) != expected:
            raise CaptureError(f"{path} has {len(shard)} examples and should have {expected}. {DAMAGED_HINT}")
        return shard

    def _check_file(self, name: str) -> None:
        checksums = self.manifest.checksums
        if checksums and (self.folder / name).exists():
            try:
                verify_checksum(self.folder / name, checksums.get(name, "not in the manifest"))
            except DamagedFileError as error:
                raise CaptureError(f"{error} {DAMAGED_HINT}") from error

    def _arrays(self, row: int) -> Arrays:
        shard, place = self._shard_of(row)
        return shard.arrays(place)

    def _shard_of(self, row: int) -> tuple[Shard, int]:
        number, place = divmod(row, self.manifest.config.shard_size)
        if number not in self._shards:
            self._shards[number] = self.shard(number)
            if len(self._shards) > MAX_OPEN_SHARDS:
                self._shards.popitem(last=False)
        self._shards.move_to_end(number)
        return self._shards[number], place


MISSING_EXAMPLE_HINT = (
    "It is known by what the model is fed, padding left out: was it masked at random, truncated or tokenised otherwise, or is "
    "it of another dataset? Capture what you train on, with the same collator but for its padding."
)


class CaptureDataCollator:
    """A user's collator, and beside what it collates the signals of the teacher, padded as it padded.

    Added are `teacher_logits` (batch, classes), or (batch, length, classes) where items are tokens; or of language models
    with the largest k `teacher_topk_indices` and `teacher_topk_log_probs` (batch, length, k) and `teacher_log_normalizer` (batch,
    length); and as captured `teacher_hidden_N` and `teacher_features`. Padded places are zeros.

    Args:
        data_collator: gives a batch of tensors. It may pad as it likes; it may not mask or cut at random.
        capture: where the signals are.
        temperature: what `teacher_log_normalizer` is for.
        missing: "error", or "skip": a batch with an example that was not captured then carries no signals.

    Raises:
        CaptureError: a temperature that was not captured; when called, an example that was not.
        OptionError: `missing` is neither.
    """

    def __init__(
        self,
        data_collator: Callable[[Any], Mapping[str, Any]],
        capture: Capture,
        temperature: float = 1.0,
        *,
        missing: str = "error",
    ):
        if missing not in ("error", "skip"):
            raise OptionError(f"missing is 'error' or 'skip'; found {missing!r}.")
        capture.check_temperature(temperature)
        self.data_collator, self.capture, self.temperature, self.missing = data_collator, capture, temperature, missing

    def at(self, temperature: float) -> "CaptureDataCollator":
        """Return the same collator for another temperature.

        Raises:
            CaptureError: it was not captured.
        """
        return CaptureDataCollator(self.data_collator, self.capture, temperature, missing=self.missing)

    def check_temperature(self, temperature: float) -> None:
        """Refuse a temperature that the batches are not made for, where the tail's mass needs it.

        Raises:
            CaptureError: names both.
        """
        if temperature != self.temperature and self.capture.manifest.temperatures is not None:
            raise CaptureError(
                f"The batches are made for temperature={self.temperature}, and the objective now has {temperature}: the mass "
                "of the tail is another. Keep the temperature during a run, or capture all logits."
            )

    def __call__(self, features: Sequence[Any]) -> dict[str, Any]:
        batch = dict(self.data_collator(features))
        keys = self.capture.keys(batch)
        if self.missing == "skip" and any(key not in self.capture for key in keys):
            return batch
        examples = [example.named() for example in self.capture.lookup(keys, temperature=self.temperature)]
        if any(-1 in column.shape for column in self.capture.manifest.columns.values()):
            places, length = token_positions(batch, self.capture.task), self._length(batch)
        for name in examples[0] if examples else ():
            values = [example[name] for example in examples]
            if self._is_by_place(name):
                batch[name] = _pad_to_positions(values, places, length)
            else:
                batch[name] = torch.stack(values)
        return batch

    def _length(self, batch: Mapping[str, Any]) -> int:
        if self.capture.task.row.targets_in_decoder:
            names: tuple[str, ...] = ("labels", "decoder_input_ids")
        else:
            names = ("attention_mask", "input_ids", "inputs_embeds")
        return next(int(batch[name].shape[1]) for name in names if batch.get(name) is not None)

    def _is_by_place(self, name: str) -> bool:
        columns = self.capture.manifest.columns
        column = columns.get(name.removeprefix(COLUMN_PREFIX))
        return column is None or -1 in column.shape  # log_normalizer and a language model's logits have no column


def _pad_to_positions(values: Sequence[Tensor], places: Sequence[Tensor], length: int) -> Tensor:
    padded = values[0].new_zeros(len(values), length, *values[0].shape[1:])
    for row, (value, where) in enumerate(zip(values, places, strict=True)):
        padded[row, where] = value
    return padded
