"""The term `lelp`: the student's subclasses against the teacher's, one divergence over all of them."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_guide.distillation.losses.registry import register_term
from hf_guide.teachers.signals import TeacherSignal

if TYPE_CHECKING:
    from hf_guide.distillation.arguments import DistillationArguments


@register_term(
    "lelp",
    needs=TeacherSignal.SUBCLASSES,
    help="the teacher's pseudo-subclasses, all at once (LELP); the batch has them from a SubclassLabelCollator",
    task_only=("sequence-classification", "image-classification"),
)
def lelp_loss(student: Tensor, target: Tensor, args: "DistillationArguments") -> Tensor:
    """Return tau^2 times KL(p, softmax(student / tau)) over all C * S subclasses, (items,).

    It is LELP's unified cross-entropy less the entropy of p, which is a constant: the gradient is the cross-entropy's, the
    value is zero where the student has learned everything, and with one subclass a class both are distillation's `kd`.

    Args:
        student: subclass logits (items, C * S).
        target: probabilities p (items, C * S), made at the temperature of `args`.
        args: of which the temperature, tau, counts.
    """
    tau = args.temperature
    target = target.to(student.device, torch.promote_types(target.dtype, student.dtype))
    log_student = torch.log_softmax(student / tau, -1)
    return tau**2 * (torch.xlogy(target, target) - target * log_student).sum(-1)
