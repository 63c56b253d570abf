"""Losses that compare a student's relations between the examples of a batch with the teacher's.

Each is computed from the batch of one process: with several processes, or with gradient accumulation, the examples of other
batches are not among those that an example is compared with.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_guide.distillation.losses.registry import LossConfig, register_loss
from hf_guide.errors import OptionError
from hf_guide.teachers.signals import DenseTarget, TeacherSignal, TopKTarget
from hf_guide.validation import MAX_WEIGHT, StringEnum, check_choice, check_number


class SimilarityDistance(StringEnum):
    """How two rows of similarities are compared."""

    MSE = "mse"
    KL = "kl"


class SimilarityFunction(StringEnum):
    """How similar two vectors are."""

    COSINE = "cosine"
    DOT = "dot"


@dataclass(frozen=True)
class SimilarityConfig(LossConfig):
    """Options of the loss of similarities."""

    distance: str = field(
        default="mse",
        metadata={"help": "mse, the mean squared difference; or kl, of each example's distribution over the others."},
    )
    similarity: str = field(
        default="cosine", metadata={"help": "cosine, or dot for models whose vectors' lengths count."}
    )
    scale: float = field(
        default=20.0, metadata={"help": "Of kl: what similarities are multiplied by before the softmax."}
    )

    def __post_init__(self) -> None:
        check_choice("distance", self.distance, SimilarityDistance)
        check_choice("similarity", self.similarity, SimilarityFunction)
        check_number("scale", self.scale, 0.0, MAX_WEIGHT, includes_low=False)


@register_loss(
    "similarity",
    requires=TeacherSignal.FEATURES,
    tasks=("feature-extraction", "sequence-classification", "image-classification"),
    config=SimilarityConfig,
    any_width=True,
)
def similarity_loss(student: Tensor, teacher: Tensor, config: SimilarityConfig) -> Tensor:
    """Return how each example's similarities to the others of the batch differ from the teacher's, (items,).

    With S and T the matrices of similarities of student and teacher, `mse` is the mean of (S_ij - T_ij)^2 over all j but i,
    and `kl` the divergence of softmax(scale S_i) from softmax(scale T_i), again without i itself. The widths need not agree.
    An example that is alone in its batch has loss zero.
    """
    if len(student) < 2:
        return 0 * student.sum(-1)
    differs = ~torch.eye(len(student), dtype=torch.bool, device=student.device)
    rows = [_similarities(each, config)[differs].view(len(each), -1) for each in (student, teacher)]
    if config.distance == SimilarityDistance.MSE:
        return (rows[0] - rows[1]).square().mean(-1)
    log_student, log_teacher = ((config.scale * each).log_softmax(-1) for each in rows)
    return torch.nn.functional.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(-1)


def _similarities(vectors: Tensor, config: SimilarityConfig) -> Tensor:
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    if config.similarity == SimilarityFunction.COSINE:
        vectors = torch.nn.functional.normalize(vectors, dim=-1)
    return vectors @ vectors.T


@register_loss(
    "margin_mse",
    requires=TeacherSignal.LOGITS,
    tasks=("sequence-classification",),
    kinds=("real",),
    help="squared difference of the margins between a positive and a negative passage (arXiv 2010.02666)",
)
def margin_mse_loss(
    student: Tensor, teacher: DenseTarget | TopKTarget, labels: Tensor | None, config: LossConfig
) -> Tensor:
    """Return the squared difference of the margins, (items,), of consecutive rows: the scores of a pair minus each other.

    Rows 2i and 2i + 1 of the batch are a query with its positive and with its negative passage, as `SentenceCollator` makes
    them; both have the value ((s_2i - s_2i+1) - (t_2i - t_2i+1))^2, so that the mean over the rows is that over the pairs.

    Raises:
        OptionError: The batch has an odd number of rows.
    """
    if len(student) % 2:
        raise OptionError(
            f"'margin_mse' compares rows 2i and 2i + 1 of a batch, and this one has {len(student)} with a target. Pass a "
            "SentenceCollator whose columns are two pairs, [('query', 'positive'), ('query', 'negative')], as data_collator."
        )
    assert isinstance(teacher, DenseTarget)
    dtype = torch.promote_types(student.dtype, torch.float32)
    margins = [each.to(dtype)[0::2] - each.to(dtype)[1::2] for each in (student, teacher.logits)]
    return (margins[0] - margins[1]).square().mean(-1).repeat_interleave(2)
