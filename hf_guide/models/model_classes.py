"""Find the model class of a checkpoint, as the Auto classes do; its own code is loaded only with permission."""

import copy
from collections.abc import Mapping
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from hf_guide.errors import TeacherError, one_paragraph
from hf_guide.models.modes import on_meta_device
from hf_guide.models.pretrained import LOADING_ERRORS, remote_code_error
from hf_guide.tasks import Task


def candidate_model_classes(
    config: PreTrainedConfig, name: str, hub: Mapping[str, Any], trust: bool
) -> list[type[PreTrainedModel]]:
    """Return the class that the config names or, where it names none, the classes of its family: those with heads first.

    Args:
        name: the folder or Hub id of the checkpoint.
        hub: keywords of `from_pretrained`, such as the revision.
        trust: whether the checkpoint's own code may be loaded.

    Raises:
        TeacherError: the class is in the checkpoint's own code and `trust` is false, or no class is known.
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
        hub_options = {key: value for key, value in hub.items() if key != "subfolder"}
        auto, reference = next(iter(remote.items()))
        try:
            model_class: Any = get_class_from_dynamic_module(reference, name, **hub_options)
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


def stored_quantization(config: PreTrainedConfig) -> dict[str, Any] | None:
    """Return how a checkpoint is quantised, by its config or that of its text model; None if it is not."""
    for part in (config, config.get_text_config(decoder=True)):
        stored = getattr(part, "quantization_config", None)
        if stored is not None:
            return dict(stored) if isinstance(stored, Mapping) else stored.to_dict()
    return None


def without_quantization_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a copy of the config without its quantization."""
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config(decoder=True)):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config


def meta_model(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Return a model of `config` on the meta device: names, shapes and ties of its weights, but no memory for them.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> meta_model(LlamaForCausalLM, LlamaConfig(num_hidden_layers=1)).device
        device(type='meta')
    """
    with on_meta_device():
        return model_class._from_config(copy.deepcopy(config))


def strip_base_prefix(name: str, prefix: str) -> str:
    """Return `name` relative to the base model.

    Example:
        >>> strip_base_prefix("model.norm.weight", "model")
        'norm.weight'
    """
    return name.removeprefix(prefix + ".") if prefix else name
