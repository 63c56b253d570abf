"""A model's embedding of an item: what its last linear layer, the classifier or the language head, is fed."""

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
"""What users said is the classifier of a model."""


@dataclass(frozen=True)
class DualHead:
    """Linear layers whose mean is the logits, as one layer that is fed what they are fed, end to end."""

    heads: tuple[Any, ...]

    @property
    def in_features(self) -> int:
        """How many numbers all of them are fed."""
        return sum(head.in_features for head in self.heads)

    @property
    def out_features(self) -> int:
        """The number of classes."""
        return int(self.heads[0].out_features)

    @property
    def weight(self) -> Tensor:
        """The weight (classes, in_features) of what they are together."""
        return torch.cat([head.weight for head in self.heads], 1) / len(self.heads)

    @property
    def bias(self) -> Tensor | None:
        """The bias (classes,) of what they are together."""
        found = [head.bias for head in self.heads if head.bias is not None]
        return torch.stack(found).sum(0) / len(self.heads) if found else None


def register_classifier(model: PreTrainedModel, classifier: "nn.Module | str") -> nn.Module:
    """Say which layer makes a model's logits, where `find_classifier` does not find it; return the layer.

    Args:
        model: what the layer is a part of; it is remembered as long as this object lives.
        classifier: the layer, or its name in the model.

    Raises:
        TaskError: the model has no such layer.
    """
    bare = without_adapter(model)
    parts = dict(bare.named_modules())
    found = parts.get(classifier) if isinstance(classifier, str) else classifier
    if found is None or not any(each is found for each in parts.values()):
        raise TaskError(f"{type(bare).__name__} has no layer {classifier!r}; name one of its modules.")
    _REGISTERED_CLASSIFIERS[bare] = found
    return found


@contextmanager
def classifier_registered(model: Any, classifier: "nn.Module | str | None") -> Iterator[None]:
    """Say which layer is a model's classifier; where what follows fails, unsay it. None says nothing."""
    if classifier is None:
        yield
        return
    bare = without_adapter(model)
    before = _REGISTERED_CLASSIFIERS.get(bare)
    register_classifier(model, classifier)
    done = False
    try:
        yield
        done = True
    finally:
        if not done:
            _REGISTERED_CLASSIFIERS.pop(bare, None)
            if before is not None:
                register_classifier(model, before)


def find_classifier(model: PreTrainedModel, task: Task) -> Any:
    """Return the linear layer that makes the logits, or the one that `register_classifier` was told.

    Raises:
        TaskError: there is none, or it cannot be told.
    """
    bare = without_adapter(model)
    if bare in _REGISTERED_CLASSIFIERS:
        return called_module(bare, _REGISTERED_CLASSIFIERS[bare])
    if task.is_language_model:
        found = bare.get_output_embeddings()
        if found is None:
            raise TaskError(f"{type(bare).__name__} has no output embeddings whose input could be its embedding.")
        return found
    inside = {id(module) for module in bare.base_model.modules()} if bare.base_model is not bare else set()
    named = [
        (name, module)
        for name, module in called_modules(bare)
        if getattr(stock_module(module), "out_features", None) == bare.config.num_labels
    ]
    named = [each for each in named if not any(each[0].startswith(f"{name}.") for name, _ in named)]
    # A few make their logits in the base model already (Perceiver).
    linear = [each for each in named if id(each[1]) not in inside] or named
    if not linear:
        raise TaskError(
            f"{type(bare).__name__} has no linear layer with its {bare.config.num_labels} classes, so its embedding is not "
            "known. Name the layer with hf_guide.models.penultimate.register_classifier, or do without the embedding."
        )
    # Image models that were distilled from a token of their own (DeiT, LeViT, SwiftFormer) give the mean of two heads.
    if len(linear) > 1 and "dist" in linear[-1][0]:
        return DualHead((linear[-2][1], linear[-1][1]))
    return linear[-1][1]


@contextmanager
def capture_head_inputs(classifier: "nn.Module | DualHead") -> Iterator[list[Tensor]]:
    """Collect what `classifier` is fed within: one tensor a call, with gradient where there is one."""
    heard: list[Tensor] = []
    heads = classifier.heads if isinstance(classifier, DualHead) else (classifier,)
    parts: list[Tensor] = []

    def record(head_input: Tensor) -> None:
        parts.append(head_input)
        if len(parts) == len(heads):
            heard.append(parts[0] if len(parts) == 1 else torch.cat(parts, -1))
            parts.clear()

    with removable_hooks() as handles:
        handles += [register_input_hook(head, record) for head in heads]
        yield heard


def pooled_features(
    task: Task, heard: Tensor, mask: Tensor, inputs: Mapping[str, Any], config: PreTrainedConfig
) -> Tensor:
    """Return one vector an item, (items, width), of what the classifier was fed.

    A decoder's classifier is fed every place, of which the last that attention sees decides, as in Transformers; where the
    model's `config` says that logits are averaged (`classifier_pooling="late"`), so are embeddings.
    """
    heard = heard.to(mask.device)  # the classifier of a teacher that is spread may be elsewhere
    if task.is_per_token or heard.ndim == 2:
        return heard[mask]
    seen = inputs.get("attention_mask")
    if getattr(config, "classifier_pooling", None) == "late":
        shares = torch.ones_like(heard[..., 0]) if seen is None else seen.to(heard)
        return ((heard * shares[..., None]).sum(1) / shares.sum(1, keepdim=True))[mask]
    if isinstance(seen, Tensor) and seen.shape == heard.shape[:2]:
        last = (torch.arange(seen.shape[1], device=seen.device) * (seen != 0)).argmax(-1)
    else:
        last = torch.full((heard.shape[0],), heard.shape[1] - 1, device=heard.device)
    return heard[torch.arange(len(heard), device=heard.device), last][mask]
