"""`SubclassLabelCollator`: adds subclass probabilities to the batches of another collator.

Does: read them from a capture, compute them from captured embeddings or with a teacher that runs on each batch, or leave that
to the trainer and its teacher.
Does not: read labels. Only fitting a projector needs them, or the classes that the teacher predicts.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, default_data_collator

from hf_guide.distillation.subclass_logits import FINE_LABELS_KEY, TARGETS_KEY, take_fine_labels
from hf_guide.errors import OptionError, SubclassError
from hf_guide.initialization.subclass_head import get_num_subclasses
from hf_guide.lelp.projector import SubclassProjector
from hf_guide.lelp.targets import load_subclass_teacher, subclass_probabilities, targets_from_cache
from hf_guide.signal_cache.reader import Capture
from hf_guide.teachers.alignment import align_labels
from hf_guide.utils.labels import IGNORE_INDEX


class SubclassLabelCollator:
    """A collator that adds `subclass_probabilities`, (batch, C * S) class by class, for the loss term `lelp`.

    They come from, in this order: the dataset's column of that name; `capture`; `teacher`; or, with neither, the trainer's
    teacher or capture, from whose signals the trainer computes them on its own device.

    Examples without a label (None, -1, -100, or a dataset without the column) are learned like all others. The column
    `fine_labels` is for projectors of the splitter "labels".

    Args:
        projector: A `SubclassProjector`, or its folder or Hub id.
        tokenizer_or_collator: A tokenizer, which then pads; an image processor, whose images are stacked; or a collator. None
            stacks tensors.
        teacher: A model, folder or Hub id, run on every batch in this process, so not with DataLoader workers. A name or
            folder is loaded to the CPU; to run it elsewhere load and move it, or pass it to the trainer.
        capture: As `capture_targets` wrote it, or a capture of logits and embeddings. A batch with an example that is not in
            it gets no probabilities: the trainer raises in training, and evaluates such a batch by its task loss.
        teacher_collator: Makes the teacher's batch from the same examples, where the teacher reads something else than the
            student: another tokenizer's tokens, or images in addition to text.

    Raises:
        OptionError: Both a teacher and a capture, or something that does not collate.
        SubclassError: The projector was fitted to another teacher.

    Example:
        >>> from hf_guide import fit_subclasses
        >>> from transformers import AutoTokenizer
        >>> name = "distilbert/distilbert-base-uncased-finetuned-sst-2-english"
        >>> tokenizer = AutoTokenizer.from_pretrained(name)
        >>> processed = dataset.map(lambda row: tokenizer(row["text"])).remove_columns("text")
        >>> projector = fit_subclasses(name, processed, 4, processing_class=tokenizer, show_progress=False)
        >>> collator = SubclassLabelCollator(projector, tokenizer, teacher=name)
        >>> collator([processed[0], processed[1]])["subclass_probabilities"].shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        projector: "SubclassProjector | str",
        tokenizer_or_collator: Any = None,
        *,
        teacher: Any = None,
        capture: "Capture | str | None" = None,
        teacher_collator: Callable[[Any], Mapping[str, Any]] | None = None,
    ):
        if teacher is not None and capture is not None:
            raise OptionError("A teacher and a capture were both given; pass one of them.")
        if teacher_collator is not None and teacher is None and capture is None:
            raise OptionError(
                "teacher_collator makes the batch of a teacher or capture that is passed here; pass one."
            )
        self.projector = _load_projector(projector)
        self.data_collator = _resolve_collator(tokenizer_or_collator)
        self.teacher_collator = teacher_collator
        self.capture = capture if capture is None or isinstance(capture, Capture) else Capture.open(capture)
        if self.capture is not None:
            targets_from_cache(self.projector, self.capture)  # raises where the targets cannot be computed from it
        processing_class = tokenizer_or_collator if teacher_collator is None else teacher_collator
        self._teacher = None
        if teacher is not None:
            self._teacher = load_subclass_teacher(self.projector, teacher, processing_class=processing_class)

    @property
    def live_teacher(self) -> Any:
        """The model that runs in this collator; None with a capture, or with the trainer's teacher."""
        return None if self._teacher is None else self._teacher.model

    @property
    def makes_targets(self) -> bool:
        """Whether the batch holds the probabilities already; otherwise the trainer computes them, by `targets_of`."""
        return self._teacher is not None or self.capture is not None

    def match(self, config: Any, temperature: float, teacher: Any) -> list[int] | None:
        """Check student, temperature and teacher; return the projector's class of each of the student's, by name.

        The trainer calls it, and puts the probabilities in that order.

        Args:
            config: The student's.
            temperature: Of its logits in the loss.
            teacher: The trainer's model or capture, if the probabilities are computed from its signals; else None.

        Returns:
            The order; None where it is the projector's own.

        Raises:
            SubclassError: The student has another number of outputs or subclasses; another teacher.
            OptionError: Another temperature than the projector's.
            VocabularyError: Classes of other names.
        """
        projector = self.projector
        outputs, num_subclasses = projector.num_classes * projector.num_subclasses, projector.num_subclasses
        if (config.num_labels, get_num_subclasses(config)) != (outputs, num_subclasses):
            raise SubclassError(
                f"The student has {config.num_labels} outputs, {get_num_subclasses(config)} for each class; this projector's "
                f"{projector.num_classes} classes of {num_subclasses} subclasses need {outputs}. Make the student with "
                f"num_subclasses={num_subclasses}."
            )
        if temperature != projector.temperature:
            raise OptionError(
                f"temperature={temperature}, but the projector's probabilities are those at {projector.temperature}. Set "
                f"DistillationArguments(temperature={projector.temperature}), or take "
                f"projector.with_temperature({temperature})."
            )
        if teacher is not None:
            projector.check_teacher(teacher)
        return align_labels(config, SimpleNamespace(id2label=dict(projector.id2label)))  # type: ignore[arg-type]

    def targets_of(self, embedding: Tensor, logits: Tensor, fine_labels: Tensor | None = None) -> Tensor:
        """Return the probabilities (items, C * S), in the projector's order of classes, of embeddings and logits."""
        return subclass_probabilities(self.projector, embedding, logits, fine_labels)

    def __call__(self, features: Sequence[Any]) -> dict[str, Any]:
        """Collate examples and add the subclass targets."""
        batch = dict(self.data_collator([_fill_missing_labels(example) for example in features]))
        labels = batch.get("labels")
        if isinstance(labels, Tensor) and not labels.is_floating_point():
            batch["labels"] = labels.masked_fill(labels == -1, IGNORE_INDEX)
        fine_labels = take_fine_labels(batch)
        if batch.get(TARGETS_KEY) is not None:
            batch[TARGETS_KEY] = torch.as_tensor(batch[TARGETS_KEY]).float().flatten(1)
        elif self.makes_targets:
            inputs = batch if self.teacher_collator is None else dict(self.teacher_collator(features))
            targets = self._lookup(inputs) if self.capture is not None else self._run_teacher(inputs, fine_labels)
            if targets is not None:
                batch[TARGETS_KEY] = targets
        elif fine_labels is not None:
            batch[FINE_LABELS_KEY] = fine_labels  # for the trainer
        return batch

    def _lookup(self, batch: Mapping[str, Any]) -> Tensor | None:
        capture = self.capture
        assert capture is not None
        keys = capture.keys(batch)
        if any(key not in capture for key in keys):
            return None
        return targets_from_cache(self.projector, capture)(capture.lookup(keys))

    def _run_teacher(self, batch: Mapping[str, Any], fine_labels: Any) -> Tensor:
        if get_worker_info() is not None:
            raise OptionError(
                "SubclassLabelCollator's teacher runs in the training process, not in a DataLoader worker. Set "
                "dataloader_num_workers=0, or pass the teacher to the trainer, or capture its targets first."
            )
        assert self._teacher is not None
        inputs = dict(batch)
        take_fine_labels(inputs)
        probabilities = self._teacher.probabilities(inputs, fine_labels)
        return probabilities.float().cpu().clone()  # no tensor of inference mode


