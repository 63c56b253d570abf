"""Check that models share no tensors and modules.

Identity is a matter of parameters. A teacher is frozen and set to evaluation mode while the student is trained, whatever
wrapper objects there are; so a teacher inside an adapter's base model, or with the student's embeddings, is an error.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from hf_guide.errors import OptionError
from hf_guide.models.adapters import has_adapter


def check_no_shared_parameters(student: Any, teachers: Iterable[Any]) -> None:
    """Check that no teacher shares a tensor or a module with the student, before either is changed.

    Args:
        student: A model; anything else (a config, None) shares nothing.
        teachers: Models, or names of models, which share nothing.

    Raises:
        OptionError: One does; the first shared tensor is named.
    """
    models = [each for each in teachers if isinstance(each, nn.Module)]
    if not isinstance(student, nn.Module) or not models:
        return
    of_student = _identities(student)
    for teacher in models:
        shared = _identities(teacher).keys() & of_student.keys()
        if not shared:
            continue
        if teacher is student:
            sharing = "The teacher is the student itself."
        else:
            first = next(name for key, name in of_student.items() if key in shared)
            sharing = (
                f"The teacher shares {len(shared)} of its tensors and modules with the student, such as {first!r}."
            )
        raise OptionError(
            f"{sharing} It would be frozen, switched to evaluation mode or trained together with the student, so a teacher "
            "must have parameters of its own. To distil from the model's present state, pass copy.deepcopy(model) as the "
            "teacher, made before an adapter is added to the student."
        )


def check_teachers_independent(teachers: Iterable[Any]) -> None:
    """Check that teachers with adapters share no tensor or module with another teacher.

    PEFT changes the layers of its base model in place, so two teachers with one base model compute the same: what the adapter
    that was activated last does.

    Raises:
        OptionError: Two do.
    """
    models = [each for each in dict.fromkeys(teachers) if isinstance(each, nn.Module)]
    for number, first in enumerate(models):
        for second in models[number + 1 :]:
            if not (has_adapter(first) or has_adapter(second)):
                continue
            of_first = _identities(first)
            shared = _identities(second).keys() & of_first.keys()
            if shared:
                name = next(name for key, name in of_first.items() if key in shared)
                raise OptionError(
                    f"Two teachers have adapters on one base model (both hold {name!r}), so that both compute what the "
                    "adapter that was activated last does. Load a separate base model for each teacher."
                )


def _identities(model: nn.Module) -> dict[Any, str]:
    """Return the identities of a model's tensors and modules (their memory, or the object), with their names."""
    identities: dict[Any, str] = {}
    for name, tensor in _tensors(model):
        identities.setdefault(_storage_key(tensor), name)
    for name, module in model.named_modules():
        if not _is_stateless(module):
            identities.setdefault(id(module), name or type(module).__name__)
    return identities


def _is_stateless(module: nn.Module) -> bool:
    """Return whether a module has no state: all models of some families share one activation, made at import."""
    has_parts = any(True for part in (module.parameters(), module.buffers(), module.children()) for _ in part)
    return not has_parts and not isinstance(module, _DropoutNd)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _storage_key(tensor: Tensor) -> Any:
    plain = type(tensor.data) is torch.Tensor and tensor.numel() > 0 and not tensor.is_meta
    return (str(tensor.device), tensor.untyped_storage().data_ptr()) if plain else id(tensor)
