"""A model's embedding of an item: what its last linear layer, the classifier or the language head, is fed."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_guide.distillation.tasks import Task, without_adapter
from hf_guide.errors import TaskError


def find_classifier(model: PreTrainedModel, task: Task) -> Any:
    """Return the linear layer that makes the logits.

    Raises:
        TaskError: there is none, or it cannot be told.
    """
    bare = without_adapter(model)
    if task.is_language_model:
        found = bare.get_output_embeddings()
        if found is None:
            raise TaskError(f"{type(bare).__name__} has no output embeddings whose input could be its embedding.")
        return found
    inside = {id(module) for module in bare.base_model.modules()} if bare.base_model is not bare else set()
    linear = [
        module
        for module in bare.modules()
        if id(module) not in inside and getattr(module, "out_features", None) == bare.config.num_labels
    ]
    if not linear:
        raise TaskError(
            f"{type(bare).__name__} has no linear layer with its {bare.config.num_labels} classes after its base model, so "
            "its embedding is not known. Leave the term 'embedding' out."
        )
    return linear[-1]


@contextmanager
def heard_embeddings(classifier: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what `classifier` is fed within: one tensor a call, with gradient where there is one."""
    heard: list[Tensor] = []
    handle = classifier.register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))
    try:
        yield heard
    finally:
        handle.remove()


def embedding_per_item(task: Task, heard: Tensor, mask: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Return one vector an item, (items, width), of what the classifier was fed.

    A decoder's classifier is fed every place, of which the last that attention sees decides, as in Transformers.
    """
    if task.is_per_token or heard.ndim == 2:
        return heard[mask]
    seen = inputs.get("attention_mask")
    if isinstance(seen, Tensor) and seen.shape == heard.shape[:2]:
        last = (torch.arange(seen.shape[1], device=seen.device) * (seen != 0)).argmax(-1)
    else:
        last = torch.full((heard.shape[0],), heard.shape[1] - 1, device=heard.device)
    return heard[torch.arange(len(heard), device=heard.device), last][mask]
