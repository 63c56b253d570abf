"""Find the layer that makes a model's logits and capture its inputs: the penultimate features."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_guide.errors import TaskError
from hf_guide.models.adapters import called_module, called_modules, stock_module, without_adapter
from hf_guide.models.hooks import register_input_hook, removable_hooks
from hf_guide.tasks import Task

_REGISTERED_CLASSIFIERS: "WeakKeyDictionary[nn.Module, nn.Module]" = WeakKeyDictionary()
"""The layers that users registered, by model."""


ITEMS_WITH_FEATURES = ("token", "example", "frame")
"""The items of tasks whose heads are fed one vector for each."""


@dataclass(frozen=True)
class DualHead:
    """Linear layers whose mean is the logits, as one layer whose input is their inputs, concatenated."""

    heads: tuple[Any, ...]

    @property
    def in_features(self) -> int:
        """The width of the concatenated inputs."""
        return sum(head.in_features for head in self.heads)

    @property
    def out_features(self) -> int:
        """The number of classes."""
        return int(self.heads[0].out_features)

    @property
    def weight(self) -> Tensor:
        """The weight (classes, in_features) of the one layer."""
        return torch.cat([head.weight for head in self.heads], 1) / len(self.heads)

    @property
    def bias(self) -> Tensor | None:
        """The bias (classes,) of the one layer."""
        biases = [head.bias for head in self.heads if head.bias is not None]
        return torch.stack(biases).sum(0) / len(self.heads) if biases else None


def register_classifier(model: PreTrainedModel, classifier: "nn.Module | str") -> nn.Module:
    """Register the layer that makes a model's logits, for models where `find_classifier` does not find it; return it.

    Args:
        model: The model; the registration lasts as long as this object.
        classifier: The layer, or its name in the model.

    Raises:
        TaskError: The model has no such layer.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        >>> model = BertForSequenceClassification(BertConfig(**sizes, vocab_size=9))
        >>> register_classifier(model, "classifier")
        Linear(in_features=8, out_features=2, bias=True)
    """
    bare = without_adapter(model)
    modules = dict(bare.named_modules())
    layer = modules.get(classifier) if isinstance(classifier, str) else classifier
    if layer is None or not any(each is layer for each in modules.values()):
        raise TaskError(f"{type(bare).__name__} has no layer {classifier!r}; it must be one of its modules.")
    _REGISTERED_CLASSIFIERS[bare] = layer
    return layer


@contextmanager
def classifier_registered(model: Any, classifier: "nn.Module | str | None") -> Iterator[None]:
    """Register a classifier; undo it if the block raises. None is a no-op."""
    if classifier is None:
        yield
        return
    bare = without_adapter(model)
    previous = _REGISTERED_CLASSIFIERS.get(bare)
    register_classifier(model, classifier)
    succeeded = False
    try:
        yield
        succeeded = True
    finally:
        if not succeeded:
            _REGISTERED_CLASSIFIERS.pop(bare, None)
            if previous is not None:
                register_classifier(model, previous)


def find_classifier(model: PreTrainedModel, task: Task) -> Any:
    """Return the linear layer that makes the logits, or the one that was registered.

    Raises:
        TaskError: There is none.
    """
    bare = without_adapter(model)
    if bare in _REGISTERED_CLASSIFIERS:
        return called_module(bare, _REGISTERED_CLASSIFIERS[bare])
    if task.is_language_model:
        head = bare.get_output_embeddings()
        if head is None:
            raise TaskError(
                f"{type(bare).__name__} has no output embeddings, whose input would be its penultimate features."
            )
        return head
    num_outputs = bare.config.vocab_size if task is Task.CTC else bare.config.num_labels
    in_base = {id(module) for module in bare.base_model.modules()} if bare.base_model is not bare else set()
    named = [
        (name, module)
        for name, module in called_modules(bare)
        if getattr(stock_module(module), "out_features", None) == num_outputs
    ]
    named = [each for each in named if not any(each[0].startswith(f"{name}.") for name, _ in named)]
    # Some models make their logits in the base model (Perceiver).
    linear = [each for each in named if id(each[1]) not in in_base] or named
    if not linear:
        raise TaskError(
            f"{type(bare).__name__} has no linear layer with {num_outputs} outputs, one per class, so its "
            "penultimate features are not known. Name the layer with "
            "hf_guide.models.penultimate.register_classifier, or do without them."
        )
    # Image models with a distillation token (DeiT, LeViT, SwiftFormer) return the mean of two heads.
    if len(linear) > 1 and "dist" in linear[-1][0]:
        return DualHead((linear[-2][1], linear[-1][1]))
    return linear[-1][1]


@contextmanager
def capture_head_inputs(classifier: "nn.Module | DualHead") -> Iterator[list[Tensor]]:
    """Collect the inputs of `classifier`: one tensor per call, with gradient where there is one."""
    captured: list[Tensor] = []
    heads = classifier.heads if isinstance(classifier, DualHead) else (classifier,)
    parts: list[Tensor] = []

    def record(head_input: Tensor) -> None:
        parts.append(head_input)
        if len(parts) == len(heads):
            captured.append(parts[0] if len(parts) == 1 else torch.cat(parts, -1))
            parts.clear()

    with removable_hooks() as handles:
        handles += [register_input_hook(head, record) for head in heads]
        yield captured


def pooled_features(
    task: Task, head_inputs: Tensor, mask: Tensor, inputs: Mapping[str, Any], config: PreTrainedConfig
) -> Tensor:
    """Return one feature vector per item, (items, width), from the inputs of the classifier.

    The classifier of a decoder is applied at all positions, and the logits at the last attended one are the model's, as in
    Transformers; with `classifier_pooling="late"` in the config the logits are averaged, and so are the features.

    Args:
        task: The model's.
        head_inputs: As from `capture_head_inputs`: (batch, width) or (batch, length, width).
        mask: Selects the items: (batch, length) where they are tokens, else (batch,).
        inputs: The model's inputs, with its attention mask.
        config: The model's.
    """
    head_inputs = head_inputs.to(mask.device)  # the classifier of a teacher on several devices may be on another one
    if mask.ndim == 2 or head_inputs.ndim == 2:
        return head_inputs[mask]
    attention_mask = inputs.get("attention_mask")
    if getattr(config, "classifier_pooling", None) == "late":
        weights = torch.ones_like(head_inputs[..., 0]) if attention_mask is None else attention_mask.to(head_inputs)
        return ((head_inputs * weights[..., None]).sum(1) / weights.sum(1, keepdim=True))[mask]
    if isinstance(attention_mask, Tensor) and attention_mask.shape == head_inputs.shape[:2]:
        last = (torch.arange(attention_mask.shape[1], device=attention_mask.device) * (attention_mask != 0)).argmax(-1)
    else:
        last = torch.full((head_inputs.shape[0],), head_inputs.shape[1] - 1, device=head_inputs.device)
    return head_inputs[torch.arange(len(head_inputs), device=head_inputs.device), last][mask]
