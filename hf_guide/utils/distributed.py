"""Collective operations across ranks that raise if another rank has ended, instead of waiting forever.

Each rank increments a counter in the default group's store from a background thread. A rank that waits for another notices
within two minutes that its counter has stopped; a rank that is only slow is waited for. Where one has not begun for half a
minute, as in a script that makes the call in rank 0 alone, the ranks that wait for it warn of that.
"""

import atexit
import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import Tensor, distributed

from hf_guide.errors import HfGuideError, MissingRankError

logger = logging.getLogger(__name__)

T = TypeVar("T")

HEARTBEAT_INTERVAL = 1.0
HEARTBEAT_TIMEOUT = 120.0
STARTUP_TIMEOUT = 1800.0
STARTUP_WARNING_TIME = 30.0
FAILURE_GRACE_PERIOD = 10.0
EXIT_GRACE_PERIOD = 0.2


def rank_and_world_size() -> tuple[int, int]:
    """Return this process's rank and the number of processes; (0, 1) without torch.distributed."""
    if distributed.is_available() and distributed.is_initialized():
        if distributed.get_world_size() > 1:
            _Heartbeat.of_default_group()
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def local_shard(items: Sequence[T]) -> list[T]:
    """Return this rank's items: every `world_size`-th, starting at `rank`."""
    rank, size = rank_and_world_size()
    return list(items[rank::size])


def all_reduce_sum_(tensors: Iterable[Tensor]) -> None:
    """Sum each tensor over all ranks, in place; all ranks must pass tensors of the same shapes in the same order."""
    if rank_and_world_size()[1] == 1:
        return
    for tensor in tensors:
        reduced = tensor.to(collective_device()).contiguous()
        with report_missing_ranks():
            distributed.all_reduce(reduced)
            tensor.copy_(reduced)  # with NCCL this is what waits


def all_reduce_scalar(number: float) -> float:
    """Return the sum of one number over all ranks."""
    total = torch.tensor(float(number), dtype=torch.float64)
    all_reduce_sum_([total])
    return total.item()


def all_gather_values(value: T) -> list[T]:
    """Return what each rank passes, in the order of the ranks; it is pickled, so it should be small."""
    size = rank_and_world_size()[1]
    if size == 1:
        return [value]
    gathered: list[Any] = [None] * size
    with report_missing_ranks():
        distributed.all_gather_object(gathered, value)
    return gathered


@contextlib.contextmanager
def raise_on_all_ranks(error_class: type[HfGuideError]) -> Iterator[None]:
    """Raise an error of one rank in all of them, where they would otherwise wait for it; the others name the rank."""
    failure: HfGuideError | None = None
    try:
        yield
    except HfGuideError as error:
        failure = error
    messages = all_gather_values(None if failure is None else str(failure))
    if failure is not None:
        raise failure
    for rank, message in enumerate(messages):
        if message is not None:
            raise error_class(f"Process {rank} failed: {message}")


def barrier() -> None:
    """Wait until every rank calls this function.

    Raises:
        MissingRankError: A rank has ended; names it.
    """
    if rank_and_world_size()[1] == 1:
        return
    heartbeat = _Heartbeat.of_default_group()
    if heartbeat is not None:
        heartbeat.meet()
    with report_missing_ranks():
        distributed.barrier()


class RankMonitor:
    """Detects ranks that have ended, for a loop that waits for their work."""

    def __init__(self, timeout: float | None = None):
        """Set the time after which a rank without heartbeats counts as missing; by default HEARTBEAT_TIMEOUT seconds."""
        self._timeout = HEARTBEAT_TIMEOUT if timeout is None else timeout
        self._heartbeat = _Heartbeat.of_default_group() if rank_and_world_size()[1] > 1 else None
        self._seen: dict[int, tuple[int, float]] = {}
        self._last_check = 0.0

    def missing(self) -> list[int]:
        """Return the ranks without a heartbeat for too long; empty if that cannot be determined."""
        now = time.monotonic()
        if self._heartbeat is None or now - self._last_check < HEARTBEAT_INTERVAL:
            return []
        self._last_check, missing = now, []
        for rank in range(rank_and_world_size()[1]):
            try:
                count = self._heartbeat.count(rank)
            except RuntimeError:
                return [0]  # rank 0 hosts the store
            before, since = self._seen.get(rank, (-1, now))
            if count != before:
                self._seen[rank] = (count, now)
            elif now - since > (self._timeout if count else max(self._timeout, STARTUP_TIMEOUT)):
                missing.append(rank)
        return missing

    def check(self, what: str) -> None:
        """Raise if a rank has ended.

        Args:
            what: What this rank waits for, for the error.

        Raises:
            MissingRankError: A rank has ended; names it.
        """
        missing = self.missing()
        if missing:
            raise MissingRankError(_missing_ranks_message(missing, what))