def _fill_missing_labels(example: Any) -> Any:
    """Return an example with -100 for a missing label, so that it can be put into a tensor."""
    if not isinstance(example, Mapping) or all(example.get(name, 0) is not None for name in ("label", "labels")):
        return example
    return {
        name: IGNORE_INDEX if name in ("label", "labels") and value is None else value
        for name, value in example.items()
    }


def _load_projector(projector: Any) -> SubclassProjector:
    if isinstance(projector, SubclassProjector):
        return projector
    if not isinstance(projector, (str, os.PathLike)):
        raise OptionError(
            f"The first argument must be a SubclassProjector, or its folder or Hub id; found a {type(projector).__name__}. "
            "Call SubclassLabelCollator(projector, tokenizer)."
        )
    return SubclassProjector.from_pretrained(projector)


def _resolve_collator(tokenizer_or_collator: Any) -> Callable[[Any], Mapping[str, Any]]:
    if tokenizer_or_collator is None or any(
        hasattr(tokenizer_or_collator, name) for name in ("image_mean", "image_processor")
    ):
        return default_data_collator
    if isinstance(tokenizer_or_collator, PreTrainedTokenizerBase):
        return DataCollatorWithPadding(tokenizer_or_collator)
    if not callable(tokenizer_or_collator):
        raise OptionError(
            "tokenizer_or_collator must be a tokenizer, an image processor or a collator; found a "
            f"{type(tokenizer_or_collator).__name__}."
        )
    return tokenizer_or_collator  # type: ignore[no-any-return]
