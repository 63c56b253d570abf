"""Several processes as one: each hears its own batches, and what they sum is added up.

A process that waits for others learns within two minutes that one of them has ended: each counts up a number in the store at
which the group met, from a thread of its own, so that a process that is merely slow is waited for.
"""

import atexit
import contextlib
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import Tensor, distributed

from hf_guide.errors import MissingRankError

T = TypeVar("T")

HEARTBEAT_INTERVAL = 1.0
HEARTBEAT_TIMEOUT = 120.0
STARTUP_TIMEOUT = 1800.0
FAILURE_GRACE_PERIOD = 10.0


def rank_and_world_size() -> tuple[int, int]:
    """Return the number of this process and how many there are."""
    if distributed.is_available() and distributed.is_initialized():
        if distributed.get_world_size() > 1:
            _Heartbeat.of_this_group()
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def local_shard(items: Sequence[T]) -> list[T]:
    """Return every n-th of `items`, those of this process."""
    rank, size = rank_and_world_size()
    return list(items[rank::size])


def all_reduce_sum_(tensors: Iterable[Tensor]) -> None:
    """Add to each tensor, in place, what the other processes have under the same place in the list."""
    if rank_and_world_size()[1] == 1:
        return
    for tensor in tensors:
        shared = tensor.to(collective_device()).contiguous()
        with report_missing_ranks():
            distributed.all_reduce(shared)
        tensor.copy_(shared)


def all_reduce_scalar(number: float) -> float:
    """Return the sum of one number over all processes."""
    total = torch.tensor(float(number), dtype=torch.float64)
    all_reduce_sum_([total])
    return total.item()


def barrier() -> None:
    """Return once every process has come here.

    Raises:
        MissingRankError: names the processes that have ended.
    """
    if rank_and_world_size()[1] == 1:
        return
    presence = _Heartbeat.of_this_group()
    if presence is not None:
        presence.meet()
    with report_missing_ranks():
        distributed.barrier()


class RankMonitor:
    """Notices which of the other processes have ended, for a loop that waits for what they do."""

    def __init__(self, seconds: float | None = None):
        """`seconds` is how long a process may give no sign of life; by default SECONDS_UNTIL_MISSING."""
        self._seconds = HEARTBEAT_TIMEOUT if seconds is None else seconds
        self._presence = _Heartbeat.of_this_group() if rank_and_world_size()[1] > 1 else None
        self._seen: dict[int, tuple[int, float]] = {}
        self._looked = 0.0

    def missing(self) -> list[int]:
        """Return the ranks of the processes that have given no sign of life for too long; none where that is not known."""
        now = time.monotonic()
        if self._presence is None or now - self._looked < HEARTBEAT_INTERVAL:
            return []
        self._looked, found = now, []
        for rank in range(rank_and_world_size()[1]):
            try:
                count = self._presence.signs(rank)
            except RuntimeError:
                return [0]  # the store is its, and gone
            before, since = self._seen.get(rank, (-1, now))
            if count != before:
                self._seen[rank] = (count, now)
            elif now - since > (self._seconds if count else max(self._seconds, STARTUP_TIMEOUT)):
                found.append(rank)
        return found

    def check(self, what: str) -> None:
        """Raise if a process has ended.

        Args:
            what: what this process waits for, for the error.

        Raises:
            MissingRankError: names it.
        """
        missing = self.missing()
        if missing:
            raise MissingRankError(_missing_ranks_message(missing, what))


@contextlib.contextmanager
def report_missing_ranks() -> Iterator[None]:
    """Turn the error of a collective operation into one that names the processes that have ended, if any has."""
    try:
        yield
    except RuntimeError as error:
        watch, end = RankMonitor(FAILURE_GRACE_PERIOD / 2), time.monotonic() + FAILURE_GRACE_PERIOD
        while time.monotonic() < end:
            missing = watch.missing()
            if missing:
                raise MissingRankError(_missing_ranks_message(missing, "an exchange with it")) from error
            time.sleep(0.2)
        raise


def _missing_ranks_message(missing: Sequence[int], what: str) -> str:
    rank, size = distributed.get_rank(), distributed.get_world_size()
    names = " and ".join(f"rank {each}" for each in missing)
    return (
        f"Of the {size} processes {names} gave no sign of life any more while rank {rank} waited for {what}: killed, out of "
        "memory, or ended by an error of its own. See its output, and start all processes again."
    )


class _Heartbeat:
    """The numbers in the store of the default group by which its processes know that each of them lives."""

    _current: "_Heartbeat | None" = None

    def __init__(self, store: Any):
        self.given = store
        self._store = store.clone() if hasattr(store, "clone") else store  # or the thread would wait for the main one
        self._meetings = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="hf_guide presence", daemon=True)
        self._thread.start()
        atexit.register(self.stop)

    @classmethod
    def of_this_group(cls) -> "_Heartbeat | None":
        """Return that of the default group, begun with the first call; None where the group has no store (MPI)."""
        try:
            store = distributed.distributed_c10d._get_default_store()
        except (RuntimeError, ValueError, AttributeError):
            return None
        if cls._current is None or cls._current.given is not store:
            if cls._current is not None:
                cls._current.stop()
            cls._current = cls(store)
        return cls._current

    def signs(self, rank: int) -> int:
        """Return how many signs of life a process has given."""
        return self._store.add(f"hf_guide/signs/{rank}", 0)

    def meet(self) -> None:
        """Return once all processes have called this as often as this one has."""
        self._meetings += 1
        key, watch = f"hf_guide/meetings/{self._meetings}", RankMonitor()
        try:
            arrived = self._store.add(key, 1)
            while arrived < rank_and_world_size()[1]:
                watch.check("it")
                time.sleep(0.05)
                arrived = self._store.add(key, 0)
        except RuntimeError as error:
            raise MissingRankError(_missing_ranks_message([0], "it")) from error

    def stop(self) -> None:
        """End the thread: one that is still in the store when the interpreter ends would abort the process."""
        self._stopped.set()
        self._thread.join(timeout=5.0)

    def _beat(self) -> None:
        key = f"hf_guide/signs/{distributed.get_rank()}"
        with contextlib.suppress(RuntimeError):  # the process that has the store has ended
            self._store.add(key, 1)
            while not self._stopped.wait(HEARTBEAT_INTERVAL):
                self._store.add(key, 1)


def collective_device() -> torch.device:
    """Return where tensors must be that processes send each other."""
    if "nccl" in str(distributed.get_backend()):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def default_device() -> torch.device:
    """Return the GPU of this process, or what accelerate has chosen where it was asked already; the CPU where there is none.

    It is not asked here, for it would start the processes' group. Only of CUDA (and ROCm) is it known that they have float64.
    """
    if PartialState._shared_state:
        device = PartialState().device
        return device if device.type == "cuda" else torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
