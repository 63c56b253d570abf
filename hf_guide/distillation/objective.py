"""Compute the objective on a prepared batch (`batch_builder`): every loss's sum over the items, with gradient.

A language model whose head is verified never holds all its logits: its losses are computed inside the head's forward, where
sharded weights are whole, in chunks of tokens. Every other model returns its logits as usual.
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
from hf_guide.distillation.batch_builder import DistillationBatch
from hf_guide.distillation.cached_teacher import CachedTeacher
from hf_guide.distillation.layer_projections import LayerProjections
from hf_guide.distillation.losses.chunked import chunked_loss
from hf_guide.distillation.losses.registry import (
    TASK_LOSS,
    LossTerm,
    logit_losses,
    registered_losses,
    required_signals,
)
from hf_guide.distillation.subclass_logits import ClassLogitsWrapper
from hf_guide.errors import OptionError, TaskError, VocabularyError
from hf_guide.models.layer_mapping import hidden_states_of, resolve_layer_mapping
from hf_guide.models.lm_head import LMHead, find_lm_head, skip_lm_head
from hf_guide.models.outputs import (
    beam_search_heads,
    boxes_and_objectness,
    capture_head_outputs,
    last_hidden_state,
    task_logits,
    what_works,
)
from hf_guide.models.penultimate import ITEMS_WITH_FEATURES, capture_head_inputs, find_classifier, pooled_features
from hf_guide.models.sentence_files import embed, modules_of_model
from hf_guide.models.targets import (
    mean_per_item,
    target_inputs,
)
from hf_guide.tasks import OutputKind, Task, output_kind
from hf_guide.teachers.alignment import incomparable_logits
from hf_guide.teachers.forward import LiveTeacher, check_item_axes
from hf_guide.teachers.signals import DenseTarget, TeacherSignal, TopKTarget
from hf_guide.utils.labels import IGNORE_INDEX

TEACHER_AGREEMENT = "teacher_agreement"
TEACHER_CE = "teacher_ce"
TOKEN_METRICS = ("mean_token_accuracy", "entropy")
"""What TRL's `SFTTrainer` reports of a language model, under its names."""

_LOGIT_SIGNALS = (TeacherSignal.LOGITS, TeacherSignal.LABELS, TeacherSignal.SUBCLASSES)

TaskLossFunction = Callable[[dict[str, Any]], tuple[Tensor, Any]]


@dataclass
class ObjectiveOutput:
    """The objective of one batch.

    Attributes:
        total: The weighted sum of all losses over the items, with gradient.
        sums: Each loss's own sum over the items, and that of other measurements, without gradient.
        outputs: The student's.
        embeddings: Of the items, (items, width), of a model without a head where they were computed.
    """

    total: Tensor
    sums: dict[str, Tensor]
    outputs: Any
    embeddings: Tensor | None = None


