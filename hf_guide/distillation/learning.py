"""One batch through the student: the sum of every term over its items, with gradient.

A language model whose head is known never makes all its logits: its losses are computed inside the head's forward, where
sharded weights are whole, over chunks of tokens. Every other model gives its logits as it always does.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_guide.distillation.arguments import DistillationArguments
from hf_guide.distillation.divergences import Dense, TopK
from hf_guide.distillation.embeddings import embedding_per_item, find_classifier, heard_embeddings
from hf_guide.distillation.heads import Head, chunked_loss, without_logits
from hf_guide.distillation.layers import hidden_states_of
from hf_guide.distillation.objectives import TASK_LOSS, Needs, Term, registered_terms
from hf_guide.distillation.projections import Projections
from hf_guide.distillation.subclasses import InClasses
from hf_guide.distillation.tasks import IGNORED, Task, mean_per_item
from hf_guide.distillation.teachers import Signals
from hf_guide.errors import OptionError, TaskError

AGREEMENT = "teacher_agreement"
TEACHER_LOSS = "teacher_ce"

_OF_LOGITS = (Needs.LOGITS, Needs.LABELS, Needs.SUBCLASSES)

TaskLoss = Callable[[dict[str, Any]], tuple[Tensor, Any]]


@dataclass(frozen=True)
class Batch:
    """A batch, its items and what the teachers said of it.

    Attributes:
        inputs: what the student is called with, labels among it.
        mask: which places have a target.
        labels: of the items, (items,) or (items, labels).
        signals: one a teacher.
        subclasses: of the items, the probabilities of all subclasses, (items, C * S), where they are learned.
        has_filler: some examples are not real and have no items: a dataloader filled its last batch up with them.
    """

    inputs: dict[str, Any]
    mask: Tensor
    labels: Tensor | None
    signals: list[Signals]
    subclasses: Tensor | None = None
    has_filler: bool = False

    @functools.cached_property
    def labelled(self) -> Tensor:
        """How many of the items have a label."""
        if self.labels is None or self.labels.is_floating_point() or self.labels.ndim > 1:
            return self.mask.sum()
        return (self.labels != IGNORED).sum()


@dataclass
class Learned:
    """What one batch came to.

    Attributes:
        total: the weighted sum of all terms over the items, with gradient.
        sums: every term's own sum, and that of what else was measured, without gradient.
        outputs: the model's.
    """

    total: Tensor
    sums: dict[str, Tensor]
    outputs: Any


@dataclass
class Learning:
    """How a student learns: its objective, and what it takes to compute it.

    Attributes:
        weights: by term.
        classes: how many of the first classes student and teacher share.
        layers: which of the teacher's layers each of the student's is compared with.
        head: the student's language head where losses can be computed inside it.
    """

    task: Task
    args: DistillationArguments
    weights: dict[str, float]
    classes: int | None = None
    layers: dict[int, int] = field(default_factory=dict)
    projections: Projections | None = None
    head: Head | None = None

    @functools.cached_property
    def terms(self) -> dict[str, Term]:
        """The terms of the objective by name."""
        return {name: term for name, term in registered_terms().items() if name in self.weights}

    @functools.cached_property
    def needs(self) -> set[Needs]:
        """What teachers are listened to for."""
        return {term.needs for term in self.terms.values()} - {Needs.LABELS, Needs.SUBCLASSES}

    @property
    def learns_subclasses(self) -> bool:
        """Whether probabilities of subclasses are learned."""
        return any(term.needs is Needs.SUBCLASSES for term in self.terms.values())

    def learn(
        self, model: nn.Module, bare: Any, batch: Batch, task_loss: TaskLoss, *, measure: bool, whole_logits: bool
    ) -> Learned:
        """Run the student on a batch and return every term.

        Args:
            model: the student as it is wrapped for training; it is what is called.
            bare: the student within.
            task_loss: gives the task loss as a sum over the items, and the model's outputs, for inputs with labels.
            measure: also measure the task loss and the agreement with the teachers, whether or not they are learned.
            whole_logits: the caller wants the model's logits.
        """
        inputs = dict(batch.inputs)
        if Needs.HIDDEN_STATES in self.needs and batch.signals:
            inputs["output_hidden_states"] = True
        fed: list[Tensor] = []
        with ExitStack() as stack:
            if Needs.EMBEDDING in self.needs and batch.signals:
                fed = stack.enter_context(heard_embeddings(find_classifier(bare, self.task)))
            if self.head is not None and not whole_logits:
                learned = self._inside_head(model, bare, self.head, inputs, batch, measure)
            else:
                learned = self._from_logits(model, inputs, batch, task_loss, measure)
        for name, values in self._of_vectors(learned.outputs, fed, batch, bare.config):
            learned.total = learned.total + self.weights[name] * values.sum()
            learned.sums[name] = values.sum().detach()
        return learned

    def _inside_head(
        self, model: nn.Module, bare: Any, head: Head, inputs: dict[str, Any], batch: Batch, measure: bool
    ) -> Learned:
        for name in ("labels", "shift_labels"):
            inputs.pop(name, None)
        found: list[tuple[Tensor, dict[str, Tensor]]] = []
        terms = self._of_logits(batch, measure, task_loss=True)

        needs = _OF_LOGITS if batch.signals else (Needs.LABELS,)
        weights = {name: weight for name, weight in self.weights.items() if self.terms[name].needs in needs}

        def on_hidden(hidden: Tensor) -> None:
            if weights or measure:
                found.append(chunked_loss(hidden[batch.mask], head, terms, weights, max_logits=self.args.max_logits))
            else:
                found.append((zero_through((head.logits(hidden[:, :1]),)), {}))

        with without_logits(bare, head, on_hidden), returning_loss(bare, lambda: found[0][0]):
            outputs = model(**inputs)
        return Learned(outputs.loss, dict(found[0][1]), outputs)

    def _from_logits(
        self, model: nn.Module, inputs: dict[str, Any], batch: Batch, task_loss: TaskLoss, measure: bool
    ) -> Learned:
        sums: dict[str, Tensor] = {}
        if batch.labels is not None and (TASK_LOSS in self.weights or measure):
            loss, outputs = task_loss(inputs)
            total, sums[TASK_LOSS] = self.weights.get(TASK_LOSS, 0.0) * loss, loss.detach()
        else:
            inputs.pop("labels", None)
            outputs = model(**inputs)
            total = torch.zeros((), device=batch.mask.device)
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[1 if TASK_LOSS in sums else 0]
        if not any(self.terms[name].needs in _OF_LOGITS for name in self.weights):
            total = total + zero_through((logits,))
        if batch.subclasses is not None and isinstance(model, InClasses) and model.heard is not None:
            for name, values in self._of_subclasses(model.heard[batch.mask], batch.subclasses):
                sums[name] = values.sum().detach()
                total = total + self.weights[name] * values.sum()
        if not batch.signals:
            return Learned(total, sums, outputs)
        rows = _wide(logits[batch.mask])
        for name, values in self._of_logits(batch, measure, task_loss=False)(rows, slice(None)).items():
            sums[name] = values.sum().detach()
            if name in self.weights:
                total = total + self.weights[name] * values.sum()
        return Learned(total, sums, outputs)

    def _of_logits(
        self, batch: Batch, measure: bool, *, task_loss: bool
    ) -> Callable[[Tensor, slice], dict[str, Tensor]]:
        """Return what gives every term of logits, (items,) each, for some items' logits."""
        terms = [term for term in self.terms.values() if term.needs is Needs.LOGITS]

        def values(logits: Tensor, chosen: slice) -> dict[str, Tensor]:
            labels = None if batch.labels is None else batch.labels[chosen]
            found = {}
            if task_loss and labels is not None and (measure or TASK_LOSS in self.weights):
                found[TASK_LOSS] = nn.functional.cross_entropy(logits, labels, reduction="none")
            shared = logits if self.classes is None else logits[:, : self.classes]
            # Of a regression, or of labels that hold at once, there is no class that is chosen.
            exclusive = shared.shape[-1] > 1 and (labels is None or not labels.is_floating_point())
            for signals in batch.signals:
                if signals.target is None:
                    continue
                target = signals.target(chosen)
                for term in terms:
                    value = signals.weight * _checked(term, term.function(shared, target, labels, self.args), shared)
                    found[term.name] = found[term.name] + value if term.name in found else value
                if not measure or not exclusive:
                    continue
                if isinstance(target, Dense) and labels is not None and labels.ndim == 1:
                    known = labels.masked_fill(labels >= target.logits.shape[-1], IGNORED)
                    own = nn.functional.cross_entropy(target.logits.float(), known, reduction="none")
                    found[TEACHER_LOSS] = found.get(TEACHER_LOSS, 0) + signals.weight * own
                best = target.logits.argmax(-1) if isinstance(target, Dense) else _best(target)
                same = signals.weight * (shared.argmax(-1) == best)
                found[AGREEMENT] = found[AGREEMENT] + same if AGREEMENT in found else same
            return found

        return values

    def _of_subclasses(self, logits: Tensor, targets: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield every term of subclasses, (items,), for logits and probabilities (items, C * S)."""
        for name, term in self.terms.items():
            if term.needs is Needs.SUBCLASSES:
                yield name, _checked(term, term.function(_wide(logits), targets, self.args), targets)

    def _of_vectors(self, outputs: Any, fed: list[Tensor], batch: Batch, config: Any) -> Iterator[tuple[str, Tensor]]:
        """Yield every term of hidden states and embeddings, (items,), summed over teachers by weight."""
        for name, term in self.terms.items():
            value: Tensor | None = None
            for number, signals in enumerate(batch.signals):
                if term.needs is Needs.HIDDEN_STATES:
                    states = hidden_states_of(outputs)
                    pairs = [
                        self._per_item(term, f"{number}_{mine}", states[mine], signals.hidden_states[theirs], batch)
                        for mine, theirs in self.layers.items()
                    ]
                    own = torch.stack(pairs).mean(0)
                elif term.needs is Needs.EMBEDDING:
                    mine_per_item = embedding_per_item(self.task, fed[-1], batch.mask, batch.inputs, config)
                    mine_per_item = self._wide(f"{number}_embedding", mine_per_item)
                    own = _checked(term, term.function(mine_per_item, signals.embedding, self.args), mine_per_item)
                else:
                    continue
                value = signals.weight * own if value is None else value + signals.weight * own
            if value is not None:
                yield name, value

    def _per_item(self, term: Term, pair: str, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        if student.shape[:-1] != teacher.shape[:-1]:
            raise TaskError(
                f"Hidden states of the student, {tuple(student.shape)}, and of the teacher, {tuple(teacher.shape)}, do not "
                "stand at the same places. Leave the term 'hidden' out."
            )
        values = _checked(term, term.function(self._wide(pair, student), teacher, self.args), student)
        return mean_per_item(self.task, values, batch.mask, batch.inputs)

    def _wide(self, name: str, student: Tensor) -> Tensor:
        return student if self.projections is None else self.projections(name, student)


def _checked(term: Term, values: Tensor, given: Tensor) -> Tensor:
    """Return a term's values for vectors `given`, checked to be one number a vector, as what sums and divides them expects."""
    if values.shape != given.shape[:-1]:
        raise OptionError(
            f"The term {term.name!r} must return one number an item, {tuple(given.shape[:-1])}; found "
            f"{tuple(values.shape)}. Reduce the last axis alone; the trainer takes the mean over the items."
        )
    return values


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype.itemsize < 4 else logits


def zero_through(outputs: "Mapping[str, Any] | Sequence[Any]") -> Tensor:
    """Return zero with a gradient, zero as well, to every tensor of a model's outputs.

    DistributedDataParallel and FSDP wait for the gradient of every parameter. Zero times a sum would be NaN where logits are
    infinite.
    """
    found = outputs.values() if isinstance(outputs, Mapping) else outputs
    tensors = [value for value in found if isinstance(value, Tensor) and value.is_floating_point()]
    zero: Tensor = _Zero.apply(*tensors)
    return zero


class _Zero(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return torch.zeros((), device=tensors[0].device, dtype=torch.promote_types(tensors[0].dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(tensor) for tensor in ctx.saved_tensors)


def _best(target: TopK) -> Tensor:
    return target.indices.gather(-1, target.log_probs.argmax(-1, keepdim=True)).squeeze(-1)


@contextmanager
def returning_loss(bare: Any, loss: Callable[[], Tensor]) -> Iterator[None]:
    """Within, the model's outputs carry `loss()`: wrappers that shard weights look for gradients in the outputs."""
    forward, own = bare.forward, "forward" in vars(bare)

    @functools.wraps(forward)
    def with_loss(*args: Any, **kwargs: Any) -> Any:
        outputs = forward(*args, **kwargs)
        outputs["loss"] = loss()
        return outputs

    bare.forward = with_loss
    try:
        yield
    finally:
        if own:
            bare.forward = forward
        else:
            del bare.forward
