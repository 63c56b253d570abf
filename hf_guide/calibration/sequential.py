"""Run a stack of blocks one block at a time, with the hidden states between them kept in memory (as GPTQ does).

So a block can be run, changed and run again without running the blocks before it. Kept for all calibration tokens of this
process, per model: the hidden states before one block, (tokens, d), and the other arguments of the blocks: a mask per batch
where there is padding, (batch, length, length), and the encoder's output in the decoder of an encoder-decoder.
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
"""The other positional arguments, the other keywords, and the keyword of the hidden states; None if they are positional."""


class UnsupportedBlockStructure(HfGuideError):
    """A stack whose blocks cannot be run one after another on the hidden states alone."""


@dataclass
class BlockTrace:
    """One forward pass: for each block its input, its other arguments and its outputs."""

    hidden_states: list[Tensor] = field(default_factory=list)
    calls: list[BlockCall] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)

    @property
    def returns_hidden_states_only(self) -> bool:
        """Return whether every block returns hidden states like its input, and nothing in addition."""
        for before, output in zip(self.hidden_states, self.outputs, strict=True):
            after, others = first_output(output), () if isinstance(output, Tensor) else tuple(output)[1:]
            if (after.shape, after.dtype) != (before.shape, before.dtype) or any(each is not None for each in others):
                return False
        return True


class SequentialBlocks:
    """The blocks of one stack, and the hidden states before the next block.

    Args:
        model: The model that the blocks are part of.
        blocks: The blocks of the stack, in order.
        batches: The calibration batches of this process.
        name: What errors call the model.

    Attributes:
        hidden_states: For each batch the input of block `next`, (batch, length, d).
        next: The index of the block to run next.

    Raises:
        UnsupportedBlockStructure: The blocks run in another order or more than once, or a block passes more to the next
            than the hidden states.
    """

    def __init__(self, model: PreTrainedModel, blocks: Sequence[nn.Module], batches: Sequence[Batch], name: str):
        self.model, self.blocks, self.batches, self.name = model, list(blocks), batches, name
        self.hidden_states: list[Tensor] = []
        self.next = 0
        self._calls: list[list[BlockCall]] = []
        self._record_calls()

    @torch.no_grad()
    def _record_calls(self) -> None:
        """Record with which other arguments the blocks are called, on every batch.

        On the first batch the blocks run. If the other arguments do not depend on what the blocks compute, the blocks are
        replaced by the identity for the other batches, which costs nothing.
        """
        first = self._trace(self.batches[0])
        self._append(first)
        for index, expected in enumerate([*first.hidden_states[1:], first_output(first.outputs[-1])]):
            output = self.run_block(index, 0, first.hidden_states[index])
            if output.shape != expected.shape or not torch.allclose(output, expected, rtol=1e-3, atol=1e-5):
                raise UnsupportedBlockStructure(
                    f"{self.name}: block {index} takes more from the one before than the hidden states."
                )
        with contextlib.ExitStack() as replaced:
            if len(self.batches) > 1 and first.returns_hidden_states_only:
                replaced.enter_context(identity_blocks(self.blocks, first.outputs))
                if not calls_equal(self._trace(self.batches[0]).calls, first.calls):
                    replaced.close()
            for batch in self.batches[1:]:
                self._append(self._trace(batch))

    def _append(self, trace: BlockTrace) -> None:
        self.hidden_states.append(trace.hidden_states[0])
        self._calls.append(trace.calls)

    def _trace(self, batch: Batch) -> BlockTrace:
        """Run the model on a batch, up to the end of the last block."""
        index_of = {id(block): index for index, block in enumerate(self.blocks)}
        trace, order = BlockTrace(), []

        def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            order.append(index_of[id(block)])
            key = None if args else "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
            trace.hidden_states.append(args[0] if key is None else kwargs[key])
            trace.calls.append((args[1:], {name: value for name, value in kwargs.items() if name != key}, key))

        def after(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            trace.outputs.append(output)
            if block is self.blocks[-1]:
                raise StopForward

        with removable_hooks() as handles:
            for block in self.blocks:
                handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(block.register_forward_hook(after))
            forward_no_cache(self.model, batch)
        if order != list(range(len(self.blocks))):
            raise UnsupportedBlockStructure(f"{self.name}: its blocks run in the order {order}.")
        return trace

    @torch.no_grad()
    def run_block(self, block: int, batch: int, hidden_states: Tensor) -> Tensor:
        """Return the output of a block for its input on one batch, (batch, length, d) each."""
        args, kwargs, key = self._calls[batch][block]
        output = (
            self.blocks[block](hidden_states, *args, **kwargs)
            if key is None
            else self.blocks[block](**{key: hidden_states}, **kwargs)
        )
        return first_output(output)

    @torch.no_grad()
    def run_next(self, batch: int) -> Tensor | None:
        """Run the next block on its hidden states, which stay; return its output, or None if a hook stopped it."""
        try:
            return self.run_block(self.next, batch, self.hidden_states[batch])
        except StopForward:
            return None

    def advance(self) -> None:
        """Run the next block on all batches and keep its outputs."""
        for batch in range(len(self.batches)):
            self.hidden_states[batch] = self.run_block(self.next, batch, self.hidden_states[batch])
        self.next += 1


@contextlib.contextmanager
def identity_blocks(blocks: Sequence[nn.Module], outputs: Sequence[Any]) -> Iterator[None]:
    """Replace blocks by the identity: each returns its input, in the form of its entry in `outputs`."""

    def identity_like(output: Any) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden_states = hidden_states_arg(args, kwargs)
            return hidden_states if isinstance(output, Tensor) else (hidden_states, *output[1:])

        return forward

    # An instance has a `forward` of its own where Accelerate moves its weights.
    instance_forwards = [block.__dict__.get("forward") for block in blocks]
    try:
        for block, output in zip(blocks, outputs, strict=True):
            block.forward = identity_like(output)
        yield
    finally:
        for block, forward in zip(blocks, instance_forwards, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def calls_equal(first: Any, second: Any) -> bool:
    """Return whether two calls, or parts of calls, are equal bit by bit; values that cannot be compared are not."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(calls_equal(first[name], second[name]) for name in first)
    if isinstance(first, (tuple, list)) and isinstance(second, (tuple, list)):
        return len(first) == len(second) and all(map(calls_equal, first, second))
    return first is second or (isinstance(first, (str, int, float)) and first == second)
