"""Divergences between a student's and a teacher's distribution, one value an item: forward KL, reverse KL, JSD and DKD.

Does: compute values and gradients in one pass over the logits, a few rows at a time, so that the gradient is the only
buffer as large as the logits; treat a teacher of which only the top k is known exactly, with the tail as one more outcome.
Register them as the losses `kd`, which also compares independent labels and real numbers, and `dkd`.
Does not: shift, mask, weight or average.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_guide.distillation.losses.chunked import row_chunks
from hf_guide.distillation.losses.registry import LossConfig, register_loss
from hf_guide.errors import HfGuideError, OptionError, TaskError, VocabularyError
from hf_guide.tasks import OutputKind
from hf_guide.teachers.signals import DenseTarget, TeacherSignal, TopKTarget
from hf_guide.validation import MAX_WEIGHT, StringEnum, check_choice, check_number, check_positive


class DivergenceKind(StringEnum):
    """Which divergence, by the values of `DistillationArguments.kd_loss_type`."""

    FORWARD_KL = "forward_kl"
    REVERSE_KL = "reverse_kl"
    JSD = "jsd"


def widest_float_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on a device that has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


class SoftmaxDistribution(NamedTuple):
    """log p = shifted - log_sum; stored separately, because the rounding of their difference would be in every class."""

    shifted: Tensor  # (rows, classes), the largest of a row is zero
    p: Tensor  # (rows, classes)
    log_sum: Tensor  # (rows,), the widest dtype there is


def softmax_distribution(scaled: Tensor) -> SoftmaxDistribution:
    """Return the softmax of logits (rows, classes) that are already divided by the temperature."""
    shifted = scaled - scaled.amax(-1, keepdim=True)
    p = shifted.exp()
    total = p.sum(-1, keepdim=True)
    return SoftmaxDistribution(shifted, p.div_(total), total.squeeze(-1).to(widest_float_dtype(scaled.device)).log())


# Takes teacher p and student q, whose buffers it may overwrite; returns values (rows,), and writes the gradient by q's
# logits into the last argument, if it is a tensor.
DivergenceFunction = Callable[[SoftmaxDistribution, SoftmaxDistribution, float, "Tensor | None"], Tensor]


def _sum_over_classes(terms: Tensor, of: SoftmaxDistribution) -> Tensor:
    """Sum over classes, where 0 times infinity is 0; NaN inputs still give NaN, through `log_sum`."""
    total = terms.nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf).sum(-1)
    return total.to(of.log_sum.dtype).masked_fill_(of.log_sum.isnan(), math.nan)


def _forward_kl(
    teacher: SoftmaxDistribution, student: SoftmaxDistribution, _: float, gradient: Tensor | None
) -> Tensor:
    if gradient is not None:
        torch.sub(student.p, teacher.p, out=gradient)
    terms = teacher.shifted.sub_(student.shifted).mul_(teacher.p)
    return _sum_over_classes(terms, teacher) - teacher.log_sum + student.log_sum


def _reverse_kl(
    teacher: SoftmaxDistribution, student: SoftmaxDistribution, _: float, gradient: Tensor | None
) -> Tensor:
    terms = student.shifted.sub_(teacher.shifted).mul_(student.p)
    total = _sum_over_classes(terms, student)
    if gradient is not None:
        # q (log(q / p) - its mean), of which the normalisers drop out.
        torch.addcmul(terms, student.p, total.to(terms.dtype).unsqueeze(-1), value=-1, out=gradient)
    return total - student.log_sum + teacher.log_sum


def _jsd(teacher: SoftmaxDistribution, student: SoftmaxDistribution, beta: float, gradient: Tensor | None) -> Tensor:
    # log(p / m) = -log(beta) - log1p((1 - beta) / beta q / p), and likewise for q: exact too where one is all of m.
    odds = (1.0 - beta) / beta
    of_teacher = torch.div(student.p, teacher.p, out=teacher.shifted).mul_(odds).log1p_().mul_(teacher.p)
    of_student = torch.div(teacher.p, student.p, out=student.shifted).div_(odds).log1p_().mul_(student.p)
    from_teacher, from_student = _sum_over_classes(of_teacher, teacher), _sum_over_classes(of_student, student)
    if gradient is not None:
        # The derivative by q is (1 - beta) log(q / m): what m itself changes cancels, and constants drop out.
        mean = from_student.to(of_student.dtype).unsqueeze(-1)
        torch.addcmul(of_student, student.p, mean, value=-1, out=gradient).mul_(beta - 1.0)
    entropy = -beta * math.log(beta) - (1.0 - beta) * math.log1p(-beta)
    return entropy - beta * from_teacher - (1.0 - beta) * from_student


DIVERGENCE_FUNCTIONS: dict[DivergenceKind, DivergenceFunction] = {
    DivergenceKind.FORWARD_KL: _forward_kl,
    DivergenceKind.REVERSE_KL: _reverse_kl,
    DivergenceKind.JSD: _jsd,
}


# With so few classes float64 costs nothing next to the model, and represents the small divergences of confident classifiers.
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

    forward_kl is knowledge distillation (Hinton et al., arXiv 1503.02531), with its factor of t squared, which keeps
    gradients on one scale; jsd is the generalized Jensen-Shannon divergence of GKD (arXiv 2306.13649, eq. 2). It is zero at
    both ends, beta = 0 and 1; divided by beta it tends to forward_kl, and by 1 - beta to reverse_kl, so both ends are
    errors.

    A class whose logit is -inf in both has probability zero in both and adds nothing. With a `TopKTarget` it is the
    divergence between both distributions over the k classes and "any other class": never more than the full one (data
    processing inequality), and equal to it where k is the number of classes.

    Args:
        student_logits: (items, classes), any floating dtype; the gradient goes here.
        target: The teacher's distributions of the same items and classes.
        kind: A `DivergenceKind` or its name.
        beta: The teacher's weight in the mixture of `jsd`, strictly between 0 and 1; other kinds ignore it.
        temperature: Positive.

    Returns:
        (items,), float64 for float64 logits and float32 for all others.

    Raises:
        OptionError: An invalid kind, beta or temperature.
        VocabularyError: Student and teacher have different numbers of classes.
        HfGuideError: They have different numbers of items, or the tensors of a `TopKTarget` do not fit together.

    Example:
        >>> teacher = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
        >>> divergence(torch.zeros(2, 2), DenseTarget(teacher), kind="forward_kl")
        tensor([0.3278, 0.0000])
    """
    kind = _parse_divergence_kind(kind, beta)
    check_positive("temperature", temperature)
    if student_logits.dim() != 2:
        raise HfGuideError(f"Logits must be (items, classes); the student's are {tuple(student_logits.shape)}.")
    if isinstance(target, DenseTarget):
        _check_dense_target(student_logits, target)
        tensors: tuple[Tensor, ...] = (target.logits.detach(),)
    else:
        _check_top_k_target(student_logits, target)
        tensors = (target.indices, target.log_probs.detach(), target.log_normalizer.detach())
    return _Divergence.apply(student_logits, kind, beta, float(temperature), torch.is_grad_enabled(), *tensors)


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
        alpha: Weight of the label's part.
        beta: Weight of the other classes' part.
        temperature: Positive.

    Returns:
        (items,), float64 for float64 student logits and float32 for all others.

    Raises:
        OptionError: There are fewer than three classes, or the temperature is not positive.
        VocabularyError: Student and teacher have different numbers of classes.
        HfGuideError: They have different numbers of items, or a label is not a class.
    """
    check_positive("temperature", temperature)
    _check_dense_target(student_logits, DenseTarget(teacher_logits))
    items, classes = student_logits.shape
    if classes < 3:
        raise OptionError(
            f"dkd compares the classes other than the label, and needs at least 3 classes; found {classes}. Use kd."
        )
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
    label_part = divergence(student_pair, DenseTarget(teacher_pair), temperature=temperature)
    other_part = divergence(student_others, DenseTarget(teacher_others), temperature=temperature)
    return alpha * label_part + beta * other_part


@dataclass(frozen=True)
class KDConfig(LossConfig):
    """Options of the loss `kd`, which are arguments of `DistillationArguments`."""

    kind: str = field(default="forward_kl", metadata={"argument": "kd_loss_type"})
    beta: float = field(default=0.5, metadata={"argument": "beta"})


@register_loss(
    "kd",
    requires=TeacherSignal.LOGITS,
    config=KDConfig,
    kinds=("categorical", "bernoulli", "real"),
    help="a divergence between teacher and student (Hinton et al., arXiv 1503.02531)",
)
def kd_loss(student: Tensor, teacher: DenseTarget | TopKTarget, labels: Tensor | None, config: KDConfig) -> Tensor:
    """Return the distance of the outputs by what they are, (items,).

    Classes that exclude each other: the divergence of kind `config.kind`, times temperature squared. Independent labels: the
    sum over the labels of that divergence between "yes" and "no". Real numbers: the mean squared difference, without a
    temperature.

    Raises:
        OptionError: Another `kd_loss_type` than the default, for real numbers.
    """
    options: dict[str, Any] = {"kind": config.kind, "beta": config.beta, "temperature": config.temperature}
    kind = teacher.kind if isinstance(teacher, DenseTarget) else OutputKind.CATEGORICAL
    if kind is OutputKind.CATEGORICAL or not isinstance(teacher, DenseTarget):
        return divergence(student, teacher, **options)
    _check_dense_target(student, teacher)
    if kind is OutputKind.BERNOULLI:
        pairs = [torch.stack([each, torch.zeros_like(each)], -1).flatten(0, 1) for each in (student, teacher.logits)]
        return divergence(pairs[0], DenseTarget(pairs[1]), **options).view(student.shape).sum(-1)
    if config.kind != DivergenceKind.FORWARD_KL:
        raise OptionError(
            f"kd_loss_type is {config.kind}, a divergence between distributions, and the outputs are real numbers, whose "
            "mean squared difference 'kd' is. Leave kd_loss_type out."
        )
    dtype = _at_least_float32(student.dtype)
    return (student.to(dtype) - teacher.logits.to(dtype)).square().mean(-1)


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
                "The loss 'dkd' compares the classes other than the target class, of which it needs two at least; "
                f"the student has {num_classes} classes. Use 'kd'."
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
    student_shape, teacher_shape = tuple(student_logits.shape), tuple(target.logits.shape)
    if len(student_shape) != 2 or len(teacher_shape) != 2 or student_shape[0] != teacher_shape[0]:
        raise HfGuideError(
            f"Both logits must be (items, classes) of the same items; found student {student_shape} and teacher "
            f"{teacher_shape}."
        )
    if student_shape[1] != teacher_shape[1]:
        raise VocabularyError(
            f"The student has {student_shape[1]} classes and the teacher {teacher_shape[1]}. Cut both to those that "
            "they share."
        )


def _check_top_k_target(student_logits: Tensor, target: TopKTarget) -> None:
    items, classes = student_logits.shape
    shapes = [tuple(part.shape) for part in (target.indices, target.log_probs, target.log_normalizer)]
    k = shapes[0][-1] if shapes[0] else 0
    if shapes != [(items, k), (items, k), (items,)] or k < 1:
        raise HfGuideError(
            f"The top k of {items} items must be indices ({items}, k), log_probs ({items}, k) and log_normalizer ({items},); "
            f"found {', '.join(map(str, shapes))}."
        )
    if k > classes:
        raise VocabularyError(f"The teacher's top {k} cannot be among the student's {classes} classes.")


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _Divergence(torch.autograd.Function):
    """Compute each item's value, and in the same pass its gradient by the logits, which every kind has in closed form."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        kind: DivergenceKind,
        beta: float,
        temperature: float,
        grad_enabled: bool,
        *target: Tensor,
    ) -> Tensor:
        dtype = _at_least_float32(logits.dtype)
        working = widest_float_dtype(logits.device) if logits.shape[-1] <= _MAX_CLASSES_IN_FLOAT64 else dtype
        values = logits.new_empty(len(logits), dtype=dtype)
        gradients = torch.empty_like(logits, dtype=dtype) if grad_enabled and ctx.needs_input_grad[0] else None
        compare = _compare_dense if len(target) == 1 else _compare_top_k
        for rows in row_chunks(logits):
            scaled = _divide_by_temperature(logits[rows], temperature, working)
            target_rows = [tensor[rows] for tensor in target]
            gradient = None
            if gradients is not None:
                gradient = gradients[rows] if working == dtype else torch.empty_like(scaled)
            values[rows] = (
                compare(scaled, target_rows, DIVERGENCE_FUNCTIONS[kind], beta, temperature, gradient)
                .mul_(temperature**2)
                .to(dtype)
            )
            if gradients is not None and gradient is not None and working != dtype:
                gradients[rows] = gradient
        if gradients is not None:
            ctx.save_for_backward(gradients)
            ctx.dtype = logits.dtype
        return values

    @staticmethod
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor | None, ...]:
        (gradients,) = ctx.saved_tensors
        return (gradients * weights.unsqueeze(-1)).to(ctx.dtype), *[None] * (len(ctx.needs_input_grad) - 1)


