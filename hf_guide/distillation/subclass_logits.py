"""The outputs of a student with subclasses, S logits for each of C classes, as class logits; and the targets that it learns.

Does: reduce subclass logits to class logits for everything that is about classes, and find the subclass probabilities of a
batch. Does not: find subclasses or compute their probabilities (`hf_guide.lelp` does).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from hf_guide.errors import OptionError, TaskError
from hf_guide.initialization.subclass_head import get_num_subclasses
from hf_guide.teachers.signals import TeacherSignal
from hf_guide.utils.deprecation import warn_renamed
from hf_guide.utils.labels import IGNORE_INDEX

TARGETS_KEY = "subclass_probabilities"
"""The key in a batch of the subclass probabilities to learn: (batch, C * S), class by class, or (batch, C, S)."""

FINE_LABELS_KEY = "fine_labels"
"""The key in a batch of fine labels, (batch,), for projectors of the splitter "labels"."""

OLD_FINE_LABELS_KEY = "subclass_labels"
"""Deprecated: the key of fine labels in an earlier release."""

SUBCLASS_COLUMNS = (TARGETS_KEY, FINE_LABELS_KEY, OLD_FINE_LABELS_KEY)
"""Columns of a dataset that the collator or the trainer reads and the student's forward does not take."""


@runtime_checkable
class SubclassTargetProvider(Protocol):
    """A collator that adds subclass probabilities to batches, or computes them from a teacher's embeddings and logits."""

    makes_targets: bool
    """Whether it adds them to batches itself."""

    def match(self, config: Any, temperature: float, teacher: Any) -> list[int] | None:
        """Check student, temperature and teacher; return the provider's class of each of the student's, None for the same.

        Raises:
            SubclassError, OptionError, VocabularyError: The probabilities are not for this student, temperature or teacher.
        """

    def targets_of(self, embedding: Tensor, logits: Tensor, fine_labels: Tensor | None = None) -> Tensor:
        """Return probabilities (items, C * S), in its own order of classes, of embeddings (items, D) and logits (items, C)."""


def find_target_provider(collator: Any) -> SubclassTargetProvider | None:
    """Return the collator, or the one that it wraps, if it provides subclass probabilities."""
    while collator is not None:
        if isinstance(collator, SubclassTargetProvider):
            return collator
        collator = getattr(collator, "data_collator", None)
    return None


def take_fine_labels(batch: dict[str, Any]) -> Any:
    """Remove the fine labels from a batch and return them; None if there are none."""
    if OLD_FINE_LABELS_KEY in batch:
        warn_renamed("column of the dataset", OLD_FINE_LABELS_KEY, FINE_LABELS_KEY)
        batch.setdefault(FINE_LABELS_KEY, batch.pop(OLD_FINE_LABELS_KEY))
    return batch.pop(FINE_LABELS_KEY, None)


def class_logits(logits: Tensor, num_subclasses: int) -> Tensor:
    """Return class logits (..., C) of subclass logits (..., C * S), class by class: their log-sum-exp, float32 or better.

    The softmax of class logits is the sum of the subclasses' probabilities.

    Example:
        >>> class_logits(torch.zeros(1, 6), num_subclasses=2).exp()
        tensor([[2., 2., 2.]])
    """
    if num_subclasses == 1:
        return logits
    wide = logits.float() if logits.dtype.itemsize < 4 else logits
    return wide.unflatten(-1, (-1, num_subclasses)).logsumexp(-1)


class ClassLogitsWrapper(nn.Module):
    """A student with subclasses whose outputs are class logits and whose loss is that of the class logits.

    Attributes:
        subclass_logits: Of the last forward pass.
    """

    def __init__(self, model: nn.Module, num_subclasses: int):
        super().__init__()
        self.model, self.num_subclasses = model, num_subclasses
        self.training = model.training
        self.subclass_logits: Tensor | None = None

    def forward(
        self, labels: Tensor | None = None, num_items_in_batch: Tensor | int | None = None, **inputs: Any
    ) -> dict[str, Any]:
        """Return the model's outputs with class logits, and with `labels` their cross-entropy, a mean over the labels."""
        outputs = self.model(**inputs)
        named = dict(outputs) if isinstance(outputs, dict) else {"logits": outputs[0]}
        self.subclass_logits = named["logits"]
        named["logits"] = class_logits(self.subclass_logits, self.num_subclasses)
        if labels is None:
            return named
        loss = nn.functional.cross_entropy(named["logits"], labels, ignore_index=IGNORE_INDEX, reduction="sum")
        labeled = (labels != IGNORE_INDEX).sum().clamp(min=1)
        return {"loss": loss / (labeled if num_items_in_batch is None else num_items_in_batch), **named}