@dataclass
class Objective:
    """The losses of a student and what it takes to compute them; `build_objective` makes one.

    Attributes:
        weights: By loss.
        losses: By name, in the order in which they are summed.
        configs: By loss, the options that its function is called with.
        num_classes: How many of their first classes student and teacher share; None for all.
        layers: Student layer -> teacher layer, for losses that compare hidden states.
        projections: Linear maps between the student's widths and the teacher's, where these differ.
        head: The student's language head, where losses can be computed inside it.
        max_logits: How many logits a chunk has.
        measures_tokens: Whether `TOKEN_METRICS` are measured, in training too.
    """

    task: Task
    weights: dict[str, float]
    losses: dict[str, LossTerm]
    configs: dict[str, Any]
    max_logits: int
    num_classes: int | None = None
    layers: dict[int, int] = field(default_factory=dict)
    projections: LayerProjections | None = None
    head: LMHead | None = None
    measures_tokens: bool = False

    @functools.cached_property
    def required_signals(self) -> set[TeacherSignal]:
        """What the losses compare with a teacher."""
        return required_signals(self.losses)

    @property
    def needs_subclasses(self) -> bool:
        """Whether a loss compares probabilities of subclasses."""
        return any(term.requires is TeacherSignal.SUBCLASSES for term in self.losses.values())

    def compute(
        self,
        model: nn.Module,
        unwrapped: Any,
        batch: DistillationBatch,
        task_loss: TaskLossFunction,
        *,
        measure: bool,
        all_logits: bool,
    ) -> ObjectiveOutput:
        """Run the student on a batch and return every loss.

        Args:
            model: The student as it is wrapped for training; it is what is called.
            unwrapped: The student itself.
            task_loss: Returns the task loss as a sum over the items, and the model's outputs, for inputs with labels.
            measure: Whether the task loss and the agreement with the teachers are measured, too.
            all_logits: Whether the caller needs the model's logits.
        """
        inputs = dict(batch.inputs)
        if TeacherSignal.HIDDEN_STATES in self.required_signals and batch.signals:
            inputs["output_hidden_states"] = True
        head_inputs: list[Tensor] = []
        with ExitStack() as stack:
            has_head = self.task is not Task.FEATURE_EXTRACTION
            if TeacherSignal.FEATURES in self.required_signals and batch.signals and has_head:
                classifier = find_classifier(unwrapped, self.task)
                head_inputs = stack.enter_context(capture_head_inputs(classifier))
            if self.head is not None and not all_logits:
                result = self._compute_chunked(model, unwrapped, self.head, inputs, batch, measure)
            else:
                result = self._compute_dense(model, unwrapped, inputs, batch, task_loss, measure)
        if not has_head and (TeacherSignal.FEATURES in self.required_signals or measure):
            head_inputs = [embed(unwrapped, last_hidden_state(result.outputs), batch.inputs)]
            result.embeddings = head_inputs[0][batch.mask].detach()
        for name, values in self._feature_terms(result.outputs, head_inputs, batch, unwrapped.config):
            result.total = result.total + self.weights[name] * values.sum()
            result.sums[name] = values.sum().detach()
        return result

    def _compute_chunked(
        self,
        model: nn.Module,
        unwrapped: Any,
        head: LMHead,
        inputs: dict[str, Any],
        batch: DistillationBatch,
        measure: bool,
    ) -> ObjectiveOutput:
        """Compute the losses inside the forward of the language head, in chunks of logits."""
        for name in ("labels", "shift_labels"):
            inputs.pop(name, None)
        results: list[tuple[Tensor, dict[str, Tensor]]] = []
        terms = self._logit_terms(batch, measure, task_loss=True)
        signals = _LOGIT_SIGNALS if batch.signals else (TeacherSignal.LABELS,)
        weights = {name: weight for name, weight in self.weights.items() if self.losses[name].requires in signals}

        def on_hidden(hidden: Tensor) -> None:
            if weights or measure:
                results.append(chunked_loss(hidden[batch.mask], head, terms, weights, max_logits=self.max_logits))
            else:
                results.append((zero_loss_with_gradient((head.logits(hidden[:, :1]),)), {}))

        with skip_lm_head(unwrapped, head, on_hidden), attach_loss_to_outputs(unwrapped, lambda: results[0][0]):
            outputs = model(**inputs)
        return ObjectiveOutput(outputs.loss, dict(results[0][1]), outputs)

    def _compute_dense(
        self,
        model: nn.Module,
        unwrapped: Any,
        inputs: dict[str, Any],
        batch: DistillationBatch,
        task_loss: TaskLossFunction,
        measure: bool,
    ) -> ObjectiveOutput:
        """Compute the losses from all of the model's logits."""
        sums: dict[str, Tensor] = {}
        with capture_head_outputs(unwrapped, self.task) as head_outputs:
            if batch.has_targets and (TASK_LOSS in self.weights or measure):
                loss, outputs = task_loss(inputs)
                total, sums[TASK_LOSS] = self.weights.get(TASK_LOSS, 0.0) * loss, loss.detach()
            else:
                needed = target_inputs(self.task) if beam_search_heads(unwrapped, self.task) else ()
                for name in {"labels", *target_inputs(self.task)}.difference(needed):
                    inputs.pop(name, None)
                outputs = model(**inputs)
                total = torch.zeros((), device=batch.mask.device)
        has_further_heads = self.task.row.outputs[0].items in (
            "boundary",
            "query",
        )  # for boxes, or unanswerable questions
        if has_further_heads or not any(term.requires in _LOGIT_SIGNALS for term in self.losses.values()):
            total = total + zero_loss_with_gradient(outputs)
        if (
            batch.subclasses is not None
            and isinstance(model, ClassLogitsWrapper)
            and model.subclass_logits is not None
        ):
            for name, values in self._subclass_terms(model.subclass_logits[batch.mask], batch.subclasses):
                sums[name] = values.sum().detach()
                total = total + self.weights[name] * values.sum()
        for name, values in self._box_terms(outputs, batch, unwrapped.config):
            sums[name] = values.sum().detach()
            total = total + self.weights[name] * values.sum()
        if all(signals.target is None for signals in batch.signals):
            return ObjectiveOutput(total, sums, outputs)
        logits = task_logits(self.task, outputs, inputs, head_outputs, has_loss=TASK_LOSS in sums)
        check_item_axes(self.task, logits, batch.mask, "student")
        item_logits = _upcast(logits[batch.mask])
        terms = self._logit_terms(batch, measure, task_loss=False)
        for name, values in terms(item_logits, slice(None)).items():
            sums[name] = values.sum().detach()
            if name in self.weights:
                total = total + self.weights[name] * values.sum()
        return ObjectiveOutput(total, sums, outputs)

    def _logit_terms(
        self, batch: DistillationBatch, measure: bool, *, task_loss: bool
    ) -> Callable[[Tensor, slice], dict[str, Tensor]]:
        """Return the function that computes every loss of logits, (items,) each, from the logits of some items."""
        losses = [term for term in self.losses.values() if term.requires is TeacherSignal.LOGITS]

        def compute_terms(logits: Tensor, rows: slice) -> dict[str, Tensor]:
            labels = None if batch.labels is None else batch.labels[rows]
            terms: dict[str, Tensor] = {}
            if task_loss and labels is not None and (measure or TASK_LOSS in self.weights):
                terms[TASK_LOSS] = nn.functional.cross_entropy(logits, labels, reduction="none")
            if self.measures_tokens and labels is not None:
                terms |= _measure_tokens(logits.detach(), labels)
            shared = logits if self.num_classes is None else logits[:, : self.num_classes]
            for signals in batch.signals:
                if signals.target is None:
                    continue
                target = signals.target(rows)
                for loss in losses:
                    values = loss.function(shared, target, labels, self.configs[loss.name])
                    value = signals.weight * _check_one_value_per_item(loss, values, shared)
                    terms[loss.name] = terms[loss.name] + value if loss.name in terms else value
                # A regression, or labels that hold at once, have no predicted class.
                is_categorical = not isinstance(target, DenseTarget) or target.kind is OutputKind.CATEGORICAL
                if measure and is_categorical and (labels is None or not labels.is_floating_point()):
                    _measure_teacher(terms, shared, target, labels, signals.weight)
            return terms

        return compute_terms

    def _box_terms(self, outputs: Any, batch: DistillationBatch, config: Any) -> Iterator[tuple[str, Tensor]]:
        """Yield every loss of boxes, (items,), the weighted sum over the teachers."""
        losses = [loss for loss in self.losses.values() if loss.requires is TeacherSignal.BOXES]
        if not losses or not batch.signals:
            return
        boxes, _ = boxes_and_objectness(self.task, outputs, output_kind(self.task, config))
        check_item_axes(self.task, boxes, batch.mask, "student")
        at_items = boxes[batch.mask]
        for loss in losses:
            parts = []
            for signals in batch.signals:
                assert signals.boxes is not None
                values = loss.function(at_items, *signals.boxes, self.configs[loss.name])
                parts.append(signals.weight * _check_one_value_per_item(loss, values, at_items))
            yield loss.name, torch.stack(parts).sum(0)

    def _subclass_terms(self, logits: Tensor, targets: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield every loss of subclasses, (items,), for logits and probabilities (items, C * S)."""
        for name, loss in self.losses.items():
            if loss.requires is TeacherSignal.SUBCLASSES:
                values = loss.function(_upcast(logits), targets, self.configs[name])
                yield name, _check_one_value_per_item(loss, values, targets)

    def _feature_terms(
        self, outputs: Any, head_inputs: list[Tensor], batch: DistillationBatch, config: Any
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield every loss of hidden states and features, (items,), the weighted sum over the teachers."""
        for name, loss in self.losses.items():
            total: Tensor | None = None
            for index, signals in enumerate(batch.signals):
                if loss.requires is TeacherSignal.HIDDEN_STATES:
                    states = hidden_states_of(outputs, self.task, config)
                    pairs = [
                        self._hidden_states_term(
                            loss,
                            f"{index}_{student_layer}",
                            states[student_layer],
                            signals.hidden_states[teacher_layer],
                            batch,
                        )
                        for student_layer, teacher_layer in self.layers.items()
                    ]
                    values = torch.stack(pairs).mean(0)
                elif loss.requires is TeacherSignal.FEATURES:
                    features = pooled_features(self.task, head_inputs[-1], batch.mask, batch.inputs, config)
                    theirs = signals.features
                    if self.projections is not None and not loss.any_width:
                        assert theirs is not None
                        features, theirs = self.projections.align(f"{index}_features", features, theirs)
                    values = loss.function(features, theirs, self.configs[name])
                    values = _check_one_value_per_item(loss, values, features)
                else:
                    continue
                total = signals.weight * values if total is None else total + signals.weight * values
            if total is not None:
                yield name, total

    def _hidden_states_term(
        self, loss: LossTerm, pair: str, student: Tensor, teacher: Tensor, batch: DistillationBatch
    ) -> Tensor:
        if student.shape[:-1] != teacher.shape[:-1]:
            raise TaskError(
                f"Hidden states of the student, {tuple(student.shape)}, and of the teacher, {tuple(teacher.shape)}, "
                "are not of the same positions. Leave the loss 'hidden_states' out."
            )
        values = loss.function(self._project(pair, student), teacher, self.configs[loss.name])
        values = _check_one_value_per_item(loss, values, student)
        return mean_per_item(self.task, values, batch.mask, batch.inputs, batch.frames)

    def _project(self, name: str, student: Tensor) -> Tensor:
        return student if self.projections is None else self.projections(name, student)


def _measure_tokens(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return whether each label is the most likely token, and the entropy of the student's distribution, (items,) each."""
    log_probs = logits.log_softmax(-1)
    values = ((logits.argmax(-1) == labels).to(log_probs), -(log_probs.exp() * log_probs).sum(-1))
    return dict(zip(TOKEN_METRICS, values, strict=True))


def _measure_teacher(
    terms: dict[str, Tensor], logits: Tensor, target: DenseTarget | TopKTarget, labels: Tensor | None, weight: float
) -> None:
    """Add to `terms` a teacher's own task loss and whether student and teacher predict the same class, (items,) each."""
    if isinstance(target, DenseTarget) and labels is not None and labels.ndim == 1:
        known = labels.masked_fill(labels >= target.logits.shape[-1], IGNORE_INDEX)
        teacher_ce = nn.functional.cross_entropy(target.logits.float(), known, reduction="none")
        terms[TEACHER_CE] = terms.get(TEACHER_CE, 0) + weight * teacher_ce
    predicted = target.logits.argmax(-1) if isinstance(target, DenseTarget) else _most_likely_class(target)
    agrees = weight * (logits.argmax(-1) == predicted)
    terms[TEACHER_AGREEMENT] = terms[TEACHER_AGREEMENT] + agrees if TEACHER_AGREEMENT in terms else agrees


def _check_one_value_per_item(loss: LossTerm, values: Tensor, vectors: Tensor) -> Tensor:
    """Return a loss's values for `vectors`, checked to be one a vector, as the sums and the division assume."""
    if values.shape != vectors.shape[:-1]:
        raise OptionError(
            f"The loss {loss.name!r} must return one value an item, {tuple(vectors.shape[:-1])}; found "
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
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    tensors = [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
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
def attach_loss_to_outputs(model: Any, loss: Callable[[], Tensor]) -> Iterator[None]:
    """Put `loss()` into the model's outputs, where wrappers that shard weights look for tensors with gradient."""
    forward, is_replaced = model.forward, "forward" in vars(model)

    @functools.wraps(forward)
    def with_loss(*args: Any, **kwargs: Any) -> Any:
        outputs = forward(*args, **kwargs)
        outputs["loss"] = loss()
        return outputs

    model.forward = with_loss
    try:
        yield
    finally:
        if is_replaced:
            model.forward = forward
        else:
            del model.forward


def build_objective(
    student: Any,
    task: Task,
    teachers: Sequence[LiveTeacher | CachedTeacher],
    args: DistillationArguments,
    accelerator: Accelerator,
    *,
    head: LMHead | None,
) -> Objective:
    """Return the objective of `student` with its teachers.

    Raises:
        VocabularyError: The vocabularies share one token.
        OptionError: A loss needs a teacher and there is none, or a signal that the cache does not have; or maps between
            widths, where weights are sharded.
    """
    weights = args.loss_weights
    losses = {name: term for name, term in registered_losses().items() if name in weights}
    objective = Objective(task, weights, losses, args.loss_configs, args.loss_chunk_size, head=head)
    if objective.required_signals and not teachers:
        names = sorted(name for name, term in losses.items() if term.requires is not TeacherSignal.LABELS)
        raise OptionError(
            f"The losses {', '.join(names)} need a teacher: pass teacher=, or set teacher or teacher_cache in the arguments."
        )
    objective.num_classes = min((each.classes for each in teachers if each.classes is not None), default=None)
    compared = [name for name, term in losses.items() if term.requires in (TeacherSignal.LOGITS, TeacherSignal.BOXES)]
    reason = next(filter(None, (incomparable_logits(task, student.config, each.config) for each in teachers)), None)
    if compared and reason is not None:
        raise TaskError(f"{reason}: {' and '.join(map(repr, compared))} cannot compare them. {what_works(task)}.")
    has_features = task.row.outputs[0].items in ITEMS_WITH_FEATURES and task is not Task.MULTIPLE_CHOICE
    if TeacherSignal.FEATURES in objective.required_signals and not has_features:
        raise TaskError(
            f"The loss 'features' is not for {task}, whose head is not fed one vector per {task.row.outputs[0].items}. "
            f"{what_works(task)}."
        )
    names = logit_losses(weights)
    if names and objective.num_classes is not None and objective.num_classes < 2:
        raise VocabularyError(
            f"Student and teacher share {objective.num_classes} token of their vocabularies, and "
            f"{' and '.join(map(repr, names))} compare distributions over two at least. Use a teacher with the student's "
            "vocabulary."
        )
    if TeacherSignal.HIDDEN_STATES in objective.required_signals:
        depths = [each.depth for each in teachers]
        objective.layers = resolve_layer_mapping(student, depths, args.layer_mapping, task)  # type: ignore[arg-type]
    if "similarity" in losses and args.per_device_train_batch_size < 2:
        raise OptionError(
            "The loss 'similarity' compares the examples of a batch with each other, and per_device_train_batch_size is 1. "
            "Set it to 2 at least; gradient_accumulation_steps does not help."
        )
    widths = _feature_widths(student, teachers, objective)
    is_embedding = task is Task.FEATURE_EXTRACTION
    modules = modules_of_model(student).trainable if is_embedding else {}
    isometric = [f"{index}_features" for index in range(len(teachers))] if is_embedding else []
    projections = LayerProjections(widths, seed=args.seed, student_modules=modules, isometric=isometric)
    if len(projections):
        if is_sharded(accelerator):
            raise OptionError(
                f"The student's widths differ from the teacher's ({sorted(set(widths.values()))}), and the maps between them "
                "cannot be sharded. Leave 'hidden_states' and 'features' out, or train without FSDP and DeepSpeed."
                if not modules
                else f"The modules {sorted(modules)} of the student's embedding cannot be sharded. Train without FSDP and "
                "DeepSpeed."
            )
        objective.projections = projections.to(args.device)
    return objective


def _feature_widths(
    student: Any, teachers: Sequence[LiveTeacher | CachedTeacher], objective: Objective
) -> dict[str, tuple[int, int]]:
    """Return the student's and the teacher's width of each pair of vectors that is compared, by name."""
    widths: dict[str, tuple[int, int]] = {}
    for index, teacher in enumerate(teachers):
        pairs = [(f"{index}_{mine}", f"hidden_{theirs}") for mine, theirs in objective.layers.items()]
        if any(term.requires is TeacherSignal.FEATURES and not term.any_width for term in objective.losses.values()):
            pairs.append((f"{index}_features", "features"))
        for name, signal in pairs:
            teacher_width = teacher.width(signal)
            if teacher_width is None:
                raise OptionError(f"The signal cache has no {signal}. Capture again with it, or change the losses.")
            student_width = LiveTeacher(student, objective.task).width(signal)
            widths[name] = (student_width or teacher_width, teacher_width)
    return widths


def is_sharded(accelerator: Accelerator) -> bool:
    """Return whether weights, or the state of the optimizer, are sharded over processes."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def find_head_all_ranks(student: Any, task: Task, accelerator: Accelerator) -> LMHead | None:
    """Return the student's language head, or None if any process cannot verify it, so that all processes do the same."""
    if not task.is_language_model:
        return None
    if (
        accelerator.distributed_type is DistributedType.DEEPSPEED
        and accelerator.state.deepspeed_plugin.zero_stage == 3
    ):
        return None  # ZeRO-3 does not gather the last norm for a backward pass that begins inside the head
    head = find_lm_head(student)
    is_verified = torch.tensor(float(head is not None), device=accelerator.device)
    # If one process alone has the weights, the others may not find it.
    return head if accelerator.reduce(is_verified, reduction="sum").item() == accelerator.num_processes else None
