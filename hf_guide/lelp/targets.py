"""Subclass probabilities of a batch, computed with a live teacher or from a capture, or captured themselves.

A capture of them has the format of every capture, with a `SubclassProjector` as its teacher and the probabilities instead
of a classifier's logits.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_guide.distillation.subclass_logits import FINE_LABELS_KEY, SUBCLASS_COLUMNS, take_fine_labels
from hf_guide.errors import OptionError, SubclassError
from hf_guide.lelp.projector import SubclassProjector
from hf_guide.signal_cache.codec import CapturedExample
from hf_guide.signal_cache.config import CaptureConfig
from hf_guide.signal_cache.data import TeacherBatchCollator, is_map_style
from hf_guide.signal_cache.manifest import CaptureManifest, signal_cache_folder
from hf_guide.signal_cache.reader import Capture
from hf_guide.signal_cache.shards import ShardWriter, shard_name
from hf_guide.signal_cache.writer import CaptureRunner, distributed_state, finalize_capture
from hf_guide.tasks import Task, task_of
from hf_guide.teachers.forward import TeacherOutputs, TeacherRunner
from hf_guide.teachers.loading import load_teacher
from hf_guide.utils.distributed import barrier
from hf_guide.utils.fingerprint import tokenizer_fingerprint
from hf_guide.utils.public_names import public_name
from hf_guide.version import __version__

_WRITE_ROWS = 256


def subclass_probabilities(
    projector: SubclassProjector, embedding: Tensor, logits: Tensor, fine_labels: Any = None
) -> Tensor:
    """Return the probabilities (items, C * S), class by class, float32 or better."""
    return projector.transform(embedding, logits, fine_labels).flatten(1)


class SubclassTeacher(TeacherRunner):
    """A teacher whose only output is the probabilities of its subclasses."""

    def __init__(self, model: PreTrainedModel, task: Task, projector: SubclassProjector, processing_class: Any = None):
        super().__init__(model, task, processing_class)
        self.projector = projector

    def forward(
        self, batch: Mapping[str, Any], *, hidden_states: bool = False, features: bool = False
    ) -> TeacherOutputs:
        """Run the teacher on a collated batch; return the probabilities (batch, C * S) as its logits."""
        inputs = dict(batch)
        fine_labels = take_fine_labels(inputs)
        probabilities = self.probabilities(inputs, fine_labels)
        return TeacherOutputs(
            classes=probabilities.shape[1],
            logits=probabilities,
            logits_at=lambda rows, positions: probabilities,
            hidden_states=(),
            features=None,
        )

    def probabilities(self, batch: Mapping[str, Any], fine_labels: Any = None) -> Tensor:
        """Return the probabilities (batch, C * S) of a collated batch."""
        outputs = super().forward(batch, features=True)
        assert outputs.features is not None
        fine_labels = None if fine_labels is None else torch.as_tensor(fine_labels)
        return subclass_probabilities(self.projector, outputs.features, outputs.logits, fine_labels)


def load_subclass_teacher(
    projector: SubclassProjector,
    teacher: "str | os.PathLike[str] | PreTrainedModel",
    device: torch.device | None = None,
    processing_class: Any = None,
) -> SubclassTeacher:
    """Return a teacher that outputs the probabilities of its subclasses; one that is a name or a folder is loaded to `device`.

    Raises:
        OptionError: Not a name, a folder or a model.
        SubclassError: Another teacher than the projector's.
        TeacherError, TaskError: It cannot be loaded, or its task is not known.
    """
    model = load_teacher(teacher, device=device)
    projector.check_teacher(model)
    return SubclassTeacher(model.eval(), task_of(model), projector, processing_class)


def targets_from_cache(
    projector: SubclassProjector, capture: Capture
) -> Callable[[Sequence[CapturedExample]], Tensor]:
    """Return a function from captured examples to their probabilities (examples, C * S).

    Raises:
        SubclassError: The capture is of another projector or teacher, or holds no embeddings.
    """
    if _is_target_cache(capture):
        if capture.manifest.weights != projector.fingerprint():
            raise SubclassError(
                f"{capture.folder} holds the targets of another projector, with "
                f"{_format_settings(capture.manifest.teacher_config)}; this one has {_format_settings(projector.settings())}. "
                "Run capture_targets with this one."
            )
        return lambda examples: torch.stack([_require_tensor(example.logits) for example in examples])
    if projector.scores.needs_fine_labels:
        raise SubclassError(
            f"This projector splits by fine labels, which {capture.folder} does not hold. Give the teacher, and the column "
            f"{FINE_LABELS_KEY!r} in the dataset."
        )
    if "features" not in capture.manifest.shapes:
        raise SubclassError(
            f"{capture.folder} holds no embeddings, which the subclasses are computed from. Capture again with "
            "config={'save_penultimate': True}."
        )
    projector.check_teacher(capture)

    def compute(examples: Sequence[CapturedExample]) -> Tensor:
        embeddings = torch.stack([_require_tensor(example.features) for example in examples])
        logits = torch.stack([_require_tensor(example.logits) for example in examples])
        return subclass_probabilities(projector, embeddings, logits)

    return compute


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

    A killed run is resumed by the same call; under `torchrun` the processes share the work of a teacher.

    Args:
        projector: Of the teacher.
        source: The teacher, a model, folder or Hub id, which is run once over the dataset; or a capture of its logits and
            embeddings, whose examples are all converted.
        dataset: As for `capture_teacher`; None where a capture is the source.
        output_dir: A new or empty folder, or one that the same call began.
        processing_class, data_collator, config, dataloader_num_workers, show_progress: As for `capture_teacher`; only what
            concerns batches, shards, keys and columns is read from the config.

    Returns:
        The capture, opened.

    Raises:
        CaptureError: The folder holds something else; the disk is too small.
        SubclassError: Another teacher than the projector's, or a capture without embeddings.
        OptionError: A teacher without a dataset.

    Example:
        >>> from hf_guide import SubclassLabelCollator, fit_subclasses
        >>> from transformers import AutoTokenizer
        >>> name = "distilbert/distilbert-base-uncased-finetuned-sst-2-english"
        >>> tokenizer = AutoTokenizer.from_pretrained(name)
        >>> processed = dataset.map(lambda row: tokenizer(row["text"])).remove_columns("text")
        >>> projector = fit_subclasses(name, processed, 4, processing_class=tokenizer, show_progress=False)
        >>> options = {"processing_class": tokenizer, "show_progress": False}
        >>> capture = capture_targets(projector, name, processed, "targets", **options)
        >>> collator = SubclassLabelCollator(projector, tokenizer, capture=capture)
        >>> collator([processed[0], processed[1]])["subclass_probabilities"].shape
        torch.Size([2, 8])
    """
    options = CaptureConfig.parse(config)
    folder = Path(output_dir)
    signal_cache_folder(folder).check()
    state = distributed_state()
    if isinstance(source, Capture):
        if state.is_main_process:
            _convert_cache(projector, source, folder)
        barrier()
        return Capture.open(folder)
    if not is_map_style(dataset) or not len(dataset):
        raise OptionError("A teacher needs a map-style dataset, with a length and examples by index.")
    teacher = load_subclass_teacher(projector, source, state.device, processing_class)
    drop = options.remove_unused_columns
    collate = TeacherBatchCollator(
        teacher.model, teacher.task, data_collator, processing_class, drop, SUBCLASS_COLUMNS
    )
    manifest = _target_manifest(
        projector, teacher.task, len(dataset), tokenizer_fingerprint(processing_class), options
    )
    runner = CaptureRunner(folder, manifest, teacher, dataset, collate, dataloader_num_workers)
    runner.begin(state)
    runner.write_missing(state, show_progress)
    runner.finish(state)
    return Capture.open(folder)


