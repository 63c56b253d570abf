"""Divergences between a student's and a teacher's distribution, one value an item: forward KL, reverse KL, JSD and DKD.

Does: compute values and gradients in one pass over the logits, a few rows at a time, so that the gradient is the only
buffer as large as the logits; treat a teacher of which only the top k is known exactly, with the tail as one more outcome.
Register them as the losses `kd` and `dkd`.
Does not: shift, mask, weight or average.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_guide.distillation.losses.registry import LossConfig, register_loss
from hf_guide.errors import HfGuideError, OptionError, TaskError, VocabularyError
from hf_guide.models.lm_head import row_chunks
from hf_guide.teachers.signals import DenseTarget, TeacherSignal, TopKTarget
from hf_guide.validation import MAX_WEIGHT, check_choice, check_number, check_positive


class DivergenceKind(str, Enum):
    """Which divergence, by the values of `DistillationArguments.kd_loss_type`."""

    FORWARD_KL = "forward_kl"
    REVERSE_KL = "reverse_kl"
    JSD = "jsd"

    def __str__(self) -> str:
        return str(self.value)


def widest_float_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or what a device has in its place."""
    return torch.float32 if device.type == "mps" else torch.float64


class SoftmaxDistribution(NamedTuple):
    """log p = shifted - log_sum. Apart, because one rounding of their difference would be in every class's share."""

    shifted: Tensor  # (rows, classes), the largest of a row is zero
    p: Tensor  # (rows, classes)
    log_sum: Tensor  # (rows,), the finest dtype there is


def softmax_distribution(scaled: Tensor) -> SoftmaxDistribution:
    """Return the softmax of logits, (rows, classes), that are divided by the temperature already."""
    shifted = scaled - scaled.amax(-1, keepdim=True)
    p = shifted.exp()
    total = p.sum(-1, keepdim=True)
    return SoftmaxDistribution(shifted, p.div_(total), total.squeeze(-1).to(widest_float_dtype(scaled.device)).log())


# Of teacher p and student q, whose buffers may be used up: values (rows,), and the slope by q's logits, written where
# there is room for it.
DivergenceFunction = Callable[[SoftmaxDistribution, SoftmaxDistribution, float, "Tensor | None"], Tensor]


def _sum_over_classes(terms: Tensor, of: SoftmaxDistribution) -> Tensor:
    """Sum over classes, where 0 times infinity is 0; what was not a number before stays so, by way of `log_sum`."""
    total = terms.nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf).sum(-1)
    return total.to(of.log_sum.dtype).masked_fill_(of.log_sum.isnan(), math.nan)


def _forward_kl(teacher: SoftmaxDistribution, student: SoftmaxDistribution, _: float, slope: Tensor | None) -> Tensor:
    if slope is not None:
        torch.sub(student.p, teacher.p, out=slope)
    terms = teacher.shifted.sub_(student.shifted).mul_(teacher.p)
    return _sum_over_classes(terms, teacher) - teacher.log_sum + student.log_sum


def _reverse_kl(teacher: SoftmaxDistribution, student: SoftmaxDistribution, _: float, slope: Tensor | None) -> Tensor:
    terms = student.shifted.sub_(teacher.shifted).mul_(student.p)
    total = _sum_over_classes(terms, student)
    if slope is not None:
        # q (log(q / p) - its mean), of which the normalisers drop out.
        torch.addcmul(terms, student.p, total.to(terms.dtype).unsqueeze(-1), value=-1, out=slope)
    return total - student.log_sum + teacher.log_sum


def _jsd(teacher: SoftmaxDistribution, student: SoftmaxDistribution, beta: float, slope: Tensor | None) -> Tensor:
    # log(p / m) = -log(beta) - log1p((1 - beta) / beta q / p), and likewise for q: exact too where one is all of m.
    odds = (1.0 - beta) / beta
    of_teacher = torch.div(student.p, teacher.p, out=teacher.shifted).mul_(odds).log1p_().mul_(teacher.p)
    of_student = torch.div(teacher.p, student.p, out=student.shifted).div_(odds).log1p_().mul_(student.p)
    from_teacher, from_student = _sum_over_classes(of_teacher, teacher), _sum_over_classes(of_student, student)
    if slope is not None:
        # The derivative by q is (1 - beta) log(q / m): what m itself changes cancels, and constants drop out.
        mean = from_student.to(of_student.dtype).unsqueeze(-1)
        torch.addcmul(of_student, student.p, mean, value=-1, out=slope).mul_(beta - 1.0)
    entropy = -beta * math.log(beta) - (1.0 - beta) * math.log1p(-beta)
    return entropy - beta * from_teacher - (1.0 - beta) * from_student


