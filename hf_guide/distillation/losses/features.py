"""Losses that compare vectors: hidden states, layer by layer, and penultimate features."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_guide.distillation.losses.registry import LossConfig, register_loss
from hf_guide.teachers.signals import TeacherSignal
from hf_guide.validation import StringEnum, check_choice


class FeatureDistance(StringEnum):
    """How the distance of two vectors is measured."""

    MSE = "mse"
    COSINE = "cosine"


@dataclass(frozen=True)
class FeatureConfig(LossConfig):
    """Options of the losses that compare vectors."""

    distance: str = field(default="mse", metadata={"help": "mse, the mean squared difference; or cosine, 1 - cosine."})

    def __post_init__(self) -> None:
        check_choice("distance", self.distance, FeatureDistance)


@register_loss("hidden_states", requires=TeacherSignal.HIDDEN_STATES, config=FeatureConfig)
def hidden_states_loss(student: Tensor, teacher: Tensor, config: FeatureConfig) -> Tensor:
    """Return the distance of hidden states, (..., width) to (...); `layer_mapping` pairs the layers."""
    return feature_distance(student, teacher, config.distance)


@register_loss("features", requires=TeacherSignal.FEATURES, config=FeatureConfig)
def features_loss(student: Tensor, teacher: Tensor, config: FeatureConfig) -> Tensor:
    """Return the distance of the inputs of the classifier or language head, (items, width) to (items,)."""
    return feature_distance(student, teacher, config.distance)


@register_loss("boxes", requires=TeacherSignal.BOXES, tasks=("object-detection",))
def boxes_loss(student: Tensor, teacher: Tensor, objectness: Tensor, config: LossConfig) -> Tensor:
    """Return the mean absolute difference of the boxes, (items, 4) to (items,), times the teacher's objectness."""
    student, teacher = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in (student, teacher))
    return (student - teacher).abs().mean(-1) * objectness.to(student.dtype)


def feature_distance(student: Tensor, teacher: Tensor, distance: str) -> Tensor:
    """Return the mean squared difference, or 1 - cosine, over the last axis, in float32 or better."""
    student, teacher = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in (student, teacher))
    if distance == FeatureDistance.COSINE:
        return 1 - torch.nn.functional.cosine_similarity(student, teacher, dim=-1)
    return (student - teacher).square().mean(-1)
