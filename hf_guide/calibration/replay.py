"""A stack of blocks, run one block at a time on streams that are held in between.

So a block can be heard, changed and heard again without running what stands before it. The price: one stream, (tokens, d),
is held per model for all calibration tokens of this process, and what else blocks are called with: a mask a batch where there
is padding, (batch, length, length), and the encoder's output where it is a decoder that reads one.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_guide.calibration.batches import Batch
from hf_guide.calibration.listening import Heard, first_of, hooks, run
from hf_guide.errors import HfGuideError

Call = tuple[tuple[Any, ...], dict[str, Any], str | None]


class NotReplayable(HfGuideError):
    """A stack whose blocks cannot be run one after another on the stream alone."""


class Replay:
    """The blocks of one stack of `model`, and the stream before the block that is next, a tensor a batch."""

    def __init__(self, model: PreTrainedModel, blocks: Sequence[nn.Module], batches: Sequence[Batch], name: str):
        self.model, self.blocks, self.batches, self.name = model, list(blocks), batches, name
        self.streams: list[Tensor] = []
        self.next = 0
        self._calls: list[list[Call]] = []
        self._record()

    @torch.no_grad()
    def _record(self) -> None:
        """Run the model once on every batch for what its blocks are called with besides the stream.

        Raises:
            NotReplayable: blocks that are run in another order, or more than once, or that take more than the stream from
                the block before.
        """
        place = {id(block): number for number, block in enumerate(self.blocks)}
        streams: list[Tensor] = []
        calls: list[Call] = []
        order: list[int] = []
        first: list[Tensor] = []

        def hear(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            order.append(place[id(block)])
            key = None if args else "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
            streams.append(args[0] if key is None else kwargs[key])
            calls.append((args[1:], {name: value for name, value in kwargs.items() if name != key}, key))

        def stop(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            streams.append(first_of(output))
            raise Heard

        with hooks() as handles:
            handles += [block.register_forward_pre_hook(hear, with_kwargs=True) for block in self.blocks]
            handles.append(self.blocks[-1].register_forward_hook(stop))
            for number, batch in enumerate(self.batches):
                streams.clear()
                calls.clear()
                order.clear()
                run(self.model, batch)
                if order != list(range(len(self.blocks))):
                    raise NotReplayable(f"{self.name}: its blocks run in the order {order}.")
                self.streams.append(streams[0])
                self._calls.append(list(calls))
                if number == 0:
                    first = list(streams)
        self._check(first)

    def _check(self, streams: Sequence[Tensor]) -> None:
        for number, expected in enumerate(streams[1:]):
            found = self.run(number, 0, streams[number])
            if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-3, atol=1e-5):
                raise NotReplayable(f"{self.name}: block {number} takes more from the one before than the stream.")

    @torch.no_grad()
    def run(self, block: int, batch: int, stream: Tensor) -> Tensor:
        """Return what a block makes of a stream, (batch, length, d)."""
        args, kwargs, key = self._calls[batch][block]
        output = (
            self.blocks[block](stream, *args, **kwargs)
            if key is None
            else self.blocks[block](**{key: stream}, **kwargs)
        )
        return first_of(output)

    @torch.no_grad()
    def hear(self, block: int, batch: int) -> Tensor | None:
        """Run a block on the stream that is held for it; return its output, or None where a hook had heard enough."""
        try:
            return self.run(block, batch, self.streams[batch])
        except Heard:
            return None

    def step(self) -> None:
        """Run the next block on all batches and hold what it returns."""
        for batch in range(len(self.batches)):
            self.streams[batch] = self.run(self.next, batch, self.streams[batch])
        self.next += 1