@contextlib.contextmanager
def report_missing_ranks() -> Iterator[None]:
    """Replace the error of a collective operation by a MissingRankError that names the ranks that have ended, if any."""
    heartbeat = _Heartbeat.of_default_group()
    try:
        with contextlib.nullcontext() if heartbeat is None else heartbeat.waiting():
            yield
    except RuntimeError as error:
        monitor, end = RankMonitor(FAILURE_GRACE_PERIOD / 2), time.monotonic() + FAILURE_GRACE_PERIOD
        while time.monotonic() < end:
            missing = monitor.missing()
            if missing:
                raise MissingRankError(_missing_ranks_message(missing, "a collective operation")) from error
            time.sleep(0.2)
        raise


def _missing_ranks_message(missing: Sequence[int], what: str) -> str:
    rank, size = distributed.get_rank(), distributed.get_world_size()
    names = " and ".join(f"rank {each}" for each in missing)
    return (
        f"Of the {size} processes {names} stopped responding while rank {rank} waited for {what}: it was killed, ran out of "
        "memory, or failed. See its output, and start all processes again."
    )


class _Heartbeat:
    """The counters in the default group's store that each rank increments while it runs."""

    _current: "_Heartbeat | None" = None

    def __init__(self, store: Any):
        self.source = store
        self._store = (
            store.clone() if hasattr(store, "clone") else store
        )  # with one connection, the thread would wait for the main thread
        self._rank, self._world_size = distributed.get_rank(), distributed.get_world_size()
        self._meetings = 0
        self._waiting_since: float | None = None
        self._is_checked = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="hf_guide heartbeat", daemon=True)
        self._thread.start()
        atexit.register(self.stop)

    @classmethod
    def of_default_group(cls) -> "_Heartbeat | None":
        """Return the heartbeat of the default group, started by the first call; None if the group has no store (MPI)."""
        try:
            store = distributed.distributed_c10d._get_default_store()
        except (RuntimeError, ValueError, AttributeError):
            return None
        if cls._current is None or cls._current.source is not store:
            if cls._current is not None:
                cls._current.stop()
            cls._current = cls(store)
        return cls._current

    def count(self, rank: int) -> int:
        """Return the number of heartbeats of a rank."""
        return self._store.add(f"hf_guide/signs/{rank}", 0)

    def meet(self) -> None:
        """Wait until all ranks have called this as often as this rank."""
        self._meetings += 1
        key, monitor = f"hf_guide/meetings/{self._meetings}", RankMonitor()
        try:
            arrived = self._store.add(key, 1)
            with self.waiting():
                while arrived < self._world_size:
                    monitor.check("it")
                    time.sleep(0.05)
                    arrived = self._store.add(key, 0)
        except RuntimeError as error:
            raise MissingRankError(_missing_ranks_message([0], "it")) from error

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Have the thread warn of ranks that have not begun, if this block takes long."""
        self._waiting_since = time.monotonic()
        try:
            yield
        finally:
            self._waiting_since = None

    def stop(self) -> None:
        """Stop the thread: if it used the store while the interpreter exits, the process would abort."""
        self._stopped.set()
        self._thread.join(timeout=5.0)

    def _beat(self) -> None:
        key = f"hf_guide/signs/{self._rank}"
        with contextlib.suppress(RuntimeError):  # the rank that hosts the store has ended
            self._store.add(key, 1)
            while not self._stopped.wait(HEARTBEAT_INTERVAL):
                self._store.add(key, 1)
                self._warn_of_ranks_not_begun()

    def _warn_of_ranks_not_begun(self) -> None:
        """Warn once of ranks without a heartbeat yet, for which this rank has waited long; they may still be loading data."""
        since = self._waiting_since
        if self._is_checked or since is None or time.monotonic() - since < STARTUP_WARNING_TIME:
            return
        missing = [rank for rank in range(self._world_size) if not self.count(rank)]
        self._is_checked = True
        if missing:
            logger.warning(
                "Rank %d has waited for %.0f s, and %s has not begun the call. All %d processes must call from_teacher with "
                "method='calibrated', fit_subclasses and capture_teacher: do so outside of conditions on the rank. It goes on "
                "once they do.",
                *(
                    self._rank,
                    STARTUP_WARNING_TIME,
                    " and ".join(f"rank {rank}" for rank in missing),
                    self._world_size,
                ),
            )


@atexit.register
def _let_collectives_finish() -> None:
    """Release the GIL before the interpreter exits, for threads of gloo that hold tensors of the last collective.

    Such a thread takes the GIL to release a tensor; if the interpreter is exiting by then, the process aborts ("terminate
    called without an active exception"). `destroy_process_group` does not wait for it where a wrapped model, such as that of
    DistributedDataParallel, still refers to the group.
    """
    if distributed.is_available() and (distributed.is_initialized() or os.environ.get("WORLD_SIZE", "1") != "1"):
        time.sleep(EXIT_GRACE_PERIOD)


def collective_device() -> torch.device:
    """Return the device that tensors must be on for collective operations."""
    if "nccl" in str(distributed.get_backend()):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def default_device() -> torch.device:
    """Return this process's CUDA (or ROCm) device, as accelerate has selected it if it is initialized; otherwise the CPU.

    accelerate is not initialized here, because that starts the process group. Other accelerators may lack float64.
    """
    if PartialState._shared_state:
        device = PartialState().device
        return device if device.type == "cuda" else torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
