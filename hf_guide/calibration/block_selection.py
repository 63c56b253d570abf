"""Choose the blocks that a student keeps as a set: by a local search from those of most influence, or by greedy removal.

The influence of a single block is measured with all others in place, and does not show which blocks can be missed together:
of blocks with nearly the same influence the wrong one costs SmolLM2-135M a tenfold perplexity at 20 of 30 blocks.

The local search exchanges the kept blocks of least influence for the dropped ones of most, one at a time, as long as the loss
on a sample of the calibration text falls.

In a greedy removal every block is evaluated in the model without the blocks that were removed before it (SLEB, arXiv
2402.09025), by the same loss. Removals that looked worse before are evaluated again only where they might be the best by now
(lazy greedy, Minoux 1978), and each runs only the blocks after it: the hidden states before each block are kept.

Cost: a local search runs the sample through the student's depth up to 28 times, less the blocks before the first exchanged
one. A greedy removal takes about 2.6 times the teacher's depth in forward passes over the sample when two thirds of 30 blocks
are removed. Of a teacher of files one block is in memory at a time, and all are read about as often.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_guide.calibration.collection import CalibrationResult
from hf_guide.calibration.forward import calibration_mode
from hf_guide.calibration.importance import BlockSelection, top_influence_blocks
from hf_guide.calibration.output_comparison import OutputComparison
from hf_guide.calibration.resume import CalibrationCheckpoint
from hf_guide.calibration.sequential import (
    SequentialBlocks,
    SequentialModel,
    UnsupportedBlockStructure,
    first_rows,
    replaced_blocks,
)
from hf_guide.calibration.streams import Streams
from hf_guide.errors import OptionError
from hf_guide.initialization.registry import StudentSetup
from hf_guide.utils.distributed import all_reduce_sum_, rank_and_world_size

SAMPLE_TOKENS = 512
"""Tokens of the sample, of all processes together."""

SAMPLE_EXAMPLES = 8
"""Examples of the sample at least, in each process, where examples are compared with each other."""

EXCHANGED, MAX_EXCHANGES = 3, 3
"""Of a local search: how many kept and how many dropped blocks are tried for each other, and how often at most."""

STEP, EXCHANGE_STEP = "removed_blocks", "exchanged_blocks"
"""Of a resumable calibration, the steps that hold what was removed so far, and what a local search chose."""

_WHAT = "Sets of blocks"
_ADVICE = "Set layer_selection='block_influence'."


def check_comparable(setup: StudentSetup, stacks: Collection[str]) -> OutputComparison:
    """Return what compares a teacher's outputs with those without a block.

    Raises:
        OptionError: It has several stacks, or outputs that cannot be compared.
    """
    teacher = dataclasses.replace(setup, model_class=setup.teacher.model_class, config=setup.teacher.config)
    comparison = OutputComparison(teacher, what=_WHAT, advice=_ADVICE)
    if len(stacks) > 1:
        raise OptionError(f"{_WHAT} are evaluated in models of one stack; found {sorted(stacks)}. {_ADVICE}")
    return comparison


def select_blocks(
    calibration: CalibrationResult,
    counts: Mapping[str, int],
    comparison: OutputComparison,
    *,
    greedy: bool,
    show_progress: bool = False,
) -> dict[str, BlockSelection]:
    """Return, by stack, which blocks to keep, so many as `counts` has; empty where no stack loses a block.

    The loss of the sample without the other blocks is never larger than with the blocks of greatest influence.

    Args:
        calibration: What was collected of the teacher.
        counts: By stack, the student's blocks.
        comparison: As `check_comparable` returned it.
        greedy: Whether blocks are removed one by one; otherwise by a local search.
        show_progress: Whether to show a progress bar.

    Raises:
        OptionError: The model has blocks that do not run one after another, or a single example of embeddings.
    """
    depths = {stack: len(blocks) for stack, blocks in calibration.teacher.stacks.items()}
    smaller = [stack for stack, count in counts.items() if count < depths.get(stack, count)]
    if not smaller:
        return {}
    (stack,) = smaller
    sample = _sample(calibration.teacher, comparison)
    try:
        with calibration_mode(sample.model):
            search = _Search(sample, stack, comparison, calibration.checkpoint)
            influence = calibration.statistics.block_influence[stack]
            select = search.remove if greedy else search.exchange
            return {stack: select(counts[stack], influence, show_progress=show_progress)}
    except UnsupportedBlockStructure as error:
        raise OptionError(f"{_WHAT} cannot be evaluated: {error} {_ADVICE}") from error


def _sample(teacher: SequentialModel, comparison: OutputComparison) -> SequentialModel:
    """Return the teacher on the first rows of this process's batches."""
    budget, batches = -(-SAMPLE_TOKENS // rank_and_world_size()[1]), []
    examples, wanted = 0, SAMPLE_EXAMPLES if comparison.compares_examples else 0
    for batch in teacher.batches:
        length = batch["input_ids"].shape[-1] if "input_ids" in batch else 1
        batches.append(first_rows(batch, max(-(-budget // length), wanted - examples)))
        count = len(next(iter(batches[-1].values())))
        budget, examples = budget - count * length, examples + count
        if budget <= 0 and examples >= wanted:
            break
    comparison.check_examples(examples)
    sample = teacher.on_first_batches(len(batches))
    sample.batches = batches
    sample.finished, sample.visited = {}, []
    return sample


class _Search:
    """The search in one stack: the hidden states before each block that is left."""

    def __init__(
        self,
        sample: SequentialModel,
        stack: str,
        comparison: OutputComparison,
        checkpoint: CalibrationCheckpoint | None,
    ):
        self.sample, self.stack, self.comparison, self.checkpoint = sample, stack, comparison, checkpoint
        self.parts = [comparison.parts(batch) for batch in sample.batches]
        self.blocks: SequentialBlocks = sample.start(stack)
        if not self.blocks.is_replayable:
            raise UnsupportedBlockStructure("what follows takes more of its blocks than the last hidden states.")
        self.kept = list(range(len(self.blocks.blocks)))
        self.before: dict[int, Streams] = {}
        self.reference: list[Tensor] = []

    def _run_teacher(self, *, keeps: bool) -> None:
        """Run all blocks; record the outputs to compare with, where there are any, and keep the hidden states before each."""
        final = self._run_from(0, self.blocks.hidden_states, keeps=keeps)
        self.reference = list(self._outputs(final)) if self.comparison.needs_teacher else []

    def exchange(self, count: int, influence: Tensor, *, show_progress: bool) -> BlockSelection:
        """Exchange blocks of the `count` of most influence while the loss falls."""
        saved = None if self.checkpoint is None else self.checkpoint.load_step(EXCHANGE_STEP)
        if saved is not None:
            facts: dict[str, Any] = saved[1]
            exchanged = [(int(out), int(taken), float(loss)) for out, taken, loss in facts["exchanged"]]
            return BlockSelection([], list(facts["kept"]), facts["influence_loss"], exchanged)
        if self.comparison.needs_teacher:
            self._run_teacher(keeps=False)
        order: list[int] = influence.argsort(descending=True, stable=True).tolist()
        self.kept = top_influence_blocks(influence, count)
        loss = self._loss(self._run_from(0, self.blocks.hidden_states, keeps=True))
        selection = BlockSelection([], [], loss)
        total = MAX_EXCHANGES * EXCHANGED**2
        with tqdm(total=total, desc="calibration: blocks", unit="set", disable=not show_progress) as bar:
            while len(selection.exchanged) < MAX_EXCHANGES:
                weak = [block for block in reversed(order) if block in self.kept][:EXCHANGED]
                strong = [block for block in order if block not in self.kept][:EXCHANGED]
                losses = {pair: self._loss_exchanged(*pair) for pair in itertools.product(weak, strong)}
                bar.update(len(losses))
                (out, taken), lowest = min(losses.items(), key=lambda item: item[1])
                if lowest >= loss:
                    break
                loss = lowest
                selection.exchanged.append((out, taken, loss))
                position, stream = self._first_change(out, taken)
                self.kept = self._exchanged(out, taken)
                if len(selection.exchanged) < MAX_EXCHANGES:
                    self._run_from(position, stream, keeps=True)
        selection.kept = list(self.kept)
        if self.checkpoint is not None:
            facts = {
                "kept": selection.kept,
                "exchanged": selection.exchanged,
                "influence_loss": selection.influence_loss,
            }
            self.checkpoint.save_step(EXCHANGE_STEP, {"kept": torch.tensor(self.kept)}, facts)
        return selection

    def _exchanged(self, out: int, taken: int) -> list[int]:
        return sorted({*self.kept, taken} - {out})

    def _first_change(self, out: int, taken: int) -> tuple[int, Streams]:
        """Return the position from which an exchange changes what is computed, and the hidden states before it."""
        first = next(block for block in self.kept if block >= min(out, taken))
        return self.kept.index(first), self.before[first]

    def _loss_exchanged(self, out: int, taken: int) -> float:
        """Return the loss of the sample with one block for another."""
        kept, (position, stream) = self.kept, self._first_change(out, taken)
        self.kept = self._exchanged(out, taken)
        try:
            return self._loss(self._run_from(position, stream))
        finally:
            self.kept = kept

    def remove(self, count: int, influence: Tensor, *, show_progress: bool) -> BlockSelection:
        """Remove blocks until `count` are left."""
        self._run_teacher(keeps=True)
        removal, losses = self._resume()
        total = len(self.kept) - count
        with tqdm(total=total, desc="calibration: blocks", unit="block", disable=not show_progress) as bar:
            while len(self.kept) > count:
                block = self._least_missed(losses)
                removal.removed.append((block, losses.pop(block)))
                self._remove(block)
                self._save(removal, losses)
                bar.update()
        removal.kept = list(self.kept)
        strongest = top_influence_blocks(influence, count)
        removal.influence_loss = self._loss_of(strongest)
        if removal.influence_loss < removal.removed[-1][1]:
            removal.kept = strongest
        return removal

    def _least_missed(self, losses: dict[int, float]) -> int:
        """Return the block whose removal costs least; `losses` has those of earlier evaluations, and gets the new ones."""
        if not losses:
            losses.update({block: self._loss_without(block) for block in self.kept})
            return min(losses, key=losses.__getitem__)
        evaluated: set[int] = set()
        while True:
            block = min(losses, key=losses.__getitem__)
            if block in evaluated:
                return block
            losses[block] = self._loss_without(block)
            evaluated.add(block)

    def _loss_without(self, block: int) -> float:
        return self._loss(self._run_from(self.kept.index(block) + 1, self.before[block]))

    def _loss_of(self, selected: Sequence[int]) -> float:
        """Return the loss of the sample with these blocks alone."""
        self.kept = list(selected)
        return self._loss(self._run_from(0, self.blocks.hidden_states))

    def _remove(self, block: int) -> None:
        position, stream = self.kept.index(block), self.before.pop(block)
        self.kept.remove(block)
        self._run_from(position, stream, keeps=True)

    @torch.no_grad()
    def _run_from(self, position: int, stream: Streams, *, keeps: bool = False) -> Streams:
        """Run the blocks that are left from a position on; return the last hidden states, and keep those before each."""
        for block in self.kept[position:]:
            if keeps:
                self.before[block] = stream
            after = Streams(self.sample.store)
            weights = self.blocks.weights
            with contextlib.nullcontext() if weights is None else weights.held(self.blocks.blocks[block]):
                for batch in range(len(self.blocks.batches)):
                    after.append(self.blocks.run_block(block, batch, stream[batch]))
            stream = after
        return stream

    @torch.no_grad()
    def _outputs(self, final: Streams) -> Iterator[Tensor]:
        """Yield what is compared of each part of a batch, on the CPU."""
        for index, parts in enumerate(self.parts):
            hidden_states = final[index]
            for part, last in zip(parts, hidden_states.tensor_split(len(parts)), strict=True):
                with replaced_blocks(self.blocks.blocks, self.blocks.outputs, last):
                    outputs = self.comparison.outputs(self.sample.model, part)
                yield outputs.cpu()

    def _loss(self, final: Streams) -> float:
        """Return the mean loss of the sample in nats, the same in all processes."""
        parts = [part for batch in self.parts for part in batch]
        losses = self.comparison.losses(self._outputs(final), self.reference, parts).double()
        sums = torch.tensor([losses.sum().item(), float(len(losses))], dtype=torch.float64)
        all_reduce_sum_([sums])
        return (sums[0] / sums[1].clamp(min=1)).item()

    def _resume(self) -> tuple[BlockSelection, dict[int, float]]:
        """Return what an earlier run removed, and the losses that it knew; the removals are made again."""
        saved = None if self.checkpoint is None else self.checkpoint.load_step(STEP)
        if saved is None:
            return BlockSelection(), {}
        facts: dict[str, Any] = saved[1]
        removal = BlockSelection([(int(block), float(loss)) for block, loss in facts["removed"]])
        gone = {block for block, _ in removal.removed}
        self.kept = [block for block in self.kept if block not in gone]
        self.before.clear()
        self._run_from(0, self.blocks.hidden_states, keeps=True)
        return removal, {int(block): float(loss) for block, loss in facts["losses"]}

    def _save(self, removal: BlockSelection, losses: Mapping[int, float]) -> None:
        if self.checkpoint is not None:
            facts = {"removed": removal.removed, "losses": list(losses.items())}
            self.checkpoint.save_step(STEP, {"kept": torch.tensor(self.kept)}, facts)
