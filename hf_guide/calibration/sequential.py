"""Run stacks of blocks one block at a time on all batches, with the hidden states between them kept (as GPTQ does).

So a block can be run, changed and run again without running the blocks before it, and its weights need to be in memory only
meanwhile. Kept for all calibration tokens of this process, per model: the hidden states before one block, (tokens, d), in a
`Streams`; and in memory the other arguments of the blocks: a mask per batch where there is padding, (batch, length, length),
and the encoder's output in the decoder of an encoder-decoder.
"""

import contextlib
import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_guide.calibration.batches import Batch, first_rows, num_rows
from hf_guide.calibration.block_weights import BlockWeights
from hf_guide.calibration.forward import forward_no_cache
from hf_guide.calibration.modules import ModuleMap
from hf_guide.calibration.recorded_inputs import BLOCK_INPUT, InputRecorder
from hf_guide.calibration.streams import Streams, StreamStore
from hf_guide.errors import HfGuideError
from hf_guide.models.hooks import (
    StopForward,
    first_output,
    hidden_states_arg,
    register_input_hook,
    removable_hooks,
)
from hf_guide.teachers.forward import unreadable_as_teacher_error
from hf_guide.utils.memory import return_freed_memory

_UNREADABLE_ADVICE = (
    "Pass all the inputs that the teacher needs, in the sizes that its own tokenizer, image processor or feature extractor "
    "makes."
)

BlockCall = tuple[tuple[Any, ...], dict[str, Any], str | None]
"""The other positional arguments, the other keywords, and the keyword of the hidden states; None if they are positional."""


class UnsupportedBlockStructure(HfGuideError):
    """A stack whose blocks cannot be run one after another on the hidden states alone."""


@dataclass
class BlockTrace:
    """One forward pass: for each block its input, its other arguments and its outputs.

    Attributes:
        hidden_states: The input of each block.
        calls: Its other arguments.
        outputs: What it returns.
        after: What follows the last block: the arguments of the next stack's first block or of the language head, or else
            the model's outputs.
    """

    hidden_states: list[Tensor] = field(default_factory=list)
    calls: list[BlockCall] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    after: Any = None

    @property
    def returns_hidden_states_only(self) -> bool:
        """Return whether every block returns hidden states like its input, and nothing in addition."""
        for before, output in zip(self.hidden_states, self.outputs, strict=True):
            after, others = first_output(output), () if isinstance(output, Tensor) else tuple(output)[1:]
            if (after.shape, after.dtype) != (before.shape, before.dtype) or any(each is not None for each in others):
                return False
        return True


@dataclass(frozen=True)
class Probe:
    """A batch that stands for all with the same inputs, when it is found how a model runs: text alone, text with images.

    Attributes:
        batch: The batch.
        index: Its number among the batches of this process; None if it has none with the same inputs.
    """

    batch: Batch
    index: int | None


def find_probes(batches: Sequence[Batch], all_batches: Sequence[Batch] | None = None) -> list[Probe]:
    """Return a batch for each combination of inputs, those of most inputs first: the same combinations in all processes.

    Args:
        batches: Those of this process.
        all_batches: Those of all processes; None if there is only this one.

    Example:
        >>> ids, image = torch.ones(1, 2), torch.ones(1, 3, 4, 4)
        >>> [probe.index for probe in find_probes([{"input_ids": ids}, {"input_ids": ids, "pixel_values": image}])]
        [1, 0]
    """
    found: dict[tuple[str, ...], Probe] = {}
    for index, batch in [*enumerate(batches), *((None, batch) for batch in all_batches or ())]:
        inputs = tuple(sorted(name for name, value in batch.items() if value.numel()))
        found.setdefault(inputs, Probe(batch, index))
    return [found[inputs] for inputs in sorted(found, key=lambda inputs: (-len(inputs), inputs))]


@dataclass(frozen=True)
class StackStructure:
    """How the blocks of a stack run, whatever their weights and their input are.

    Attributes:
        outputs: For each block what it returned for one row; only the form matters.
        is_sequential: Whether the blocks' other arguments do not depend on what they compute. Otherwise these are recorded in
            a run of all blocks on every batch, before each runs by itself.
        is_replayable: Whether what follows the blocks depends on nothing but their last hidden states.
    """

    outputs: list[Any]
    is_sequential: bool
    is_replayable: bool


