"""One capture on its way: what is missing is written, shard by shard, by one process or several.

A run that was killed left whole shards and nothing else; the next one writes those that are missing.
"""

import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator
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
    shard_name,
    write_index,
)
from hf_guide.distillation.tasks import Task
from hf_guide.errors import CaptureError
from hf_guide.folders import remove_partials

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
            remove_partials(self.folder)
            if not (self.folder / MANIFEST_NAME).exists():
                self.manifest.save(self.folder)
        state.wait_for_everyone()
        there = CaptureManifest.load(self.folder)
        differing = there.differences(self.manifest)
        if differing:
            raise CaptureError(
                f"{self.folder} holds a capture with other settings: {'; '.join(differing)}. Capture with those, or into a "
                "new folder."
            )
        self.was_complete = there.complete
        sizes = there.shards if there.complete else [None] * there.shard_count
        self.missing = [number for number, size in enumerate(sizes) if not self._is_there(number, size)]
        if state.is_main_process:
            self._check_finished()
            self._check_disk()
        state.wait_for_everyone()  # or a shard written by one process would be missing from another's list

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
        """Write the index of all keys and mark the capture complete, in the first process."""
        for number in self.missing:
            # A barrier alone gives up after some minutes, and another process's last shard may take longer.
            while not (self.folder / shard_name(number)).exists():
                time.sleep(0.2)
        state.wait_for_everyone()
        if state.is_main_process and not (
            self.was_complete and not self.missing and (self.folder / INDEX_NAME).exists()
        ):
            count = self.manifest.shard_count
            columns = self.manifest.columns
            paths = [self.folder / shard_name(number) for number in range(count)]
            write_index(self.folder / INDEX_NAME, [Shard(path, columns).keys() for path in paths])
            sizes = [path.stat().st_size for path in paths]
            dataclasses.replace(self.manifest, shards=sizes, complete=True).save(self.folder)
        state.wait_for_everyone()

    def _is_there(self, number: int, size: int | None) -> bool:
        path = self.folder / shard_name(number)
        return path.exists() and size in (None, path.stat().st_size)

    def _batches(self, number: int) -> list[range]:
        inside, size = self.manifest.shard_examples(number), self.manifest.config.batch_size
        return [inside[start : start + size] for start in range(0, len(inside), size)]

    def _write(self, number: int, stream: Iterator[Any], bar: Any) -> None:
        path = self.folder / shard_name(number)
        try:
            with ShardWriter(path, self.manifest.columns) as shard:
                for _ in self._batches(number):
                    numbers, batch = next(stream)
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
