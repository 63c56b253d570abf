"""Students that tell the subclasses of a class apart: S logits for each of C classes, whose log-sum-exp is the class's own.

Does: read from a config how many subclasses there are, and show everything that speaks of classes the class logits.
Does not: say what the subclasses are (`hf_guide.lelp` does).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from hf_guide.errors import OptionError, TaskError
from hf_guide.initialization.subclass_head import get_num_subclasses
from hf_guide.teachers.signals import TeacherSignal
from hf_guide.utils.labels import IGNORE_INDEX

TARGETS_KEY = "subclass_probabilities"
"""The name in a batch of what a student with subclasses learns: (batch, C * S), class by class, or (batch, C, S)."""

FINE_LABELS_KEY = "subclass_labels"
"""The name in a batch of finer labels, (batch,), for those who have them."""


@runtime_checkable
class SubclassTargetProvider(Protocol):
    """A collator that gives a batch's subclass probabilities, or makes them of what a teacher is heard to say."""

    makes_targets: bool
    """Whether the batch has them already."""

    def match(self, config: Any, temperature: float, teacher: Any) -> list[int] | None:
        """Refuse a student, a temperature or a teacher that they are not for; return which class each of the student's is."""

    def targets_of(self, embedding: Tensor, logits: Tensor, subclass_labels: Tensor | None = None) -> Tensor:
        """Return the probabilities (items, C * S), in its own order, of embeddings (items, D) and logits (items, C)."""


def find_target_provider(collator: Any) -> SubclassTargetProvider | None:
    """Return the collator itself or the one that it wraps, where it gives subclass probabilities."""
    while collator is not None:
        if isinstance(collator, SubclassTargetProvider):
            return collator
        collator = getattr(collator, "data_collator", None)
    return None


def class_logits(logits: Tensor, num_subclasses: int) -> Tensor:
    """Return class logits (..., C) of subclass logits (..., C * S), class by class: log-sum-exp, float32 or better.

    Their softmax is the sum of the subclasses' probabilities.
    """
    if num_subclasses == 1:
        return logits
    wide = logits.float() if logits.dtype.itemsize < 4 else logits
    return wide.unflatten(-1, (-1, num_subclasses)).logsumexp(-1)


class ClassLogitsWrapper(nn.Module):
    """A student with subclasses, called as it is and seen in classes: its loss is that of the class logits.

    Args:
        items: how many items the batch has, where not all of them have labels; by default those that have.

    Attributes:
        heard: the subclass logits of the last call.
    """

    def __init__(self, model: nn.Module, num_subclasses: int, items: Tensor | None = None):
        super().__init__()
        self.model, self.num_subclasses, self.items = model, num_subclasses, items
        self.training = model.training
        self.heard: Tensor | None = None

    def forward(
        self, labels: Tensor | None = None, num_items_in_batch: Tensor | int | None = None, **inputs: Any
    ) -> dict[str, Any]:
        """Return the model's outputs with class logits, and with `labels` their cross-entropy, a mean over the items."""
        outputs = self.model(**inputs)
        named = dict(outputs) if isinstance(outputs, dict) else {"logits": outputs[0]}
        self.heard = named["logits"]
        named["logits"] = class_logits(self.heard, self.num_subclasses)
        if labels is None:
            return named
        loss = nn.functional.cross_entropy(named["logits"], labels, ignore_index=IGNORE_INDEX, reduction="sum")
        own = (labels != IGNORE_INDEX).sum() if self.items is None else self.items
        return {"loss": loss / (own.clamp(min=1) if num_items_in_batch is None else num_items_in_batch), **named}


