"""Run a teacher over some examples once and collect what a projector reads."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_guide.lelp.data import check_classifier_task, check_single_label, classifier_weight
from hf_guide.lelp.validation import resolve_classes
from hf_guide.models.adapters import without_adapter
from hf_guide.models.modes import eval_mode
from hf_guide.models.penultimate import find_classifier
from hf_guide.tasks import task_of
from hf_guide.teachers.forward import forward_outputs
from hf_guide.validation import check_integer


@dataclass(frozen=True)
class AnalysisFeatures:
    """The features of N examples.

    Attributes:
        embeddings: (N, D), the inputs of the teacher's classifier.
        logits: (N, C).
        labels: (N,), the class that the teacher predicts where an example has no label.
        classifier_weight: (C, D), float64.
    """

    embeddings: Tensor
    logits: Tensor
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
        teacher: Of sequences or images.
        dataset: Examples as `data_collator` takes them.
        data_collator: Makes batches of tensors; labels of -1 and -100 mean the class that the teacher predicts.

    Raises:
        OptionError: `batch_size` is not a whole number of at least 1.
        SubclassError: A label is not one of the teacher's classes.
        TaskError: The teacher does not classify whole examples, or its classes do not exclude each other.
    """
    task = task_of(teacher)
    check_classifier_task(task, type(teacher).__name__)
    config = without_adapter(teacher).config
    check_single_label(config, type(teacher).__name__)
    classifier = find_classifier(teacher, task)
    columns: list[tuple[Tensor, ...]] = []
    num_read = 0
    size = check_integer("batch_size", batch_size)
    loader: Any = DataLoader(dataset, batch_size=size, collate_fn=data_collator)
    with eval_mode(teacher):
        for batch in tqdm(loader, desc="Running the teacher", disable=not show_progress):
            inputs = {name: value.to(teacher.device) for name, value in batch.items() if isinstance(value, Tensor)}
            labels = inputs.pop("labels", None)
            with torch.no_grad():
                outputs = forward_outputs(teacher, task, inputs, features=True)
            logits = outputs.logits.float()
            every_example = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
            embeddings = outputs.item_features(task, every_example, config).float()
            numbers = range(num_read, num_read + len(logits))
            classes = resolve_classes(labels, logits, len(logits), logits.shape[1], numbers)
            num_read += len(logits)
            batch_columns = (embeddings, logits, classes)
            columns.append(tuple(column.cpu() for column in batch_columns))
    embeddings, logits, classes = (torch.cat(parts) for parts in zip(*columns, strict=True))
    return AnalysisFeatures(embeddings, logits, classes, classifier_weight(classifier))
