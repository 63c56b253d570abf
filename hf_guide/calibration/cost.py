"""What `calibrated` takes besides the transfer of the weights: the teacher, the activations, the statistics and the fits.

Batches are assumed to be of `calibration_batch_size` rows of `calibration_seq_length` tokens. Not counted are the blocks of a
stack that only runs within the whole model.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from hf_guide.calibration.block_selection import keeps_width, sample_size
from hf_guide.calibration.block_weights import is_used_mapped
from hf_guide.calibration.config import CalibratedConfig, Refit
from hf_guide.calibration.data import default_num_tokens
from hf_guide.calibration.head_fitting import LOGIT_SCALE_TOKENS, TOKENS_AT_A_TIME
from hf_guide.calibration.least_squares import fit_dtype, max_eps
from hf_guide.calibration.output_comparison import NUMBERS_AT_A_TIME
from hf_guide.initialization.config import LayerSelection
from hf_guide.initialization.cost import CostPart
from hf_guide.initialization.registry import StudentSetup
from hf_guide.layouts.registry import Layout
from hf_guide.models.model_classes import strip_base_prefix
from hf_guide.tasks import task_of
from hf_guide.teachers.checkpoint import TeacherCheckpoint
from hf_guide.utils.distributed import default_device

TEACHER_PASSES, STUDENT_PASSES = 2, 4
"""Over all tokens of the teacher and of the student."""

SEARCH_PASSES, SEARCHED_SETS = 11, 21
"""Of a local search over its own sample, where a single stack is searched; and how often another stack runs for each."""


@dataclass
class TeacherSize:
    """How large a teacher is.

    Attributes:
        numbers: Of its weights.
        stored: Bytes of its weights in files.
        blocks: Bytes of each block, by its name.
        copied: Bytes of the weights outside of blocks that are in memory as long as it runs.
        mapped: Bytes of the largest weight that is used where its file is mapped: what was read of another is given up.
    """

    numbers: int = 0
    stored: int = 0
    blocks: Counter[str] = field(default_factory=Counter)
    copied: int = 0
    mapped: int = 0

    @property
    def resident(self) -> int:
        """Bytes that are in memory while it runs: one block, the next, and what is outside."""
        return self.copied + self.mapped + 2 * max(self.blocks.values(), default=0)


def measure_teacher(teacher: TeacherCheckpoint, layout: Layout) -> TeacherSize:
    """Return how large a teacher is by the shapes of its weights; none is read."""
    found, weights, device = TeacherSize(), teacher.weights, default_device()
    loops_over_experts = teacher.model_class._can_set_experts_implementation()
    for name in weights.keys():
        shape = weights.shape(name)
        size = shape.numel() * weights.dtype(name).itemsize
        match = layout.find(strip_base_prefix(name, teacher.base_model_prefix))
        found.numbers += shape.numel()
        found.stored += size
        if loops_over_experts and len(shape) == 3 and weights.reads_rows(name):
            size //= shape[0]  # one expert is in memory
        if match is not None and "block" in match.numbers:
            found.blocks[match.row.pattern.partition("{block}")[0] + match.numbers["block"]] += size
        elif is_used_mapped(weights, name, teacher.dtype, device):
            found.mapped = max(found.mapped, size)
        else:
            found.copied += size
    return found


def calibration_parts(setup: StudentSetup, config: CalibratedConfig) -> Iterator[CostPart]:
    """Yield the parts of a calibration; the number of tokens is the default where none is given."""
    teacher, student = setup.teacher, setup.meta_student()
    plan, item, size = setup.plan(student), teacher.dtype.itemsize, measure_teacher(teacher, setup.layout)
    planned = [plan.sizes(parameter) for parameter in plan.parameters.values() if parameter.source is not None]
    neurons, student_neurons = (max((sizes[index].get("mlp", 0) for sizes in planned), default=0) for index in (0, 1))
    vocab = max((sizes[0].get("vocab", 0) for sizes in planned), default=0)
    tokens = config.calibration_tokens or default_num_tokens(neurons)
    is_shallower = sum(map(len, plan.block_mapping.values())) < len(size.blocks)
    searches = is_shallower and config.layer_selection == LayerSelection.LOCAL_SEARCH
    searches = searches and any(map(keeps_width, plan.widths.values() or [None]))
    stacks = len(plan.block_mapping)
    sample = sample_size(task_of(setup.model_class), setup.config)[0] * searches
    searched = float(sample * size.numbers * (SEARCH_PASSES if stacks == 1 else stacks * SEARCHED_SETS))
    if not isinstance(setup.source, PreTrainedModel):
        read = (3 if searched else 2) * size.stored
        yield CostPart("the teacher's embeddings, head and two blocks", size.resident, is_kept=True, read=read)
    refits = config.refit != Refit.NONE
    passes = TEACHER_PASSES * size.numbers + (STUDENT_PASSES * student.num_parameters() if refits else 0)
    # A family that is known by its blocks alone has no axis to project, and keeps its width.
    unchanged = (getattr(teacher.config.get_text_config(), "hidden_size", 0),) * 2
    width, student_width = map(max, zip(*(plan.widths.values() or [unchanged]), strict=True))
    yield CostPart(
        f"the activations of {tokens} tokens",
        min(item * tokens * (9 if refits else 2) * width, round(config.activation_memory * 10**9)),
        is_kept=True,
        products={torch.float32: float(tokens) * passes + searched},
        advice="fewer calibration_tokens, a lower activation_memory",
    )
    squares = sum(old**2 for old, _ in plan.widths.values())
    yield CostPart("the statistics", 8 * squares + 4 * width**2, is_kept=True)
    batch = min(tokens, config.calibration_batch_size * config.calibration_seq_length)
    run = CostPart(
        "a batch in a block", batch * item * (8 * width + 4 * neurons), advice="a lower calibration_batch_size"
    )
    yield run
    yield CostPart("the logits", _logits_bytes(min(batch, LOGIT_SCALE_TOKENS), vocab, item, sample))
    if refits:
        exact = fit_dtype(max_eps(teacher.dtype, setup.dtype)).itemsize
        yield CostPart(
            "the fit of a weight", run.bytes + _fit_bytes(tokens, width, student_width, student_neurons, exact)
        )


def _logits_bytes(tokens: int, vocab: int, item: int, sample: int) -> int:
    """Return the memory of the logits in the fit of their scale, or of those that a search of blocks compares.

    Args:
        tokens: Of a batch.
        vocab: The teacher's vocabulary.
        item: Bytes of one of its logits.
        sample: Tokens that a search of blocks compares; 0 where there is none.
    """
    # With and without padding, a few of the student's, and fewer of these in float32.
    fitted = item * vocab * (2 * tokens + TOKENS_AT_A_TIME) + 16 * min(NUMBERS_AT_A_TIME, TOKENS_AT_A_TIME * vocab)
    # As many of a set, and in float32 those of the set and the teacher's.
    compared = sample * (2 * item + 8) * vocab + 16 * NUMBERS_AT_A_TIME * (sample > 0)
    return max(fitted, compared)


def _fit_bytes(tokens: int, width: int, student_width: int, student_neurons: int, exact: int) -> int:
    """Return the memory of the larger of the fits of an input projection and of an output projection.

    Args:
        tokens: All calibration tokens.
        width, student_width: Of the hidden states.
        student_neurons: Of the student's MLP.
        exact: Bytes of a number of a fit.
    """
    # Of each input two sums, their totals in the dtype of the fit as well, and the factors and inverses for up to three
    # candidates; of a sum of squares 9/16 are in memory, and two whole ones in float32 while the ridge is chosen.
    of_inputs = student_width * (64 * student_width + 24 * width)
    features = max(student_width, student_neurons)
    if tokens <= features:  # the rows, put together, and by the root of their penalties; and the system between them
        of_outputs = tokens * (8 * features + 2 * exact * features + 8 * student_width) + 4 * exact * tokens**2
    else:  # two sums, both in float32 as well, and the system or one of them in a wider dtype
        of_outputs = features * ((9 + 8 + exact) * features + 24 * student_width)
    return max(of_inputs, of_outputs)
