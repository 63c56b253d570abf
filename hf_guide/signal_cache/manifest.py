"""The manifest of a signal cache, `capture.json`: written first, marked complete last. `FORMAT.md` defines it."""

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from hf_guide.errors import CaptureError
from hf_guide.signal_cache.config import RENAMED_OPTIONS, CaptureConfig
from hf_guide.signal_cache.keys import KEY_BYTES
from hf_guide.signal_cache.shards import OLD_COLUMN_NAMES, Column, high_bits, shard_name
from hf_guide.tasks import Task
from hf_guide.utils.checksums import DamagedFileError, read_json, write_json
from hf_guide.utils.public_names import Source
from hf_guide.utils.resumable import ResumableFolder

MANIFEST_NAME = "capture.json"
FORMAT_VERSION = 3
"""The version of the format, written down in `FORMAT.md`."""

_OLD_FORMATS = (1, 2)
"""Formats of version 0.1: with the old names of options and of the column `features`; the first without checksums."""

_CHANGEABLE_OPTIONS = {"batch_size"}  # may change between a run and its resumption


def signal_cache_folder(folder: Path) -> ResumableFolder:
    """Return the folder of a capture."""
    return ResumableFolder(folder, MANIFEST_NAME, "The capture's folder", CaptureError)


@dataclass
class CaptureManifest:
    """The teacher, dataset, options and files of a capture.

    Attributes:
        teacher, teacher_revision: where the teacher came from, and its commit where that is known.
        teacher_class, teacher_config, teacher_dtype: what it is.
        weights: fingerprint of its parameters (`weights_fingerprint`), None where another program wrote the cache.
        teacher_values: hash of all values of its parameters (`exact_fingerprint`): an interrupted capture continues with no
            other teacher. None where another program or an earlier version wrote the cache.
        files: fingerprint of its safetensors files, None if it had none.
        tokenizer: fingerprint of the tokenizer or processor, None where none was known.
        task: a value of `Task`.
        classes: its vocabulary, as far as captured, or its labels.
        examples: how many examples the dataset has.
        shapes: of one example's hidden states and penultimate features, -1 for the axis that is its number of tokens.
        config: what was asked for.
        shards: the bytes of each shard's file, once complete.
        checksums: of each shard and of the index by file name, once complete; empty in captures of earlier versions.
        complete: whether all of it is there.
    """

    teacher: str
    teacher_revision: str | None
    teacher_class: str
    teacher_config: dict[str, Any]
    teacher_dtype: str
    weights: str | None
    files: str | None
    tokenizer: str | None
    task: str
    classes: int
    examples: int
    shapes: dict[str, list[int]]
    config: CaptureConfig
    hf_guide_version: str
    shards: list[int] = field(default_factory=list)
    checksums: dict[str, str] = field(default_factory=dict)
    complete: bool = False
    teacher_values: str | None = None
    format: int = FORMAT_VERSION

    @property
    def teacher_source(self) -> Source:
        """Where the teacher was loaded from: of public names only Hub ids have an owner or a commit."""
        return "hub" if "/" in self.teacher or self.teacher_revision is not None else "local"

    @property
    def is_dense(self) -> bool:
        """Whether all classes are stored: always of classifiers, of language models if `top_k` is the vocabulary."""
        return not Task(self.task).is_language_model or self.config.top_k == self.classes

    @property
    def temperatures(self) -> list[float] | None:
        """The temperatures at which the mass of the tail is stored; None if all classes are."""
        return None if self.is_dense else self.config.temperatures

    @property
    def in_decoder(self) -> bool:
        """Whether its tokens are those of a decoder."""
        return Task(self.task).row.targets_in_decoder and bool(self.teacher_config.get("is_encoder_decoder", True))

    @property
    def shard_count(self) -> int:
        """The number of shards."""
        return -(-self.examples // self.config.shard_size)

    @property
    def columns(self) -> dict[str, Column]:
        """The columns of a shard, without the key."""
        task, config = Task(self.task), self.config
        columns: dict[str, Column] = {}
        if not task.is_language_model:
            by_items = {"example": (self.classes,), "boundary": (-1, 2)}
            per_example = by_items.get(task.row.outputs[0].items, (-1, self.classes))
            if task is not Task.FEATURE_EXTRACTION:
                columns["logits"] = Column("float32", per_example)
        elif self.is_dense:
            columns["log_probs"] = Column(config.log_prob_dtype, (-1, self.classes))
        else:
            columns["indices_low"] = Column("uint16", (-1, config.top_k))
            if high_bits(self.classes):
                columns["indices_high"] = Column("uint8", (-1,))
            columns["log_probs"] = Column(config.log_prob_dtype, (-1, config.top_k))
            columns["log_tail"] = Column("float32", (-1, len(config.temperatures)))
        for name, shape in self.shapes.items():
            columns[name] = Column(config.hidden_dtype, tuple(shape))
        return columns

    def example_bytes(self, tokens: int) -> int:
        """Return the bytes of an example of `tokens` tokens, including its key."""
        config, total = self.config, KEY_BYTES
        for name, column in self.columns.items():
            if name == "indices_high":  # packed, so the shape does not give it
                total += -(-tokens * config.top_k * high_bits(self.classes) // 8)
            else:
                total += column.bytes_per_token * (tokens if -1 in column.shape else 1)
        return total

    def shard_examples(self, number: int) -> range:
        """Return the indices of the examples in a shard."""
        size = self.config.shard_size
        return range(number * size, min((number + 1) * size, self.examples))

    def teacher_config_object(self) -> PreTrainedConfig:
        """Return the teacher's config.

        Raises:
            CaptureError: it is of a family that Transformers does not know here, or the capture is one of subclasses.
        """
        settings = dict(self.teacher_config)
        if "model_type" not in settings:
            raise CaptureError(
                "The capture holds no teacher's logits but the probabilities of subclasses, as capture_targets writes them: "
                "pass it to SubclassLabelCollator(projector, ..., capture=...)."
            )
        try:
            return AutoConfig.for_model(settings.pop("model_type"), **settings)
        except (KeyError, ValueError) as error:
            raise CaptureError(f"The teacher's config in {MANIFEST_NAME} cannot be read here: {error}") from error

    def comparable(self) -> dict[str, Any]:
        """Return what a resumed capture must agree on: the teacher, the dataset and the options that shape the files."""
        teacher = ("teacher_class", "teacher_dtype", "tokenizer", "weights", "teacher_values")
        names = (*teacher, "task", "classes", "examples", "shapes")
        options = dataclasses.asdict(self.config).items()
        return {name: getattr(self, name) for name in names} | {
            name: value for name, value in options if name not in _CHANGEABLE_OPTIONS
        }

    def save(self, folder: Path) -> None:
        """Write `capture.json` atomically."""
        write_json(folder / MANIFEST_NAME, dataclasses.asdict(self))

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "CaptureManifest":
        """Read `capture.json`.

        Raises:
            CaptureError: There is none, it is damaged, or its format is newer than `FORMAT_VERSION`.
        """
        path = Path(folder) / MANIFEST_NAME
        try:
            entries, has_checksum = read_json(path, required=False)
        except FileNotFoundError:
            raise CaptureError(
                f"{folder} holds no capture: it has no {MANIFEST_NAME}. Name the folder that capture_teacher or "
                "`hf-guide capture` wrote."
            ) from None
        except DamagedFileError as error:
            raise CaptureError(f"{error} Capture again into a new folder.") from error
        version = entries.get("format")
        if version not in (*_OLD_FORMATS, FORMAT_VERSION):
            raise CaptureError(
                f"{path} has format {version!r}; this version of hf_guide reads formats 1 to {FORMAT_VERSION}. Update "
                "hf_guide, or capture again into a new folder."
            )
        if version in _OLD_FORMATS:
            entries = _upgrade(entries)
        entries = {"teacher_values": None} | entries
        expected = {option.name for option in dataclasses.fields(cls)}
        if entries.keys() != expected:
            raise CaptureError(f"{path} is damaged: {sorted(entries.keys() ^ expected)} are missing or unknown.")
        may_lack_checksum = version == 1 or (
            version == FORMAT_VERSION and entries["complete"] and not entries["checksums"]
        )
        if not (has_checksum or may_lack_checksum):
            raise CaptureError(f"{path} is damaged: it has no checksum of its own. Capture again into a new folder.")
        return cls(**entries | {"config": CaptureConfig(**entries["config"])})

    def check_files(self, folder: Path) -> None:
        """Check that the capture is complete and its shards have their sizes.

        Raises:
            CaptureError: It is not complete, or a shard is missing or truncated; the file is named.
        """
        if not self.complete:
            done = sum((folder / shard_name(number)).exists() for number in range(self.shard_count))
            raise CaptureError(
                f"{folder} is not complete: {done} of {self.shard_count} shards are there. Run the same capture again; "
                "it continues where it stopped."
            )
        for number, expected in enumerate(self.shards):
            path = folder / shard_name(number)
            if not path.exists():
                raise CaptureError(f"{path} is missing. Run the same capture again; it writes this shard alone.")
            size = path.stat().st_size
            if size != expected:
                raise CaptureError(
                    f"{path} has {size} bytes and should have {expected}: it is truncated or was changed. Run the same "
                    "capture again; it writes this shard alone."
                )


def _upgrade(entries: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a manifest of an old format as those of this one. The shards are the same but for a name."""
    config = {RENAMED_OPTIONS.names.get(name, name): value for name, value in entries["config"].items()}
    shapes = {OLD_COLUMN_NAMES.get(name, name): shape for name, shape in entries["shapes"].items()}
    return {"checksums": {}} | entries | {"config": config, "shapes": shapes, "format": FORMAT_VERSION}
