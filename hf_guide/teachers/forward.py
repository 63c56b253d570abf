"""Run a teacher on a batch and return its signals: logits, hidden states, penultimate features.

Does: the one forward pass of teachers (`forward_outputs`), shared by training with a live teacher, the signal cache and LELP.
Does not: load a teacher (`loading.py`), or decide how a batch becomes what the teacher expects (`inputs.py`).
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_guide.errors import TaskError, TeacherError
from hf_guide.models.adapters import check_no_virtual_tokens, forward_parameters, without_adapter
from hf_guide.models.layer_mapping import depth_of_config, hidden_states_of, width_of_config
from hf_guide.models.lm_head import LMHead, find_lm_head, skip_lm_head
from hf_guide.models.modes import without_cache
from hf_guide.models.outputs import (
    beam_search_heads,
    boxes_and_objectness,
    capture_head_outputs,
    last_hidden_state,
    task_logits,
)
from hf_guide.models.packed_rows import check_packed_rows
from hf_guide.models.penultimate import capture_head_inputs, find_classifier, pooled_features
from hf_guide.models.sentence_files import embed, modules_of_model
from hf_guide.models.targets import complete_inputs
from hf_guide.tasks import OutputKind, Task, output_kind
from hf_guide.teachers.inputs import TeacherInputs, build_teacher_inputs
from hf_guide.teachers.patches import convert_patches, normalizes_patches
from hf_guide.teachers.retokenization import RetokenizedBatch, Retokenizer
from hf_guide.teachers.signals import DenseTarget, TeacherSignal, TeacherSignals, TopKTarget
from hf_guide.utils.half_precision import fast_half_products
from hf_guide.utils.public_names import Source

_TARGET_INPUTS = ("labels", "label", "label_ids", "start_positions", "end_positions", "return_loss")
"""Inputs by which a model would compute a loss of its own."""

_SAME_INPUTS_ADVICE = (
    "Both must read the same batches: use a teacher with the student's inputs, vocabulary, image size and number of tokens "
    "for an image."
)

_ERRORS_OF_BATCHES = (ValueError, RuntimeError, IndexError, KeyError, TypeError, AttributeError)

_SPAN_LABELS = ("start_positions", "end_positions")


@dataclass(frozen=True)
class ForwardOutputs:
    """The outputs of one forward pass.

    Attributes:
        inputs: What the model was called with.
        logits: In the canonical form of `models.outputs.task_logits`; without any position where the model's head was
            skipped, and empty where they were not asked for.
        head_inputs: The input of the language head, (batch, length, width), where the head was skipped.
        hidden_states: All of them, the input embeddings first, where asked for: of an encoder-decoder the decoder's.
        features: The input of the layer that makes the logits, where asked for, as the model computes it; of a model
            without a head its last hidden states.
        boxes: Of a detector, its boxes and the probabilities that they hold an object, where asked for.
        retokenized: How the model read the batch, where that has a smaller vocabulary: all outputs are those for the pieces
            of the batch, but `head_inputs` are of the model's own head.
    """

    inputs: dict[str, Any]
    logits: Tensor
    head_inputs: Tensor | None
    hidden_states: tuple[Tensor, ...]
    features: Tensor | None
    boxes: tuple[Tensor, Tensor] | None = None
    retokenized: RetokenizedBatch | None = None

    def item_features(self, task: Task, mask: Tensor, config: PreTrainedConfig) -> Tensor:
        """Return one feature vector for each item that `mask` selects, (items, width)."""
        assert self.features is not None
        return pooled_features(task, self.features, mask, self.inputs, config)


def forward_outputs(
    model: Any,
    task: Task,
    batch: Mapping[str, Any],
    *,
    inputs: TeacherInputs | None = None,
    head: LMHead | None = None,
    logits: bool = True,
    hidden_states: bool = False,
    features: bool = False,
    boxes: bool = False,
    normalized_patches: bool | None = None,
) -> ForwardOutputs:
    """Run a model on a batch without its labels, and return what a loss may compare.

    Args:
        model: In evaluation mode; what wraps it may be PEFT, torch.compile, FSDP or DeepSpeed.
        task: What its head is for.
        batch: The student's, on the model's device; what the model's forward does not name is left out.
        inputs: Converts the batch to what this teacher expects; None where it is that already.
        head: The model's language head; it is then not run, and `head_inputs` is returned instead of logits.
        logits, hidden_states, features, boxes: Whether to return them.
        normalized_patches: Whether patches of masked images are to have mean 0 and variance 1; None as the model has them.

    Raises:
        TeacherError: The batch cannot be converted to what the teacher expects, or it cannot run on it.
        OptionError: Its rows have several texts each, which the teacher would mix.
    """
    bare = without_adapter(extract_model_from_parallel(model, keep_torch_compile=False))
    known = forward_parameters(bare)
    converted = dict(batch) if inputs is None else inputs.convert(batch)
    needed = _SPAN_LABELS if beam_search_heads(bare, task) else ()  # its end logits depend on the true start
    retokenizer = None if inputs is None else inputs.retokenizer
    retokenized = None if retokenizer is None else retokenizer.retokenize(converted)
    model_inputs = {
        name: value
        for name, value in (converted if retokenized is None else retokenized.inputs).items()
        if name in known and (name not in _TARGET_INPUTS or name in needed)
    }
    check_packed_rows(bare, converted, "teacher")
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in known else {}
    if hidden_states:
        options["output_hidden_states"] = True
    if not getattr(bare.config, "return_dict", True):
        options["return_dict"] = True
    head_inputs: list[Tensor] = []
    captured: list[Tensor] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(without_cache(bare))
        if not torch.is_grad_enabled():
            stack.enter_context(fast_half_products(bare))
        if inputs is not None:
            stack.enter_context(inputs.special_tokens())
        head_outputs = stack.enter_context(capture_head_outputs(bare, task))
        has_head = task is not Task.FEATURE_EXTRACTION
        if features and has_head:
            captured = stack.enter_context(capture_head_inputs(find_classifier(bare, task)))
        if head is not None:
            stack.enter_context(skip_lm_head(bare, head, head_inputs.append))
        with unreadable_as_teacher_error(bare, converted | model_inputs):  # what it does not read may be why
            outputs = model(**model_inputs, **options)
    if features and not has_head:
        captured = [embed(bare, last_hidden_state(outputs), converted)]
    canonical = task_logits(task, outputs, converted, head_outputs) if logits else torch.empty(0)
    if logits and task.row.outputs[0].items == "patch":
        normalized = normalizes_patches(bare.config) if normalized_patches is None else normalized_patches
        conversion = None if inputs is None else inputs.pixels
        canonical = convert_patches(task, canonical, batch["pixel_values"], bare.config, conversion, normalized)
    made = ForwardOutputs(
        inputs=converted,
        logits=canonical,
        head_inputs=head_inputs[0] if head_inputs else None,
        hidden_states=hidden_states_of(outputs, task, bare.config) if hidden_states else (),
        features=captured[-1] if captured else None,
        boxes=boxes_and_objectness(task, outputs, output_kind(task, bare.config)) if boxes else None,
    )
    return made if retokenized is None else _for_pieces(made, retokenized, retokenizer)


def _for_pieces(made: ForwardOutputs, batch: RetokenizedBatch, retokenizer: Retokenizer | None) -> ForwardOutputs:
    """Return outputs of the model's own tokens for the pieces of the batch that it was made of."""
    assert retokenizer is not None
    if made.logits.shape[1:2] == batch.inputs["input_ids"].shape[1:]:
        logits = retokenizer.merge(batch.select(made.logits), batch.states)
    else:  # the head was skipped, or no logits were asked for
        logits = made.logits.new_empty(len(made.logits), 0, len(retokenizer.kept_ids))
    return dataclasses.replace(
        made,
        logits=logits,
        head_inputs=None if made.head_inputs is None else batch.select(made.head_inputs),
        hidden_states=tuple(batch.select(each) for each in made.hidden_states),
        features=None if made.features is None else batch.select(made.features),
        retokenized=batch,
    )


