"""Choose the blocks that a student keeps as a set: by a local search around those of most influence, or by greedy removal.

The influence of a single block is measured with all others in place, and does not show which blocks can be missed together:
of blocks with nearly the same influence the wrong one costs SmolLM2-135M a tenfold perplexity at 20 of 30 blocks.

Blocks that make hidden states massive count as more influential than most (`calibration/statistics.py`).

The local search leaves open which of the blocks nearest to the threshold are kept, the three kept ones of least influence
and the three dropped ones of most. Of all 20 sets it takes the one whose outputs are nearest to the teacher's on the
start of a few texts, if that is nearer by a tenth and the student's config can have it. Of several stacks, as in an
encoder-decoder, each is searched with the others whole. The sets are compared at the teacher's width: narrower students lose
more by their width than by their blocks, and were up to 12 % worse after training with what a search found for them.

In a greedy removal every block is evaluated in the model without the blocks that were removed before it (SLEB, arXiv
2402.09025), by the loss that shapes are scored by. Removals that looked worse before are evaluated again only where they
might be the best by now (lazy greedy, Minoux 1978), and each runs only the blocks after it: the hidden states before each
block are kept.

Cost, in forward passes of the teacher over the sample: of a local search at half of 30 blocks 7, at two thirds 11, because
sets share the blocks before the first in which they differ; all blocks are read once. Of a greedy removal of two thirds of 30
blocks 80, and a teacher of files is read about as often, one block at a time.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedConfig

from hf_guide.calibration.batches import (
    Batch,
    count_rows,
    count_tokens,
    first_rows,
    first_tokens,
    has_sounds,
    num_rows,
)
from hf_guide.calibration.collection import CalibrationResult
from hf_guide.calibration.forward import calibration_mode
from hf_guide.calibration.importance import BlockSelection, top_influence_blocks
from hf_guide.calibration.output_comparison import IncomparableOutputs, OutputComparison
from hf_guide.calibration.resume import CalibrationCheckpoint
from hf_guide.calibration.sequential import (
    SequentialBlocks,
    SequentialModel,
    UnsupportedBlockStructure,
    replaced_blocks,
)
from hf_guide.calibration.streams import Streams
from hf_guide.initialization.registry import StudentSetup
from hf_guide.tasks import Task
from hf_guide.utils.distributed import all_reduce_sum_, rank_and_world_size
from hf_guide.utils.memory import return_freed_memory

SEARCH_TOKENS, GREEDY_TOKENS = 256, 512
"""Tokens of a sample of whole rows, of all processes together, of a local search and of a greedy removal."""

SHORT_ROWS, SHORT_ROW_TOKENS = 4, 32
"""Of a local search for a model with outputs of each token: the rows of the sample and the tokens that each is cut to.

Sets differ more by texts than by tokens. Of SmolLM2-135M at 15 and 20 of 30 blocks, four seeds, the sets chosen on four such
rows are within 1.6 % of the divergence of the best set on other text in the mean, on one row of 256 tokens within 3.0 %.
"""

SAMPLE_EXAMPLES = 16
"""Examples of the sample at least, in each process, where a model has few outputs for each."""

MARGINAL_BLOCKS = 3
"""Of a local search: so many kept blocks, and as many dropped ones, may change places."""

MIN_GAIN = 0.1
"""Of a local search: the share by which another set has to lower the divergence.

Far from the teacher, as at a third of SmolLM2-135M's depth, sets differ by less, and smaller gains do not hold once the
weights are refitted.
"""

STEP, SEARCH_STEP = "removed_blocks", "searched_blocks"
"""Of a resumable calibration, the steps that hold what was removed so far, and what a local search chose."""

_WHAT = "Sets of blocks"
_ADVICE = "Set layer_selection='block_influence'."


def keeps_width(widths: tuple[int, int] | None) -> bool:
    """Return whether sets of a stack's blocks are compared, for the widths of teacher and student; None where they agree."""
    return widths is None or widths[1] == widths[0]


def check_comparable(setup: StudentSetup) -> OutputComparison:
    """Return what compares a teacher's outputs with those without a block.

    Raises:
        IncomparableOutputs: They cannot be compared.
    """
    teacher = dataclasses.replace(setup, model_class=setup.teacher.model_class, config=setup.teacher.config)
    return OutputComparison(teacher, what=_WHAT, advice=_ADVICE)


def check_removable(setup: StudentSetup, stacks: Collection[str]) -> None:
    """Raise where blocks cannot be removed one by one.

    Raises:
        IncomparableOutputs: There are several stacks, or as `check_comparable`.
    """
    if len(stacks) > 1:
        raise IncomparableOutputs(
            f"Blocks are removed one by one from models of one stack; found {sorted(stacks)}. {_ADVICE}"
        )
    check_comparable(setup)


