"""Teachers that run beside the student, and what they are heard to say of a batch."""

import contextlib
import functools
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import accelerate
import torch
import transformers
from accelerate.utils import DistributedType, extract_model_from_parallel
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from hf_guide.distillation.divergences import Dense, TopK
from hf_guide.distillation.embeddings import embedding_per_item, find_classifier, heard_embeddings
from hf_guide.distillation.heads import Head, find_head, without_logits
from hf_guide.distillation.layers import depth_of_config, hidden_states_of, width_of_config
from hf_guide.distillation.objectives import Needs
from hf_guide.distillation.tasks import Task, columns_read, task_of
from hf_guide.distillation.vocabulary import label_alignment, shared_vocabulary
from hf_guide.errors import OptionError, TaskError, TeacherError

AUTO_CLASSES = {
    Task.CAUSAL_LM: "AutoModelForCausalLM",
    Task.MASKED_LM: "AutoModelForMaskedLM",
    Task.SEQ2SEQ_LM: "AutoModelForSeq2SeqLM",
    Task.SEQUENCE_CLASSIFICATION: "AutoModelForSequenceClassification",
    Task.TOKEN_CLASSIFICATION: "AutoModelForTokenClassification",
    Task.IMAGE_CLASSIFICATION: "AutoModelForImageClassification",
}


@dataclass(frozen=True)
class Signals:
    """What one teacher says of one batch.

    Attributes:
        target: the distribution at some of the items, in their order; None where none was asked for or captured.
        hidden_states: (batch, length, width) by number of blocks passed.
        embedding: (items, width).
        weight: this teacher's share.
    """

    target: Callable[[slice], Dense | TopK] | None = None
    hidden_states: Mapping[int, Tensor] = field(default_factory=dict)
    embedding: Tensor | None = None
    weight: float = 1.0


def shared_logits(logits: Tensor, classes: int | None, order: list[int] | None) -> Tensor:
    """Return a teacher's logits, (items, classes), of what the student has too: its first `classes`, or those of `order`."""
    if order is not None:
        return logits[:, order]
    return logits if classes is None else logits[:, :classes]


