"""One pass of a teacher over a few examples: what a projector reads, and what a student could know without the teacher."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_guide.lelp.data import check_classifier_task, check_single_label, linear_weight
from hf_guide.lelp.validation import resolve_classes
from hf_guide.models.adapters import without_adapter
from hf_guide.models.penultimate import find_classifier
from hf_guide.tasks import task_of
from hf_guide.teachers.forward import forward_outputs
from hf_guide.validation import check_integer

POOLED_SIZE = 14


@dataclass(frozen=True)
class AnalysisFeatures:
    """What was heard of N examples.

    Attributes:
        embeddings: (N, D), what the teacher's classifier is fed.
        logits: (N, C).
        features: (N, F): pixels made coarse, or the mean of a text's input embeddings.
        labels: (N,), the teacher's own class where an example has no label.
        classifier_weight: (C, D), float64.
    """

    embeddings: Tensor
    logits: Tensor
    features: Tensor
    labels: Tensor
    classifier_weight: Tensor


def collect_features(
    teacher: PreTrainedModel,
    dataset: Any,
    data_collator: Callable[[Any], Mapping[str, Any]],
    *,
    batch_size: int = 32,
    show_progress: bool = True,
) -> AnalysisFeatures:
    """Run a classifier over a dataset that fits in memory.

    Args:
        teacher: of sequences or images.
        dataset: examples as `data_collator` takes them.
        data_collator: makes batches of tensors; of their labels -1 and -100 stand for the teacher's own class.

    Raises:
        OptionError: a batch_size that is no whole number of at least 1.
        SubclassError: a label that is none of the teacher's classes.
        TaskError: the teacher is no classifier of whole examples, or its classes do not exclude each other.
    """
    task = task_of(teacher)
    check_classifier_task(task, type(teacher).__name__)
    config = without_adapter(teacher).config
    check_single_label(config, type(teacher).__name__)
    classifier = find_classifier(teacher, task)
    found: list[tuple[Tensor, ...]] = []
    seen = 0
    size = check_integer("batch_size", batch_size)
    loader: Any = DataLoader(dataset, batch_size=size, collate_fn=data_collator)
    teacher.eval()
    for batch in tqdm(loader, desc="Listening to the teacher", disable=not show_progress):
        inputs = {name: value.to(teacher.device) for name, value in batch.items() if isinstance(value, Tensor)}
        labels = inputs.pop("labels", None)
        with torch.no_grad():
            outputs = forward_outputs(teacher, task, inputs, features=True)
        logits = outputs.logits.float()
        every_example = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        embeddings = outputs.item_features(task, every_example, config).float()
        classes = resolve_classes(labels, logits, len(logits), logits.shape[1], range(seen, seen + len(logits)))
        seen += len(logits)
        found.append(tuple(each.cpu() for each in (embeddings, logits, _input_features(teacher, inputs), classes)))
    embeddings, logits, features, classes = (torch.cat(parts) for parts in zip(*found, strict=True))
    return AnalysisFeatures(embeddings, logits, features, classes, linear_weight(classifier))


@torch.no_grad()
def _input_features(teacher: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    if "pixel_values" in inputs:
        pixels = inputs["pixel_values"].float()
        if pixels.ndim != 4:
            return pixels.flatten(1)
        return adaptive_avg_pool2d(pixels, min(POOLED_SIZE, pixels.shape[-1], pixels.shape[-2])).flatten(1)
    table: Any = teacher.get_input_embeddings()
    vectors = table(inputs["input_ids"]).float()
    mask = inputs.get("attention_mask")
    seen = torch.ones_like(inputs["input_ids"]) if mask is None else mask
    weights = (seen != 0).unsqueeze(-1).float()
    return (vectors * weights).sum(1) / weights.sum(1).clamp_min(1)
