"""The loss term `lelp`: one divergence between the student's and the teacher's subclass probabilities, over all classes."""

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

    It is LELP's unified cross-entropy (arXiv 2409.20449) less the entropy of p, which is constant: its gradient is that of the
    cross-entropy, its minimum is zero, and with one subclass a class it equals `kd`.

    Args:
        student: Subclass logits (items, C * S).
        target: Probabilities p (items, C * S), at the temperature of `args`.
        args: Their `temperature` is tau.
    """
    tau = args.temperature
    target = target.to(student.device, torch.promote_types(target.dtype, student.dtype))
    log_student = torch.log_softmax(student / tau, -1)
    return tau**2 * (torch.xlogy(target, target) - target * log_student).sum(-1)
