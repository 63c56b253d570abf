"""Which model class a checkpoint belongs to.

Does: resolve the class as the Auto classes do, the checkpoint's own code only with permission.
Does not: build a model but on the meta device, or look at weights.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from hf_guide.errors import TeacherError, one_paragraph
from hf_guide.models.pretrained import LOADING_ERRORS, remote_code_error
from hf_guide.tasks import Task


def candidate_model_classes(
    config: PreTrainedConfig, name: str, hub: Mapping[str, Any], trust: bool
) -> list[type[PreTrainedModel]]:
    """Return the class the config names, or, where it names none, those its family has: with heads first.

    Raises:
        TeacherError: the class is in the checkpoint's own code and `trust` is false, or there is none at all.
    """
    architecture = (config.architectures or [""])[0]
    references = getattr(config, "auto_map", None) or {}
    remote = {
        auto: ref
        for auto, ref in references.items()
        if isinstance(ref, str) and ref.rpartition(".")[2] == architecture
    }
    stock = getattr(transformers, architecture, None)
    if remote and trust:
        where = {key: value for key, value in hub.items() if key != "subfolder"}
        auto, reference = next(iter(remote.items()))
        try:
            model_class: Any = get_class_from_dynamic_module(reference, name, **where)
        except (*LOADING_ERRORS, SyntaxError) as error:
            raise TeacherError(f"{reference} of {name} cannot be loaded: {one_paragraph(error)}.") from error
        model_class.register_for_auto_class(auto)  # a student of it is saved with its code
        return [model_class]
    if isinstance(stock, type) and issubclass(stock, PreTrainedModel):
        return [stock]
    if remote:
        raise remote_code_error(name)
    ordered = {task.row.checkpoint_order: task for task in Task if task.row.checkpoint_order is not None}
    names = [
        f"MODEL_FOR_{mapping}_MAPPING" for order in sorted(ordered) for mapping in ordered[order].row.pipeline_tags
    ]
    mappings: list[Any] = [getattr(transformers, name) for name in (*names, "MODEL_MAPPING")]
    classes = [mapping[type(config)] for mapping in mappings if type(config) in mapping]
    classes = [entry[0] if isinstance(entry, tuple) else entry for entry in classes]
    if not classes:
        raise TeacherError(
            f"The config of {name} names the class {architecture!r}, which Transformers does not have, and "
            f"{type(config).__name__} has no model class. Set `architectures` in the config to a known class."
        )
    return classes


def without_quantization_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a copy of the config that does not say how its weights were stored."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def meta_model(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Return the model on the meta device, without memory for its weights: their names, shapes and ties."""
    with torch.device("meta"):
        return model_class._from_config(copy.deepcopy(config))


def strip_base_prefix(name: str, prefix: str) -> str:
    """Return `name` relative to the base model.

    Example:
        >>> strip_base_prefix("model.norm.weight", "model")
        'norm.weight'
    """
    return name.removeprefix(prefix + ".") if prefix else name
