"""Read a teacher's signals from disk in row_in_shard of the teacher.

Does: map a capture, check that it is complete and of the right teacher, find an example's signals, add them to a batch.
Does not: load a capture into memory, or run the teacher.
"""

import logging
import math
import mmap
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_guide.errors import CaptureError, OptionError
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
from hf_guide.utils.public_names import to_repo_id

logger = logging.getLogger(__name__)

MAX_OPEN_SHARDS = 128
"""How many shards are open at once; each needs a file descriptor."""


class Capture:
    """The signals of a teacher on disk, read-only. Pickling it is cheap: another process opens the files itself.

    The checksum of each file is verified when the file is first read: once for all workers of a dataloader that are forked,
    and once in each worker that is spawned.

    Attributes:
        folder: Its folder.
        manifest: Its teacher, dataset and options.

    Example:
        >>> from hf_guide import Capture, capture_teacher
        >>> _ = capture_teacher(
        ...     "HuggingFaceTB/SmolLM2-135M", tokenized_dataset, "capture", processing_class=tokenizer, show_progress=False
        ... )
        >>> Capture.open("capture").manifest.teacher_class
        'LlamaForCausalLM'
    """

    def __init__(self, folder: Path, manifest: CaptureManifest):
        self.folder, self.manifest = folder, manifest
        # One byte per shard in memory that forked processes share: whether its checksum was verified.
        self._verified = mmap.mmap(-1, max(1, manifest.shard_count))
        self._check_file(INDEX_NAME)
        self._index = KeyIndex(folder / INDEX_NAME)
        if len(self._index) != manifest.examples:
            raise CaptureError(
                f"{folder / INDEX_NAME} has {len(self._index)} examples; it must have {manifest.examples}, as in the "
                "manifest. Run the same capture again."
            )
        self._columns = manifest.columns
        self._shards: OrderedDict[int, Shard] = OrderedDict()

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, processing_class: Any = None, teacher: Any = None) -> "Capture":
        """Open a capture, mapped and read-only; of the shards nothing is read.

        Args:
            folder: What `capture_teacher` or `hf-guide capture` wrote.
            processing_class, teacher: What it must be of, see `check`; None is not compared.

        Raises:
            CaptureError: There is no capture, it is not complete, a file is missing, truncated or damaged, or it is of another
                teacher or tokenizer.
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
        """Check that the capture is of this teacher, tokenizer and dataset. What is None is not compared.

        Args:
            processing_class: The tokenizer or processor that makes the student's input.
            teacher: A loaded model, or a folder or Hub id, whose files are compared; it is loaded if these differ.
            dataset: Its number of examples is compared; a missing example is an error when it is looked up.

        Raises:
            CaptureError: Something differs; it is named.
        """
        fingerprint = tokenizer_fingerprint(processing_class)
        if fingerprint is not None and self.manifest.tokenizer not in (None, fingerprint):
            raise CaptureError(
                f"{self.folder} was captured with another tokenizer or processor than this {type(processing_class).__name__} "
                f"(fingerprint {self.manifest.tokenizer} there, {fingerprint} here). Use that of {self.manifest.teacher}, or "
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
        """Return the name or path from which `from_pretrained` loads the captured teacher.

        A capture does not store paths of the machine that made it. The teacher is its Hub id, or a folder of its name with the
        same weights next to the capture, in the working directory, or one level below it.

        Raises:
            CaptureError: There is no such folder.
        """
        manifest = self.manifest
        if to_repo_id(manifest.teacher, manifest.teacher_revision, manifest.teacher_source) is not None:
            return manifest.teacher
        parents = dict.fromkeys([self.folder.resolve().parent, Path.cwd()])
        below = sorted(Path.cwd().glob("[!.]*/"))
        for candidate in (parent / manifest.teacher for parent in (*parents, *below)):
            if manifest.files is not None and candidate.is_dir() and files_fingerprint(candidate) == manifest.files:
                return str(candidate)
        searched = " and ".join(str(parent / manifest.teacher) for parent in parents)
        raise CaptureError(
            f"{self.folder} was captured from {manifest.teacher!r}, a folder or a loaded model, and does not hold its path; "
            f"looked for the same weights in {searched}, and in the folders of the working "
            "directory. Name the teacher's folder: processing_class_name_or_path for its tokenizer, and teacher "
            "among the arguments of student for a student that is made of it."
        )

    def summary(self) -> str:
        """Return its teacher, signals and size in a few lines."""
        manifest = self.manifest
        signals = [
            f"all {manifest.classes} logits"
            if manifest.is_dense
            else f"the {manifest.config.top_k} largest logits and the mass of the rest"
        ]
        if manifest.temperatures is not None:
            signals.append("at temperatures " + ", ".join(f"{value:g}" for value in manifest.temperatures))
        signals += [
            name.replace("hidden_", "hidden states of layer ").replace("features", "penultimate features")
            for name in manifest.shapes
        ]
        size = sum(manifest.shards) / 2**20
        return (
            f"{self.folder}: {manifest.examples:,} examples of {manifest.teacher} ({manifest.teacher_class})\n"
            f"{'; '.join(signals)}\n{manifest.shard_count} shards, {size:,.1f} MiB"
        )

    def __len__(self) -> int:
        return self.manifest.examples

    def __contains__(self, key: object) -> bool:
        return isinstance(key, bytes) and self._row(key) is not None

    def keys(self, batch: Mapping[str, Any]) -> list[bytes]:
        """Return the keys of the examples of a collated batch, by this capture's options."""
        return example_keys(
            batch, self.task, ignore=self.manifest.config.ignored_inputs, in_decoder=self.manifest.in_decoder
        )

    def lookup(self, keys: Iterable[bytes], *, temperature: float = 1.0) -> list[CapturedExample]:
        """Return the signals of examples.

        Args:
            keys: As from `keys`.
            temperature: Of `log_normalizer`; for a capture of the k largest logits one of the captured temperatures.

        Raises:
            CaptureError: An example or the temperature was not captured, or a shard is damaged.
        """
        self.check_temperature(temperature)
        examples = []
        for key in keys:
            row = self._row(key)
            if row is None:
                raise CaptureError(f"The example {key.hex()} is not in {self.folder}. {MISSING_EXAMPLE_HINT}")
            examples.append(decode_example(self.manifest, self._arrays(row), temperature))
        return examples

    def check_temperature(self, temperature: float) -> None:
        """Check that the mass of the tail was captured at a temperature.

        Raises:
            CaptureError: It was not; the captured temperatures are named.
        """
        captured = self.manifest.temperatures
        if captured is not None and temperature not in captured:
            raise CaptureError(
                f"temperature={temperature} was not captured; {self.folder} has {captured}. Train at one of these, or capture "
                f"again with temperatures=[{temperature}]."
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return Capture, (self.folder, self.manifest)

    def _check_teacher(self, teacher: Any) -> None:
        manifest = self.manifest
        if isinstance(teacher, (str, os.PathLike)):
            if manifest.files is not None and files_fingerprint(teacher) == manifest.files:
                return
            config = load_config(os.fspath(teacher))
        else:
            check_is_teacher(teacher)
            config = without_adapter(teacher).config
        there, here = comparable_config(manifest.teacher_config), comparable_config(config)
        # An entry that only one of them has may be new in a version of Transformers; the weights decide.
        differing = sorted(name for name in there.keys() & here.keys() if there[name] != here[name])
        if differing:
            shown = "; ".join(f"{name} is {there[name]!r} there and {here[name]!r} here" for name in differing[:5])
            raise CaptureError(f"{self.folder} was captured from another teacher, {manifest.teacher}: {shown}.")
        model = load_teacher(teacher)
        if manifest.weights is None:
            logger.warning(
                "%s has no fingerprint of its teacher's weights, so only the configs were compared.", self.folder
            )
        elif weights_fingerprint(model) != manifest.weights:
            raise CaptureError(
                f"{self.folder} was captured from another teacher, {manifest.teacher}: the shapes agree, the weights differ. "
                "Capture again with this one."
            )

    def _row(self, key: bytes) -> int | None:
        for row in self._index.rows(key):
            shard, row_in_shard = self._shard_of(row)
            if shard.key(row_in_shard) == key:
                return row
        return None

    def shard(self, number: int) -> Shard:
        """Open a shard and verify its checksum.

        Raises:
            CaptureError: It is missing or damaged, or of another capture.
        """
        path, expected = self.folder / shard_name(number), len(self.manifest.shard_examples(number))
        if not self._verified[number]:
            self._check_file(path.name)
            self._verified[number] = 1
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
        shard, row_in_shard = self._shard_of(row)
        return shard.arrays(row_in_shard)

    def _shard_of(self, row: int) -> tuple[Shard, int]:
        number, row_in_shard = divmod(row, self.manifest.config.shard_size)
        if number not in self._shards:
            self._shards[number] = self.shard(number)
            if len(self._shards) > MAX_OPEN_SHARDS:
                self._shards.popitem(last=False)
        self._shards.move_to_end(number)
        return self._shards[number], row_in_shard


MISSING_EXAMPLE_HINT = (
    "An example is identified by the model's inputs without padding: was it masked at random, truncated or tokenised "
    "otherwise, or is it of another dataset? Capture what you train on, with the same collator except for its "
    "padding."
)


class CaptureDataCollator:
    """Wraps a data collator and adds the teacher's signals to each batch, padded as the batch is.

    Adds `teacher_logits` (batch, classes), or (batch, length, classes) where items are tokens; or of language models with the
    k largest logits `teacher_topk_indices` and `teacher_topk_log_probs` (batch, length, k) and `teacher_log_normalizer`
    (batch, length); and as captured `teacher_hidden_N` and `teacher_features`. They are zero at padding, and
    the logits of the positions of an answer -inf.

    Args:
        data_collator: Returns a batch of tensors. It may pad in any way; it may not mask or truncate at random.
        capture: The signals.
        temperature: Of `teacher_log_normalizer`.
        missing: "error", or "skip": a batch with an example that was not captured then has no signals.

    Raises:
        CaptureError: The temperature was not captured; (when called) an example was not.
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
            raise OptionError(f"missing must be 'error' or 'skip'; found {missing!r}.")
        capture.check_temperature(temperature)
        self.data_collator, self.capture, self.temperature, self.missing = data_collator, capture, temperature, missing

    @property
    def keeps_columns(self) -> bool:
        """Whether the collator reads columns that no model takes."""
        return bool(getattr(self.data_collator, "keeps_columns", False))

    def with_temperature(self, temperature: float) -> "CaptureDataCollator":
        """Return the same collator for another temperature.

        Raises:
            CaptureError: It was not captured.
        """
        return CaptureDataCollator(self.data_collator, self.capture, temperature, missing=self.missing)

    def check_temperature(self, temperature: float) -> None:
        """Check that the batches have the mass of the tail at a temperature.

        Raises:
            CaptureError: They have it at another one.
        """
        if temperature != self.temperature and self.capture.manifest.temperatures is not None:
            raise CaptureError(
                f"The batches have the mass of the tail at temperature={self.temperature}, and the loss has "
                f"temperature={temperature}. Keep the temperature during a run, or capture all logits."
            )

    def __call__(self, features: Sequence[Any]) -> dict[str, Any]:
        """Collate examples and add the cached teacher outputs."""
        batch = dict(self.data_collator(features))
        keys = self.capture.keys(batch)
        if self.missing == "skip" and any(key not in self.capture for key in keys):
            return batch
        examples = [example.named() for example in self.capture.lookup(keys, temperature=self.temperature)]
        has_positions = any(-1 in column.shape for column in self.capture.manifest.columns.values())
        if has_positions and self.capture.task.has_token_positions:
            positions, length = token_positions(batch, self.capture.task, self._in_decoder), self._length(batch)
        for name in examples[0] if examples else ():
            values = [example[name] for example in examples]
            if self._has_token_axis(name):
                if not self.capture.task.has_token_positions:  # frames, pixels or queries, from the first on
                    positions = [torch.arange(len(value)) for value in values]
                    length = max(len(value) for value in values)
                is_span = name == "teacher_logits" and self.capture.task is Task.QUESTION_ANSWERING
                batch[name] = _pad_to_positions(values, positions, length, -math.inf if is_span else 0.0)
            else:
                batch[name] = torch.stack(values)
        return batch

    @property
    def _in_decoder(self) -> bool:
        return self.capture.manifest.in_decoder

    def _length(self, batch: Mapping[str, Any]) -> int:
        if self._in_decoder:
            names: tuple[str, ...] = ("labels", "decoder_input_ids")
        else:
            names = ("attention_mask", "input_ids", "inputs_embeds")
        return next(int(batch[name].shape[1]) for name in names if batch.get(name) is not None)

    def _has_token_axis(self, name: str) -> bool:
        columns = self.capture.manifest.columns
        column = columns.get(name.removeprefix(COLUMN_PREFIX))
        return column is None or -1 in column.shape  # log_normalizer and a language model's logits have no column


def _pad_to_positions(values: Sequence[Tensor], positions: Sequence[Tensor], length: int, fill: float = 0.0) -> Tensor:
    padded = values[0].new_full((len(values), length, *values[0].shape[1:]), fill)
    for row, (value, where) in enumerate(zip(values, positions, strict=True)):
        padded[row, where] = value
    return padded
