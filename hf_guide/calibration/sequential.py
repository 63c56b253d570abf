"""A stack of blocks, run one block at a time on streams that are held in between.

So a block can be heard, changed and heard again without running what stands before it. The price: one stream, (tokens, d),
is held per model for all calibration tokens of this process, and what else blocks are called with: a mask a batch where there
is padding, (batch, length, length), and the encoder's output where it is a decoder that reads one.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_guide.calibration.data import Batch
from hf_guide.calibration.forward import forward_no_cache
from hf_guide.errors import HfGuideError
from hf_guide.models.hooks import StopForward, first_output, hidden_states_arg, removable_hooks

BlockCall = tuple[tuple[Any, ...], dict[str, Any], str | None]


class UnsupportedBlockStructure(HfGuideError):
    """A stack whose blocks cannot be run one after another on the stream alone."""


@dataclass
class BlockTrace:
    """What the blocks were called with on one batch, the stream and all else, and what they returned: an entry a block."""

    hidden_states: list[Tensor] = field(default_factory=list)
    calls: list[BlockCall] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)

    @property
    def returns_hidden_states_only(self) -> bool:
        """Whether every block returns a stream like the one it is given, and nothing beside it."""
        for stream, output in zip(self.hidden_states, self.outputs, strict=True):
            after, beside = first_output(output), () if isinstance(output, Tensor) else tuple(output)[1:]
            if (after.shape, after.dtype) != (stream.shape, stream.dtype) or any(each is not None for each in beside):
                return False
        return True


class SequentialBlocks:
    """The blocks of one stack of `model`, and the stream before the block that is next, a tensor a batch."""

    def __init__(self, model: PreTrainedModel, blocks: Sequence[nn.Module], batches: Sequence[Batch], name: str):
        self.model, self.blocks, self.batches, self.name = model, list(blocks), batches, name
        self.hidden_states: list[Tensor] = []
        self.next = 0
        self._calls: list[list[BlockCall]] = []
        self._record()

    @torch.no_grad()
    def _record(self) -> None:
        """Hear on every batch what the blocks are called with besides the stream.

        On the first batch they are run. On the others each hands on the stream that it is given, which costs nothing, where
        it is found on the first that they are called with the same then.

        Raises:
            NotReplayable: blocks that are run in another order, or more than once, or that take more than the stream from
                the block before.
        """
        first = self._hear(self.batches[0])
        self._keep(first)
        for number, expected in enumerate([*first.hidden_states[1:], first_output(first.outputs[-1])]):
            found = self.run(number, 0, first.hidden_states[number])
            if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-3, atol=1e-5):
                raise UnsupportedBlockStructure(
                    f"{self.name}: block {number} takes more from the one before than the stream."
                )
        with contextlib.ExitStack() as skipping:
            if len(self.batches) > 1 and first.returns_hidden_states_only:
                skipping.enter_context(identity_blocks(self.blocks, first.outputs))
                if not calls_equal(self._hear(self.batches[0]).calls, first.calls):
                    skipping.close()
            for batch in self.batches[1:]:
                self._keep(self._hear(batch))

    def _keep(self, heard: BlockTrace) -> None:
        self.hidden_states.append(heard.hidden_states[0])
        self._calls.append(heard.calls)

    def _hear(self, batch: Batch) -> BlockTrace:
        """Run the model on a batch, up to the end of the last block."""
        place = {id(block): number for number, block in enumerate(self.blocks)}
        heard, order = BlockTrace(), []

        def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            order.append(place[id(block)])
            key = None if args else "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
            heard.hidden_states.append(args[0] if key is None else kwargs[key])
            heard.calls.append((args[1:], {name: value for name, value in kwargs.items() if name != key}, key))

        def after(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            heard.outputs.append(output)
            if block is self.blocks[-1]:
                raise StopForward

        with removable_hooks() as handles:
            for block in self.blocks:
                handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(block.register_forward_hook(after))
            forward_no_cache(self.model, batch)
        if order != list(range(len(self.blocks))):
            raise UnsupportedBlockStructure(f"{self.name}: its blocks run in the order {order}.")
        return heard

    @torch.no_grad()
    def run(self, block: int, batch: int, stream: Tensor) -> Tensor:
        """Return what a block makes of a stream, (batch, length, d)."""
        args, kwargs, key = self._calls[batch][block]
        output = (
            self.blocks[block](stream, *args, **kwargs)
            if key is None
            else self.blocks[block](**{key: stream}, **kwargs)
        )
        return first_output(output)

    @torch.no_grad()
    def hear(self, block: int, batch: int) -> Tensor | None:
        """Run a block on the stream that is held for it; return its output, or None where a hook had heard enough."""
        try:
            return self.run(block, batch, self.hidden_states[batch])
        except StopForward:
            return None

    def step(self) -> None:
        """Run the next block on all batches and hold what it returns."""
        for batch in range(len(self.batches)):
            self.hidden_states[batch] = self.run(self.next, batch, self.hidden_states[batch])
        self.next += 1


@contextlib.contextmanager
def identity_blocks(blocks: Sequence[nn.Module], outputs: Sequence[Any]) -> Iterator[None]:
    """Let blocks return the stream that they are given and do nothing, in the form of their own `outputs`."""

    def instead(output: Any) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            stream = hidden_states_arg(args, kwargs)
            return stream if isinstance(output, Tensor) else (stream, *output[1:])

        return forward

    own = [block.__dict__.get("forward") for block in blocks]  # an instance has one where Accelerate moves its weights
    try:
        for block, output in zip(blocks, outputs, strict=True):
            block.forward = instead(output)
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def calls_equal(first: Any, second: Any) -> bool:
    """Whether two calls, or parts of calls, are alike to the last bit; what cannot be compared is not."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(calls_equal(first[name], second[name]) for name in first)
    if isinstance(first, (tuple, list)) and isinstance(second, (tuple, list)):
        return len(first) == len(second) and all(map(calls_equal, first, second))
    return first is second or (isinstance(first, (str, int, float)) and first == second)
