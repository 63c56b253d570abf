"""`DistillationMixin`: what makes a `transformers.Trainer`, or a class derived from it, a distillation.

Does: set up the student, its teachers and the losses; compute, check and log the losses; evaluate them.
Does not: divide them (`loss_scaling.py`), check steps (`step_checks.py`), save (`student_files.py`, `resuming.py`), or
order the bases of a class (`trainer_compatibility.py`).
"""

import contextlib
import functools
import inspect
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, Seq2SeqTrainer, TrainerCallback
from transformers.debug_utils import DebugOption
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput
from transformers.utils import ModelOutput
from typing_extensions import Self

from hf_guide.distillation.arguments import (
    DistillationArguments,
    resolve_teacher,
    validate_arguments,
    validate_datasets,
    validate_output_dir,
)
from hf_guide.distillation.batch_builder import BatchBuilder, DistillationBatch
from hf_guide.distillation.cached_teacher import CachedTeacher, load_cached_teacher
from hf_guide.distillation.embedding_maps import fit_embedding_maps
from hf_guide.distillation.generation_prompts import generation_step
from hf_guide.distillation.layer_projections import ProjectionGradSyncCallback, check_optimizer_has_projections
from hf_guide.distillation.loss_scaling import LossDenominator, LossScalingTrainer
from hf_guide.distillation.losses.registry import (
    TASK_LOSS,
    check_losses_fit_task,
    check_output_kind,
    compares_features,
)
from hf_guide.distillation.metrics import RunningMeans
from hf_guide.distillation.objective import (
    TEACHER_AGREEMENT,
    TEACHER_CE,
    TOKEN_METRICS,
    ObjectiveOutput,
    build_objective,
    find_head_all_ranks,
    is_sharded,
)
from hf_guide.distillation.resuming import ResumableTrainer
from hf_guide.distillation.similarity_metrics import SimilarityRecorder
from hf_guide.distillation.step_checks import StepChecksCallback, non_finite_loss_error
from hf_guide.distillation.student_files import FormerRecordCallback, StudentFilesTrainer
from hf_guide.distillation.student_init import (
    align_student_special_tokens,
    attach_saved_report,
    find_earlier_trainings,
    init_student_from_teacher,
    validate_student,
    validate_tokenizer,
    validate_trainable,
    wrap_with_peft,
)
from hf_guide.distillation.subclass_logits import build_subclass_targets, find_target_provider
from hf_guide.distillation.teacher_setup import build_live_teachers, check_shardable
from hf_guide.distillation.trainer_compatibility import (
    DistillationMeta,
    calls_compute_loss,
    check_arguments_class,
    check_init_keywords,
    check_next_classes,
    check_next_keywords,
    check_overridden_methods,
    describe_dropped_metrics,
    describe_not_called,
    describe_other_count,
    describe_unused_loss,
    has_own_task_loss,
    is_sft_trainer,
    next_init_kwargs,
)
from hf_guide.errors import HfGuideError, OptionError
from hf_guide.models.adapters import check_no_virtual_tokens, is_encoder_decoder, validate_unwrapped
from hf_guide.models.code_references import drop_code_references
from hf_guide.models.label_shift import shifts_labels
from hf_guide.models.lm_head import LMHead
from hf_guide.models.targets import needs_labels
from hf_guide.signal_cache.reader import Capture, CaptureDataCollator
from hf_guide.tasks import Task, task_of
from hf_guide.teachers.alignment import incomparable_logits
from hf_guide.teachers.forward import LiveTeacher, non_finite_signals_error
from hf_guide.teachers.isolation import check_no_shared_parameters