@dataclass(frozen=True)
class SubclassTargets:
    """The subclass probabilities that one student learns, from the batch or computed from a teacher's signals.

    Attributes:
        outputs: The student's, C * S.
        num_subclasses: S.
        learned: Whether a loss term reads them.
        provider: The collator that adds them to batches, or computes them from a teacher's signals.
        order: The provider's class of each of the student's; None for the same order. It is stored here, because one
            collator may serve the trainers of several students.
    """

    outputs: int = 0
    num_subclasses: int = 1
    learned: bool = False
    provider: SubclassTargetProvider | None = None
    order: list[int] | None = None

    def wrap_in_class_logits(self, model: nn.Module) -> nn.Module:
        """Return the student with class logits for outputs; a student without subclasses is returned as it is."""
        plain = self.num_subclasses == 1 and not self.learned
        if plain or isinstance(model, ClassLogitsWrapper):
            return model
        return ClassLogitsWrapper(model, self.num_subclasses)

    def needs(self, inputs: Mapping[str, Any]) -> set[TeacherSignal]:
        """Return the teacher signals that the probabilities are computed from, if the batch does not hold them."""
        computes = self.learned and self.provider is not None and not self.provider.makes_targets
        return (
            {TeacherSignal.LOGITS, TeacherSignal.FEATURES} if computes and inputs.get(TARGETS_KEY) is None else set()
        )

    def batch_targets(
        self,
        inputs: Mapping[str, Any],
        mask: Tensor,
        signals: Sequence[Any],
        orders: Sequence[list[int] | None],
        *,
        training: bool,
    ) -> Tensor | None:
        """Return the probabilities (items, C * S) of a batch's items; None if they are not learned, or absent in evaluation.

        Args:
            signals: Of each teacher.
            orders: For each teacher its class of each of the student's; None for the same order.

        Raises:
            TaskError: A training batch has none, or they have another shape than the student's outputs or do not sum to 1.
        """
        if not self.learned:
            return None
        targets = inputs.get(TARGETS_KEY)
        if targets is not None:
            flat = torch.as_tensor(targets).flatten(1)
            if flat.shape[1] != self.outputs:
                raise TaskError(
                    f"{TARGETS_KEY} in the batch has the shape {tuple(targets.shape)}; the student has {self.outputs} "
                    f"outputs, which are {self.outputs // self.num_subclasses} classes of {self.num_subclasses} subclasses. "
                    "Make student and projector with the same num_subclasses."
                )
            probabilities = flat.to(mask.device)[mask]
            sums = probabilities.sum(1)
            if len(sums) and not (bool((probabilities >= 0).all()) and bool(((sums - 1).abs() < 0.01).all())):
                raise TaskError(
                    f"{TARGETS_KEY} in the batch are no probabilities: they sum to {sums.min().item():.4g} to "
                    f"{sums.max().item():.4g} an example, and the least is {probabilities.min().item():.4g}. Over the "
                    "subclasses of all classes they must be at least 0 and sum to 1."
                )
            return self._ordered(probabilities)
        if self.needs(inputs) and len(signals) == 1 and self.provider is not None:
            logits = signals[0].target(slice(None)).logits
            fine_labels = take_fine_labels(dict(inputs))
            fine_labels = None if fine_labels is None else fine_labels[mask]
            return self._ordered(
                self.provider.targets_of(signals[0].features, _undo_alignment(logits, orders[0]), fine_labels)
            )
        if training:
            raise TaskError(
                f"A loss term needs subclass probabilities, but the batch has no {TARGETS_KEY}; it has {sorted(inputs)}. "
                "Pass data_collator=SubclassLabelCollator(projector, ...) and a teacher, or give the dataset that column."
            )
        return None

    def _ordered(self, probabilities: Tensor) -> Tensor:
        if self.order is None:
            return probabilities
        return probabilities.unflatten(1, (-1, self.num_subclasses))[:, self.order].flatten(1)


def build_subclass_targets(
    config: Any,
    collator: Any,
    temperature: float,
    teachers: Sequence[Any],
    *,
    learned: bool,
    columns: Collection[str],
    keeps_columns: bool,
) -> SubclassTargets:
    """Return the subclass probabilities that a student learns, after checking that they are for this student.

    Args:
        config: The student's.
        collator: The trainer's.
        temperature: Of the student's logits.
        teachers: The trainer's: models, captures, or None for one that cannot be compared.
        learned: Whether a loss term reads the probabilities.
        columns: Of the training dataset, as far as they are known.
        keeps_columns: Whether the collator is passed columns that the student does not take.

    Raises:
        TaskError: The student's outputs are not classes times subclasses.
        OptionError: As `SubclassTargetProvider.match`, or there is not exactly one teacher to compute them from.
    """
    count = get_num_subclasses(config)
    provider = find_target_provider(collator) if learned else None
    order = None
    if provider is not None:
        if not provider.makes_targets and len(teachers) != 1 and TARGETS_KEY not in columns:
            raise OptionError(
                f"Subclass probabilities are computed from the signals of one teacher; there are {len(teachers)}. Pass one to "
                f"the trainer or the collator, or a capture of it; or give the dataset the column {TARGETS_KEY}."
            )
        if getattr(provider, "teacher_collator", None) is not None and not keeps_columns:
            raise OptionError(
                "teacher_collator makes the teacher's batch from columns that the student does not take, and Trainer removes "
                "these. Set DistillationArguments(remove_unused_columns=False)."
            )
        teacher = None if provider.makes_targets or len(teachers) != 1 else teachers[0]
        order = provider.match(config, temperature, teacher)
    return SubclassTargets(getattr(config, "num_labels", 0), count, learned, provider, order)


def _undo_alignment(logits: Tensor, order: list[int] | None) -> Tensor:
    """Return a teacher's logits in its own order of classes, given in the student's."""
    return logits if order is None else logits[:, torch.tensor(order, device=logits.device).argsort()]