def select_blocks(
    calibration: CalibrationResult, stack: str, by_influence: Sequence[int], setup: StudentSetup, *, greedy: bool
) -> BlockSelection:
    """Return which blocks of a stack to keep, with all others of the model whole.

    The loss of the sample with these blocks alone is never larger than with those of greatest influence.

    Args:
        calibration: What was collected of the teacher.
        stack: The stack, such as "layers.{block}".
        by_influence: The blocks of greatest influence of those that the student's config can have, in order; of a greedy
            removal only their number matters.
        setup: Of the student.
        greedy: Whether blocks are removed one by one; otherwise there is a local search.

    Raises:
        IncomparableOutputs: As `check_comparable`; the model has blocks that do not run one after another, or a single example
            of embeddings.
    """
    comparison, step = check_comparable(setup), _search_step(stack)
    saved = None if greedy or calibration.checkpoint is None else calibration.checkpoint.load_step(step)
    if saved is not None:
        return BlockSelection(**saved[1])
    sample = _sample(calibration.teacher, comparison, *sample_size(comparison.task, setup.config, greedy=greedy))
    try:
        with calibration_mode(sample.model):
            search = _Search(sample, stack, comparison, calibration.checkpoint, by_rows=greedy)
            select = search.remove if greedy else search.search
            influence = calibration.statistics.block_scores[stack]
            return select(by_influence, influence, show_progress=setup.show_progress)
    except UnsupportedBlockStructure as error:
        raise IncomparableOutputs(f"{_WHAT} cannot be evaluated: {error} {_ADVICE}") from error


def _search_step(stack: str) -> str:
    return f"{SEARCH_STEP}.{stack.removesuffix('.{block}')}"


def sample_size(task: Task, config: PreTrainedConfig, *, greedy: bool = False) -> tuple[int, int | None]:
    """Return on how many tokens of all processes sets are compared, and to how many rows are cut; None leaves them whole.

    Example:
        >>> from transformers import LlamaConfig
        >>> sample_size(Task.CAUSAL_LM, LlamaConfig())
        (128, 32)
    """
    if greedy:
        return GREEDY_TOKENS, None
    if task.is_per_token and not config.is_encoder_decoder:
        return SHORT_ROWS * SHORT_ROW_TOKENS, SHORT_ROW_TOKENS
    return SEARCH_TOKENS, None