@dataclass(frozen=True)
class SubclassTargets:
    """Where a student's subclass probabilities come from, batch by batch.

    Attributes:
        outputs: the student's, C * S.
        num_subclasses: S.
        learned: whether the objective has them.
        source: the collator that gives them, or that makes them of a teacher's signals.
        order: which of the source's classes each of the student's is; None for the same order. One collator may serve the
            trainers of several students, so it is kept here.
    """

    outputs: int = 0
    num_subclasses: int = 1
    learned: bool = False
    source: SubclassTargetProvider | None = None
    order: list[int] | None = None

    def in_classes(self, model: nn.Module, items: Tensor | None = None) -> nn.Module:
        """Return the student as it is seen in classes; itself where it has nothing but classes."""
        plain = self.num_subclasses == 1 and not self.learned
        return (
            model
            if plain or isinstance(model, ClassLogitsWrapper)
            else ClassLogitsWrapper(model, self.num_subclasses, items)
        )

    def needs(self, inputs: Mapping[str, Any]) -> set[TeacherSignal]:
        """Return what a teacher must be heard to say, where the batch has no probabilities and they can be made."""
        make = self.learned and self.source is not None and not self.source.makes_targets
        return {TeacherSignal.LOGITS, TeacherSignal.FEATURES} if make and inputs.get(TARGETS_KEY) is None else set()

    def batch_targets(
        self,
        inputs: Mapping[str, Any],
        mask: Tensor,
        signals: Sequence[Any],
        orders: Sequence[list[int] | None],
        *,
        training: bool,
    ) -> Tensor | None:
        """Return the probabilities (items, C * S) of a batch's items; None where they are not learned, or not there.

        Args:
            signals: what the teachers say.
            orders: for each teacher, which of its classes each of the student's is; None for the same order.

        Raises:
            TaskError: a batch to train on has none, or they are not of the student's shape, or no probabilities.
        """
        if not self.learned:
            return None
        given = inputs.get(TARGETS_KEY)
        if given is not None:
            found = torch.as_tensor(given).flatten(1)
            if found.shape[1] != self.outputs:
                raise TaskError(
                    f"{TARGETS_KEY} in the batch has the shape {tuple(given.shape)}; the student has {self.outputs} outputs, "
                    f"which are {self.outputs // self.num_subclasses} classes of {self.num_subclasses} subclasses. "
                    "Make student and projector with the same num_subclasses."
                )
            found = found.to(mask.device)[mask]
            off = (found.sum(1) - 1).abs()
            if len(found) and not (bool((found >= 0).all()) and bool((off < 0.01).all())):
                raise TaskError(
                    f"{TARGETS_KEY} in the batch are no probabilities: they sum to {found.sum(1).min().item():.4g} to "
                    f"{found.sum(1).max().item():.4g} an example, and the least is {found.min().item():.4g}. Over the "
                    "subclasses of all classes they are at least 0 and sum to 1."
                )
            return self._ordered(found)
        if self.needs(inputs) and len(signals) == 1 and self.source is not None:
            logits = signals[0].target(slice(None)).logits
            finer = inputs.get(FINE_LABELS_KEY)
            return self._ordered(
                self.source.targets_of(
                    signals[0].embedding, _undo_alignment(logits, orders[0]), None if finer is None else finer[mask]
                )
            )
        if training:
            raise TaskError(
                f"The objective has the subclasses of a teacher, but the batch has no {TARGETS_KEY}; it has {sorted(inputs)}. "
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
    """Return where a student's subclass probabilities come from.

    Args:
        config: the student's.
        collator: the trainer's.
        temperature: what the student's logits are divided by.
        teachers: the trainer's: models, captures, or None for one that cannot be compared.
        learned: whether the objective has them.
        columns: of the dataset to train on, as far as they are known.
        keeps_columns: whether the collator sees those columns too that the student does not read.

    Raises:
        TaskError: a student whose outputs are not classes times subclasses.
        OptionError: what the collator refuses, or there is not one teacher to make them of.
    """
    count = get_num_subclasses(config)
    source = find_target_provider(collator) if learned else None
    order = None
    if source is not None:
        if not source.makes_targets and len(teachers) != 1 and TARGETS_KEY not in columns:
            raise OptionError(
                f"The subclass probabilities are made of what one teacher says; there are {len(teachers)}. Pass teacher= or a "
                f"capture to the trainer, or to the collator; or give the dataset the column {TARGETS_KEY}."
            )
        if getattr(source, "teacher_collator", None) is not None and not keeps_columns:
            raise OptionError(
                "teacher_collator makes the teacher's batch of columns that the student does not read, and Trainer removes "
                "these. Set DistillationArguments(remove_unused_columns=False)."
            )
        heard = None if source.makes_targets or len(teachers) != 1 else teachers[0]
        order = source.match(config, temperature, heard)
    return SubclassTargets(getattr(config, "num_labels", 0), count, learned, source, order)


def _undo_alignment(logits: Tensor, order: list[int] | None) -> Tensor:
    """A teacher's logits in its own order of classes, of those that were put in the student's."""
    return logits if order is None else logits[:, torch.tensor(order, device=logits.device).argsort()]