DIVERGENCE_FUNCTIONS: dict[DivergenceKind, DivergenceFunction] = {
    DivergenceKind.FORWARD_KL: _forward_kl,
    DivergenceKind.REVERSE_KL: _reverse_kl,
    DivergenceKind.JSD: _jsd,
}


# So few classes cost nothing beside the model, and float64 then holds the small divergences of sure classifiers too.
_MAX_CLASSES_IN_FLOAT64 = 1024


def divergence(
    student_logits: Tensor,
    target: DenseTarget | TopKTarget,
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:
    """Return each item's divergence between teacher p and student q at a temperature t, times t squared, in nats.

        forward_kl = KL(p || q)        reverse_kl = KL(q || p)        p, q = softmax(logits / t)
        jsd = beta KL(p || m) + (1 - beta) KL(q || m),   m = beta p + (1 - beta) q

    The first is distillation's own (Hinton et al., arXiv 1503.02531), with its factor of t squared, which keeps gradients
    on one scale; the last is the generalised JSD of GKD (arXiv 2306.13649, eq. 2). It is zero at both ends, beta = 0 and
    1; divided by beta it tends to forward_kl, and by 1 - beta to reverse_kl, which have names of their own, so
    both ends are refused.

    A class whose logit is -inf in both has probability zero in both and adds nothing. Against a `TopK` each is the same
    divergence between what both say of the k outcomes and of "any other": never more than the full one (data
    processing inequality), and the full one where k is the number of classes.

    Args:
        student_logits: (items, classes), any floating dtype; the gradient goes here.
        target: what the teacher says of the same items and classes.
        kind: a `DivergenceKind` or its name.
        beta: the teacher's share of the mixture in `jsd`, strictly between 0 and 1; other kinds do not look at it.
        temperature: positive.

    Returns:
        (items,), float64 for float64 logits and float32 for all others.

    Raises:
        OptionError: kind, beta or temperature is not one of those.
        VocabularyError: student and teacher have different numbers of classes.
        HfGuideError: they have different numbers of items, or the parts of a `TopK` do not fit together.
    """
    kind = _parse_divergence_kind(kind, beta)
    check_positive("temperature", temperature)
    if student_logits.dim() != 2:
        raise HfGuideError(f"Logits are (items, classes) here; the student's are {tuple(student_logits.shape)}.")
    if isinstance(target, DenseTarget):
        _check_dense_target(student_logits, target)
        told: tuple[Tensor, ...] = (target.logits.detach(),)
    else:
        _check_top_k_target(student_logits, target)
        told = (target.indices, target.log_probs.detach(), target.log_normalizer.detach())
    return _Divergence.apply(student_logits, kind, beta, float(temperature), torch.is_grad_enabled(), *told)


def dkd(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, alpha: float, beta: float, temperature: float
) -> Tensor:
    """Return each item's Decoupled Knowledge Distillation (Zhao et al., arXiv 2203.08679, eq. 7), times t squared.

        alpha KL(b_p || b_q) + beta KL(p' || q')

    where b is the distribution over "the label" and "any other class", and p', q' that over the other classes alone.
    With alpha = 1 and beta = 1 - p(label) for each item it would be forward KL.

    Args:
        student_logits: (items, classes), three classes at least; the gradient goes here.
        teacher_logits: (items, classes).
        labels: int64 (items,), each a class.
        alpha: weight of the label's part.
        beta: weight of the others' part.
        temperature: positive.

    Returns:
        (items,), float64 for float64 student logits and float32 for all others.

    Raises:
        OptionError: there are fewer than three classes, or the temperature is not positive.
        VocabularyError: student and teacher have different numbers of classes.
        HfGuideError: they have different numbers of items, or a label is no class.
    """
    check_positive("temperature", temperature)
    _check_dense_target(student_logits, DenseTarget(teacher_logits))
    items, classes = student_logits.shape
    if classes < 3:
        raise OptionError(f"dkd is about the classes beside the label, and needs 3 at least; found {classes}. Use kd.")
    if labels.shape != (items,):
        raise HfGuideError(f"dkd needs one label per item, ({items},); found {tuple(labels.shape)}.")
    if items and not bool(((labels >= 0) & (labels < classes)).all()):
        raise HfGuideError(f"dkd's labels must be from 0 to {classes - 1}; found {labels.min()} to {labels.max()}.")
    dtype = _at_least_float32(student_logits.dtype)
    is_other = torch.ones_like(student_logits, dtype=torch.bool).scatter_(-1, labels.unsqueeze(-1), False)

    def decouple(logits: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits.to(dtype)
        others = logits[is_other].view(items, classes - 1)
        at_label = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        any_other = temperature * torch.logsumexp(others / temperature, -1)
        return torch.stack([at_label, any_other], -1), others

    (student_pair, student_others), (teacher_pair, teacher_others) = decouple(student_logits), decouple(teacher_logits)
    of_label = divergence(student_pair, DenseTarget(teacher_pair), temperature=temperature)
    of_others = divergence(student_others, DenseTarget(teacher_others), temperature=temperature)
    return alpha * of_label + beta * of_others


@dataclass(frozen=True)
class KDConfig(LossConfig):
    """Options of the loss `kd`, which are arguments of `DistillationArguments`."""

    kind: str = field(default="forward_kl", metadata={"argument": "kd_loss_type"})
    beta: float = field(default=0.5, metadata={"argument": "beta"})


@register_loss(
    "kd",
    requires=TeacherSignal.LOGITS,
    config=KDConfig,
    help="a divergence between teacher and student (Hinton et al., arXiv 1503.02531)",
)
def kd_loss(student: Tensor, teacher: DenseTarget | TopKTarget, labels: Tensor | None, config: KDConfig) -> Tensor:
    """Return the divergence of kind `config.kind`, times temperature squared, (items,)."""
    return divergence(student, teacher, kind=config.kind, beta=config.beta, temperature=config.temperature)


@dataclass(frozen=True)
class DKDConfig(LossConfig):
    """Options of the loss `dkd`."""

    alpha: float = field(default=1.0, metadata={"help": "Weight of the target class's part."})
    beta: float = field(default=8.0, metadata={"help": "Weight of the other classes' part."})

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            value = check_number(f"dkd's {name}", getattr(self, name), 0.0, MAX_WEIGHT, includes_low=False)
            object.__setattr__(self, name, value)

    def check_student(self, config: Any) -> None:
        """Check that there are classes other than the target class and one more."""
        num_classes = config.num_labels // (getattr(config, "num_subclasses", None) or 1)
        if num_classes < 3:
            raise TaskError(
                f"The loss 'dkd' compares the classes other than the target class, of which it needs two at least; the student "
                f"has {num_classes} classes. Use 'kd'."
            )


@register_loss(
    "dkd",
    requires=TeacherSignal.LOGITS,
    tasks=("sequence-classification", "token-classification", "image-classification"),
    config=DKDConfig,
    help="decoupled distillation: the target class apart from the others (arXiv 2203.08679)",
)
def dkd_loss(student: Tensor, teacher: DenseTarget | TopKTarget, labels: Tensor | None, config: DKDConfig) -> Tensor:
    """Return the decoupled divergence, times temperature squared, (items,)."""
    if labels is None:
        raise TaskError("The loss 'dkd' needs labels; the batch has none.")
    if not isinstance(teacher, DenseTarget):
        raise TaskError("The loss 'dkd' needs all of the teacher's logits, not its top k.")
    return dkd(student, teacher.logits, labels, alpha=config.alpha, beta=config.beta, temperature=config.temperature)


def _parse_divergence_kind(kind: str, beta: float) -> DivergenceKind:
    parsed = DivergenceKind(check_choice("kind", kind, DivergenceKind))
    if parsed is DivergenceKind.JSD and not 0 < beta < 1:
        raise OptionError(
            f"jsd needs a beta between 0 and 1, both excluded; found {beta!r}. It is zero at both ends; what it tends "
            "to there, scaled, are forward_kl (beta to 0) and reverse_kl (beta to 1)."
        )
    return parsed


def _check_dense_target(student_logits: Tensor, target: DenseTarget) -> None:
    mine, theirs = tuple(student_logits.shape), tuple(target.logits.shape)
    if len(mine) != 2 or len(theirs) != 2 or mine[0] != theirs[0]:
        raise HfGuideError(f"Both logits are (items, classes) of the same items; found {mine} and teacher {theirs}.")
    if mine[1] != theirs[1]:
        raise VocabularyError(
            f"The student has {mine[1]} classes and the teacher {theirs[1]}. Cut both to those that they share."
        )


def _check_top_k_target(student_logits: Tensor, target: TopKTarget) -> None:
    items, classes = student_logits.shape
    shapes = [tuple(part.shape) for part in (target.indices, target.log_probs, target.log_normalizer)]
    k = shapes[0][-1] if shapes[0] else 0
    if shapes != [(items, k), (items, k), (items,)] or k < 1:
        raise HfGuideError(
            f"A top k of {items} items is indices ({items}, k), log_probs ({items}, k) and log_normalizer ({items},); "
            f"found {', '.join(map(str, shapes))}."
        )
    if k > classes:
        raise VocabularyError(f"The teacher's top {k} cannot be among the student's {classes} classes.")


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _Divergence(torch.autograd.Function):
    """Each item's value, and at once its slope by the logits, which every kind here knows in closed form."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        kind: DivergenceKind,
        beta: float,
        temperature: float,
        grad_enabled: bool,
        *told: Tensor,
    ) -> Tensor:
        dtype = _at_least_float32(logits.dtype)
        working = widest_float_dtype(logits.device) if logits.shape[-1] <= _MAX_CLASSES_IN_FLOAT64 else dtype
        values = logits.new_empty(len(logits), dtype=dtype)
        slopes = torch.empty_like(logits, dtype=dtype) if grad_enabled and ctx.needs_input_grad[0] else None
        against = _compare_dense if len(told) == 1 else _compare_top_k
        for rows in row_chunks(logits):
            scaled, heard = _divide_by_temperature(logits[rows], temperature, working), [part[rows] for part in told]
            slope = None
            if slopes is not None:
                slope = slopes[rows] if working == dtype else torch.empty_like(scaled)
            values[rows] = (
                against(scaled, heard, DIVERGENCE_FUNCTIONS[kind], beta, temperature, slope)
                .mul_(temperature**2)
                .to(dtype)
            )
            if slopes is not None and slope is not None and working != dtype:
                slopes[rows] = slope
        if slopes is not None:
            ctx.save_for_backward(slopes)
            ctx.dtype = logits.dtype
        return values

    @staticmethod
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return (slopes * weights.unsqueeze(-1)).to(ctx.dtype), *[None] * (len(ctx.needs_input_grad) - 1)


def _divide_by_temperature(logits: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    logits = logits.to(dtype)
    return logits if temperature == 1.0 else logits / temperature


def _compare_dense(
    scaled: Tensor,
    told: list[Tensor],
    compare: DivergenceFunction,
    beta: float,
    temperature: float,
    slope: Tensor | None,
) -> Tensor:
    teacher = softmax_distribution(_divide_by_temperature(told[0], temperature, scaled.dtype))
    values = compare(teacher, softmax_distribution(scaled), beta, slope)
    if slope is not None and temperature != 1.0:
        slope.mul_(temperature)  # one t of its square is spent on the division of the logits
    return values


def _compare_top_k(
    scaled: Tensor,
    told: list[Tensor],
    compare: DivergenceFunction,
    beta: float,
    temperature: float,
    slope: Tensor | None,
) -> Tensor:
    """Compare on k + 1 outcomes, then hand the tail's slope on to the classes in it by their share of the tail."""
    indices, log_probs, log_normalizer = told[0].long(), *told[1:]
    finest, k = widest_float_dtype(scaled.device), indices.shape[-1]
    log_p = _divide_by_temperature(log_probs, temperature, finest) - log_normalizer.to(finest).unsqueeze(-1)
    outcomes = scaled.gather(-1, indices).to(finest)
    has_tail = k < scaled.shape[-1]
    if has_tail:
        # One exponential of the row serves the tail's mass and its slope; with a temperature `scaled` is nobody else's.
        rest = (
            scaled.scatter(-1, indices, -math.inf) if temperature == 1.0 else scaled.scatter_(-1, indices, -math.inf)
        )
        most = rest.amax(-1, keepdim=True)
        nobody = most == -math.inf
        shares = torch.exp(rest.sub_(most.masked_fill(nobody, 0.0)), out=rest if slope is None else slope)
        mass = shares.sum(-1, keepdim=True)
        log_rest = mass.to(finest).log() + most.to(finest)
        log_tail = _log_tail(log_p, log_probs.dtype).masked_fill(nobody, -math.inf)
        log_p, outcomes = torch.cat([log_p, log_tail], -1), torch.cat([outcomes, log_rest], -1)
    coarse_slope = None if slope is None else torch.empty_like(outcomes)
    values = compare(softmax_distribution(log_p), softmax_distribution(outcomes), beta, coarse_slope)
    if slope is not None and coarse_slope is not None:
        coarse_slope = coarse_slope.to(slope.dtype).mul_(temperature)  # of few, where the whole slope would do as well
        if has_tail:
            slope.mul_((coarse_slope[:, k:] / mass).masked_fill(nobody, 0.0))
        slope.scatter_(-1, indices, coarse_slope[:, :k])
    return values


def _log_tail(log_p: Tensor, stored: torch.dtype) -> Tensor:
    """Return log(1 - sum p), (items, 1): as good as nothing, but not negative, where rounding made the sum too large."""
    smallest = torch.finfo(_at_least_float32(stored)).eps
    return (1.0 - log_p.exp().sum(-1, keepdim=True)).clamp_min_(smallest).log_()