def _sample(
    teacher: SequentialModel, comparison: OutputComparison, tokens: int, row_tokens: int | None
) -> SequentialModel:
    """Return the teacher on the first rows of this process's batches.

    Args:
        teacher: The teacher on all batches.
        comparison: What its outputs are compared by.
        tokens: Of all processes together.
        row_tokens: Tokens that rows are cut to, if they are of text alone; None leaves them whole.
    """
    budget, batches = -(-tokens // rank_and_world_size()[1]), list[Batch]()
    examples, wanted = 0, SAMPLE_EXAMPLES if comparison.task.row.outputs[0].items in ("example", "boundary") else 0
    if has_sounds(teacher.batches[0]):  # one of them may have as many frames as are compared
        wanted = max(wanted, SHORT_ROWS)
    for each in teacher.batches:
        batch = each if row_tokens is None else first_tokens(each, row_tokens)
        rows = count_rows(batch, budget, teacher.model)
        batches.append(first_rows(batch, rows and max(rows, wanted - examples)))
        budget -= count_tokens(batches[-1], teacher.model)
        examples += len(next(iter(batches[-1].values())))
        if budget <= 0 and examples >= wanted:
            break
    comparison.check_examples(examples)
    batches = _merged(batches)
    sample = teacher.on_first_batches(len(batches))
    sample.batches = batches
    sample.finished, sample.visited = {}, []
    return sample


def _merged(batches: list[Batch]) -> list[Batch]:
    """Return one batch of the rows of all, if they are as long: a head of many tokens is read once for each batch."""
    if len({tuple((name, value.shape[1:]) for name, value in batch.items()) for batch in batches}) > 1:
        return batches
    if any(num_rows(batch) is None for batch in batches):
        return batches
    return [{name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}]


class _Search:
    """The search in one stack; of a greedy removal, with the blocks that are left, and the hidden states before each."""

    def __init__(
        self,
        sample: SequentialModel,
        stack: str,
        comparison: OutputComparison,
        checkpoint: CalibrationCheckpoint | None,
        *,
        by_rows: bool,
    ):
        self.sample, self.stack, self.comparison, self.checkpoint = sample, stack, comparison, checkpoint
        self.parts = [comparison.parts(batch) if by_rows else [batch] for batch in sample.batches]
        self.blocks: SequentialBlocks = sample.start(stack)
        if not self.blocks.structure.is_replayable:
            raise UnsupportedBlockStructure("what follows takes more of its blocks than the last hidden states.")
        self.kept = list(range(len(self.blocks.blocks)))
        self.before: dict[int, Streams] = {}
        self.reference: list[Tensor] = []

    def search(self, by_influence: Sequence[int], influence: Tensor, *, show_progress: bool) -> BlockSelection:
        """Return the blocks with which the outputs are nearest to the teacher's, of all sets that are tried."""
        order: list[int] = influence.argsort(descending=True, stable=True).tolist()
        order.sort(key=lambda block: block not in by_influence)  # stable: the blocks that are kept come first
        count = len(by_influence)
        free = min(MARGINAL_BLOCKS, count, len(order) - count)
        kept, marginal = order[: count - free], order[count - free : count + free]
        sets = [sorted([*kept, *chosen]) for chosen in itertools.combinations(marginal, free)]
        losses = self._divergences(sets, show_progress=show_progress)
        nearer = [each for each in zip(sets, losses, strict=True) if each[1] <= (1 - MIN_GAIN) * losses[0]]
        ranked = [*sorted(nearer, key=lambda each: each[1]), (sets[0], losses[0])]
        selection = BlockSelection(influence_loss=losses[0], by_influence=sets[0], next_best=ranked).without_best()
        if self.checkpoint is not None:
            step = _search_step(self.stack)
            self.checkpoint.save_step(step, {"kept": torch.tensor(selection.kept)}, vars(selection))
        return selection

    def _divergences(self, sets: Sequence[Sequence[int]], *, show_progress: bool) -> list[float]:
        """Return how far the sample's outputs with the blocks of each set alone are from the teacher's.

        Each block is loaded once, and runs once for all sets that agree in the blocks before it.
        """
        depth = len(self.blocks.blocks)
        of_all = [*sets, range(depth)]
        streams = [self.blocks.hidden_states] * len(of_all)
        for block in tqdm(range(depth), desc="calibration: sets", unit="block", disable=not show_progress):
            users = [index for index, kept in enumerate(of_all) if block in kept]
            before = {id(streams[index]): streams[index] for index in users}
            with self._held(block):
                after = {key: self._run_block(block, stream) for key, stream in before.items()}
            for index in users:
                streams[index] = after[id(streams[index])]
        *finals, teacher = streams
        reference, differences = list(self._outputs(teacher)), []
        for final in finals:
            differences.append(self.comparison.all_differences(self._outputs(final), reference))
            return_freed_memory()  # logits over a large vocabulary
        return self._means(differences)

    def remove(self, by_influence: Sequence[int], influence: Tensor, *, show_progress: bool) -> BlockSelection:
        """Remove blocks until as many are left as `by_influence` has."""
        count = len(by_influence)
        final = self._run_from(0, self.blocks.hidden_states, keeps=True)
        self.reference = list(self._outputs(final)) if self.comparison.needs_teacher else []
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
            with self._held(block):
                stream = self._run_block(block, stream)
        return stream

    def _held(self, block: int) -> contextlib.AbstractContextManager[None]:
        """Keep the weights of a block in memory for the duration of the block."""
        weights = self.blocks.weights
        return contextlib.nullcontext() if weights is None else weights.held(self.blocks.blocks[block])

    def _run_block(self, block: int, stream: Streams) -> Streams:
        after = Streams(self.sample.store)
        for batch in range(len(self.blocks.batches)):
            after.append(self.blocks.run_block(block, batch, stream[batch]))
        return after

    @torch.no_grad()
    def _outputs(self, final: Streams) -> Iterator[Tensor]:
        """Yield what is compared of each part of a batch."""
        for index, parts in enumerate(self.parts):
            hidden_states = final[index]
            for part, last in zip(parts, hidden_states.tensor_split(len(parts)), strict=True):
                with replaced_blocks(self.blocks.blocks, self.blocks.structure.outputs, last):
                    outputs = self.comparison.outputs(self.sample.model, part)
                yield outputs

    def _loss(self, final: Streams) -> float:
        """Return the mean loss of the sample in nats, the same in all processes."""
        parts = [part for batch in self.parts for part in batch]
        return self._means([self.comparison.losses(self._outputs(final), self.reference, parts)])[0]

    @staticmethod
    def _means(losses: Sequence[Tensor]) -> list[float]:
        """Return the mean of each entry, (items,) in this process, over the items of all processes."""
        sums = torch.tensor(
            [[each.double().sum().item() for each in losses], [float(len(each)) for each in losses]],
            dtype=torch.float64,
        )
        all_reduce_sum_([sums])
        means: list[float] = (sums[0] / sums[1].clamp(min=1)).tolist()
        return means

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