class DistillationMixin(LossScalingTrainer, StudentFilesTrainer, ResumableTrainer, metaclass=DistillationMeta):
    """Let any `Trainer` class train a student on a teacher's signals as well as on its own loss.

    Put it in front of the class: `class MyTrainer(DistillationMixin, OtherTrainer)`. The `compute_loss` of `OtherTrainer` then
    gives the task loss `ce`, to which the other losses are added; its data, evaluation, metrics and callbacks work as usual.
    A class in front of this one whose `compute_loss` calls `super().compute_loss` builds on the weighted sum of all losses.
    `DistillationTrainer` and `Seq2SeqDistillationTrainer` are made of this class; `DistillationTrainer` describes what they
    do.

    In whatever order the bases are written, the teacher is used, or an error gives the reason: a trainer written in front of
    this class comes after it where it would leave the teacher out.

    Args:
        model: The student; or a config, or a mapping of arguments of `from_teacher`, to initialize it from the teacher.
        teacher: A Hub id, a folder, a model, several of these, or a `Capture`; `args.teacher` and `args.teacher_cache` do
            the same.
        teacher_model: Alias of `teacher`, its name in TRL.
        peft_config: Wraps the student in an adapter.
        processing_class: As in `Trainer`; it is compared with the teacher's. Pixels that the teacher expects normalized in
            another way are converted; the size of images that are segmented or searched for objects, and the language of
            texts, are the data's choice; any other difference is an error.
        others: As in `Trainer`.
        next_class_kwargs: What the class after this one takes besides, such as `formatting_func` of TRL's `SFTTrainer`.

    Raises:
        OptionError: A loss needs a teacher and there is none, options contradict each other, or a class leaves the teacher
            out.
        TaskError: A teacher of another task, or losses that are not for this one.
        VocabularyError: Vocabularies or labels that do not agree.
        TeacherError: A teacher that cannot be loaded, or expects other inputs than the batches.
        CaptureError: A signal cache that is truncated, of another teacher or another tokenizer.

    Example:
        >>> import tempfile, torch
        >>> from transformers import LlamaConfig, LlamaForSequenceClassification, Trainer
        >>> from hf_guide import DistillationArguments
        >>> class WeightedTrainer(Trainer):
        ...     def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ...         outputs = model(**inputs)
        ...         weights = torch.tensor([1.0, 3.0])
        ...         loss = torch.nn.functional.cross_entropy(outputs.logits, inputs["labels"], weights)
        ...         return (loss, outputs) if return_outputs else loss
        >>> class MyTrainer(DistillationMixin, WeightedTrainer):
        ...     pass
        >>> sizes = {"vocab_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
        >>> teacher = LlamaForSequenceClassification(LlamaConfig(hidden_size=32, pad_token_id=0, **sizes))
        >>> student = LlamaForSequenceClassification(LlamaConfig(hidden_size=16, pad_token_id=0, **sizes))
        >>> examples = [{"input_ids": [1, 5, 7, 2], "labels": 1}] * 8
        >>> args = DistillationArguments(
        ...     tempfile.mkdtemp(), losses={"ce": 0.5, "kd": 0.5}, max_steps=1, logging_steps=1, use_cpu=True,
        ...     report_to="none", disable_tqdm=True
        ... )
        >>> trainer = MyTrainer(student, args, train_dataset=examples, teacher=teacher)
        >>> trainer.train().global_step
        {'loss': ..., 'ce': ..., 'kd': ...}
        {'train_runtime': ...}
        1
    """

    arguments_class: type[DistillationArguments] = DistillationArguments
    """Of the arguments that are used where none are passed."""

    def __new__(cls, *_: Any, **keywords: Any) -> Self:
        """Check the order of the bases before another class's `__init__` raises for a keyword that it does not take."""
        check_init_keywords(cls, DistillationMixin, keywords)
        return super().__new__(cls)

    def __init__(
        self,
        model: "PreTrainedModel | nn.Module | PreTrainedConfig | Mapping[str, Any] | None" = None,
        args: DistillationArguments | None = None,
        data_collator: Callable[..., Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Callable[..., Any] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[..., Tensor] | None = None,
        *,
        teacher: "str | os.PathLike[str] | PreTrainedModel | Sequence[Any] | Capture | None" = None,
        teacher_model: "str | os.PathLike[str] | PreTrainedModel | None" = None,
        peft_config: Any = None,
        **next_class_kwargs: Any,
    ):
        args = self.arguments_class("tmp_trainer") if args is None else args
        check_next_keywords(self, DistillationMixin, args, next_class_kwargs)
        self._validate_init(model, args, train_dataset, eval_dataset)
        if teacher is not None and teacher_model is not None:
            raise OptionError("teacher and teacher_model, its name in TRL, are both given; keep teacher.")
        source = resolve_teacher(teacher if teacher_model is None else teacher_model, args)
        if model is None and model_init is None and args.student_init_kwargs is not None:
            model = dict(args.student_init_kwargs)  # type: ignore[arg-type]  # parsed by now
        validate_output_dir(args, source, model)
        student: Any = model
        if isinstance(model, (PreTrainedConfig, Mapping)):
            student = init_student_from_teacher(
                model,
                source,
                args.teacher_init_kwargs,  # type: ignore[arg-type]
                train_dataset,
                data_collator,
            )
        attach_saved_report(student, token=args.hub_token)
        self.earlier_trainings = find_earlier_trainings(student, token=args.hub_token)
        # PEFT changes the student in place, so this comes first.
        check_no_shared_parameters(student, source if isinstance(source, (list, tuple)) else [source])
        if peft_config is not None:
            student, model_init = wrap_with_peft(student, model_init, peft_config)
        self._train_means, self._eval_means = RunningMeans(), RunningMeans()
        self._similarities = SimilarityRecorder()
        self._needs_all_logits, self._evaluated_losses = False, set[str]()
        self._hub_target = {"token": args.hub_token, "revision": args.hub_revision}
        self._seen_cards = set()
        self.called_methods, self.loss_gradients = set(), []
        keywords = {
            "model": student,
            "args": args,
            "data_collator": data_collator,
            "train_dataset": train_dataset,
            "eval_dataset": eval_dataset,
            "processing_class": processing_class,
            "model_init": model_init,
            "compute_loss_func": compute_loss_func,
            "compute_metrics": compute_metrics,
            "callbacks": callbacks,
            "optimizers": optimizers,
            "optimizer_cls_and_kwargs": optimizer_cls_and_kwargs,
            "preprocess_logits_for_metrics": preprocess_logits_for_metrics,
        }
        super().__init__(**next_init_kwargs(self, DistillationMixin, keywords), **next_class_kwargs)
        self.args: DistillationArguments
        self._setup_distillation(source)

    def _validate_init(self, model: Any, args: Any, train_dataset: Any, eval_dataset: Any) -> None:
        validate_arguments(args, self.arguments_class)
        check_arguments_class(self, args)
        if set(args.loss_weights) != {TASK_LOSS}:
            check_overridden_methods(self, DistillationMixin)
            check_next_classes(self, DistillationMixin, args)
        validate_student(model)
        validate_datasets(train_dataset, eval_dataset)

    def _setup_distillation(self, source: Any) -> None:
        """Check the student, load its teachers, and set up the losses."""
        args, processing_class = self.args, self.processing_class
        drop_code_references(processing_class)  # what a checkpoint pushes is saved and uploaded in one go
        validate_unwrapped(self.model, "student")
        validate_tokenizer(self.model, processing_class)
        align_student_special_tokens(self.model, processing_class)
        student = self.unwrapped_student
        check_shardable(student, "student", self.accelerator)
        self.task = task_of(student)
        if needs_labels(self.task):
            self.label_names = list(self.label_names) or ["labels"]  # a forward of *args and **kwargs names none
        else:
            self.can_return_loss = True  # `Trainer` then evaluates without labels, too
        check_losses_fit_task(args.loss_configs, self.task, student.config)
        if self.train_dataset is not None:
            validate_trainable(student)
        self.teachers: list[LiveTeacher | CachedTeacher] = []
        if isinstance(source, Capture):
            self.teachers = [load_cached_teacher(source, student, self.task, processing_class)]
            self.data_collator = CaptureDataCollator(self.data_collator, source, args.temperature, missing="skip")
        elif source is not None:
            self.teachers += build_live_teachers(
                source,
                student,
                self.task,
                init_kwargs=args.teacher_init_kwargs,  # type: ignore[arg-type]
                weights=args.teacher_weights,  # type: ignore[arg-type]
                processing_class=processing_class,
                accelerator=self.accelerator,
            )
        for each in self.teachers:
            check_output_kind(args.loss_weights, self.task, each.config, "teacher")
        self.add_callback(StepChecksCallback(self))
        self.add_callback(FormerRecordCallback(self))
        self._setup_objective()

    # Student and losses

    def check_called(self, *names: str) -> None:
        """Check that the trainer's own methods were called, unless the task loss is the only loss.

        Raises:
            OptionError: Names the class whose method was called instead of one of them.
        """
        if set(self.args.loss_weights) == {TASK_LOSS}:
            return
        for name in names:
            if name not in self.called_methods:
                raise OptionError(describe_not_called(self, DistillationMixin, name))
        if self.loss_is_scaled_for_ga is not True:
            raise OptionError(
                f"{type(self).__name__}.loss_is_scaled_for_ga must be True; found {self.loss_is_scaled_for_ga}: the loss "
                "would be divided by gradient_accumulation_steps a second time. Leave it as DistillationMixin sets it."
            )

    def check_loss_used(self) -> None:
        """Check that a derived class's `compute_loss` trains on the loss that it got, unless the task loss is the only loss.

        Raises:
            OptionError: Names the class.
        """
        if set(self.args.loss_weights) == {TASK_LOSS} or not self.is_watched:
            return
        if not any(bool(gradient) for gradient in self.loss_gradients):
            raise OptionError(describe_unused_loss(self, DistillationMixin))

    def _unwrapped_teacher(self, teacher: LiveTeacher | CachedTeacher) -> Any:
        """Return a teacher's model or signal cache; None where this process has only a shard of its weights."""
        if isinstance(teacher, CachedTeacher):
            return teacher.capture
        return None if is_sharded(self.accelerator) else teacher.bare

    def _find_head(self, student: Any) -> LMHead | None:
        needs_all_logits = (
            self._has_own_task_loss
            or self.compute_loss_func is not None
            or self.label_smoother is not None
            or self.args.torch_compile
            # Its hooks read the output of every module, which must have one.
            or DebugOption.UNDERFLOW_OVERFLOW in self.args.debug
        )
        head = None if needs_all_logits else find_head_all_ranks(student, self.task, self.accelerator)
        return head if head is not None and head.shifted == self._shifted else None

    def _setup_objective(self) -> None:
        """Set up the losses of this student under these arguments; called again for every new student and trial."""
        student = self.unwrapped_student
        teachers = [each.bare for each in self.teachers if isinstance(each, LiveTeacher)]
        check_no_shared_parameters(
            student, [*teachers, getattr(find_target_provider(self.data_collator), "live_teacher", None)]
        )
        if self.task.is_per_token or compares_features(self.args.loss_weights):
            check_no_virtual_tokens(student, "student")
            for teacher in teachers:
                check_no_virtual_tokens(teacher, "teacher")
        self._accepts_num_items: bool | None = None
        self._has_own_task_loss = has_own_task_loss(type(self), DistillationMixin)
        self._shifted = shifts_labels(student, self.task)
        self.distillation_objective = build_objective(
            student, self.task, self.teachers, self.args, self.accelerator, head=self._find_head(student)
        )
        self.distillation_objective.measures_tokens = is_sft_trainer(type(self))
        self._subclass_targets = build_subclass_targets(
            student.config,
            self.data_collator,
            self.args.temperature,
            [self._unwrapped_teacher(each) for each in self.teachers],
            learned=self.distillation_objective.needs_subclasses,
            columns=getattr(self.train_dataset, "column_names", None) or (),
            keeps_columns=not self.args.remove_unused_columns,
        )
        self._batch_builder = BatchBuilder(
            student,
            self.task,
            self.teachers,
            self.distillation_objective.losses,
            self.distillation_objective.layers,
            self.accelerator,
            self._subclass_targets,
            tuple(self.label_names),
            self._shifted,
            self.distillation_objective.max_logits,
            not any(incomparable_logits(self.task, student.config, each.config) for each in self.teachers),
        )
        self.remove_callback(ProjectionGradSyncCallback)
        if self.distillation_objective.projections is not None:
            self.add_callback(ProjectionGradSyncCallback(self.distillation_objective.projections, self.accelerator))

    def _hp_search_setup(self, trial: Any) -> None:
        """Apply a trial's arguments as `Trainer` does, and set up the losses of the student that `model_init` just made."""
        super()._hp_search_setup(trial)
        if self.model_init is None:
            return
        self.args.check_options()
        check_losses_fit_task(self.args.loss_configs, self.task, self.unwrapped_student.config)
        if isinstance(self.data_collator, CaptureDataCollator):
            self.data_collator = self.data_collator.with_temperature(self.args.temperature)
        self._setup_objective()

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create the optimizer as `Trainer` does; it also updates the projections between widths, where there are any.

        Raises:
            OptionError: An optimizer was passed that does not have them.
        """
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if self.distillation_objective.projections is not None:
            projections = list(self.distillation_objective.projections.parameters())
            if is_new and projections:
                optimizer.add_param_group({"params": projections, "weight_decay": 0.0})
            check_optimizer_has_projections(optimizer, projections)
        return optimizer

    # Batches

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns that the teacher reads, too."""
        is_new = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if is_new and self._signature_columns is not None:
            self._signature_columns += self._batch_builder.teacher_only_columns
            self._signature_columns.append("seq_lengths")  # without it TRL's collator takes a packed row for one text

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        """Keep all columns for a collator that makes the model's inputs of them, such as `SentenceCollator`."""
        if getattr(self.data_collator, "keeps_columns", False):
            return dataset
        return super()._remove_unused_columns(dataset, description)

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        if getattr(data_collator, "keeps_columns", False):
            return data_collator
        return super()._get_collator_with_removed_columns(data_collator, description)

    # Losses

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the weighted sum of the losses, each its mean over the items of the accumulated batch.

        In evaluation it is the task loss, where there are labels; a batch without any target has loss and gradient zero.
        With `return_outputs` a language model computes all its logits, which takes their memory.
        """
        self.called_methods.add("compute_loss")
        training = model.training
        if isinstance(self.data_collator, CaptureDataCollator):
            self.data_collator.check_temperature(self.args.temperature)
        if training and self.is_in_train:
            self._check_count(num_items_in_batch)
        fit_embedding_maps(self, inputs)
        batch = self._batch_builder.build(inputs, training=training)
        denominator = self._loss_denominator(batch, num_items_in_batch)
        model = self._subclass_targets.wrap_in_class_logits(model)
        objective = self.distillation_objective
        if training and objective.weights == {TASK_LOSS: 1.0} and not objective.measures_tokens:
            # What `Trainer` does, to the last bit.
            loss, outputs = self._task_loss(model, batch.inputs, batch, denominator)
            result = ObjectiveOutput(loss, {TASK_LOSS: denominator.to_sum(loss.detach())}, outputs)
        else:
            result = objective.compute(
                model,
                self.unwrapped_student,
                batch,
                lambda inputs: self._task_loss_sum(model, inputs, batch, denominator),
                measure=not training,
                all_logits=self._needs_all_logits or (return_outputs and not self._discards_outputs),
            )
            is_task_loss = not training and TASK_LOSS in result.sums
            loss = denominator.to_mean(result.sums[TASK_LOSS] if is_task_loss else result.total)
        if training:
            loss = self._divide_by_accumulation_steps(loss, denominator)
            self.watch_gradient(loss)
        self._check_loss(loss, result, batch)
        self._add_to_means(self._train_means if training else self._eval_means, result, batch, denominator)
        if not training and result.embeddings is not None:
            self._record_embeddings(result.embeddings, batch)
        return (loss, self._strip_hidden_states(result.outputs, loss)) if return_outputs else loss

    def _add_to_means(
        self, means: RunningMeans, result: ObjectiveOutput, batch: DistillationBatch, denominator: LossDenominator
    ) -> None:
        """Add the losses of a batch to the means, the task loss by what it is averaged over."""
        sums = dict(result.sums)
        if TASK_LOSS in sums:
            of_targets = sums.pop(TASK_LOSS) * (denominator.num_targets / denominator.num_items)
            means.add({TASK_LOSS: of_targets}, batch.num_targets)
        means.add(sums, batch.num_items)

    def _record_embeddings(self, embeddings: Tensor, batch: DistillationBatch) -> None:
        """Record the student's embeddings in evaluation, and those of its teacher, of several the first."""
        teacher = batch.signals[0].features if batch.signals else None
        scores = None if batch.scores is None else batch.scores.to(batch.mask.device)[batch.mask]
        self._similarities.add(embeddings, teacher, scores=scores, rows_per_example=batch.rows_per_example)

    @property
    def _discards_outputs(self) -> bool:
        """Whether the outputs that `compute_loss` returns are not used: in `Trainer`'s evaluation of losses alone."""
        is_overridden = type(self).compute_loss is not DistillationMixin.compute_loss or "compute_loss" in vars(self)
        return self._is_predicting and not self._needs_all_logits and not is_overridden

    def _check_count(self, num_items_in_batch: Any) -> None:
        """Raise if a derived class passes another number of items than the one that was counted."""
        counted = self.counted_items
        if num_items_in_batch is None or counted is None or num_items_in_batch is counted:
            return
        if float(num_items_in_batch) != float(counted) and set(self.args.loss_weights) != {TASK_LOSS}:
            raise OptionError(describe_other_count(self, DistillationMixin, counted, num_items_in_batch))

    def _check_loss(self, loss: Tensor, result: ObjectiveOutput, batch: DistillationBatch) -> None:
        """Raise if a teacher's signals are not finite, or in training a loss; all processes raise together, before the step.

        In evaluation a student's loss that is not finite is reported as it is.
        """
        if bool(torch.isfinite(loss) & torch.isfinite(result.total)):
            return
        error: HfGuideError | None = non_finite_signals_error(
            batch.inputs, batch.mask, batch.signals, self.state.global_step
        )
        training = self.unwrapped_student.training
        if error is None and training:
            error = non_finite_loss_error(self, loss, result.sums)
        if error is None:
            return
        if not training or self.accelerator.num_processes == 1:
            raise error
        self.pending_error = self.pending_error or error

    def _strip_hidden_states(self, outputs: Any, loss: Tensor) -> Any:
        """Return the outputs without what only the losses needed: the rest is gathered as predictions."""
        if not isinstance(outputs, dict):
            return outputs
        is_requested = getattr(self.unwrapped_student.config, "output_hidden_states", False)
        dropped = () if is_requested else ("hidden_states", "decoder_hidden_states", "encoder_hidden_states")
        remaining = {name: value for name, value in outputs.items() if name not in dropped} | {"loss": loss.detach()}
        if (
            isinstance(outputs, ModelOutput)
            and remaining.keys() <= vars(type(outputs)).get("__dataclass_fields__", {}).keys()
        ):
            return type(outputs)(**remaining)
        return remaining

    # Evaluation

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Predict as the next class does, and measure the losses; without labels there is no loss, and no teacher runs.

        `gen_kwargs` are those of `Seq2SeqTrainer.prediction_step`. Where that one generates, it costs the generation, and one
        forward pass of student and teacher on the labels. The losses are measured in a pass of their own where another class's
        `prediction_step` does not call `compute_loss`.
        """
        step: Callable[..., tuple[Any, Any, Any]] = super().prediction_step
        self.called_methods.add("prediction_step")
        self.called_methods.discard("compute_loss")
        student_inputs = self._batch_builder.student_inputs(inputs)
        if isinstance(self, Seq2SeqTrainer) and self.args.predict_with_generate and not prediction_loss_only:
            step = functools.partial(generation_step, self, step)
        if any(inputs.get(name) is None for name in self.label_names):
            model = self._subclass_targets.wrap_in_class_logits(model)
            with self._predicting(all_logits=not prediction_loss_only):
                return step(model, student_inputs, prediction_loss_only, ignore_keys, **gen_kwargs)
        if isinstance(self, Seq2SeqTrainer) and self.args.predict_with_generate and not prediction_loss_only:
            measured: Any = _MeasuredForward(model, functools.partial(self._measure, model, inputs))
            _, predictions, labels = step(measured, student_inputs, False, ignore_keys, **gen_kwargs)
            loss = measured.loss
        else:
            step_inputs = inputs if calls_compute_loss(type(self), DistillationMixin) else student_inputs
            with self._predicting(all_logits=not prediction_loss_only):
                loss, predictions, labels = step(model, step_inputs, prediction_loss_only, ignore_keys, **gen_kwargs)
        if "compute_loss" not in self.called_methods:
            loss = self._measure(model, inputs)["loss"]
        return loss, predictions, labels

    def _pad_tensors_to_max_len(self, tensor: Tensor, max_length: int) -> Tensor:
        """Pad as `Seq2SeqTrainer` does; not answers after a prompt, which the evaluation loop pads without a token for it."""
        if not is_encoder_decoder(self.unwrapped_student):
            return tensor
        padded: Tensor = super()._pad_tensors_to_max_len(tensor, max_length)  # type: ignore[misc]  # of Seq2SeqTrainer
        return padded

    def _measure(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
        """Measure the losses of a batch in a forward pass of its own; return the task loss, and outputs if used."""
        with torch.no_grad(), self.compute_loss_context_manager(), self._predicting(all_logits=False):
            inputs = self._prepare_inputs(inputs)
            if self.label_smoother is None:
                return {"loss": self.compute_loss(model, inputs).detach().mean()}
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
            return {**outputs, "loss": loss.detach().mean()}

    @contextlib.contextmanager
    def _predicting(self, *, all_logits: bool) -> Iterator[None]:
        self._needs_all_logits, self._is_predicting = all_logits, True
        try:
            yield
        finally:
            self._needs_all_logits = self._is_predicting = False

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate as the next class does, and measure every loss, the task loss, perplexity and agreement with the teacher.

        `eval_loss` is the task loss, its mean over all items, as `eval_ce`; `eval_objective` is the weighted sum of the
        losses.
        """
        self._eval_means, self._similarities = RunningMeans(), SimilarityRecorder()
        self.called_methods -= {"compute_loss", "prediction_step"}
        output = super().evaluation_loop(*args, **kwargs)
        self.called_methods.add("evaluation_loop")
        prefix = (
            inspect.signature(super().evaluation_loop).bind(*args, **kwargs).arguments.get("metric_key_prefix", "eval")
        )
        metrics = dict(output.metrics or {})
        has_targets = f"{prefix}_loss" in metrics or output.label_ids is not None
        if has_targets and "compute_loss" not in self.called_methods:
            self.check_called("compute_loss" if "prediction_step" in self.called_methods else "prediction_step")
        means = self._eval_means.means(
            self.accelerator, {*self.args.loss_weights, TASK_LOSS, TEACHER_AGREEMENT, TEACHER_CE, *TOKEN_METRICS}
        )
        if TASK_LOSS in means:
            metrics[f"{prefix}_loss"] = means[TASK_LOSS]
        if means.keys() >= self.args.loss_weights.keys():
            means["objective"] = sum(weight * means[name] for name, weight in self.args.loss_weights.items())
        if self.task.is_language_model:
            # A class's own task loss, with weights or penalties, is no cross-entropy.
            own = [] if self._has_own_task_loss else [(TASK_LOSS, "perplexity")]
            for loss, perplexity in (*own, (TEACHER_CE, "teacher_perplexity")):
                if loss in means:
                    means[perplexity] = math.exp(min(means[loss], 700.0))
        if self.task is Task.FEATURE_EXTRACTION:
            means |= self._similarities.metrics(self.accelerator)
        metrics.update({f"{prefix}_{name}": value for name, value in self._add_weighted_terms(means).items()})
        self._evaluated_losses |= {f"{prefix}_{name}" for name in means}
        return output._replace(metrics=metrics)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as the next class does; its `evaluation_loop` measures the losses.

        An `evaluate` of another class that does not call `self.evaluation_loop` reports its own metrics alone.

        Raises:
            OptionError: A derived class's `evaluation_loop` left out the one that measures the losses.
        """
        self._evaluated_losses = set()
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        self._check_loop(metrics)
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> PredictionOutput:
        """Predict as the next class does; with labels, the losses are measured as in `evaluate`."""
        self._evaluated_losses = set()
        output: PredictionOutput = super().predict(*args, **kwargs)
        self._check_loop(output.metrics or {})
        return output

    def _check_loop(self, metrics: Mapping[str, float]) -> None:
        """Check that a derived class's `evaluation_loop` called the one that measures the losses, and kept its metrics."""
        if type(self).evaluation_loop is DistillationMixin.evaluation_loop and "evaluation_loop" not in vars(self):
            return
        self.check_called("evaluation_loop")
        self.called_methods.discard("evaluation_loop")
        dropped = self._evaluated_losses - metrics.keys()
        if dropped:
            raise OptionError(describe_dropped_metrics(self, DistillationMixin, dropped))

    # Logs

    def _add_weighted_terms(self, means: Mapping[str, float]) -> dict[str, float]:
        weights = self.args.loss_weights
        weighted = {f"{name}_weighted": weights[name] * value for name, value in means.items() if name in weights}
        return dict(means) | weighted

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as `Trainer` does, and in training every loss, raw and weighted."""
        if "loss" in logs:
            logs |= self._add_weighted_terms(
                self._train_means.means(self.accelerator, {*self.args.loss_weights, *TOKEN_METRICS})
            )
        super().log(logs, start_time)


class _MeasuredForward:
    """A model whose forward pass in `Seq2SeqTrainer.prediction_step` is the one that measures the losses.

    Args:
        model: The student as it is wrapped for training; attributes are read from it.
        measure: Returns the loss of the batch, and outputs where they are used.
    """

    def __init__(self, model: nn.Module, measure: Callable[[], dict[str, Any]]):
        self._model, self._measure = model, measure
        self.loss: Tensor | None = None

    def __call__(self, **_: Any) -> dict[str, Any]:
        outputs = self._measure()
        self.loss = outputs["loss"]
        return outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
