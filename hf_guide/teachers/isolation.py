"""Whether models are apart: no tensor and no module of one is also part of another.

Identity is a matter of parameters. A teacher is frozen and put into evaluation mode, and a student is trained, whatever
object is wrapped around them; so a teacher inside an adapter's base model, or with the student's embeddings, is refused.
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
        student: a model; anything else (a config, None) shares nothing.
        teachers: models, and names of models, which share nothing.

    Raises:
        OptionError: one that does; names the first shared tensor.
    """
    models = [each for each in teachers if isinstance(each, nn.Module)]
    if not isinstance(student, nn.Module) or not models:
        return
    own = _identities(student)
    for teacher in models:
        shared = _identities(teacher).keys() & own.keys()
        if not shared:
            continue
        if teacher is student:
            found = "The teacher is the student itself."
        else:
            first = next(name for key, name in own.items() if key in shared)
            found = f"The teacher shares {len(shared)} of its tensors and modules with the student, such as {first!r}."
        raise OptionError(
            f"{found} It would be frozen, switched to evaluation mode or trained together with the student, so a teacher "
            "must have parameters of its own. To learn from what the model is now, pass copy.deepcopy(model) as the "
            "teacher, made before an adapter is added to the student."
        )


def check_teachers_independent(teachers: Iterable[Any]) -> None:
    """Check that teachers with adapters share no tensor or module with another teacher.

    PEFT changes the layers of the model that it wraps in place, so two teachers with one base model are the same function:
    that of the adapter which was made active last.

    Raises:
        OptionError: two that do.
    """
    models = [each for each in dict.fromkeys(teachers) if isinstance(each, nn.Module)]
    for number, first in enumerate(models):
        for second in models[number + 1 :]:
            if not (has_adapter(first) or has_adapter(second)):
                continue
            own = _identities(first)
            shared = _identities(second).keys() & own.keys()
            if shared:
                name = next(name for key, name in own.items() if key in shared)
                raise OptionError(
                    f"Two teachers have adapters on one base model (both hold {name!r}), so that both compute what the "
                    "adapter that was made active last does. Load a base model of its own for each teacher."
                )


def _identities(model: nn.Module) -> dict[Any, str]:
    """Return what makes a model's tensors and modules themselves (memory, or the object), with their names."""
    found: dict[Any, str] = {}
    for name, tensor in _tensors(model):
        found.setdefault(_identity(tensor), name)
    for name, module in model.named_modules():
        if not _is_stateless(module):
            found.setdefault(id(module), name or type(module).__name__)
    return found


def _is_stateless(module: nn.Module) -> bool:
    """Return whether a module only computes: some families' models all call one activation, made when it is imported."""
    has_parts = any(True for part in (module.parameters(), module.buffers(), module.children()) for _ in part)
    return not has_parts and not isinstance(module, _DropoutNd)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _identity(tensor: Tensor) -> Any:
    plain = type(tensor.data) is torch.Tensor and tensor.numel() > 0 and not tensor.is_meta
    return (str(tensor.device), tensor.untyped_storage().data_ptr()) if plain else id(tensor)
