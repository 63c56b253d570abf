"""Run a teacher once over a dataset and write its signals to disk, so that training needs no teacher.

Does: divide the shards among the processes of `torchrun`, continue after a kill with the missing shards, and never mix two
captures. Does not: read them back (`reader.py`), or hold more than a batch in memory.
"""

import dataclasses
import functools
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import distributed
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_guide.data.sentence_collator import SentenceCollator, SentenceRows
from hf_guide.errors import CaptureError, OptionError
from hf_guide.models.adapters import without_adapter
from hf_guide.models.modes import eval_mode
from hf_guide.models.penultimate import ITEMS_WITH_FEATURES
from hf_guide.signal_cache.codec import encode_batch, resolve_layers, stored_positions
from hf_guide.signal_cache.config import CaptureConfig
from hf_guide.signal_cache.data import IndexedCollator, IndexedDataset, TeacherBatchCollator, is_map_style
from hf_guide.signal_cache.keys import example_keys
from hf_guide.signal_cache.manifest import CaptureManifest, signal_cache_folder
from hf_guide.signal_cache.reader import Capture
from hf_guide.signal_cache.shards import (
    INDEX_NAME,
    Shard,
    ShardWriter,
    checksum_path,
    shard_checksum,
    shard_defect,
    shard_name,
    write_index,
)
from hf_guide.tasks import Task, task_of
from hf_guide.teachers.forward import TeacherRunner
from hf_guide.teachers.loading import load_teacher
from hf_guide.teachers.vocabulary import with_vocabulary_of
from hf_guide.utils.checksums import file_checksum
from hf_guide.utils.distributed import RankMonitor, barrier, rank_and_world_size
from hf_guide.utils.files import check_can_create
from hf_guide.utils.fingerprint import (
    exact_fingerprint,
    files_fingerprint,
    named_tensors,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from hf_guide.utils.public_names import public_name, without_private_keys
from hf_guide.utils.resumable import resumable_write
from hf_guide.validation import check_is_dataset
from hf_guide.version import __version__

logger = logging.getLogger(__name__)

_NUM_SAMPLED_LENGTHS = 32


class LazyBatchSampler:
    """A batch sampler that makes its batches one at a time."""

    def __init__(self, batches: Callable[[], Iterator[list[int]]]):
        self._batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return self._batches()


class CaptureRunner:
    """Writes the shards of one capture that are missing: a killed run leaves whole shards and nothing else."""

    def __init__(
        self,
        folder: Path,
        manifest: CaptureManifest,
        teacher: TeacherRunner,
        dataset: Any,
        collate: TeacherBatchCollator,
        workers: int,
    ):
        self.folder, self.manifest, self.teacher = folder, manifest, teacher
        self.dataset, self.collate, self.workers = dataset, collate, workers
        self.task = Task(manifest.task)
        self.was_complete = False

    def begin(self, state: PartialState) -> None:
        """Write the manifest or compare it with the one in the folder; then check the finished shards and the free space."""
        folder = signal_cache_folder(self.folder)
        folder.begin(lambda: self.manifest.save(self.folder))
        recorded = CaptureManifest.load(self.folder)
        requested = self.manifest
        if recorded.teacher_values is None:  # of an earlier version
            requested = dataclasses.replace(requested, teacher_values=None)
        folder.check_same_call(recorded.comparable(), requested.comparable())
        self.was_complete, self.checksums = recorded.complete, recorded.checksums
        if state.is_main_process:
            self._remove_damaged()
        barrier()
        self.missing = [
            number for number in range(recorded.shard_count) if not (self.folder / shard_name(number)).exists()
        ]
        if state.is_main_process:
            self._check_finished()
            self._check_disk()
        barrier()  # or a shard written by one process would be missing from another's list

    def write_missing(self, state: PartialState, show_progress: bool) -> None:
        """Write the missing shards of this rank."""
        local_shards = self.missing[state.process_index :: state.num_processes]
        loader: DataLoader[Any] = DataLoader(
            IndexedDataset(self.dataset),
            batch_sampler=LazyBatchSampler(
                lambda: (list(batch) for number in local_shards for batch in self._batches(number))
            ),
            collate_fn=IndexedCollator(self.collate),
            num_workers=self.workers,
        )
        with tqdm(
            total=sum(len(self.manifest.shard_examples(number)) for number in local_shards),
            unit="example",
            desc="Running the teacher",
            disable=not (show_progress and state.is_main_process),
        ) as bar:
            batches = iter(loader)
            for number in local_shards:
                self._write(number, batches, bar)

    def finish(self, state: PartialState) -> None:
        """Write the index of all keys and mark the capture complete, in the first process.

        Raises:
            MissingRankError: Another process has ended, so that its shards will never be written.
        """
        watch = RankMonitor()
        for index, number in enumerate(self.missing):
            # A barrier alone times out after some minutes; the last shard of another process may take longer.
            while not (self.folder / shard_name(number)).exists():
                watch.check(f"{shard_name(number)} of rank {index % state.num_processes}")
                time.sleep(0.2)
        barrier()
        if state.is_main_process:
            if self.missing or not (self.was_complete and self.checksums and (self.folder / INDEX_NAME).exists()):
                finalize_capture(self.folder, self.manifest, self.checksums)
            for number in range(self.manifest.shard_count):  # also those of a run that was killed at this point
                checksum_path(self.folder / shard_name(number)).unlink(missing_ok=True)
        barrier()

    def _keys(self, batch: Mapping[str, Any]) -> list[bytes]:
        ignored = self.manifest.config.ignored_inputs
        return example_keys(batch, self.task, ignore=ignored, in_decoder=self.manifest.in_decoder)

    @functools.cached_property
    def _positions_of_first(self) -> int:
        """The number of pixels or queries of the first example."""
        return self.teacher.forward(self.collate([self.dataset[0]])).logits.shape[1]

    def _remove_damaged(self) -> None:
        """Remove the shards and the index whose checksum is wrong, so that they are written again."""
        for number in range(self.manifest.shard_count):
            path = self.folder / shard_name(number)
            defect = shard_defect(path, self.checksums.get(path.name)) if path.exists() else None
            if defect is not None:
                logger.warning("%s It is written again.", defect)
                path.unlink()
        index = self.folder / INDEX_NAME
        if index.exists() and self.checksums and file_checksum(index) != self.checksums.get(index.name):
            logger.warning("%s is damaged. It is written again.", index)
            index.unlink()

    def _batches(self, number: int) -> list[range]:
        numbers, size = self.manifest.shard_examples(number), self.manifest.config.batch_size
        return [numbers[start : start + size] for start in range(0, len(numbers), size)]

    def _next(self, batches: Iterator[Any], expected: range) -> Any:
        """Return the next batch. A dataset that cannot be read is an error of its own, not one of writing the shard."""
        try:
            return next(batches)
        except OSError as error:
            raise CaptureError(
                f"The dataset's examples {expected[0]} to {expected[-1]} cannot be read: {error}. Replace or remove "
                "the one that is damaged."
            ) from error

    def _write(self, number: int, batches: Iterator[Any], bar: Any) -> None:
        path = self.folder / shard_name(number)
        with resumable_write(path, CaptureError), ShardWriter(path, self.manifest.columns) as shard:
            for expected in self._batches(number):
                numbers, batch = self._next(batches, expected)
                keys = self._keys(batch)
                if len(keys) != len(numbers):
                    raise CaptureError(
                        f"The collator made {len(keys)} rows of {len(numbers)} examples, so rows cannot be assigned to "
                        "examples. Use one that makes one row per example."
                    )
                shard.write(keys, encode_batch(self.teacher, batch, self.manifest.config, numbers))
                bar.update(len(numbers))

    def _check_finished(self) -> None:
        """Check that the finished shards are of this dataset.

        Raises:
            CaptureError: The first example of a shard has another key.
        """
        for number in set(range(self.manifest.shard_count)) - set(self.missing):
            path, expected = self.folder / shard_name(number), self.manifest.shard_examples(number)
            shard = Shard(path, self.manifest.columns)
            if len(shard) != len(expected):
                raise CaptureError(
                    f"{path} has {len(shard)} examples; it must have {len(expected)}. Remove it and repeat the call."
                )
            batch = self.collate([self.dataset[expected[0]]])
            if self._keys(batch) != [shard.key(0)]:
                raise CaptureError(
                    f"{self.folder} holds a capture of another dataset: example {expected[0]} is another one, or is processed "
                    "or collated otherwise (masked at random, perhaps). Capture that dataset, or use a new folder."
                )

    def _check_disk(self) -> None:
        remaining = sum(len(self.manifest.shard_examples(number)) for number in self.missing)
        if not remaining:
            return
        check_can_create(self.folder)
        step = max(1, self.manifest.examples // _NUM_SAMPLED_LENGTHS)
        sampled = [self._example_bytes(number) for number in range(0, self.manifest.examples, step)]
        needed = remaining * sum(sampled) // len(sampled)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise CaptureError(
                f"The capture takes about {needed / 2**20:,.0f} MiB and {self.folder} has {free / 2**20:,.0f} MiB free. "
                "Choose another disk, a smaller top_k, or fewer hidden_layers."
            )

    def _example_bytes(self, number: int) -> int:
        if not any(-1 in column.shape for column in self.manifest.columns.values()):
            return self.manifest.example_bytes(0)
        stored = stored_positions(self.task, self.collate([self.dataset[number]]), self.teacher.model)
        return self.manifest.example_bytes(self._positions_of_first if stored is None else len(stored[0]))


def finalize_capture(folder: Path, manifest: CaptureManifest, listed: Mapping[str, str]) -> None:
    """Write the index of a capture whose shards are all written, and its manifest with their sizes and checksums.

    Args:
        folder: The capture's.
        manifest: Of the capture.
        listed: Checksums of shards that an earlier run completed, by file name.
    """
    index = folder / INDEX_NAME
    paths = [folder / shard_name(number) for number in range(manifest.shard_count)]
    write_index(index, [Shard(path, manifest.columns).keys() for path in paths])
    checksums = {path.name: shard_checksum(path, listed.get(path.name)) for path in paths}
    checksums[index.name] = file_checksum(index)
    sizes = [path.stat().st_size for path in paths]
    dataclasses.replace(manifest, shards=sizes, checksums=checksums, complete=True).save(folder)
    for path in paths:
        checksum_path(path).unlink(missing_ok=True)


def capture_teacher(
    teacher: "str | os.PathLike[str] | PreTrainedModel",
    dataset: Any,
    output_dir: str | os.PathLike[str],
    *,
    processing_class: Any = None,
    data_collator: Callable[[Any], Mapping[str, Any]] | None = None,
    config: "CaptureConfig | Mapping[str, Any] | None" = None,
    dtype: "str | torch.dtype | None" = None,
    revision: str | None = None,
    token: "str | bool | None" = None,
    trust_remote_code: bool = False,
    dataloader_num_workers: int = 0,
    show_progress: bool = True,
) -> Capture:
    """Run a teacher once over a dataset and write its signals to `output_dir`, in Arrow files.

    Of classifiers all logits are stored; of language models the k largest log-probabilities at each token and the mass of all
    others; hidden states and penultimate features on request. A killed run is continued by the same call. Under `torchrun` the
    processes share the work; each calls this, with a folder that all of them see.

    Args:
        teacher: A Hub id, a folder or a loaded model.
        dataset: What the student will be trained on, processed as for `Trainer`; it has a length and an index.
        output_dir: A new or empty folder, or one that the same call began.
        processing_class: The tokenizer or processor; its fingerprint is stored, and it pads. Where it has some of the
            teacher's tokens alone (a student with a smaller `vocab_size`), the outputs are of these tokens.
        data_collator: As for training, except for its padding; by default one that pads. Of a `SentenceCollator` every text,
            or pair of texts, is an example of the capture.
        config: A `CaptureConfig` or a mapping of its fields.
        dtype: Of a teacher that is loaded here; None or "auto" takes the checkpoint's.
        revision, token, trust_remote_code: As in `from_pretrained`.
        dataloader_num_workers: Processes that prepare batches, besides this one.
        show_progress: Whether the first process shows a progress bar.

    Returns:
        The capture, opened.

    Raises:
        CaptureError: The folder holds something else or a capture with other settings; an output of the teacher is not
            finite; the disk is too small. The error names the settings, the example, the sizes.
        OptionError: An option is out of range, such as `top_k`, or the dataset has no length.
        TaskError, TeacherError: The teacher's task is not known, or it cannot be loaded.

    Example:
        >>> from hf_guide import capture_teacher
        >>> capture = capture_teacher(
        ...     "HuggingFaceTB/SmolLM2-135M",
        ...     tokenized_dataset,
        ...     "capture",
        ...     processing_class=tokenizer,
        ...     config={"top_k": 64},
        ...     show_progress=False,
        ... )
        >>> capture.manifest.examples
        64
    """
    options = CaptureConfig.parse(config)
    folder = Path(output_dir)
    examples = _num_examples(dataset)
    if isinstance(data_collator, SentenceCollator):
        dataset = SentenceRows(dataset, data_collator)
        examples, data_collator = len(dataset), dataset.row_collator()
    signal_cache_folder(folder).check()
    state = distributed_state()
    model = load_teacher(
        teacher,
        dtype=dtype,
        device=state.device,
        revision=revision,
        token=token,
        trust_remote_code=trust_remote_code,
    )
    hub = {"revision": revision, "token": token, "trust_remote_code": trust_remote_code}
    model = with_vocabulary_of(model, processing_class, hub)
    task = task_of(model)
    collate = TeacherBatchCollator(model, task, data_collator, processing_class, options.remove_unused_columns)
    with eval_mode(model):
        runner = TeacherRunner(model, task, processing_class, hub)
        manifest = build_manifest(teacher, runner, collate([dataset[0]]), examples, processing_class, options)
        capture = CaptureRunner(folder, manifest, runner, dataset, collate, dataloader_num_workers)
        capture.begin(state)
        capture.write_missing(state, show_progress)
        capture.finish(state)
    return Capture.open(folder)


def build_manifest(
    source: Any,
    teacher: TeacherRunner,
    batch: Mapping[str, Any],
    examples: int,
    processing_class: Any,
    options: CaptureConfig,
) -> CaptureManifest:
    """Return the manifest of a capture that is about to begin.

    Args:
        source: The teacher as it was passed to `capture_teacher`.
        teacher: Runs it.
        batch: The first example, collated: it is run for the shapes of what is stored.
        examples: The number of examples.
        processing_class: The tokenizer or processor.
        options: What is stored.

    Raises:
        OptionError: `top_k` or `vocabulary_size` is larger than the teacher's vocabulary, or it has no such layer.
        CaptureError: The first example cannot be captured.
    """
    model, task = teacher.model, teacher.task
    _check_cacheable(task, options)
    outputs = teacher.forward(batch, hidden_states=bool(options.hidden_layers))
    classes = outputs.classes
    if task.is_language_model:
        if options.vocabulary_size is not None and options.vocabulary_size > classes:
            raise OptionError(
                f"vocabulary_size is {options.vocabulary_size}; it must be at most {classes}, the rows of the teacher's."
            )
        classes = options.vocabulary_size or classes
        if options.top_k > classes:
            raise OptionError(
                f"top_k is {options.top_k}; it must be at most {classes}, the rows of the vocabulary, which stores "
                "all of them."
            )
    elif options.vocabulary_size is not None:
        raise OptionError(f"vocabulary_size is for language models, and the teacher's task is {task}. Leave it out.")
    config = dataclasses.replace(
        options, hidden_layers=resolve_layers(options.hidden_layers, len(outputs.hidden_states))
    )
    (first,) = encode_batch(teacher, batch, config, [0])
    shapes = {}
    for name, array in first.items():
        if name.startswith("hidden_") or (name == "features" and task.row.outputs[0].items in ("token", "frame")):
            by_position = stored_positions(task, batch, model) is not None
            shapes[name] = [-1, *array.shape[1:]] if by_position else list(array.shape)
        elif name == "features":
            shapes[name] = list(array.shape)
    bare = without_adapter(model)
    loaded_here = isinstance(source, (str, os.PathLike))
    name = os.fspath(source) if loaded_here else bare.config._name_or_path or type(bare).__name__
    return CaptureManifest(
        teacher=public_name(name),
        teacher_revision=getattr(bare.config, "_commit_hash", None),
        teacher_class=type(bare).__name__,
        teacher_config=without_private_keys(bare.config.to_dict()),
        teacher_dtype=str(bare.dtype).removeprefix("torch."),
        weights=weights_fingerprint(model),
        files=files_fingerprint(name) if loaded_here and os.path.isdir(name) else None,
        tokenizer=tokenizer_fingerprint(processing_class),
        task=str(task),
        classes=classes,
        examples=examples,
        shapes=shapes,
        config=config,
        hf_guide_version=__version__,
        teacher_values=exact_fingerprint(named_tensors(model)),
    )


def _check_cacheable(task: Task, options: CaptureConfig) -> None:
    """Check that a teacher's signals for an example do not depend on what else is in its batch.

    Raises:
        CaptureError: They do, or there would be nothing to store.
    """
    live = "Train with the teacher itself: DistillationTrainer(teacher=...)."
    match task.row.outputs[0].items:
        case "row":
            raise CaptureError(
                f"The outputs of a model for {task} compare each example with all others of its batch, so they cannot be "
                f"stored by example. {live}"
            )
        case "patch":
            raise CaptureError(
                f"A model for {task} reconstructs the patches that are masked, at random and anew in each epoch, so its "
                f"outputs cannot be stored by example. {live}"
            )
    has_features = task.row.outputs[0].items in ITEMS_WITH_FEATURES and task is not Task.MULTIPLE_CHOICE
    if options.save_penultimate and not has_features:
        raise CaptureError(
            f"save_penultimate is not for {task}, whose head is not fed one vector per {task.row.outputs[0].items}. Store "
            "hidden_layers instead."
        )
    if options.hidden_layers and task is Task.MULTIPLE_CHOICE:
        raise CaptureError(
            f"hidden_layers cannot be stored of a model for {task}, which has them for each choice. {live}"
        )
    if task is Task.FEATURE_EXTRACTION and not (options.save_penultimate or options.hidden_layers):
        raise CaptureError(
            f"A model for {task} has no logits: set save_penultimate=True, which stores its mean hidden states, or "
            "hidden_layers."
        )


def distributed_state() -> PartialState:
    """Return the rank and the number of processes; they communicate by gloo where there is no accelerator."""
    started = int(os.environ.get("WORLD_SIZE", 1))
    try:
        state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
    except distributed.DistError as error:
        raise CaptureError(
            f"The {started} processes could not connect to each other (this is rank {os.environ.get('RANK')}): "
            f"{error}. Start ranks 0 to {started - 1}, each with the same MASTER_ADDR and MASTER_PORT."
        ) from error
    if started != state.num_processes:
        raise CaptureError(
            f"{started} processes were started, and accelerate knows of {state.num_processes}: each would do all of the work. "
            "Call capture_teacher before anything else creates accelerate's PartialState, or create it with cpu=True."
        )
    rank_and_world_size()  # so that the other processes notice when this one ends
    return state


def _num_examples(dataset: Any) -> int:
    check_is_dataset(dataset, "dataset")
    if not is_map_style(dataset):
        raise OptionError(
            f"The dataset must have a length and an index, so that a killed capture can be continued; found a "
            f"{type(dataset).__name__}. Save a stream to disk first."
        )
    if len(dataset) == 0:
        raise OptionError("The dataset is empty; there is nothing to capture.")
    return len(dataset)
