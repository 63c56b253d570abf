"""Recognise layers that PEFT and torch substitute for a model's own, and find the stock layer or the trained copy in them.

PEFT is not imported: a model can only have its layers once it is imported. No model is changed.
"""

import copy
import functools
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from hf_guide.errors import OptionError
from hf_guide.models.modes import on_meta_device


def is_adapter_layer(module: Any) -> bool:
    """Return whether a module is a PEFT layer that wraps another: of LoRA and similar methods, or of `modules_to_save`."""
    if "peft" not in sys.modules:
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost PEFT layers of a model with their names, without the modules inside them."""
    prefixes: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if is_adapter_layer(module) and not name.startswith(prefixes):
            prefixes += (f"{name}.",)
            yield name, module


def has_adapter(model: Any) -> bool:
    """Return whether a model has an adapter: PEFT layers, or virtual tokens."""
    return bool(getattr(model, "peft_config", None)) or next(adapter_layers(model), None) is not None


def stock_module(module: Any) -> Any:
    """Return the model's own layer that PEFT wrapped, or the layer itself.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> stock_module(layer) is layer
        True
    """
    while is_adapter_layer(module):
        module = module.base_layer if hasattr(module, "base_layer") else module.original_module
    return module


def active_module(module: Any) -> Any:
    """Return the module that is called: of `modules_to_save` the active copy, otherwise the layer itself."""
    copies = getattr(module, "modules_to_save", None)
    if not is_adapter_layer(module) or copies is None:
        return module
    if module.disable_adapters or not module.active_adapters:
        return module.original_module
    name = module.active_adapters[0]
    return copies[name] if name in copies else module  # noqa: SIM401  # a ModuleDict has no get()


def check_no_virtual_tokens(model: Any, role: str) -> None:
    """Check that a model's outputs are at the positions of its inputs, as the other model's and the labels are.

    Raises:
        OptionError: an adapter puts virtual tokens before the text (prefixes of keys and values shift nothing).
    """
    for config in getattr(model, "peft_config", {}).values():
        if config.is_prompt_learning and config.peft_type != "PREFIX_TUNING":
            raise OptionError(
                f"{config.peft_type.value} puts virtual tokens before the text, so that the {role}'s outputs are not at the "
                "positions of the other model's and of the labels. Use another adapter, such as LORA or PREFIX_TUNING."
            )


def called_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that a model's forward can call, with their names, parents first.

    A PEFT layer counts as one module, without those inside it; of `modules_to_save` only the active copy is included.
    """
    pending: list[tuple[str, nn.Module]] = [("", model)]
    known: set[nn.Module] = set()
    while pending:
        name, module = pending.pop()
        if module in known:
            continue
        known.add(module)
        yield name, module
        if not is_adapter_layer(module):
            prefix = f"{name}." if name else ""
            children = [(prefix + key, active_module(child)) for key, child in module.named_children()]
            pending += reversed(children)


def called_module(model: nn.Module, module: nn.Module) -> nn.Module:
    """Return the module that is called in place of `module` once PEFT has wrapped it, or a module around it."""
    for _, layer in adapter_layers(model):
        for name, inside in stock_module(layer).named_modules():
            if inside is module:
                active = active_module(layer)
                return active if active is layer else active.get_submodule(name)
    return module


def is_plain_linear(module: Any) -> bool:
    """Return whether a layer computes `x W^T + b` of a weight that is an ordinary parameter.

    Adapters, quantised weights (tensor subclasses), sharded weights, and `torch.nn.utils.parametrize` are not plain: what
    they multiply with is computed anew in each forward pass.
    """
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        return False
    return not nn.utils.parametrize.is_parametrized(module) and type(module.weight.data) is torch.Tensor


def parametrized_layers(model: Any) -> list[str]:
    """Return the names of the layers that `torch.nn.utils.parametrize` has changed, and that are plain in the stock class.

    Some families have such layers themselves (wav2vec 2.0).
    """
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = _parametrized(model)
    if not layers:
        return []
    with on_meta_device():
        stock = tuple(_parametrized(type(bare)(copy.deepcopy(bare.config))))
    return [name for name in layers if not name.endswith(stock)] if stock else layers


def _parametrized(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if nn.utils.parametrize.is_parametrized(module)]


def validate_unwrapped(model: Any, role: str) -> None:
    """Check that nothing is wrapped around a model that the trainer itself wraps, or that hides its layers.

    Raises:
        OptionError: a compiled model, or one of several processes or devices; the error names what to pass instead.
    """
    if isinstance(model, OptimizedModule):
        how = "DistillationArguments(torch_compile=True)" if role == "student" else "call its own `compile()` before"
        raise OptionError(f"The {role} is compiled already, and wrapped by it. Pass the model itself, and {how}.")
    if isinstance(model, (nn.DataParallel, DistributedDataParallel, FullyShardedDataParallel)):
        raise OptionError(
            f"The {role} is wrapped in {type(model).__name__}. Pass the model itself: what several processes or devices need "
            "is done here. Launch one process a GPU, with `accelerate launch` or `torchrun`."
        )


def without_adapter(model: Any) -> Any:
    """Return the model that PEFT wrapped, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def forward_parameters(model: Any) -> frozenset[str]:
    """Return what the `forward` of a model, or of a model's class, takes by name, within an adapter and hooks around it."""
    kind: Any = model if isinstance(model, type) else type(without_adapter(model))
    return _forward_parameters_of_class(kind)


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@functools.cache
def _forward_parameters_of_class(kind: type) -> frozenset[str]:
    """Return the names that a class's `forward` takes; where it takes any keyword, those of the class it derives from, too."""
    names: frozenset[str] = frozenset()
    for each in kind.__mro__:
        forward = vars(each).get("forward")
        if each is nn.Module or forward is None:
            continue
        parameters = inspect.signature(forward).parameters
        names |= {name for name, parameter in parameters.items() if parameter.kind not in _VARIADIC}
        if all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return names - {"self"}


def is_encoder_decoder(model: Any) -> bool:
    """Return whether a model has a decoder with inputs of its own."""
    return bool(getattr(without_adapter(model).config, "is_encoder_decoder", False))
