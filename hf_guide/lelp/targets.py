"""Subclass probabilities of a batch from whoever knows them, and captured once: S * C numbers an example and no more.

A capture of them has the form of every capture (Arrow, known by content), with a `SubclassProjector` for teacher and the
probabilities where a classifier's logits are.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_guide.distillation.subclass_logits import FINE_LABELS_KEY
from hf_guide.errors import OptionError, SubclassError
from hf_guide.lelp.projector import SubclassProjector
from hf_guide.signal_cache.codec import CapturedExample
from hf_guide.signal_cache.config import CaptureConfig
from hf_guide.signal_cache.data import TeacherBatchCollator, is_map_style
from hf_guide.signal_cache.manifest import CaptureManifest, cache_folder
from hf_guide.signal_cache.reader import Capture
from hf_guide.signal_cache.shards import ShardWriter, shard_name
from hf_guide.signal_cache.teacher_outputs import TeacherOutputs, TeacherRunner
from hf_guide.signal_cache.writer import CaptureRunner, distributed_state, finalize_capture
from hf_guide.tasks import Task, task_of
from hf_guide.teachers.loading import load_teacher
from hf_guide.utils.distributed import barrier
from hf_guide.utils.fingerprint import tokenizer_fingerprint
from hf_guide.utils.public_names import public_name
from hf_guide.version import __version__

_WRITE_ROWS = 256


def subclass_probabilities(
    projector: SubclassProjector, embedding: Tensor, logits: Tensor, subclass_labels: Any = None
) -> Tensor:
    """Return probabilities (items, C * S), class by class, float32 or better."""
    return projector.transform(embedding, logits, subclass_labels).flatten(1)


class SubclassTeacher(TeacherRunner):
    """A teacher of whom nothing is heard but the probabilities of its subclasses."""

    def __init__(self, model: PreTrainedModel, task: Task, projector: SubclassProjector, processing_class: Any = None):
        super().__init__(model, task, processing_class)
        self.projector = projector

    def hear(
        self, batch: Mapping[str, Any], *, hidden_states: bool = False, embedding: bool = False
    ) -> TeacherOutputs:
        """Run the teacher on a collated batch; what stands for logits are the probabilities (batch, C * S)."""
        found = self.probabilities(
            {name: value for name, value in batch.items() if name != FINE_LABELS_KEY}, batch.get(FINE_LABELS_KEY)
        )
        return TeacherOutputs(
            classes=found.shape[1], logits=found, at=lambda rows, places: found, layers=(), embedding=None
        )

    def probabilities(self, batch: Mapping[str, Any], subclass_labels: Any = None) -> Tensor:
        """Return the probabilities (batch, C * S) of a collated batch."""
        heard = super().hear(batch, embedding=True)
        assert heard.embedding is not None
        finer = None if subclass_labels is None else torch.as_tensor(subclass_labels)
        return subclass_probabilities(self.projector, heard.embedding, heard.logits, finer)


def load_subclass_teacher(
    projector: SubclassProjector,
    teacher: "str | os.PathLike[str] | PreTrainedModel",
    device: torch.device | None = None,
    processing_class: Any = None,
) -> SubclassTeacher:
    """Return a teacher, loaded onto `device` where it is named, that says what its subclasses' probabilities are.

    Raises:
        SubclassError: another teacher than the projector's.
        TeacherError, TaskError: it cannot be loaded, or is of no known task.
    """
    if isinstance(teacher, (str, os.PathLike)):
        teacher = load_teacher(teacher, device=device)
    if not isinstance(teacher, PreTrainedModel) and not hasattr(teacher, "get_base_model"):
        raise OptionError(f"A teacher is a Hub id, a folder or a PreTrainedModel, not a {type(teacher).__name__}.")
    projector.check_teacher(teacher)
    return SubclassTeacher(teacher.eval(), task_of(teacher), projector, processing_class)


def targets_from_cache(
    projector: SubclassProjector, capture: Capture
) -> Callable[[Sequence[CapturedExample]], Tensor]:
    """Return what gives probabilities (examples, C * S) of captured examples.

    Raises:
        SubclassError: a capture of another projector or teacher, or one without embeddings.
    """
    if _is_target_cache(capture):
        if capture.manifest.weights != projector.fingerprint():
            raise SubclassError(
                f"{capture.folder} holds the targets of another projector: it has "
                f"{_format_settings(capture.manifest.teacher_config)} there, and {_format_settings(projector.settings())} here. Run "
                "capture_targets with this one."
            )
        return lambda examples: torch.stack([_require_tensor(each.logits) for each in examples])
    if projector.scores.needs_subclass_labels:
        raise SubclassError(
            f"The projector goes by finer labels, which {capture.folder} does not hold. Give the teacher, and the column "
            f"{FINE_LABELS_KEY!r} in the dataset."
        )
    if "embedding" not in capture.manifest.shapes:
        raise SubclassError(
            f"{capture.folder} holds no embeddings, of which the subclasses are made. Capture again with "
            "config={'embedding': True}."
        )
    projector.check_teacher(capture)

    def made(examples: Sequence[CapturedExample]) -> Tensor:
        embeddings = torch.stack([_require_tensor(each.embedding) for each in examples])
        logits = torch.stack([_require_tensor(each.logits) for each in examples])
        return subclass_probabilities(projector, embeddings, logits)

    return made


def capture_targets(
    projector: SubclassProjector,
    source: "Capture | str | os.PathLike[str] | PreTrainedModel",
    dataset: Any,
    output_dir: str | os.PathLike[str],
    *,
    processing_class: Any = None,
    data_collator: Callable[[Any], Mapping[str, Any]] | None = None,
    config: "CaptureConfig | Mapping[str, Any] | None" = None,
    dataloader_num_workers: int = 0,
    show_progress: bool = True,
) -> Capture:
    """Write the subclass probabilities of a dataset to `output_dir`: S * C numbers an example, for `SubclassLabelCollator`.

    Killed at any moment, the same call goes on where it was; under `torchrun` the processes share the work of a teacher.

    Args:
        projector: whose subclasses.
        source: the teacher, a model, folder or Hub id, which is run once over the dataset; or a capture of its logits and
            embeddings, of which all examples are taken.
        dataset: as for `capture_teacher`; None where a capture is the source.
        output_dir: a new or empty folder, or one that the same call began.
        processing_class, data_collator, config, dataloader_num_workers, show_progress: as for `capture_teacher`; of the
            config count batch_size, examples_per_shard, ignore_in_key and remove_unused_columns.

    Returns:
        The capture, opened.

    Raises:
        CaptureError: the folder holds something else; the disk is too small.
        SubclassError: another teacher than the projector's, or a capture without embeddings.
        OptionError: a teacher without a dataset.
    """
    options = CaptureConfig.parse(config)
    folder = Path(output_dir)
    cache_folder(folder).check()
    state = distributed_state()
    if isinstance(source, Capture):
        if state.is_main_process:
            _convert_cache(projector, source, folder)
        barrier()
        return Capture.open(folder)
    if not is_map_style(dataset) or not len(dataset):
        raise OptionError("A teacher needs a dataset with a length and examples by number, to run over.")
    listener = load_subclass_teacher(projector, source, state.device, processing_class)
    collate = _FineLabelCollator(listener.model, listener.task, data_collator, processing_class, options)
    manifest = _target_manifest(
        projector, listener.task, len(dataset), tokenizer_fingerprint(processing_class), options
    )
    run = CaptureRunner(folder, manifest, listener, dataset, collate, dataloader_num_workers)
    run.begin(state)
    run.write_missing(state, show_progress)
    run.finish(state)
    return Capture.open(folder)


class _FineLabelCollator(TeacherBatchCollator):
    def __init__(self, model: Any, task: Task, collator: Any, processing_class: Any, options: CaptureConfig):
        super().__init__(model, task, collator, processing_class, options.remove_unused_columns)
        self._known |= {FINE_LABELS_KEY}


def _convert_cache(projector: SubclassProjector, source: Capture, folder: Path) -> None:
    made = targets_from_cache(projector, source)
    of_source = source.manifest
    manifest = _target_manifest(projector, source.task, of_source.examples, of_source.tokenizer, of_source.config)
    resumable = cache_folder(folder)
    resumable.create(lambda: manifest.save(folder))
    there = CaptureManifest.load(folder)
    resumable.check_same_call(there.comparable(), manifest.comparable())
    if there.complete:
        return
    for number in range(manifest.shard_count):
        rows = source.shard(number)
        with ShardWriter(folder / shard_name(number), manifest.columns) as shard:
            for start in range(0, len(rows), _WRITE_ROWS):
                some = [rows.key(row) for row in range(start, min(len(rows), start + _WRITE_ROWS))]
                values = made(source.lookup(some)).float().numpy()
                shard.write(some, [{"logits": value} for value in values])
    finalize_capture(folder, manifest, {})


def _target_manifest(
    projector: SubclassProjector, task: Task, examples: int, tokenizer: str | None, options: CaptureConfig
) -> CaptureManifest:
    return CaptureManifest(
        teacher=public_name(projector.teacher or "arrays"),
        teacher_revision=None,
        teacher_class=SubclassProjector.__name__,
        teacher_config=projector.settings(),
        teacher_dtype="float32",
        weights=projector.fingerprint(),
        files=None,
        tokenizer=tokenizer,
        task=str(task),
        classes=projector.num_classes * projector.num_subclasses,
        examples=examples,
        shapes={},
        config=dataclasses.replace(options, embedding=False, hidden_states=[]),
        hf_guide_version=__version__,
    )


def _format_settings(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def _is_target_cache(capture: Capture) -> bool:
    return capture.manifest.teacher_class == SubclassProjector.__name__


def _require_tensor(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
