"""The tensors of student and teacher under names relative to the base model, each shared tensor once."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_guide.errors import LayoutError
from hf_guide.models.model_classes import strip_base_prefix
from hf_guide.teachers.checkpoint import TeacherCheckpoint


@dataclass(frozen=True)
class TensorNames:
    """Both models' tensors by their names relative to the base model.

    Attributes:
        tensors: The student's tensors by their own names, each once.
        student, teacher: Each model's own names by relative ones.
        tied: The tensor that a tied one shares, by relative names, in the student.
    """

    tensors: dict[str, Tensor]
    student: dict[str, str]
    tied: dict[str, str]
    teacher: dict[str, str]

    @classmethod
    def of(cls, student: PreTrainedModel, teacher: TeacherCheckpoint) -> "TensorNames":
        """Return the names of both.

        Raises:
            LayoutError: Two of the student's parameters have one relative name.
        """
        tensors, tied = unique_tensors(student)
        prefix, teacher_prefix = student.base_model_prefix, teacher.base_model_prefix
        names = {strip_base_prefix(name, prefix): name for name in tensors}
        if len(names) < len(tensors):
            raise LayoutError(
                f"{type(student).__name__} has two parameters of one name inside and outside its base model, which no "
                "layout can distinguish."
            )
        tied = {strip_base_prefix(name, prefix): strip_base_prefix(first, prefix) for name, first in tied.items()}
        teacher_names = {strip_base_prefix(name, teacher_prefix): name for name in teacher.weights.keys()}
        for name, first in teacher.tied.items():
            if strip_base_prefix(name, teacher_prefix) not in teacher_names and first in teacher.weights.keys():
                teacher_names[strip_base_prefix(name, teacher_prefix)] = first
        return cls(tensors, names, tied, teacher_names)


def unique_tensors(model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a model's saved tensors by name, each once, and the other names of those that are shared.

    A shared tensor bears the name of the one that the others are tied to, wherever in the model it is registered
    (XLM-RoBERTa registers its head before its embeddings).
    """
    by_tensor: dict[int, list[str]] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        by_tensor.setdefault(id(tensor), []).append(name)
    sources = set((getattr(model, "all_tied_weights_keys", None) or {}).values())
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    for names in by_tensor.values():
        first = next((name for name in names if name in sources), names[0])
        tensors[first] = state[first]
        shared |= {name: first for name in names if name != first}
    return tensors, shared


def is_parameter(tensor: Tensor) -> bool:
    """Whether a model's saved tensor is learned, and no buffer."""
    return isinstance(tensor, torch.nn.Parameter)