def _divide_by_temperature(logits: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    logits = logits.to(dtype)
    return logits if temperature == 1.0 else logits / temperature


def _compare_dense(
    scaled: Tensor,
    target: list[Tensor],
    compare: DivergenceFunction,
    beta: float,
    temperature: float,
    gradient: Tensor | None,
) -> Tensor:
    teacher = softmax_distribution(_divide_by_temperature(target[0], temperature, scaled.dtype))
    values = compare(teacher, softmax_distribution(scaled), beta, gradient)
    if gradient is not None and temperature != 1.0:
        gradient.mul_(temperature)  # of the factor t squared, the division of the logits takes one t
    return values


def _compare_top_k(
    scaled: Tensor,
    target: list[Tensor],
    compare: DivergenceFunction,
    beta: float,
    temperature: float,
    gradient: Tensor | None,
) -> Tensor:
    """Compare k + 1 outcomes, then distribute the tail's gradient over its classes by their share of the tail."""
    indices, log_probs, log_normalizer = target[0].long(), *target[1:]
    widest, k = widest_float_dtype(scaled.device), indices.shape[-1]
    log_p = _divide_by_temperature(log_probs, temperature, widest) - log_normalizer.to(widest).unsqueeze(-1)
    outcomes = scaled.gather(-1, indices).to(widest)
    has_tail = k < scaled.shape[-1]
    if has_tail:
        # One exponential of the row serves the tail's mass and its gradient; with a temperature `scaled` is a copy.
        rest = (
            scaled.scatter(-1, indices, -math.inf) if temperature == 1.0 else scaled.scatter_(-1, indices, -math.inf)
        )
        most = rest.amax(-1, keepdim=True)
        is_empty = most == -math.inf
        shares = torch.exp(rest.sub_(most.masked_fill(is_empty, 0.0)), out=rest if gradient is None else gradient)
        mass = shares.sum(-1, keepdim=True)
        log_rest = mass.to(widest).log() + most.to(widest)
        log_tail = _log_tail(log_p, log_probs.dtype).masked_fill(is_empty, -math.inf)
        log_p, outcomes = torch.cat([log_p, log_tail], -1), torch.cat([outcomes, log_rest], -1)
    outcome_gradient = None if gradient is None else torch.empty_like(outcomes)
    values = compare(softmax_distribution(log_p), softmax_distribution(outcomes), beta, outcome_gradient)
    if gradient is not None and outcome_gradient is not None:
        outcome_gradient = outcome_gradient.to(gradient.dtype).mul_(
            temperature
        )  # few classes: cheaper than scaling the whole gradient
        if has_tail:
            gradient.mul_((outcome_gradient[:, k:] / mass).masked_fill(is_empty, 0.0))
        gradient.scatter_(-1, indices, outcome_gradient[:, :k])
    return values


def _log_tail(log_p: Tensor, stored: torch.dtype) -> Tensor:
    """Return log(1 - sum p), (items, 1); where rounding made the sum too large, the logarithm of a negligible probability."""
    smallest = torch.finfo(_at_least_float32(stored)).eps
    return (1.0 - log_p.exp().sum(-1, keepdim=True)).clamp_min_(smallest).log_()
