"""Choose the blocks that a student keeps as a set: by a local search around those of most influence.

The influence of a single block is measured with all others in place, and does not show which blocks can be missed together:
of blocks with nearly the same influence the wrong one costs SmolLM2-135M a tenfold perplexity at 20 of 30 blocks.

Blocks that make hidden states massive count as more influential than most (`calibration/statistics.py`).

The local search leaves open which of the blocks nearest to the threshold are kept, the three kept ones of least influence
and the three dropped ones of most. Of all 20 sets it takes the one whose outputs are nearest to the teacher's on the
start of a few texts, if that is nearer by a tenth and the student's config can have it. Of several stacks, as in an
encoder-decoder, each is searched with the others whole. The sets are compared at the teacher's width: narrower students lose
more by their width than by their blocks, and were up to 12 % worse after training with what a search found for them.

Cost, in forward passes of the teacher over the sample: at half of 30 blocks 7, at two thirds 11, because sets share the blocks
before the first in which they differ; all blocks are read once.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence

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
from hf_guide.calibration.importance import BlockSelection
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

SEARCH_TOKENS = 256
"""Tokens of a sample of whole rows, of all processes together."""

SHORT_ROWS, SHORT_ROW_TOKENS = 4, 32
"""For a model with outputs of each token: the rows of the sample and the tokens that each is cut to.

Sets differ more by texts than by tokens. Of SmolLM2-135M at 15 and 20 of 30 blocks, four seeds, the sets chosen on four such
rows are within 1.6 % of the divergence of the best set on other text in the mean, on one row of 256 tokens within 3.0 %.
"""

SAMPLE_EXAMPLES = 16
"""Examples of the sample at least, in each process, where a model has few outputs for each."""

MARGINAL_BLOCKS = 3
"""So many kept blocks, and as many dropped ones, may change places."""

MIN_GAIN = 0.1
"""The share by which another set has to lower the divergence.

Far from the teacher, as at a third of SmolLM2-135M's depth, sets differ by less, and smaller gains do not hold once the
weights are refitted.
"""

STEP = "searched_blocks"
"""Of a resumable calibration, the step that holds what was chosen."""

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


def select_blocks(
    calibration: CalibrationResult, stack: str, by_influence: Sequence[int], setup: StudentSetup
) -> BlockSelection:
    """Return which blocks of a stack to keep, with all others of the model whole.

    With these blocks alone the sample's outputs are never farther from the teacher's than with those of greatest influence.

    Args:
        calibration: What was collected of the teacher.
        stack: The stack, such as "layers.{block}".
        by_influence: The blocks of greatest influence of those that the student's config can have, in order.
        setup: Of the student.

    Raises:
        IncomparableOutputs: As `check_comparable`; the model has blocks that do not run one after another, or a single example
            of embeddings.
    """
    comparison, step = check_comparable(setup), _search_step(stack)
    saved = None if calibration.checkpoint is None else calibration.checkpoint.load_step(step)
    if saved is not None:
        return BlockSelection(**saved[1])
    sample = _sample(calibration.teacher, comparison, *sample_size(comparison.task, setup.config))
    try:
        with calibration_mode(sample.model):
            search = _Search(sample, stack, comparison, calibration.checkpoint)
            influence = calibration.statistics.block_scores[stack]
            return search.search(by_influence, influence, show_progress=setup.show_progress)
    except UnsupportedBlockStructure as error:
        raise IncomparableOutputs(f"{_WHAT} cannot be evaluated: {error} {_ADVICE}") from error


def _search_step(stack: str) -> str:
    return f"{STEP}.{stack.removesuffix('.{block}')}"


def sample_size(task: Task, config: PreTrainedConfig) -> tuple[int, int | None]:
    """Return on how many tokens of all processes sets are compared, and to how many rows are cut; None leaves them whole.

    Example:
        >>> from transformers import LlamaConfig
        >>> sample_size(Task.CAUSAL_LM, LlamaConfig())
        (128, 32)
    """
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
    """The search in one stack."""

    def __init__(
        self,
        sample: SequentialModel,
        stack: str,
        comparison: OutputComparison,
        checkpoint: CalibrationCheckpoint | None,
    ):
        self.sample, self.stack, self.comparison, self.checkpoint = sample, stack, comparison, checkpoint
        self.blocks: SequentialBlocks = sample.start(stack)
        if not self.blocks.structure.is_replayable:
            raise UnsupportedBlockStructure("what follows takes more of its blocks than the last hidden states.")

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
        """Yield what is compared of each batch."""
        for index, batch in enumerate(self.sample.batches):
            with replaced_blocks(self.blocks.blocks, self.blocks.structure.outputs, final[index]):
                outputs = self.comparison.outputs(self.sample.model, batch)
            yield outputs

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
