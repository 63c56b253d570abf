"""The loss `lelp`: one divergence between the student's and the teacher's subclass probabilities, over all classes."""

import torch
from torch import Tensor

from hf_guide.distillation.losses.registry import LossConfig, register_loss
from hf_guide.teachers.signals import TeacherSignal


@register_loss(
    "lelp",
    requires=TeacherSignal.SUBCLASSES,
    tasks=("sequence-classification", "image-classification"),
    help="the teacher's pseudo-subclasses, all at once (LELP); the batch has them from a SubclassLabelCollator",
)
def lelp_loss(student: Tensor, target: Tensor, config: LossConfig) -> Tensor:
    """Return tau^2 times KL(p, softmax(student / tau)) over all C * S subclasses, (items,).

    It is LELP's unified cross-entropy (arXiv 2409.20449) less the entropy of p, which is constant: its gradient is that of the
    cross-entropy, its minimum is zero, and with one subclass a class it equals `kd`.

    Args:
        student: Subclass logits (items, C * S).
        target: Probabilities p (items, C * S), at the temperature of `config`.
        config: Its `temperature` is tau.
    """
    tau = config.temperature
    target = target.to(student.device, torch.promote_types(target.dtype, student.dtype))
    log_student = torch.log_softmax(student / tau, -1)
    return tau**2 * (torch.xlogy(target, target) - target * log_student).sum(-1)