class SequentialBlocks:
    """The blocks of one stack, and the hidden states before the next block.

    Args:
        model: The model that the blocks are part of.
        blocks: The blocks of the stack, in order.
        batches: The calibration batches of this process.
        is_teacher: Whether it is the teacher, and not its student; errors name it so.
        store: Where hidden states are kept; None keeps them in memory.
        weights: What loads the blocks' weights; None if they are in memory.
        following: Modules that may run after the blocks, at which a comparison of what follows may end.
        replay: Returns a context in which the stacks before this one need not run, for a batch and its first rows.
        probes: From `find_probes`; None takes them from the batches.
        structure: As it was found on other batches; None runs the model on one row of each probe to find it.

    Attributes:
        hidden_states: For each batch the input of block `next`, (batch, length, d).
        next: The index of the block to run next.
        structure: How the blocks run.
        recorded: For blocks that were run with a recorder what they and their modules were called with, by the module's name.

    Raises:
        UnsupportedBlockStructure: The blocks run in another order or more than once, or not on every batch, or a block passes
            more to the next than the hidden states.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Sequence[nn.Module],
        batches: Sequence[Batch],
        *,
        is_teacher: bool,
        store: StreamStore | None = None,
        weights: BlockWeights | None = None,
        following: Sequence[nn.Module] = (),
        replay: Callable[[int | None, int | None], contextlib.AbstractContextManager[None]] | None = None,
        probes: Sequence[Probe] | None = None,
        structure: StackStructure | None = None,
    ):
        self.model, self.blocks, self.batches = model, list(blocks), batches
        self.is_teacher, self.name = is_teacher, _name(is_teacher)
        self.store, self.weights = store, weights
        self._following = list(following)
        self._replay = replay or (lambda batch, rows: contextlib.nullcontext())
        self.recorded: dict[int, dict[str, Streams]] = {}
        self.structure = self._verify(probes or find_probes(batches)) if structure is None else structure
        self.restart()

    def _verify(self, probes: Sequence[Probe]) -> StackStructure:
        """Return how the blocks run on all of the probes; only what holds on each counts."""
        found = [self._verify_on(probe) for probe in probes]
        return StackStructure(
            found[0].outputs, all(each.is_sequential for each in found), all(each.is_replayable for each in found)
        )

    @torch.no_grad()
    def _verify_on(self, probe: Probe) -> StackStructure:
        """Run the model on one row, compare with the blocks run one by one, and return how they run."""
        traced = self._trace(probe, rows=1, verifies=True)
        is_identity = False
        if traced.returns_hidden_states_only:
            with replaced_blocks(self.blocks, traced.outputs):
                is_identity = calls_equal(self._trace(probe, rows=1).calls, traced.calls)
        with replaced_blocks(self.blocks, traced.outputs, first_output(traced.outputs[-1])):
            replayed = self._trace(probe, rows=1, to_end=True)
        has_rows = num_rows(probe.batch) is None or len(first_output(traced.outputs[-1])) == 1
        return StackStructure(traced.outputs, is_identity, has_rows and _nearly_equal(replayed.after, traced.after))

    @torch.no_grad()
    def restart(self) -> None:
        """Go back to the first block: record the hidden states before it, and the blocks' other arguments, on every batch."""
        self.next = 0
        self.hidden_states = Streams(self.store)
        self._calls: list[list[BlockCall]] = []
        prepared: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if self.structure.is_sequential:
            prepared = replaced_blocks(self.blocks, self.structure.outputs)
        elif self.weights is not None:
            prepared = self.weights.held(*self.blocks)  # they run on every batch
        with prepared:
            for index, batch in enumerate(self.batches):
                trace = self._trace(Probe(batch, index))
                self.hidden_states.append(trace.hidden_states[0])
                self._calls.append(trace.calls)

    def _trace(
        self, probe: Probe, rows: int | None = None, *, verifies: bool = False, to_end: bool = False
    ) -> BlockTrace:
        """Run the model on a batch up to the end of the last block, or also to what follows it.

        Args:
            probe: The batch.
            rows: If not None, only so many of its first rows.
            verifies: Run each block once more by itself, while its weights are there, and on to what follows the last block.
            to_end: Run on to what follows the last block.

        Raises:
            UnsupportedBlockStructure: The order is another, or a block by itself computes something else.
        """
        index_of = {id(block): index for index, block in enumerate(self.blocks)}
        trace, alone = BlockTrace(), Tensor()
        order: list[int] = []

        def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            key = None if args else "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
            hidden_states = args[0] if key is None else kwargs[key]
            order.append(index_of[id(block)])
            if order[-1] != len(order) - 1:
                raise UnsupportedBlockStructure(f"{self.name}: its blocks run in the order {order}.")
            if verifies and len(order) > 1:
                self._check_alone(order[-2], alone, hidden_states)
            trace.hidden_states.append(hidden_states)
            trace.calls.append((args[1:], {name: value for name, value in kwargs.items() if name != key}, key))

        def after(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            nonlocal alone
            trace.outputs.append(output)
            if verifies:
                alone = first_output(
                    block.forward(*args, **kwargs)
                )  # the forward, because a call would call this hook again
            if block is not self.blocks[-1]:
                return
            if not (verifies or to_end):
                raise StopForward
            if verifies:
                self._check_alone(order[-1], alone, first_output(output))

        def follow(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if trace.outputs and len(trace.outputs) >= len(self.blocks):
                trace.after = (args, kwargs)
                raise StopForward

        with removable_hooks() as handles, self._replay(probe.index, rows):
            for block in self.blocks:  # before the hooks that load and drop its weights
                handles.append(block.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
                handles.append(block.register_forward_hook(after, with_kwargs=True, prepend=True))
            for block in self._following if verifies or to_end else ():
                handles.append(block.register_forward_pre_hook(follow, with_kwargs=True, prepend=True))
            with _reading(self.model, probe.batch, is_teacher=self.is_teacher):
                outputs = forward_no_cache(self.model, first_rows(probe.batch, rows))
        if trace.after is None:
            trace.after = outputs
        if len(order) != len(self.blocks):
            raise UnsupportedBlockStructure(f"{self.name}: its blocks run in the order {order}.")
        return trace

    def _check_alone(self, block: int, alone: Tensor, expected: Tensor) -> None:
        if alone.shape != expected.shape or not torch.allclose(alone, expected, rtol=1e-3, atol=1e-5):
            raise UnsupportedBlockStructure(
                f"{self.name}: block {block} takes more from the one before than the hidden states."
            )

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

    def advance(self, begin: Callable[[int], None] | None = None, recorder: InputRecorder | None = None) -> None:
        """Run the next block on all batches and keep its outputs.

        Args:
            begin: Called with each batch before.
            recorder: Records what the block and its modules are called with, for `take_recorded`.
        """
        block = self.blocks[self.next]
        if self.weights is not None and self.next + 1 < len(self.blocks):
            self.weights.prefetch(self.blocks[self.next + 1])
        is_recorded = self.recorded.get(self.next, {}).get(BLOCK_INPUT) is self.hidden_states
        with contextlib.ExitStack() as stack:
            if self.weights is not None:
                stack.enter_context(self.weights.held(block))
            if recorder is not None:
                inputs = stack.enter_context(recorder.record(block, self.hidden_states))
                outputs = recorder.new_streams()
            else:  # each is replaced, unless it is needed once more
                outputs = Streams(self.store) if is_recorded else self.hidden_states
            for batch in range(len(self.batches)):
                if begin is not None:
                    begin(batch)
                output = self.run_block(self.next, batch, self.hidden_states[batch])
                if outputs is self.hidden_states:
                    outputs[batch] = output
                    continue
                if recorder is not None and recorder.append(outputs, output):
                    continue
                if recorder is not None:  # its files cannot be written
                    outputs, recorder = Streams(self.store, outputs), None
                outputs.append(output)
        return_freed_memory()
        if recorder is not None:
            self.recorded |= {self.next: inputs, self.next + 1: {BLOCK_INPUT: outputs}}
        self.hidden_states = outputs
        self.next += 1

    def take_recorded(self, names: Sequence[str] = ()) -> dict[str, Streams] | None:
        """Return what modules of the next block were called with, and go on after it; None if that was not recorded."""
        found, after = self.recorded.get(self.next, {}), self.recorded.get(self.next + 1)
        if after is None or not found.keys() >= {*names, BLOCK_INPUT}:
            return None
        self.next += 1
        self.hidden_states = after[BLOCK_INPUT]
        return {name: found[name] for name in names}

    def run_to(self, block: int) -> None:
        """Run the blocks before that one, of which those that were recorded need not run again."""
        while self.next < block:
            if self.take_recorded() is None:
                self.advance()


RegisterHooks = Callable[[list[Any], str | None, int], None]
"""Registers hooks of one block, by its stack and index; with None, of all that is outside of the stacks in `visited`."""


class SequentialModel:
    """A model whose stacks run block by block on all batches; those that ran need not run again.

    Args:
        model: The model.
        modules: Its modules, from `find_modules`.
        batches: The calibration batches of this process.
        is_teacher: Whether it is the teacher, and not its student; errors name it so.
        probes: From `find_probes`; None takes them from the batches.
        store: Where hidden states are kept; None keeps them in memory.
        weights: What loads the blocks' weights; None if they are in memory.

    Attributes:
        finished: For each stack that has run the hidden states after its last block. It is replaced by them in further runs
            of the model.
        visited: The stacks that have run, in order; some of them may be no part of `finished`.
        unsupported: Stacks that only run within the whole model, and why.
        notes: Where the blocks of a stack do not run one by one, and why.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        modules: ModuleMap,
        batches: Sequence[Batch],
        *,
        is_teacher: bool,
        probes: Sequence[Probe] | None = None,
        store: StreamStore | None = None,
        weights: BlockWeights | None = None,
    ):
        self.model, self.stacks, self.batches = model, modules.blocks, batches
        self.probes = list(probes or find_probes(batches))
        self.is_teacher, self.name = is_teacher, _name(is_teacher)
        self._modules, self._heads = modules, modules.language_heads
        self.store, self.weights = store, weights
        self.finished: dict[str, Streams] = {}
        self.visited: list[str] = []
        self.unsupported: dict[str, UnsupportedBlockStructure] = {}
        self.notes: list[str] = []
        self._blocks: dict[str, SequentialBlocks] = {}
        self._structures: dict[str, StackStructure] = {}
        self._outputs: dict[str, list[Any]] = {}

    def on_first_batches(self, count: int) -> "SequentialModel":
        """Return the same model on the first batches only; what has run on them need not run again."""
        other = copy.copy(self)
        other.batches, other._blocks = self.batches[:count], {}
        other.probes = [
            Probe(each.batch, None if each.index is None or each.index >= count else each.index)
            for each in self.probes
        ]
        other.finished, other.visited = dict(self.finished), list(self.visited)
        return other

    def start(self, stack: str, *, changes: bool = False) -> SequentialBlocks:
        """Return a stack before its first block; the stacks that run before it are run.

        Args:
            stack: The stack.
            changes: Its weights are going to change, and so what it and the stacks after it compute.

        Raises:
            UnsupportedBlockStructure: It only runs within the whole model.
        """
        if changes and stack in self.visited:
            self._forget_from(stack)
        while stack not in self.visited and (earlier := self._next_stack()) not in (None, stack):
            self._run(earlier)
        if stack in self.unsupported:
            raise self.unsupported[stack]
        try:
            if stack in self._blocks:
                self._blocks[stack].restart()
            else:
                others = [block for name, blocks in self.stacks.items() if name != stack for block in blocks]
                self._blocks[stack] = SequentialBlocks(
                    self.model,
                    self.stacks[stack],
                    self.batches,
                    is_teacher=self.is_teacher,
                    store=self.store,
                    weights=self.weights,
                    following=[*others, *self._heads],
                    replay=lambda batch, rows: self._replay(batch, rows, skip=stack),
                    probes=self.probes,
                    structure=self._structures.get(stack),
                )
                self._structures[stack] = self._blocks[stack].structure
        except UnsupportedBlockStructure as error:
            self.unsupported[stack] = error
            self._run_whole(stack, str(error))
            raise
        if not self._blocks[stack].structure.is_sequential:
            self._add_note(stack, "its blocks pass on more than the hidden states.")
        return self._blocks[stack]

    def finish(self, stack: str) -> None:
        """Record that the last block of a stack has run."""
        blocks = self._blocks[stack]
        if stack not in self.visited:
            self.visited.append(stack)
        if blocks.structure.is_replayable:
            self.finished[stack], self._outputs[stack] = blocks.hidden_states, blocks.structure.outputs
        else:
            self._run_whole(stack, "what follows takes more of its blocks than the last hidden states.")

    def stacks_in_order(self) -> list[str]:
        """Return the stacks in the order in which the model calls them, those that it never calls last."""
        order: dict[str, None] = {}
        with removable_hooks() as handles:
            for stack, blocks in self.stacks.items():
                handles.append(blocks[0].register_forward_pre_hook(lambda *args, s=stack: order.setdefault(s)))
            for probe in self.probes:
                forward_no_cache(self.model, first_rows(probe.batch, 1))
        return list(order | dict.fromkeys(self.stacks))

    def finish_all(self) -> None:
        """Run the stacks that have not run."""
        while (stack := self._next_stack()) is not None:
            self._run(stack)

    def visit(
        self,
        register: RegisterHooks,
        begin: Callable[[int], None],
        *,
        skip: int = 0,
        after_block: Callable[[int], None] = lambda count: None,
        records: bool = False,
    ) -> None:
        """Run the whole model on all batches, block by block, with hooks; again what has run before.

        Args:
            register: Registers the hooks of a block, or of what is outside.
            begin: Called with the number of a batch before a part of the model runs on it.
            skip: Register no hooks for so many blocks, the first that run.
            after_block: Called with the number of blocks that have run.
            records: Keep what the blocks and their modules are called with, as far as the disk has space for it.
        """
        recorder = InputRecorder(self._modules) if records else None
        self.finished.clear()
        self.visited.clear()
        count = 0
        while (stack := self._next_stack()) is not None:
            try:
                blocks = self.start(stack)
            except UnsupportedBlockStructure:
                continue
            while blocks.next < len(blocks.blocks):
                with removable_hooks() as handles:
                    if count >= skip:
                        register(handles, stack, blocks.next)
                    blocks.advance(begin, recorder if recorder and recorder.has_space(blocks.hidden_states) else None)
                count += 1
                after_block(count)
            self.finish(stack)
        with removable_hooks() as handles:
            register(handles, None, 0)
            for batch in range(len(self.batches)):
                begin(batch)
                self.forward(batch)

    def forward(self, batch: int, rows: int | None = None) -> Any:
        """Return the model's outputs on a batch, or on its first rows; None if a hook stopped it.

        Stacks that have not run are run on all batches first, except for a few rows of a model in memory.
        """
        self._prepare(rows)
        with self._replay(batch, rows):
            return forward_no_cache(self.model, first_rows(self.batches[batch], rows))

    def _prepare(self, rows: int | None) -> None:
        if rows is None or self.weights is not None:
            self.finish_all()

    def capture_input(self, module: nn.Module, batch: int, rows: int | None = None) -> Tensor | None:
        """Run a forward pass up to `module` and return its input; None if the forward pass never calls it."""
        inputs: list[Tensor] = []

        def stop(tensor: Tensor) -> None:
            inputs.append(tensor)
            raise StopForward

        self._prepare(rows)  # before there is a hook
        with removable_hooks() as handles:
            handles.append(register_input_hook(module, stop))
            self.forward(batch, rows)
        return inputs[0] if inputs else None

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each weight and its name, also those that are not in memory."""
        if self.weights is None:
            yield from self.model.named_parameters()
            return
        checkpoint = self.weights.teacher.weights
        for name in checkpoint.keys():
            yield name, checkpoint.get(name)

    @contextlib.contextmanager
    def _replay(self, batch: int | None, rows: int | None, skip: str | None = None) -> Iterator[None]:
        """Have the stacks that have run return their last hidden states, except `skip`; none on a batch of another process."""
        with contextlib.ExitStack() as replaced:
            for stack, streams in self.finished.items():
                if stack == skip or batch is None:
                    continue
                is_whole = rows is None or num_rows(self.batches[batch]) is None
                final = streams[batch] if is_whole else streams[batch][:rows]
                replaced.enter_context(replaced_blocks(self.stacks[stack], self._outputs[stack], final))
            yield

    def _run(self, stack: str) -> None:
        try:
            blocks = self.start(stack)
        except UnsupportedBlockStructure:
            return
        while blocks.next < len(blocks.blocks):
            blocks.advance()
        self.finish(stack)

    def _next_stack(self) -> str | None:
        """Return the stack whose first block the model calls next, of those that have not run."""
        waiting = {stack for stack in self.stacks if stack not in self.visited and stack not in self.unsupported}
        if not waiting:
            return None
        first = next(filter(None, (self._first_called(waiting, probe) for probe in self.probes)), None)
        if first is None:
            never = UnsupportedBlockStructure(f"{self.name}: its blocks run in the order [].")
            self.unsupported |= dict.fromkeys(waiting, never)
        return first

    def _first_called(self, stacks: Collection[str], probe: Probe) -> str | None:
        """Return which of the stacks the model calls first on a row of a batch; None if it calls the language head before."""
        first: list[str] = []

        def stop(stack: str | None) -> None:
            first.extend([] if stack is None else [stack])
            raise StopForward

        with removable_hooks() as handles:
            ends: list[tuple[str | None, nn.Module]] = [(None, head) for head in self._heads]
            ends += [(stack, block) for stack in stacks for block in self.stacks[stack]]
            for name, module in ends:
                handles.append(module.register_forward_pre_hook(lambda *args, s=name: stop(s), prepend=True))
            with self._replay(probe.index, 1), _reading(self.model, probe.batch, is_teacher=self.is_teacher):
                forward_no_cache(self.model, first_rows(probe.batch, 1))
        return first[0] if first else None

    def _forget_from(self, stack: str) -> None:
        """Forget that a stack and those after it have run."""
        position = self.visited.index(stack)
        for later in self.visited[position:]:
            self.finished.pop(later, None)
        del self.visited[position:]

    def _run_whole(self, stack: str, reason: str) -> None:
        """Record why a stack must run on every batch whenever the model does, and keep its weights in memory from now on."""
        if self._add_note(stack, reason) and self.weights is not None:
            self.weights.keep(*self.stacks[stack])

    def _add_note(self, stack: str, reason: str) -> bool:
        """Record why the blocks of a stack ran together; return whether that was not known."""
        blocks = f"All blocks of {self.name} in {stack.removesuffix('.{block}')}"
        note = f"{blocks} were in memory and ran together: {reason}"
        is_new = note not in self.notes
        self.notes += [note] if is_new else []
        return is_new


def _name(is_teacher: bool) -> str:
    """Return what errors call a model."""
    return "the teacher" if is_teacher else "the student"


def _reading(model: PreTrainedModel, batch: Batch, *, is_teacher: bool) -> contextlib.AbstractContextManager[None]:
    """Raise a `TeacherError` with the shapes of a batch where a teacher cannot run on it; a student reads what it has read.

    Only for passes whose hooks record alone: what they compute must not be taken for the model's error.
    """
    if not is_teacher:
        return contextlib.nullcontext()
    return unreadable_as_teacher_error(model, batch, source="calibration_dataset", advice=_UNREADABLE_ADVICE)


def _nearly_equal(first: Any, second: Any) -> bool:
    """Return whether all floating tensors of two nested structures are equal but for rounding."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape == second.shape and torch.allclose(first, second, rtol=1e-3, atol=1e-5, equal_nan=True)
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(_nearly_equal(first[name], second[name]) for name in first)
    if isinstance(first, (tuple, list)) and isinstance(second, (tuple, list)):
        return len(first) == len(second) and all(map(_nearly_equal, first, second))
    return True


@contextlib.contextmanager
def replaced_blocks(
    blocks: Sequence[nn.Module], outputs: Sequence[Any], final: Tensor | None = None
) -> Iterator[None]:
    """Replace blocks by the identity: each returns its input, in the form of its entry in `outputs`; the last, `final`."""

    def identity_like(output: Any, result: Tensor | None) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden_states = hidden_states_arg(args, kwargs) if result is None else result
            return hidden_states if isinstance(output, Tensor) else (hidden_states, *output[1:])

        return forward

    # An instance has a `forward` of its own where Accelerate moves its weights.
    instance_forwards = [block.__dict__.get("forward") for block in blocks]
    try:
        for index, (block, output) in enumerate(zip(blocks, outputs, strict=True), 1):
            block.forward = identity_like(output, final if index == len(blocks) else None)
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