def _convert_cache(projector: SubclassProjector, source: Capture, folder: Path) -> None:
    """Write the probabilities of all examples of a capture of embeddings."""
    compute_targets = targets_from_cache(projector, source)
    examples, tokenizer, config = source.manifest.examples, source.manifest.tokenizer, source.manifest.config
    manifest = _target_manifest(projector, source.task, examples, tokenizer, config)
    resumable = signal_cache_folder(folder)
    resumable.create(lambda: manifest.save(folder))
    existing = CaptureManifest.load(folder)
    resumable.check_same_call(existing.comparable(), manifest.comparable())
    if existing.complete:
        return
    for number in range(manifest.shard_count):
        rows = source.shard(number)
        with ShardWriter(folder / shard_name(number), manifest.columns) as shard:
            for start in range(0, len(rows), _WRITE_ROWS):
                keys = [rows.key(row) for row in range(start, min(len(rows), start + _WRITE_ROWS))]
                values = compute_targets(source.lookup(keys)).float().numpy()
                shard.write(keys, [{"logits": value} for value in values])
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
        config=dataclasses.replace(options, save_penultimate=False, hidden_layers=[]),
        hf_guide_version=__version__,
    )


def _format_settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _is_target_cache(capture: Capture) -> bool:
    return capture.manifest.teacher_class == SubclassProjector.__name__


def _require_tensor(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
