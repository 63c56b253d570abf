"""Fit the isometry between the embeddings of a student and of a teacher of another width, before the first step."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.utils import broadcast

from hf_guide.distillation.losses.divergences import widest_float_dtype
from hf_guide.models.modes import eval_preserving_state
from hf_guide.models.outputs import last_hidden_state
from hf_guide.models.sentence_files import embed
from hf_guide.signal_cache.data import is_map_style

NUM_EXAMPLES = 1024
"""Of the training dataset, on which an isometry is fitted; a batch at a time."""


def fit_embedding_maps(trainer: Any, inputs: Mapping[str, Any]) -> None:
    """Fit the isometries that a trainer's objective has and that are not fitted yet.

    Student and teachers run on `NUM_EXAMPLES` examples, evenly spaced, of the training dataset; without one on the evaluation
    dataset, or else on the batch `inputs`. The processes share the examples, and have the same isometries.
    """
    projections = trainer.distillation_objective.projections
    if projections is None or not projections.unfitted:
        return
    student, device = trainer.unwrapped_student, trainer.accelerator.device
    dtype = widest_float_dtype(device)
    sums = {name: torch.zeros_like(projections.isometry(name), dtype=dtype) for name in sorted(projections.unfitted)}
    with eval_preserving_state(student, device):
        for examples in _batches(trainer, inputs):
            batch = trainer._batch_builder.build(trainer._prepare_inputs(examples), training=True)
            own = {name: value for name, value in batch.inputs.items() if name != "labels"}
            vectors = embed(student, last_hidden_state(student(**own)), batch.inputs)[batch.mask]
            for index, signals in enumerate(batch.signals):
                if (name := f"{index}_features") in sums:
                    sums[name] += signals.features.to(dtype).T @ vectors.to(dtype)
        for name, cross_covariance in sums.items():
            projections.fit(name, trainer.accelerator.reduce(cross_covariance, reduction="sum"))
            broadcast(projections.isometry(name))  # the same to the last bit


def _batches(trainer: Any, inputs: Mapping[str, Any]) -> Iterator[Any]:
    """Yield this process's share of the examples, collated."""
    dataset = trainer.train_dataset
    if dataset is None and not isinstance(trainer.eval_dataset, dict):
        dataset = trainer.eval_dataset
    if dataset is None:
        yield inputs
        return
    if is_map_style(dataset):
        step = max(1, len(dataset) // NUM_EXAMPLES)
        chosen: Any = (dataset[number] for number in range(0, len(dataset), step))
    else:
        chosen = iter(dataset)
    accelerator = trainer.accelerator
    chosen = itertools.islice(chosen, accelerator.process_index, NUM_EXAMPLES, accelerator.num_processes)
    collate = trainer._get_collator_with_removed_columns(trainer.data_collator)
    size = max(1, trainer.args.per_device_eval_batch_size)
    while examples := list(itertools.islice(chosen, size)):
        yield collate(examples)
