"""`SubclassLabelCollator`: the user's own collator, and beside what it collates the subclass probabilities to learn.

Does: read them from a capture of them, make them of a capture of embeddings or of a teacher that runs on each batch, or leave
that to the trainer and its teacher.
Does not: look at labels. A projector needs them, or the teacher's own classes, when it is fitted.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, default_data_collator

from hf_guide.distillation.subclass_logits import FINE_LABELS_KEY, TARGETS_KEY
from hf_guide.errors import OptionError, SubclassError
from hf_guide.initialization.subclass_head import get_num_subclasses
from hf_guide.lelp.projector import SubclassProjector
from hf_guide.lelp.targets import load_subclass_teacher, subclass_probabilities, targets_from_cache
from hf_guide.signal_cache.reader import Capture
from hf_guide.teachers.alignment import align_labels
from hf_guide.utils.labels import IGNORE_INDEX


class SubclassLabelCollator:
    """A collator that adds `subclass_probabilities`, (batch, C * S) class by class, for the objective `lelp`.

    They come from where they are to be had: the dataset's own column of that name; `capture`; `teacher`; or, with neither,
    what the trainer's teacher or capture says of the batch, from which the trainer makes them on its own device.

    Examples without a label (None, -1, -100, or a dataset without the column) are learned as all others are. The column
    `subclass_names` is for projectors that go by finer labels.

    Args:
        projector: a `SubclassProjector`, or its folder or Hub id.
        tokenizer_or_collator: what collates: a tokenizer, which then pads; an image processor, whose images are stacked; or a
            collator. By default tensors are stacked.
        teacher: a model, folder or Hub id, run on every batch in this process; it cannot be with DataLoader workers. Where
            it is named it runs on the CPU; load it and move it to run it elsewhere, or give it to the trainer.
        capture: what `capture_targets` wrote, or a capture of logits and embeddings. A batch with an example that is not in
            it carries no probabilities; the trainer refuses such a batch in training and evaluates it by its task.
        teacher_collator: makes the teacher's batch of the same examples, where the teacher reads something else than the
            student: another tokenizer's tokens, or images beside text.

    Raises:
        OptionError: both a teacher and a capture, or something that does not collate.
        SubclassError: a teacher or capture that the projector is not of.
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
            raise OptionError("A teacher and a capture are both given; the probabilities come from one of them.")
        if teacher_collator is not None and teacher is None and capture is None:
            raise OptionError("teacher_collator makes the batch of a teacher or capture that is given here; give one.")
        self.projector = _load_projector(projector)
        self.data_collator = _resolve_collator(tokenizer_or_collator)
        self.teacher_collator = teacher_collator
        self.capture = capture if capture is None or isinstance(capture, Capture) else Capture.open(capture)
        if self.capture is not None:
            targets_from_cache(self.projector, self.capture)  # refuses what it cannot be made of
        made_with = tokenizer_or_collator if teacher_collator is None else teacher_collator
        self._listener = None
        if teacher is not None:
            self._listener = load_subclass_teacher(self.projector, teacher, processing_class=made_with)

    @property
    def live_teacher(self) -> Any:
        """The model that the probabilities are made with here; None for a capture's, or the trainer's own."""
        return None if self._listener is None else self._listener.model

    @property
    def makes_targets(self) -> bool:
        """Whether the batch has the probabilities already; otherwise the trainer makes them, by `targets_of`."""
        return self._listener is not None or self.capture is not None

    def match(self, config: Any, temperature: float, teacher: Any) -> list[int] | None:
        """Refuse what does not go together, and say which of the projector's classes each of the student's is, by name.

        The trainer calls it, and puts the probabilities in that order.

        Args:
            config: the student's.
            temperature: what its logits are divided by.
            teacher: the trainer's model or capture, where it is to be heard; None where it cannot be compared.

        Returns:
            The order; None where it is the projector's own.

        Raises:
            SubclassError: a student with another number of outputs or subclasses; another teacher.
            OptionError: another temperature than the projector's.
            VocabularyError: classes of other names.
        """
        mine = self.projector
        if (config.num_labels, get_num_subclasses(config)) != (
            mine.num_classes * mine.num_subclasses,
            mine.num_subclasses,
        ):
            raise SubclassError(
                f"The student has {config.num_labels} outputs, {get_num_subclasses(config)} for each class; this projector's "
                f"{mine.num_classes} classes of {mine.num_subclasses} subclasses need "
                f"{mine.num_classes * mine.num_subclasses}. Make the student with num_subclasses={mine.num_subclasses}."
            )
        if temperature != mine.temperature:
            raise OptionError(
                f"temperature={temperature}, but the projector makes its probabilities at {mine.temperature}. Set "
                f"DistillationArguments(temperature={mine.temperature}), or take projector.at(temperature={temperature})."
            )
        if teacher is not None:
            mine.check_teacher(teacher)
        return align_labels(config, SimpleNamespace(id2label=dict(mine.id2label)))  # type: ignore[arg-type]

    def targets_of(self, embedding: Tensor, logits: Tensor, subclass_labels: Tensor | None = None) -> Tensor:
        """Return the probabilities (items, C * S), in the projector's order of classes, of embeddings and logits."""
        return subclass_probabilities(self.projector, embedding, logits, subclass_labels)

    def __call__(self, features: Sequence[Any]) -> dict[str, Any]:
        batch = dict(self.data_collator([_fill_missing_labels(each) for each in features]))
        labels = batch.get("labels")
        if isinstance(labels, Tensor) and not labels.is_floating_point():
            batch["labels"] = labels.masked_fill(labels == -1, IGNORE_INDEX)
        finer = batch.get(FINE_LABELS_KEY)
        if batch.get(TARGETS_KEY) is not None:
            batch[TARGETS_KEY] = torch.as_tensor(batch[TARGETS_KEY]).float().flatten(1)
        elif self.makes_targets:
            read = batch if self.teacher_collator is None else dict(self.teacher_collator(features))
            found = self._read(read) if self.capture is not None else self._hear(read, finer)
            batch.pop(FINE_LABELS_KEY, None)
            if found is not None:
                batch[TARGETS_KEY] = found
        return batch

    def _read(self, batch: Mapping[str, Any]) -> Tensor | None:
        capture = self.capture
        assert capture is not None
        keys = capture.keys(batch)
        if any(key not in capture for key in keys):
            return None
        return targets_from_cache(self.projector, capture)(capture.lookup(keys))

    def _hear(self, batch: Mapping[str, Any], finer: Any) -> Tensor:
        if get_worker_info() is not None:
            raise OptionError(
                "SubclassLabelCollator's teacher runs in the process that trains, not in a DataLoader worker. Set "
                "dataloader_num_workers=0, or give the teacher to the trainer, or capture its targets first."
            )
        assert self._listener is not None
        inputs = {name: value for name, value in batch.items() if name != FINE_LABELS_KEY}
        return self._listener.probabilities(inputs, finer).float().cpu().clone()  # no tensor of inference mode


def _fill_missing_labels(example: Any) -> Any:
    """Return an example whose missing label is a number, of which a tensor can be made."""
    if not isinstance(example, Mapping) or all(example.get(name, 0) is not None for name in ("label", "labels")):
        return example
    return {
        name: IGNORE_INDEX if name in ("label", "labels") and value is None else value
        for name, value in example.items()
    }


def _load_projector(given: Any) -> SubclassProjector:
    if isinstance(given, SubclassProjector):
        return given
    if not isinstance(given, (str, os.PathLike)):
        raise OptionError(
            f"A SubclassProjector, or its folder or Hub id, was expected first, not a {type(given).__name__}: "
            "SubclassLabelCollator(projector, tokenizer)."
        )
    return SubclassProjector.from_pretrained(given)


def _resolve_collator(given: Any) -> Callable[[Any], Mapping[str, Any]]:
    if given is None or hasattr(given, "image_mean") or hasattr(given, "image_processor"):
        return default_data_collator
    if isinstance(given, PreTrainedTokenizerBase):
        return DataCollatorWithPadding(given)
    if not callable(given):
        raise OptionError(f"A tokenizer, an image processor or a collator was expected, not a {type(given).__name__}.")
    return given
