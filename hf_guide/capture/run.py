"""One capture on its way: what is missing is written, shard by shard, by one process or several.

A run that was killed left whole shards and nothing else; the next one writes those that are missing.
"""

import dataclasses
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hf_guide.capture.collate import Collate, CollateNumbered, Numbered
from hf_guide.capture.keys import example_keys, token_places
from hf_guide.capture.manifest import MANIFEST_NAME, CaptureManifest
from hf_guide.capture.signals import Listener, read_signals
from hf_guide.capture.storage import (
    INDEX_NAME,
    Shard,
    ShardWriter,
    checksum_path,
    shard_checksum,
    shard_defect,
    shard_name,
    write_index,
)
from hf_guide.distillation.tasks import Task
from hf_guide.errors import CaptureError
from hf_guide.folders import remove_stale
from hf_guide.integrity import file_checksum
from hf_guide.worlds import Watch, wait

logger = logging.getLogger(__name__)

_SAMPLED_LENGTHS = 32


class _Lazily:
    """An iterable of batches that are never all there at once."""

    def __init__(self, batches: Callable[[], Iterator[list[int]]]):
        self._batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return self._batches()


class Run:
    """One capture on its way."""

    def __init__(
        self, folder: Path, manifest: CaptureManifest, listener: Listener, dataset: Any, collate: Collate, workers: int
    ):
        self.folder, self.manifest, self.listener = folder, manifest, listener
        self.dataset, self.collate, self.workers = dataset, collate, workers
        self.task = Task(manifest.task)
        self.was_complete = False

    def begin(self, state: PartialState) -> None:
        """Write the manifest, or agree with the one that is there; then look at what is there, and at the disk."""
        if state.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_stale(self.folder)
            if not (self.folder / MANIFEST_NAME).exists():
                self.manifest.save(self.folder)
        wait()
        there = CaptureManifest.load(self.folder)
        differing = there.differences(self.manifest)
        if differing:
            raise CaptureError(
                f"{self.folder} holds a capture with other settings: {'; '.join(differing)}. Capture with those, or into a "
                "new folder."
            )
        self.was_complete, self.checksums = there.complete, there.checksums
        if state.is_main_process:
            self._remove_damaged()
        wait()
        self.missing = [
            number for number in range(there.shard_count) if not (self.folder / shard_name(number)).exists()
        ]
        if state.is_main_process:
            self._check_finished()
            self._check_disk()
        wait()  # or a shard written by one process would be missing from another's list

    def write_missing(self, state: PartialState, show_progress: bool) -> None:
        """Write this process's share of the shards that are missing."""
        mine = self.missing[state.process_index :: state.num_processes]
        loader: DataLoader[Any] = DataLoader(
            Numbered(self.dataset),
            batch_sampler=_Lazily(lambda: (list(batch) for number in mine for batch in self._batches(number))),
            collate_fn=CollateNumbered(self.collate),
            num_workers=self.workers,
        )
        with tqdm(
            total=sum(len(self.manifest.shard_examples(number)) for number in mine),
            unit="example",
            desc="Listening to the teacher",
            disable=not (show_progress and state.is_main_process),
        ) as bar:
            stream = iter(loader)
            for number in mine:
                self._write(number, stream, bar)

    def finish(self, state: PartialState) -> None:
        """Write the index of all keys and mark the capture complete, in the first process.

        Raises:
            MissingRankError: another process has ended, so that its shards will never be there.
        """
        watch = Watch()
        for place, number in enumerate(self.missing):
            # A barrier alone gives up after some minutes, and another process's last shard may take longer.
            while not (self.folder / shard_name(number)).exists():
                watch.check(f"{shard_name(number)} of rank {place % state.num_processes}")
                time.sleep(0.2)
        wait()
        if state.is_main_process:
            if self.missing or not (self.was_complete and self.checksums and (self.folder / INDEX_NAME).exists()):
                complete(self.folder, self.manifest, self.checksums)
            for number in range(self.manifest.shard_count):  # also those of a run that was killed right here
                checksum_path(self.folder / shard_name(number)).unlink(missing_ok=True)
        wait()

    def _remove_damaged(self) -> None:
        """Remove shards, and the index, whose bytes are not those that were written: they are written again."""
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
        inside, size = self.manifest.shard_examples(number), self.manifest.config.batch_size
        return [inside[start : start + size] for start in range(0, len(inside), size)]

    def _next(self, stream: Iterator[Any], inside: range) -> Any:
        """Return the next batch; what cannot be read of the dataset is not taken for a disk that cannot be written."""
        try:
            return next(stream)
        except OSError as error:
            raise CaptureError(
                f"The dataset's examples {inside[0]} to {inside[-1]} cannot be read: {error}. Replace or remove the one that "
                "is damaged."
            ) from error

    def _write(self, number: int, stream: Iterator[Any], bar: Any) -> None:
        path = self.folder / shard_name(number)
        try:
            with ShardWriter(path, self.manifest.columns) as shard:
                for inside in self._batches(number):
                    numbers, batch = self._next(stream, inside)
                    keys = example_keys(batch, self.task, ignore=self.manifest.config.ignore_in_key)
                    if len(keys) != len(numbers):
                        raise CaptureError(
                            f"The collator made {len(keys)} rows of {len(numbers)} examples, so which is which cannot be "
                            "told. Use one that keeps one row an example."
                        )
                    shard.write(keys, read_signals(self.listener, batch, self.manifest.config, numbers))
                    bar.update(len(numbers))
        except OSError as error:
            raise CaptureError(
                f"{path} could not be written: {error}. Make room; the same call then goes on from here."
            ) from error

    def _check_finished(self) -> None:
        """Refuse a dataset other than the one that the finished shards are of."""
        for number in set(range(self.manifest.shard_count)) - set(self.missing):
            shard, inside = (
                Shard(self.folder / shard_name(number), self.manifest.columns),
                self.manifest.shard_examples(number),
            )
            if len(shard) != len(inside):
                raise CaptureError(
                    f"{self.folder / shard_name(number)} has {len(shard)} examples, not {len(inside)}. Remove it and go on."
                )
            batch = self.collate([self.dataset[inside[0]]])
            if example_keys(batch, self.task, ignore=self.manifest.config.ignore_in_key) != [shard.key(0)]:
                raise CaptureError(
                    f"{self.folder} holds a capture of another dataset: example {inside[0]} is another one, or is processed "
                    "or collated otherwise (masked at random, perhaps). Capture that dataset, or into a new folder."
                )

    def _check_disk(self) -> None:
        remaining = sum(len(self.manifest.shard_examples(number)) for number in self.missing)
        if not remaining:
            return
        step = max(1, self.manifest.examples // _SAMPLED_LENGTHS)
        sampled = [self._example_bytes(number) for number in range(0, self.manifest.examples, step)]
        needed = remaining * sum(sampled) // len(sampled)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise CaptureError(
                f"The capture takes about {needed / 2**20:,.0f} MiB and {self.folder} has {free / 2**20:,.0f} MiB free. "
                "Choose another disk, a smaller top_k, or fewer hidden_states."
            )

    def _example_bytes(self, number: int) -> int:
        if self.task is Task.IMAGE_CLASSIFICATION:
            return self.manifest.example_bytes(0)
        (places,) = token_places(self.collate([self.dataset[number]]), self.task)
        return self.manifest.example_bytes(len(places))


def complete(folder: Path, manifest: CaptureManifest, listed: Mapping[str, str]) -> None:
    """Write the index of a capture whose shards are all there, and its manifest with their sizes and checksums.

    Args:
        listed: checksums of shards that an earlier run has completed.
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
