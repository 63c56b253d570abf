"""One batch through the student: the sum of every term over its items, with gradient.

A language model whose head is known never makes all its logits: its losses are computed inside the head's forward, where
sharded weights are whole, over chunks of tokens. Every other model gives its logits as it always does.

How a student comes to learn: its head, its layers beside the teacher's, and the maps between their widths.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from hf_guide.distillation.arguments import DistillationArguments
from hf_guide.distillation.cached_teacher import CachedTeacher
from hf_guide.distillation.layer_projections import LayerProjections
from hf_guide.distillation.losses.registry import TASK_LOSS, LossTerm, categorical_terms, registered_losses
from hf_guide.distillation.subclass_logits import ClassLogitsWrapper
from hf_guide.errors import OptionError, TaskError, VocabularyError
from hf_guide.models.layer_mapping import hidden_states_of, resolve_layer_mapping
from hf_guide.models.lm_head import LMHead, chunked_loss, find_lm_head, skip_lm_head
from hf_guide.models.penultimate import capture_head_inputs, find_classifier, pooled_features
from hf_guide.models.targets import mean_per_item
from hf_guide.tasks import Task
from hf_guide.teachers.forward import LiveTeacher
from hf_guide.teachers.signals import DenseTarget, TeacherSignal, TeacherSignals, TopKTarget
from hf_guide.utils.labels import IGNORE_INDEX

TEACHER_AGREEMENT = "teacher_agreement"
TEACHER_CE = "teacher_ce"

_LOGIT_SIGNALS = (TeacherSignal.LOGITS, TeacherSignal.LABELS, TeacherSignal.SUBCLASSES)

TaskLossFunction = Callable[[dict[str, Any]], tuple[Tensor, Any]]


@dataclass(frozen=True)
class DistillationBatch:
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
    signals: list[TeacherSignals]
    subclasses: Tensor | None = None
    has_padding_examples: bool = False

    @functools.cached_property
    def labelled(self) -> Tensor:
        """How many of the items have a label."""
        if self.labels is None or self.labels.is_floating_point() or self.labels.ndim > 1:
            return self.mask.sum()
        return (self.labels != IGNORE_INDEX).sum()


@dataclass
class ObjectiveOutput:
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
class ObjectiveComputer:
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
    projections: LayerProjections | None = None
    head: LMHead | None = None

    @functools.cached_property
    def terms(self) -> dict[str, LossTerm]:
        """The terms of the objective by name."""
        return {name: term for name, term in registered_losses().items() if name in self.weights}

    @functools.cached_property
    def needs(self) -> set[TeacherSignal]:
        """What teachers are listened to for."""
        return {term.needs for term in self.terms.values()} - {TeacherSignal.LABELS, TeacherSignal.SUBCLASSES}

    @property
    def needs_subclasses(self) -> bool:
        """Whether probabilities of subclasses are learned."""
        return any(term.needs is TeacherSignal.SUBCLASSES for term in self.terms.values())

    def compute(
        self,
        model: nn.Module,
        bare: Any,
        batch: DistillationBatch,
        task_loss: TaskLossFunction,
        *,
        measure: bool,
        whole_logits: bool,
    ) -> ObjectiveOutput:
        """Run the student on a batch and return every term.

        Args:
            model: the student as it is wrapped for training; it is what is called.
            bare: the student within.
            task_loss: gives the task loss as a sum over the items, and the model's outputs, for inputs with labels.
            measure: also measure the task loss and the agreement with the teachers, whether or not they are learned.
            whole_logits: the caller wants the model's logits.
        """
        inputs = dict(batch.inputs)
        if TeacherSignal.HIDDEN_STATES in self.needs and batch.signals:
            inputs["output_hidden_states"] = True
        fed: list[Tensor] = []
        with ExitStack() as stack:
            if TeacherSignal.FEATURES in self.needs and batch.signals:
                fed = stack.enter_context(capture_head_inputs(find_classifier(bare, self.task)))
            if self.head is not None and not whole_logits:
                learned = self._compute_chunked(model, bare, self.head, inputs, batch, measure)
            else:
                learned = self._from_logits(model, inputs, batch, task_loss, measure)
        for name, values in self._feature_terms(learned.outputs, fed, batch, bare.config):
            learned.total = learned.total + self.weights[name] * values.sum()
            learned.sums[name] = values.sum().detach()
        return learned

    def _compute_chunked(
        self,
        model: nn.Module,
        bare: Any,
        head: LMHead,
        inputs: dict[str, Any],
        batch: DistillationBatch,
        measure: bool,
    ) -> ObjectiveOutput:
        for name in ("labels", "shift_labels"):
            inputs.pop(name, None)
        found: list[tuple[Tensor, dict[str, Tensor]]] = []
        terms = self._of_logits(batch, measure, task_loss=True)

        needs = _LOGIT_SIGNALS if batch.signals else (TeacherSignal.LABELS,)
        weights = {name: weight for name, weight in self.weights.items() if self.terms[name].needs in needs}

        def on_hidden(hidden: Tensor) -> None:
            if weights or measure:
                found.append(chunked_loss(hidden[batch.mask], head, terms, weights, max_logits=self.args.max_logits))
            else:
                found.append((zero_loss_with_gradient((head.logits(hidden[:, :1]),)), {}))

        with skip_lm_head(bare, head, on_hidden), attach_loss_to_outputs(bare, lambda: found[0][0]):
            outputs = model(**inputs)
        return ObjectiveOutput(outputs.loss, dict(found[0][1]), outputs)

    def _from_logits(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        batch: DistillationBatch,
        task_loss: TaskLossFunction,
        measure: bool,
    ) -> ObjectiveOutput:
        sums: dict[str, Tensor] = {}
        if batch.labels is not None and (TASK_LOSS in self.weights or measure):
            loss, outputs = task_loss(inputs)
            total, sums[TASK_LOSS] = self.weights.get(TASK_LOSS, 0.0) * loss, loss.detach()
        else:
            inputs.pop("labels", None)
            outputs = model(**inputs)
            total = torch.zeros((), device=batch.mask.device)
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[1 if TASK_LOSS in sums else 0]
        if not any(self.terms[name].needs in _LOGIT_SIGNALS for name in self.weights):
            total = total + zero_loss_with_gradient((logits,))
        if (
            batch.subclasses is not None
            and isinstance(model, ClassLogitsWrapper)
            and model.subclass_logits is not None
        ):
            for name, values in self._subclass_terms(model.subclass_logits[batch.mask], batch.subclasses):
                sums[name] = values.sum().detach()
                total = total + self.weights[name] * values.sum()
        if not batch.signals:
            return ObjectiveOutput(total, sums, outputs)
        rows = _upcast(logits[batch.mask])
        for name, values in self._of_logits(batch, measure, task_loss=False)(rows, slice(None)).items():
            sums[name] = values.sum().detach()
            if name in self.weights:
                total = total + self.weights[name] * values.sum()
        return ObjectiveOutput(total, sums, outputs)

    def _of_logits(
        self, batch: DistillationBatch, measure: bool, *, task_loss: bool
    ) -> Callable[[Tensor, slice], dict[str, Tensor]]:
        """Return what gives every term of logits, (items,) each, for some items' logits."""
        terms = [term for term in self.terms.values() if term.needs is TeacherSignal.LOGITS]

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
                    value = signals.weight * _check_one_value_per_item(
                        term, term.function(shared, target, labels, self.args), shared
                    )
                    found[term.name] = found[term.name] + value if term.name in found else value
                if not measure or not exclusive:
                    continue
                if isinstance(target, DenseTarget) and labels is not None and labels.ndim == 1:
                    known = labels.masked_fill(labels >= target.logits.shape[-1], IGNORE_INDEX)
                    own = nn.functional.cross_entropy(target.logits.float(), known, reduction="none")
                    found[TEACHER_CE] = found.get(TEACHER_CE, 0) + signals.weight * own
                best = target.logits.argmax(-1) if isinstance(target, DenseTarget) else _most_likely_class(target)
                same = signals.weight * (shared.argmax(-1) == best)
                found[TEACHER_AGREEMENT] = found[TEACHER_AGREEMENT] + same if TEACHER_AGREEMENT in found else same
            return found

        return values

    def _subclass_terms(self, logits: Tensor, targets: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield every term of subclasses, (items,), for logits and probabilities (items, C * S)."""
        for name, term in self.terms.items():
            if term.needs is TeacherSignal.SUBCLASSES:
                yield (
                    name,
                    _check_one_value_per_item(term, term.function(_upcast(logits), targets, self.args), targets),
                )

    def _feature_terms(
        self, outputs: Any, fed: list[Tensor], batch: DistillationBatch, config: Any
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield every term of hidden states and embeddings, (items,), summed over teachers by weight."""
        for name, term in self.terms.items():
            value: Tensor | None = None
            for number, signals in enumerate(batch.signals):
                if term.needs is TeacherSignal.HIDDEN_STATES:
                    states = hidden_states_of(outputs)
                    pairs = [
                        self._hidden_states_term(
                            term, f"{number}_{mine}", states[mine], signals.hidden_states[theirs], batch
                        )
                        for mine, theirs in self.layers.items()
                    ]
                    own = torch.stack(pairs).mean(0)
                elif term.needs is TeacherSignal.FEATURES:
                    mine_per_item = pooled_features(self.task, fed[-1], batch.mask, batch.inputs, config)
                    mine_per_item = self._project(f"{number}_embedding", mine_per_item)
                    own = _check_one_value_per_item(
                        term, term.function(mine_per_item, signals.features, self.args), mine_per_item
                    )
                else:
                    continue
                value = signals.weight * own if value is None else value + signals.weight * own
            if value is not None:
                yield name, value

    def _hidden_states_term(
        self, term: LossTerm, pair: str, student: Tensor, teacher: Tensor, batch: DistillationBatch
    ) -> Tensor:
        if student.shape[:-1] != teacher.shape[:-1]:
            raise TaskError(
                f"Hidden states of the student, {tuple(student.shape)}, and of the teacher, {tuple(teacher.shape)}, do not "
                "stand at the same places. Leave the term 'hidden' out."
            )
        values = _check_one_value_per_item(
            term, term.function(self._project(pair, student), teacher, self.args), student
        )
        return mean_per_item(self.task, values, batch.mask, batch.inputs)

    def _project(self, name: str, student: Tensor) -> Tensor:
        return student if self.projections is None else self.projections(name, student)


def _check_one_value_per_item(term: LossTerm, values: Tensor, given: Tensor) -> Tensor:
    """Return a term's values for vectors `given`, checked to be one number a vector, as what sums and divides them expects."""
    if values.shape != given.shape[:-1]:
        raise OptionError(
            f"The term {term.name!r} must return one number an item, {tuple(given.shape[:-1])}; found "
            f"{tuple(values.shape)}. Reduce the last axis alone; the trainer takes the mean over the items."
        )
    return values


def _upcast(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype.itemsize < 4 else logits


def zero_loss_with_gradient(outputs: "Mapping[str, Any] | Sequence[Any]") -> Tensor:
    """Return zero with a gradient, zero as well, to every tensor of a model's outputs.

    DistributedDataParallel and FSDP wait for the gradient of every parameter. Zero times a sum would be NaN where logits are
    infinite.
    """
    found = outputs.values() if isinstance(outputs, Mapping) else outputs
    tensors = [value for value in found if isinstance(value, Tensor) and value.is_floating_point()]
    zero: Tensor = _ZeroWithGradient.apply(*tensors)
    return zero


class _ZeroWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return torch.zeros((), device=tensors[0].device, dtype=torch.promote_types(tensors[0].dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(tensor) for tensor in ctx.saved_tensors)


def _most_likely_class(target: TopKTarget) -> Tensor:
    return target.indices.gather(-1, target.log_probs.argmax(-1, keepdim=True)).squeeze(-1)


@contextmanager
def attach_loss_to_outputs(bare: Any, loss: Callable[[], Tensor]) -> Iterator[None]:
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


Teachers = Sequence[LiveTeacher | CachedTeacher]


def build_objective(
    student: Any,
    task: Task,
    teachers: Teachers,
    args: DistillationArguments,
    accelerator: Accelerator,
    *,
    head: LMHead | None,
) -> ObjectiveComputer:
    """Return how `student` learns from its teachers.

    Raises:
        VocabularyError: the vocabularies share one token.
        OptionError: the objective needs a teacher and there is none, or what was not captured; or maps between widths,
            where weights are sharded.
    """
    learning = ObjectiveComputer(task, args, args.weights)
    if learning.needs and not teachers:
        names = sorted(name for name, term in learning.terms.items() if term.needs is not TeacherSignal.LABELS)
        raise OptionError(f"The objective's {', '.join(names)} need a teacher: pass teacher=, or a capture.")
    learning.classes = min((each.classes for each in teachers if each.classes is not None), default=None)
    names = categorical_terms(args.weights)
    if names and learning.classes is not None and learning.classes < 2:
        raise VocabularyError(
            f"Student and teacher share {learning.classes} token of their vocabularies, and {' and '.join(map(repr, names))} "
            "compare distributions over two at least. Take a teacher of the student's vocabulary."
        )
    learning.head = head
    if TeacherSignal.HIDDEN_STATES in learning.needs:
        learning.layers = resolve_layer_mapping(student, [each.depth for each in teachers], args.hidden_layers)  # type: ignore[arg-type]
    widths = _feature_widths(student, task, teachers, learning)
    projections = LayerProjections(widths, seed=args.seed)
    if len(projections.maps):
        if is_sharded(accelerator):
            raise OptionError(
                f"The student's widths differ from the teacher's ({sorted(set(widths.values()))}), and the maps between "
                "them cannot be sharded. Leave 'hidden' and 'embedding' out, or train without FSDP and DeepSpeed."
            )
        learning.projections = projections.to(args.device)
    return learning


def _feature_widths(
    student: Any, task: Task, teachers: Teachers, learning: ObjectiveComputer
) -> dict[str, tuple[int, int]]:
    """Return how wide what is compared is, in the student and in the teacher, by name."""
    widths: dict[str, tuple[int, int]] = {}
    for number, teacher in enumerate(teachers):
        pairs = [(f"{number}_{mine}", f"hidden_{theirs}") for mine, theirs in learning.layers.items()]
        if TeacherSignal.FEATURES in learning.needs:
            pairs.append((f"{number}_embedding", "features"))
        for name, asked in pairs:
            theirs_wide = teacher.width(asked)
            if theirs_wide is None:
                raise OptionError(f"The capture holds no {asked}. Capture again with it, or change the objective.")
            own = LiveTeacher(student, task).width(asked)
            widths[name] = (own or theirs_wide, theirs_wide)
    return widths


def is_sharded(accelerator: Accelerator) -> bool:
    """Return whether weights, or the state of the optimizer, are spread over processes."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def find_head_all_ranks(student: Any, task: Task, accelerator: Accelerator) -> LMHead | None:
    """Return the student's language head, or None where it is not certain in any of the processes: all do the same."""
    if not task.is_language_model:
        return None
    if (
        accelerator.distributed_type is DistributedType.DEEPSPEED
        and accelerator.state.deepspeed_plugin.zero_stage == 3
    ):
        return None  # ZeRO-3 does not gather the last norm for a backward pass that begins inside the head
    head = find_lm_head(student)
    found = torch.tensor(float(head is not None), device=accelerator.device)
    # Where only one process has the weights the others may not find it.
    return head if accelerator.reduce(found, reduction="sum").item() == accelerator.num_processes else None
