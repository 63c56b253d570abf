"""Record what the modules of a teacher's blocks are called with while its statistics are collected, for the refit.

So the refit need not run the teacher once more. It is kept in temporary files, for a small model's 65,536 tokens some GB: as
long as these take a share of what is free there, and can be written. Of blocks beyond that the refit runs the teacher.
"""

import contextlib
import logging
from collections.abc import Iterator
from itertools import chain

from torch import Tensor, nn

from hf_guide.calibration.modules import ModuleMap
from hf_guide.calibration.streams import Streams, StreamStore
from hf_guide.errors import OptionError
from hf_guide.models.hooks import register_input_hook, removable_hooks
from hf_guide.utils.distributed import rank_and_world_size

logger = logging.getLogger(__name__)

BLOCK_INPUT = ""
"""The name of a block's own input."""

FREE_SHARE = 0.25
"""Of the free space where the files are, what all processes may take."""

EXPECTED_TENSORS = 4
"""What a block is assumed to take in units of its input: itself, and the inputs of a norm and of two groups of projections."""


class InputRecorder:
    """Records the inputs of blocks, and of the norms and projections in them that read the residual stream.

    Args:
        modules: The model's modules.
    """

    def __init__(self, modules: ModuleMap):
        self._names = {id(ref.module): name for name, ref in chain(modules.norms.items(), modules.residual_in.items())}
        self._store = StreamStore(0)
        self._left = FREE_SHARE * self._store.free_bytes() / rank_and_world_size()[1]
        self._inputs: dict[str, Streams] = {}
        self._stopped = False

    def has_space(self, hidden_states: Streams) -> bool:
        """Return whether there is space for a block of these hidden states."""
        return not self._stopped and EXPECTED_TENSORS * hidden_states.nbytes <= self._left

    def new_streams(self) -> Streams:
        """Return an empty list for tensors of a recorded block."""
        return Streams(self._store)

    def append(self, streams: Streams, tensor: Tensor) -> bool:
        """Add a tensor of a recorded block; stop recording if it cannot be written, and return whether it is there."""
        if self._stopped:
            return False
        try:
            streams.append(tensor)
        except OptionError as error:  # no call needs these files
            logger.warning(
                "What the teacher's blocks read cannot be recorded (%s), so the refit runs them again: the student is the "
                "same, and takes longer.",
                str(error.__cause__),
            )
            self._stopped = True
            self._inputs.clear()
        return not self._stopped

    @contextlib.contextmanager
    def record(self, block: nn.Module, hidden_states: Streams) -> Iterator[dict[str, Streams]]:
        """Record a block for the duration of the context, on all batches; yield the inputs, by the module's name.

        A tensor that several modules read is kept once. Modules that were not called once for every batch, and those that
        read something of another size than the block, are left out in the end. Once a file cannot be written, nothing is
        recorded any more, and what was is discarded.
        """
        recorded = self._inputs = {BLOCK_INPUT: hidden_states}
        of_batch: list[tuple[str, Tensor]] = []

        def on_block(tensor: Tensor) -> None:
            of_batch[:] = [(BLOCK_INPUT, tensor)]

        def on_input(name: str, tensor: Tensor) -> None:
            if self._stopped or tensor.numel() != of_batch[0][1].numel():
                return  # such as the tokens of one expert
            same = next((other for other, each in of_batch if each is tensor), None)
            if same is not None and recorded.get(name) in (None, recorded[same]):
                recorded[name] = recorded[same]
                return
            if self.append(recorded.setdefault(name, self.new_streams()), tensor):
                of_batch.append((name, tensor))

        with removable_hooks() as handles:
            handles.append(register_input_hook(block, on_block))
            for module in block.modules():
                if name := self._names.get(id(module)):
                    handles.append(register_input_hook(module, lambda tensor, n=name: on_input(n, tensor)))  # type: ignore[misc]
            yield recorded
        for name in [name for name, streams in recorded.items() if len(streams) != len(hidden_states)]:
            del recorded[name]
        self._left -= sum(streams.nbytes for streams in {id(each): each for each in recorded.values()}.values())
