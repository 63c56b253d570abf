"""Quantised teachers: their tensors dequantised one at a time, by Transformers' own operations.

Does: prepare what reads a quantised checkpoint, and dequantise a tensor that Transformers has loaded.
Does not: quantise, or hold a dequantised copy of a model.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer, AutoQuantizationConfig

from hf_guide.models.model_classes import meta_model, stored_quantization, without_quantization_config
from hf_guide.models.modes import on_meta_device
from hf_guide.teachers.tensor_source import InMemoryTensors

_DEQUANTIZED_HERE = ("torchao", "bitsandbytes")
"""Formats that Transformers loads as they are, and whose tensors `dequantized` can read."""


@dataclass(frozen=True)
class Quantization:
    """What reads the tensors of a quantised checkpoint.

    Attributes:
        quantizer: Transformers' quantiser.
        model: The model on the meta device, with the modules of the quantised one.
        operation: The type of the operation that reads or dequantises a tensor.
    """

    quantizer: Any
    model: PreTrainedModel
    operation: type[Any]


def dequantize_on_load(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a config by which weights are dequantised while they are read, where their format has that option.

    By default Transformers does this only without a GPU, and some formats (FP8) cannot be dequantised afterwards.
    """
    stored = stored_quantization(config)
    if stored is not None and hasattr(AutoQuantizationConfig.from_dict(dict(stored)), "dequantize"):
        config = copy.copy(config)
        config.quantization_config = {**stored, "dequantize": True}
    return config


def open_quantization(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, files: Sequence[str]
) -> Quantization | None:
    """Return what reads the tensors of a quantised checkpoint one by one; None where only the whole model can be loaded.

    Args:
        model_class: The class of the model.
        config: Its config, from `dequantize_on_load`.
        files: The checkpoint's safetensors files.

    Raises:
        ImportError, ValueError: Transformers has no such quantiser, or lacks the package or the device for it.
    """
    stored = dict(stored_quantization(config) or {})
    quantizer = AutoHfQuantizer.from_config(stored, pre_quantized=True)
    quantizer.validate_environment(device_map=None, weights_only=True)
    on_load = getattr(quantizer.quantization_config, "dequantize", False)
    operation = quantizer.get_load_operations().get("dequantize" if on_load else "deserialize")
    if operation is None or not (on_load or quantizer.quantization_config.quant_method in _DEQUANTIZED_HERE):
        return None
    with on_meta_device():
        model = model_class._from_config(copy.deepcopy(config))
        quantizer.preprocess_model(model=model, dtype=model.dtype, device_map=None, checkpoint_files=list(files))
    return Quantization(quantizer, model, operation)


def is_quantized(model: torch.nn.Module) -> bool:
    """Return whether some weights of a loaded model are quantised."""
    parameters = (parameter for _, parameter in model.named_parameters())
    if any(type(p.data) is not torch.Tensor or not p.is_floating_point() or p.element_size() < 2 for p in parameters):
        return True
    if not getattr(model, "is_quantized", False):
        return False
    stock = meta_model(type(model), without_quantization_config(model.config))  # type: ignore[arg-type]  # packed weights have other names
    return stock.state_dict().keys() != model.state_dict().keys()


def can_dequantize(model: torch.nn.Module) -> bool:
    """Return whether `QuantizedTensors` can read a loaded model."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return getattr(config, "quant_method", None) in _DEQUANTIZED_HERE


def dequantized(value: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
    """Return a parameter of a model of torchao or bitsandbytes as a stock tensor; one that is not quantised as it is."""
    if type(value).__name__ in ("Params4bit", "Int8Params"):
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        return dequantize_bnb_weight(value, getattr(module, "state", None))  # type: ignore[arg-type]
    value = value.detach()
    return value if type(value.data) is torch.Tensor else value.dequantize()


def quantized_shapes(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the tensors of a quantised model as those of the unquantised one, on the meta device, by name."""
    stock = meta_model(type(model), without_quantization_config(model.config)).state_dict()
    present = model.state_dict().keys()
    return {name: tensor for name, tensor in stock.items() if name in present}


class QuantizedTensors(InMemoryTensors):
    """The tensors of a quantised model in memory, each dequantised when it is read.

    Args:
        model: A model of torchao or bitsandbytes.
        shapes: What of it is read, from `quantized_shapes`.
    """

    def __init__(self, model: PreTrainedModel, shapes: Mapping[str, torch.Tensor]):
        super().__init__(shapes)
        self._model = model

    def get(self, name: str) -> torch.Tensor:
        """Return one tensor in the dtype that it has in the unquantised model; never write to it."""
        path, _, attribute = name.rpartition(".")
        module = self._model.get_submodule(path)
        return dequantized(getattr(module, attribute), module).detach().to(self.dtype(name))
