"""Compare how modules are built, their weights apart: which blocks are of one kind, whether two configs make one model.

Everything can be read from models on the meta device.
"""

import functools
import re
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_guide.models.model_classes import meta_model
from hf_guide.models.tiny_models import MODEL_ERRORS
from hf_guide.utils.by_value import ByValue

_WITHOUT_EFFECT = re.compile(
    r"drop|^training$|^gradient_checkpointing$|^store_full_length_kv$|(^|_)(idx|index|id|number)$"
)
"""Attributes that do not change what a module computes in evaluation: a block's index among them."""

_OF_THE_STACK = re.compile(r"^num$|(^|_)(num|n)_(\w+_)?(layers?|blocks?)$|(^|_)(layer|block)_num$")
"""Attributes of a block that describe its stack: its index, or the number of blocks."""


@dataclass(frozen=True)
class ModuleSignature:
    """How a module is built; equal signatures compute the same from the same weights.

    Attributes:
        structure: its modules, their classes and the names of their tensors, whatever the widths.
        switches: booleans, strings and None by module and name, such as a kind of attention.
        sizes: the shapes of its tensors, and whole numbers by module and name, such as a window.
        constants: other numbers and tuples by module and name, such as an epsilon.
    """

    structure: frozenset[tuple[str, str, tuple[str, ...]]]
    switches: frozenset[tuple[str, str, Any]]
    sizes: frozenset[tuple[str, str, Any]]
    constants: frozenset[tuple[str, str, Any]]

    def of_block(self) -> "ModuleSignature":
        """Return what makes a block's kind: without what follows from its index or the depth, nor the length of its lists."""

        def merge(name: str) -> str:
            return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)

        return ModuleSignature(
            frozenset((merge(name), kind, tensors) for name, kind, tensors in self.structure),
            frozenset((merge(name), key, value) for name, key, value in self.switches),
            frozenset((merge(name), key, value) for name, key, value in self.sizes if not _OF_THE_STACK.search(key)),
            frozenset(),
        )

    @property
    def tensor_names(self) -> set[str]:
        """The names of the module's tensors."""
        return {f"{name}.{key}".removeprefix(".") for name, _, keys in self.structure for key in keys}


def module_signature(module: nn.Module) -> ModuleSignature:
    """Return how `module` is built, dropout and the attributes without effect in evaluation apart.

    Example:
        >>> from torch import nn
        >>> module_signature(nn.Linear(3, 2)) == module_signature(nn.Linear(3, 2))
        True
        >>> module_signature(nn.Linear(3, 2)) == module_signature(nn.Linear(3, 2, bias=False))
        False
    """
    structure: list[tuple[str, str, tuple[str, ...]]] = []
    switches: list[tuple[str, str, Any]] = []
    sizes: list[tuple[str, str, Any]] = []
    constants: list[tuple[str, str, Any]] = []
    for name, part in module.named_modules():
        if isinstance(part, nn.Identity) or "drop" in f"{name} {type(part).__name__}".lower():
            continue  # drop path at a rate of zero is often another class
        tensors = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        structure.append((name, type(part).__name__, tuple(sorted(key for key, _ in tensors))))
        sizes += [(name, key, tuple(tensor.shape)) for key, tensor in tensors]
        for key, value in vars(part).items():
            if key.startswith("_") or _WITHOUT_EFFECT.search(key):
                continue
            if value is None or isinstance(value, (bool, str)):
                switches.append((name, key, value))
            elif isinstance(value, int):
                sizes.append((name, key, value))
            elif isinstance(value, (float, tuple)):
                constants.append((name, key, repr(value)))
    return ModuleSignature(frozenset(structure), frozenset(switches), frozenset(sizes), frozenset(constants))


def config_signature(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> ModuleSignature | None:
    """Return how the model of a config is built; None if it cannot be. Those of the last configs are kept.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> one, other = (LlamaConfig(num_hidden_layers=1, sliding_window=window) for window in (None, 8))
        >>> config_signature(LlamaForCausalLM, one) == config_signature(LlamaForCausalLM, other)  # Llama has no such window
        True
    """
    return _built_signature(ByValue.of((model_class, config)))


@functools.lru_cache(maxsize=64)
def _built_signature(model: ByValue[tuple[type[PreTrainedModel], PreTrainedConfig]]) -> ModuleSignature | None:
    try:
        return module_signature(meta_model(*model.value))
    except MODEL_ERRORS:
        return None


def describe_difference(teacher: ModuleSignature, student: ModuleSignature, *, widths: bool) -> str:
    """Return how two blocks differ, in words; "" where the student's can be initialized from the teacher's.

    Args:
        widths: whether other sizes are a difference.
    """
    missing, surplus = student.tensor_names - teacher.tensor_names, teacher.tensor_names - student.tensor_names
    if missing or surplus:
        lacking = [f"has no {name}" for name in sorted(missing)[:1]]
        more = [f"has {name}, which the student's block lacks" for name in sorted(surplus)[:1]]
        return " and ".join(lacking + more)
    for name, kind, _ in sorted(teacher.structure - student.structure):
        modules = {name: kind for name, kind, _ in student.structure}
        return f"has a {kind} at {name or 'its root'}, the student's a {modules.get(name, 'nothing')}"
    for name, kind, _ in sorted(student.structure - teacher.structure):
        return f"has nothing at {name}, the student's a {kind}"
    pairs = [(teacher.switches, student.switches)] + [(teacher.sizes, student.sizes)] * widths
    for theirs, ours in pairs:
        other = {(name, key): value for name, key, value in ours}
        for name, key, value in sorted(theirs - ours, key=str):
            return f"has {'.'.join(filter(None, (name, key)))}={value!r}, the student's {other.get((name, key))!r}"
    return ""


def stack_modules(model: PreTrainedModel, stack: str) -> list[nn.Module]:
    """Return the modules of a list in their order; an empty list where the model has none of this name.

    Args:
        stack: the list's name relative to the base model, or to the model; "layers" and "layers.{block}" are the same.
    """
    name = stack.rpartition(".")[0] if stack.endswith("}") else stack
    for root in (model.base_model, model):
        try:
            modules = root.get_submodule(name)
        except AttributeError:
            continue
        numbered = [child for key, child in modules._modules.items() if key.isdigit() and child is not None]
        if numbered:
            return numbered
    return []