def check_item_axes(task: Task, outputs: Tensor, mask: Tensor, role: str) -> None:
    """Check that the canonical outputs of a model have the positions that the items of the batch are selected from.

    Raises:
        TaskError: They have others; both numbers are named.
    """
    if outputs.shape[: mask.ndim] == mask.shape and outputs.ndim == mask.ndim + 1:
        return
    items = task.row.outputs[0].items
    raise TaskError(
        f"The {role}'s outputs are {tuple(outputs.shape)}, and the batch has {tuple(mask.shape)} positions, one a {items}. "
        "Student and teacher must make the same number from the same input for the losses of their logits; leave these out "
        "and use 'ce', or a teacher that does."
    )


@contextlib.contextmanager
def unreadable_as_teacher_error(
    teacher: Any, inputs: Mapping[str, Any], *, source: str = "the student's", advice: str = _SAME_INPUTS_ADVICE
) -> Iterator[None]:
    """Raise a `TeacherError` with the shapes of its inputs where a teacher's forward pass cannot run on them.

    Only the errors of Python, Transformers and torch that a batch may cause are: ids beyond a table are an `IndexError`,
    other shapes a `RuntimeError` or `ValueError`, missing inputs a `TypeError` or `AttributeError`. Their subclasses, as of
    a lost device, a compiler or memory that ran out, are not the batch's fault and come out as they are.

    Args:
        teacher: The model.
        inputs: The batch.
        source: Whose batch it is.
        advice: What to do, a sentence.
    """
    try:
        yield
    except _ERRORS_OF_BATCHES as error:
        if type(error) not in _ERRORS_OF_BATCHES or should_reduce_batch_size(error) or "CUDA error" in str(error):
            raise
        shapes = {name: tuple(value.shape) for name, value in inputs.items() if isinstance(value, Tensor)}
        name = getattr(teacher.config, "_name_or_path", "") or type(teacher).__name__
        raise TeacherError(
            f"The teacher {name} cannot read a batch of {source}, {shapes}: {str(error).rstrip('.')}. {advice}"
        ) from error