@dataclass
class LiveTeacher:
    """A model that is run on every batch, in evaluation mode and without gradients.

    Attributes:
        classes: how many of its first classes student and teacher share; None for all.
        order: which of its classes each of the student's is; None where they stand in the same order.
        head: its language head, where that is known and its weights are whole in this process.
    """

    model: PreTrainedModel
    task: Task
    classes: int | None = None
    order: list[int] | None = None
    weight: float = 1.0
    head: Head | None = None

    @property
    def depth(self) -> int:
        """Its number of blocks."""
        return depth_of_config(self.bare.config)

    def width(self, name: str) -> int | None:
        """Return how wide `hidden_N` or `embedding` is."""
        if name == "embedding":
            return int(find_classifier(self.bare, self.task).in_features)
        return width_of_config(self.bare.config)

    @functools.cached_property
    def bare(self) -> Any:
        """The model without what wraps it."""
        return extract_model_from_parallel(self.model, keep_torch_compile=False)

    @torch.no_grad()
    def listen(
        self,
        inputs: Mapping[str, Any],
        mask: Tensor,
        needs: Collection[Needs],
        layers: Collection[int] = (),
        *,
        max_logits: int = 2**23,
    ) -> Signals:
        """Return what the teacher says of a batch.

        Args:
            inputs: the student's; what the teacher's forward does not name is left out.
            mask: which places have a target, as `tasks.target_mask` gives.
            needs: what to listen for.
            layers: the numbers of blocks after which hidden states are wanted.
            max_logits: so many logits are held at once where the head is known.
        """
        known = columns_read(self.bare)
        given = {
            name: value for name, value in inputs.items() if name in known and name not in ("labels", "return_loss")
        }
        if "use_cache" in known:
            given["use_cache"] = False
        if Needs.HIDDEN_STATES in needs:
            given["output_hidden_states"] = True
        fed: list[Tensor] = []
        heard: list[Tensor] = []
        with contextlib.ExitStack() as stack:
            if Needs.EMBEDDING in needs:
                heard = stack.enter_context(heard_embeddings(find_classifier(self.bare, self.task)))
            if self.head is not None:
                stack.enter_context(without_logits(self.bare, self.head, fed.append))
            outputs = self.model(**given)
        target = None
        if Needs.LOGITS in needs:
            target = (
                self._from_head(fed[0][mask], max_logits)
                if self.head is not None
                else self._from_logits(outputs.logits[mask])
            )
        return Signals(
            target=target,
            hidden_states={layer: hidden_states_of(outputs)[layer] for layer in layers},
            embedding=embedding_per_item(self.task, heard[-1], mask, inputs, self.bare.config) if heard else None,
            weight=self.weight,
        )

    def _from_head(self, hidden: Tensor, max_logits: int) -> Callable[[slice], Dense]:
        head = self.head
        assert head is not None
        ahead = max(1, max_logits // head.module.weight.shape[0])
        held: Tensor | None = None
        first = 0

        def rows(chosen: slice) -> Dense:
            """Few rows are asked for at a time, one after the other; a product with the whole head is worth it for many."""
            nonlocal held, first
            start, stop, _ = chosen.indices(len(hidden))
            if held is None or not first <= start <= stop <= first + len(held):
                held, first = None, start
                # In the teacher's own precision, whatever the student's is.
                with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
                    held = head.logits(hidden[start : max(stop, start + ahead)])
            return Dense(shared_logits(held[start - first : stop - first], self.classes, self.order))

        return rows

    def _from_logits(self, logits: Tensor) -> Callable[[slice], Dense]:
        return lambda chosen: Dense(shared_logits(logits[chosen], self.classes, self.order))


def open_teachers(
    teacher: "str | os.PathLike[str] | PreTrainedModel | Sequence[Any]",
    task: Task,
    *,
    init_kwargs: Mapping[str, Any] | None = None,
) -> list[PreTrainedModel]:
    """Return the teachers, loaded where they are named: a Hub id, a folder, several with commas, a model, or a sequence.

    Raises:
        TeacherError: one that cannot be loaded.
        TaskError: one for another task than the student's.
        OptionError: something else than a teacher.
    """
    if isinstance(teacher, str) and "," in teacher and not os.path.exists(teacher):
        teacher = [name.strip() for name in teacher.split(",")]
    many = teacher if isinstance(teacher, (list, tuple)) else [teacher]
    if not many:
        raise OptionError("There is no teacher in the sequence of teachers; name at least one.")
    opened = []
    for one in many:
        if isinstance(one, (str, os.PathLike)):
            model = _load(os.fspath(one), task, dict(init_kwargs or {}))
        elif isinstance(one, PreTrainedModel) or hasattr(one, "get_base_model"):
            model = one  # type: ignore[assignment]
        else:
            raise OptionError(f"A teacher is a Hub id, a folder or a PreTrainedModel, not a {type(one).__name__}.")
        if task_of(model) is not task:
            raise TaskError(
                f"The teacher {name_of(model)} is a {type(model).__name__}, for {task_of(model)}; the student is for {task}. "
                "Give a teacher of the student's task."
            )
        model.eval()
        model.requires_grad_(False)
        opened.append(model)
    return opened


def _load(name: str, task: Task, init_kwargs: dict[str, Any]) -> PreTrainedModel:
    loader = getattr(transformers, AUTO_CLASSES[task])
    try:
        model, found = loader.from_pretrained(name, output_loading_info=True, **init_kwargs)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise TeacherError(f"The teacher {name} does not load as a model for {task}: {error}") from error
    if found["missing_keys"]:
        raise TeacherError(
            f"{len(found['missing_keys'])} weights of {type(model).__name__} are not in {name} and would be random: "
            f"{', '.join(sorted(found['missing_keys'])[:3])}, ... A teacher must be trained for {task}."
        )
    return model


def name_of(model: Any) -> str:
    """Return where a model came from, or its class's name."""
    return getattr(model.config, "_name_or_path", "") or type(model).__name__


def tokenizer_of(model: Any, init_kwargs: Mapping[str, Any] | None = None) -> Any:
    """Return the tokenizer beside a model's files, or None where there is none to be had."""
    where = {key: value for key, value in (init_kwargs or {}).items() if key in ("revision", "token", "cache_dir")}
    try:
        return (
            AutoTokenizer.from_pretrained(model.config._name_or_path, **where) if model.config._name_or_path else None
        )
    except (OSError, ValueError, ImportError, KeyError):
        return None


def place_teacher(model: PreTrainedModel, accelerator: accelerate.Accelerator) -> tuple[PreTrainedModel, bool]:
    """Bring a teacher to where the student is trained, sharded as the student is; return it and whether it is sharded.

    A quantised one, or one that a `device_map` has spread already, stays where it is.
    """
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1 or getattr(model, "is_quantized", False):
        return model, False
    if accelerator.distributed_type == DistributedType.FSDP:
        if accelerator.is_fsdp2:
            from accelerate.utils.fsdp_utils import fsdp2_prepare_model

            return fsdp2_prepare_model(accelerator, model), True
        return accelerator.prepare_model(model), True
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return _place_with_deepspeed(model, accelerator)
    return model.to(accelerator.device), False


def _place_with_deepspeed(model: PreTrainedModel, accelerator: accelerate.Accelerator) -> tuple[PreTrainedModel, bool]:
    """Shard a teacher where the student's weights are: ZeRO-3 alone shards them, other stages gradients and optimizers."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin.zero_stage != 3:
        return model.to(accelerator.device), False
    import deepspeed

    sharding = {"stage": 3}
    if "offload_param" in plugin.deepspeed_config["zero_optimization"]:
        sharding["offload_param"] = plugin.deepspeed_config["zero_optimization"]["offload_param"]
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": sharding}
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        config[name] = {"enabled": model.dtype is dtype}
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    return engine, True


def make_teachers(
    teacher: Any,
    student: Any,
    task: Task,
    *,
    init_kwargs: Mapping[str, Any] | None,
    weights: Sequence[float] | None,
    compile: bool,
    processing_class: Any,
    accelerator: accelerate.Accelerator,
) -> list[LiveTeacher]:
    """Return teachers that are loaded, agree with the student, and stand where it is trained.

    Raises:
        OptionError, TaskError, TeacherError: as `open_teachers`, or weights of another number than teachers.
        VocabularyError: vocabularies or labels that do not agree.
    """
    models = open_teachers(teacher, task, init_kwargs=init_kwargs)
    shares = [1.0] * len(models) if weights is None else list(weights)
    if len(shares) != len(models):
        raise OptionError(f"There are {len(shares)} teacher_weights for {len(models)} teachers; give one weight each.")
    made = []
    for model, share in zip(models, shares, strict=True):
        if model is student:
            raise OptionError(
                "The teacher is the student itself. To learn from what it is now, pass copy.deepcopy(model)."
            )
        if model.main_input_name != student.main_input_name:
            raise TaskError(
                f"The teacher {name_of(model)} reads {model.main_input_name}, the student {student.main_input_name}: "
                "they cannot be fed the same batch."
            )
        classes, order = None, None
        if task.is_language_model:
            sizes = [each.get_output_embeddings().weight.shape[0] for each in (student, model)]
            own = tokenizer_of(model, init_kwargs)
            tokenizer = getattr(processing_class, "tokenizer", processing_class)
            classes = shared_vocabulary(tokenizer, own, *sizes)
        else:
            order = label_alignment(student.config, model.config)
        # Before it is sharded: what is proved on whole weights still holds then, but they are no longer whole.
        head = find_head(model) if task.is_language_model and not compile else None
        placed, sharded = place_teacher(model, accelerator)
        if compile:
            placed = torch.compile(placed)  # type: ignore[assignment]
        head = None if sharded else head
        made.append(LiveTeacher(placed, task, classes, order, share / sum(shares), head))
    return made


def refuse_not_finite(
    loss: Tensor, inputs: Mapping[str, Any], mask: Tensor, said: Sequence[Signals], step: int
) -> None:
    """Refuse a teacher that says NaN or infinity; a student that does is left to `Trainer`.

    Raises:
        TeacherError: names the examples of the batch, and the step.
    """
    if bool(torch.isfinite(loss)):
        return
    rows = torch.arange(len(mask), device=mask.device)
    of_items = rows[:, None].expand(mask.shape)[mask] if mask.ndim == 2 else rows[mask]
    for number, signals in enumerate(said):
        wrong: set[int] = set()
        if signals.target is not None:
            target = signals.target(slice(None))
            bad = torch.isnan(target.logits if isinstance(target, Dense) else target.log_probs).any(-1)
            wrong |= set(of_items[bad].tolist())
        if signals.embedding is not None:
            wrong |= set(of_items[~torch.isfinite(signals.embedding).all(-1)].tolist())
        for hidden in signals.hidden_states.values():
            wrong |= set(rows[~torch.isfinite(hidden.flatten(1)).all(-1)].tolist())
        if wrong:
            ids = inputs.get("input_ids")
            shown = f", which begins with the tokens {ids[min(wrong)][:8].tolist()}" if isinstance(ids, Tensor) else ""
            raise TeacherError(
                f"Teacher {number} says NaN or infinity of {len(wrong)} of {len(mask)} examples at step {step}: the first is "
                f"number {min(wrong)} of the batch{shown}. Run the teacher in a wider dtype (bfloat16 or float32), or "
                "leave the example out."
            )
