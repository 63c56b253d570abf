"""The formulas of the divergences: of two distributions, each item's value, and the slope by the student's logits."""

import math
from collections.abc import Callable
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor


class DivergenceKind(str, Enum):
    """Which divergence, by the names of `DistillationArguments.divergence`."""

    FORWARD_KL = "forward_kl"
    REVERSE_KL = "reverse_kl"
    JSD = "jsd"

    def __str__(self) -> str:
        return str(self.value)


def finest_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or what a device has in its place."""
    return torch.float32 if device.type == "mps" else torch.float64


class Distribution(NamedTuple):
    """log p = shifted - log_sum. Apart, because one rounding of their difference would be in every class's share."""

    shifted: Tensor  # (rows, classes), the largest of a row is zero
    p: Tensor  # (rows, classes)
    log_sum: Tensor  # (rows,), the finest dtype there is


def distribution(scaled: Tensor) -> Distribution:
    """Return the softmax of logits, (rows, classes), that are divided by the temperature already."""
    shifted = scaled - scaled.amax(-1, keepdim=True)
    p = shifted.exp()
    total = p.sum(-1, keepdim=True)
    return Distribution(shifted, p.div_(total), total.squeeze(-1).to(finest_dtype(scaled.device)).log())


# Of teacher p and student q, whose buffers may be used up: values (rows,), and the slope by q's logits, written where
# there is room for it.
Compare = Callable[[Distribution, Distribution, float, "Tensor | None"], Tensor]


def _sum_of_terms(terms: Tensor, of: Distribution) -> Tensor:
    """Sum over classes, where 0 times infinity is 0; what was not a number before stays so, by way of `log_sum`."""
    total = terms.nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf).sum(-1)
    return total.to(of.log_sum.dtype).masked_fill_(of.log_sum.isnan(), math.nan)


def _forward_kl(teacher: Distribution, student: Distribution, _: float, slope: Tensor | None) -> Tensor:
    if slope is not None:
        torch.sub(student.p, teacher.p, out=slope)
    terms = teacher.shifted.sub_(student.shifted).mul_(teacher.p)
    return _sum_of_terms(terms, teacher) - teacher.log_sum + student.log_sum


def _reverse_kl(teacher: Distribution, student: Distribution, _: float, slope: Tensor | None) -> Tensor:
    terms = student.shifted.sub_(teacher.shifted).mul_(student.p)
    total = _sum_of_terms(terms, student)
    if slope is not None:
        # q (log(q / p) - its mean), of which the normalisers drop out.
        torch.addcmul(terms, student.p, total.to(terms.dtype).unsqueeze(-1), value=-1, out=slope)
    return total - student.log_sum + teacher.log_sum


def _jsd(teacher: Distribution, student: Distribution, beta: float, slope: Tensor | None) -> Tensor:
    # log(p / m) = -log(beta) - log1p((1 - beta) / beta q / p), and likewise for q: exact too where one is all of m.
    odds = (1.0 - beta) / beta
    of_teacher = torch.div(student.p, teacher.p, out=teacher.shifted).mul_(odds).log1p_().mul_(teacher.p)
    of_student = torch.div(teacher.p, student.p, out=student.shifted).div_(odds).log1p_().mul_(student.p)
    from_teacher, from_student = _sum_of_terms(of_teacher, teacher), _sum_of_terms(of_student, student)
    if slope is not None:
        # The derivative by q is (1 - beta) log(q / m): what m itself changes cancels, and constants drop out.
        mean = from_student.to(of_student.dtype).unsqueeze(-1)
        torch.addcmul(of_student, student.p, mean, value=-1, out=slope).mul_(beta - 1.0)
    entropy = -beta * math.log(beta) - (1.0 - beta) * math.log1p(-beta)
    return entropy - beta * from_teacher - (1.0 - beta) * from_student


COMPARE: dict[DivergenceKind, Compare] = {
    DivergenceKind.FORWARD_KL: _forward_kl,
    DivergenceKind.REVERSE_KL: _reverse_kl,
    DivergenceKind.JSD: _jsd,
}