def align_logits(logits: Tensor, classes: int | None, order: list[int] | None) -> Tensor:
    """Return the columns of a teacher's logits that the student has too: the first `classes`, or those of `order`.

    Args:
        logits: (items, classes of the teacher).
        classes: How many leading classes are shared; None for all.
        order: The teacher's class for each of the student's; it takes precedence.
    """
    if order is not None:
        return logits[:, order]
    return logits if classes is None else logits[:, :classes]


@dataclass
class LiveTeacher:
    """A teacher that is run on every batch, in evaluation mode and without gradients.

    Attributes:
        classes: How many of its first classes student and teacher share; None for all.
        order: The teacher's class for each of the student's; None where their order is the same.
        weight: Its share where there are several teachers.
        head: Its language head, where that is known and its weights are whole in this process.
        inputs: Converts batches, made for the student, to what it expects; None where they are that already.
        normalized_patches: Whether the student reconstructs patches of mean 0 and variance 1.
        name: Hub id, path of a folder, or name of its class.
        source: Where it was loaded from; None where that is not known.
    """

    model: PreTrainedModel
    task: Task
    classes: int | None = None
    order: list[int] | None = None
    weight: float = 1.0
    head: LMHead | None = None
    inputs: TeacherInputs | None = None
    normalized_patches: bool = False
    name: str = ""
    source: Source | None = None

    @property
    def config(self) -> Any:
        """The config of the model."""
        return self.bare.config

    @property
    def depth(self) -> int:
        """Its number of blocks, of an encoder-decoder the decoder's."""
        return depth_of_config(self.bare.config, self.task)

    def width(self, name: str) -> int | None:
        """Return the width of "hidden_N" or "features"."""
        if name == "features" and self.task is Task.FEATURE_EXTRACTION:
            return modules_of_model(self.bare).width
        if name == "features":
            return int(find_classifier(self.bare, self.task).in_features)
        return width_of_config(self.bare.config)

    @functools.cached_property
    def kind(self) -> OutputKind:
        """What its logits are."""
        return output_kind(self.task, self.bare.config)

    @functools.cached_property
    def bare(self) -> Any:
        """The model without the wrappers of several processes and of torch.compile."""
        return extract_model_from_parallel(self.model, keep_torch_compile=False)

    @torch.no_grad()
    def forward(
        self,
        inputs: Mapping[str, Any],
        mask: Tensor,
        needs: Collection[TeacherSignal],
        layers: Collection[int] = (),
        *,
        max_logits: int = 2**23,
    ) -> TeacherSignals:
        """Return the teacher's signals for a batch.

        Args:
            inputs: The student's batch.
            mask: The positions that have a target, as from `models.targets.target_mask`.
            needs: Which signals to return.
            layers: The numbers of blocks after which hidden states are returned.
            max_logits: How many logits are held at once where the head is known.
        """
        outputs = forward_outputs(
            self.model,
            self.task,
            inputs,
            inputs=self.inputs,
            head=self.head,
            logits=TeacherSignal.LOGITS in needs,
            hidden_states=TeacherSignal.HIDDEN_STATES in needs,
            features=TeacherSignal.FEATURES in needs,
            boxes=TeacherSignal.BOXES in needs,
            normalized_patches=self.normalized_patches,
        )
        target: Callable[[slice], DenseTarget | TopKTarget] | None = None
        if TeacherSignal.LOGITS in needs and outputs.head_inputs is not None:
            at_items = outputs.head_inputs[mask.to(outputs.head_inputs.device)]
            retokenized = outputs.retokenized
            states = None if retokenized is None else retokenized.states[mask.to(retokenized.states.device)]
            target = self._target_from_head_inputs(at_items, states, max_logits, mask.device)
        elif TeacherSignal.LOGITS in needs:
            check_item_axes(self.task, outputs.logits, mask, "teacher")
            target = self._target_from_logits(outputs.logits[mask.to(outputs.logits.device)].to(mask.device))
        return TeacherSignals(
            target=target,
            hidden_states={layer: outputs.hidden_states[layer] for layer in layers},
            features=None if outputs.features is None else outputs.item_features(self.task, mask, self.bare.config),
            boxes=None if outputs.boxes is None else self._boxes_at(outputs.boxes, mask),
            weight=self.weight,
        )

    def _target_from_head_inputs(
        self, hidden: Tensor, states: Tensor | None, max_logits: int, device: torch.device
    ) -> Callable[[slice], DenseTarget]:
        """Return a function that computes logits on the head's device and returns them on `device`.

        Few rows are requested at a time, in order, and a product with the whole head is efficient for many: it is computed
        ahead, `max_logits` at a time, and kept until rows outside of it are requested.
        """
        head, inputs = self.head, self.inputs
        assert head is not None
        ahead = max(1, max_logits // head.module.weight.shape[0])
        computed: Tensor | None = None
        first = 0

        def target_of(chosen: slice) -> DenseTarget:
            nonlocal computed, first
            start, stop, _ = chosen.indices(len(hidden))
            if computed is None or not first <= start <= stop <= first + len(computed):
                computed, first = None, start
                # In the teacher's precision, not in the student's autocast.
                rows = slice(start, max(stop, start + ahead))
                with (
                    torch.no_grad(),
                    torch.autocast(hidden.device.type, enabled=False),
                    fast_half_products(head.module),
                ):
                    logits = head.logits(hidden[rows])
                    if states is not None and inputs is not None and inputs.retokenizer is not None:
                        logits = inputs.retokenizer.merge(logits, states[rows])
                    computed = logits.to(device)
            return DenseTarget(align_logits(computed[start - first : stop - first], self.classes, self.order))

        return target_of

    def _target_from_logits(self, logits: Tensor) -> Callable[[slice], DenseTarget]:
        return lambda chosen: DenseTarget(align_logits(logits[chosen], self.classes, self.order), self.kind)

    def _boxes_at(self, boxes: tuple[Tensor, Tensor], mask: Tensor) -> tuple[Tensor, Tensor]:
        check_item_axes(self.task, boxes[0], mask, "teacher")
        return boxes[0][mask], boxes[1][mask]


@dataclass(frozen=True)
class TeacherOutputs:
    """What a teacher computes for one batch.

    Attributes:
        classes: The rows of its vocabulary, or the number of its labels.
        logits: In the canonical form of `models.outputs.task_logits`, of a language model without any position; (batch, 0)
            of a model without a head.
        logits_at: Of a language model, its logits (tokens, classes) at rows and positions of the batch, (tokens,) each.
        hidden_states: All of them, where asked for.
        features: The input of the head, where asked for: (batch, width), or (batch, length, width) where items are tokens.
    """

    classes: int
    logits: Tensor
    logits_at: Callable[[Tensor, Tensor], Tensor]
    hidden_states: tuple[Tensor, ...]
    features: Tensor | None


class TeacherRunner:
    """A teacher run without gradients; a language model's logits are computed token by token where its head is known.

    Args:
        model: The teacher.
        task: What its head is for.
        processing_class: What the batches are made with; they are converted to what the teacher's own processor would make.
        init_kwargs: `from_pretrained`'s, of which those that find files on the Hub are used.

    Raises:
        TeacherError: Batches of this processor cannot be converted to what the teacher expects.
    """

    def __init__(
        self, model: nn.Module, task: Task, processing_class: Any = None, init_kwargs: Mapping[str, Any] | None = None
    ):
        self.model, self.task = model, task
        self.inputs = build_teacher_inputs(model, task, processing_class, init_kwargs=init_kwargs)
        self.head = find_lm_head(model) if task.is_language_model else None

    @torch.inference_mode()
    def forward(
        self, batch: Mapping[str, Any], *, hidden_states: bool = False, features: bool = False
    ) -> TeacherOutputs:
        """Run the teacher on a collated batch, on the teacher's own device."""
        bare, task = without_adapter(self.model), self.task
        has_logits = task is not Task.FEATURE_EXTRACTION
        if task.is_per_token or hidden_states or features:
            check_no_virtual_tokens(self.model, "teacher")
        # Of an offloaded teacher, or one on several devices, accelerate moves the inputs to where they are needed.
        device = next((each.device for each in self.model.parameters() if not each.is_meta), torch.device("cpu"))
        tensors = {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
        outputs = forward_outputs(
            self.model,
            task,
            complete_inputs(bare, task, tensors),
            inputs=self.inputs,
            head=self.head,
            logits=has_logits,
            hidden_states=hidden_states,
            features=features,
        )
        batch_size = len(next(iter(tensors.values())))
        logits = outputs.logits if has_logits else torch.empty(batch_size, 0, device=device)
        head_features = outputs.features
        if head_features is not None and task.row.outputs[0].items == "example":
            every_example = torch.ones(len(head_features), dtype=torch.bool, device=device)
            head_features = outputs.item_features(task, every_example, bare.config)
        return TeacherOutputs(
            classes=logits.shape[-1],
            logits=logits,
            logits_at=functools.partial(self._logits_at, outputs),
            hidden_states=outputs.hidden_states,
            features=head_features,
        )

    def _logits_at(self, outputs: ForwardOutputs, rows: Tensor, positions: Tensor) -> Tensor:
        source = outputs.logits if outputs.head_inputs is None else outputs.head_inputs
        selected = source[rows.to(source.device), positions.to(source.device)]
        if self.head is None:
            return selected
        with fast_half_products(self.head.module):
            logits = self.head.transform(self.head.module(selected))
        if outputs.retokenized is None or self.inputs.retokenizer is None:
            return logits
        states = outputs.retokenized.states
        return self.inputs.retokenizer.merge(logits, states[rows.to(states.device), positions.to(states.device)])


def non_finite_signals_error(
    inputs: Mapping[str, Any], mask: Tensor, teachers: Sequence[TeacherSignals], step: int
) -> TeacherError | None:
    """Return an error if a teacher's signals are not finite, None if all are.

    Args:
        inputs: The batch.
        mask: The positions that have a target, (batch, length) or (batch,).
        teachers: The signals of each teacher.
        step: The training step, for the error.
    """
    rows = torch.arange(len(mask), device=mask.device)
    row_of_item = rows[:, None].expand(mask.shape)[mask] if mask.ndim == 2 else rows[mask]
    for number, signals in enumerate(teachers):
        wrong: set[int] = set()
        if signals.target is not None:
            target = signals.target(slice(None))
            # A class may be ruled out by -inf, but the largest logit must be finite.
            largest = (target.logits if isinstance(target, DenseTarget) else target.log_probs).amax(-1)
            wrong |= set(row_of_item[~torch.isfinite(largest)].tolist())
        if signals.features is not None:
            wrong |= set(row_of_item[~torch.isfinite(signals.features).all(-1)].tolist())
        for hidden in signals.hidden_states.values():
            wrong |= set(rows[~torch.isfinite(hidden.flatten(1)).all(-1)].tolist())
        if wrong:
            ids = inputs.get("input_ids")
            beginning = (
                f", which begins with the tokens {ids[min(wrong)][:8].tolist()}" if isinstance(ids, Tensor) else ""
            )
            return TeacherError(
                f"Teacher {number} gives NaN or infinity for {len(wrong)} of {len(mask)} examples at step {step}: the "
                f"first is number {min(wrong)} of the batch{beginning}. Run the teacher in a wider dtype (bfloat16 or "
                "float32), or leave the example out."
            )
    return None
