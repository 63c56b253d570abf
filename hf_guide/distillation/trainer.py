"""`DistillationTrainer`: a `transformers.Trainer` that also listens to a teacher."""

import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput

from hf_guide.adapters import check_positions
from hf_guide.capture.reading import Capture, CapturedCollator
from hf_guide.cards import save_record
from hf_guide.code_references import clean_saved_folder, forget_code
from hf_guide.distillation.arguments import DistillationArguments, saved_publicly
from hf_guide.distillation.batches import BatchReader
from hf_guide.distillation.dividing import divides_by_items
from hf_guide.distillation.given import (
    adapted,
    align_student,
    check_arguments,
    check_has_examples,
    check_student,
    check_trainable,
    check_unwrapped,
    source_of,
)
from hf_guide.distillation.heads import Head
from hf_guide.distillation.isolation import check_apart
from hf_guide.distillation.learning import AGREEMENT, TEACHER_LOSS, Learned
from hf_guide.distillation.making import find_head_everywhere, is_sharded, make_learning
from hf_guide.distillation.merging import save_merged
from hf_guide.distillation.objectives import TASK_LOSS, check_objective, compares_vectors
from hf_guide.distillation.opening import make_teachers
from hf_guide.distillation.playback import CapturedTeacher, captured_teacher
from hf_guide.distillation.projections import SynchronizeProjections, check_learns
from hf_guide.distillation.record import make_record
from hf_guide.distillation.resuming import ResumableTrainer, remove_paths_from_state
from hf_guide.distillation.students import make_student
from hf_guide.distillation.subclasses import make_targets, subclass_source
from hf_guide.distillation.tally import Tally
from hf_guide.distillation.tasks import IGNORED, task_of
from hf_guide.distillation.teachers import LiveTeacher, refuse_not_finite
from hf_guide.errors import OptionError
from hf_guide.folders import replaced_files
from hf_guide.hub import remove_paths_from_card, write_model_card
from hf_guide.provenance import fetch_card
from hf_guide.saving import attach_record


class DistillationTrainer(ResumableTrainer):
    """A `Trainer` whose student learns from a teacher as well as from labels.

    Everything that `Trainer` takes and does stays: collators, callbacks, metrics, `compute_loss_func`, label smoothing,
    `resume_from_checkpoint`, `hyperparameter_search` through `model_init`, reporting. The logs gain every term of the
    objective, raw and weighted; evaluation always reports the task loss (`eval_ce`), for language models the perplexity,
    and the share of items on which student and teacher choose the same class.

    A language model's losses are computed over chunks of tokens, so that neither its own logits nor the teacher's are
    ever all held, unless the caller wants them: with `compute_metrics`, label smoothing, `compute_loss_func`,
    `torch_compile`, or a head that is not a plain linear layer.

    Args:
        model: the student; or a config, or the arguments of `from_teacher` as a mapping, to make it from the teacher.
        teacher: a Hub id, a folder, a model, several of these, or a `Capture`; also as `args.teacher`, `args.capture`.
        peft_config: wraps the student in an adapter.
        processing_class: as `Trainer`'s; it is compared with what lies beside the teacher's files. Pixels that are normalised
            otherwise are converted for the teacher; any other difference is refused.
        others: as `Trainer`'s.

    Raises:
        OptionError: neither teacher nor capture, where the objective needs one; options that contradict each other.
        TaskError: a teacher of another task, or terms that are not for this one.
        VocabularyError: vocabularies or labels that do not agree.
        TeacherError: a teacher that cannot be loaded, or expects other inputs than the batches.
        CaptureError: a capture that is truncated, of another teacher or another tokenizer.
    """

    # Every term is divided by the number of items in the whole accumulated batch, so Trainer must not divide again.
    loss_is_scaled_for_ga = True

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
        peft_config: Any = None,
    ):
        args = DistillationArguments("tmp_trainer") if args is None else args
        check_arguments(args)
        check_student(model)
        for dataset, name in ((train_dataset, "train_dataset"), (eval_dataset, "eval_dataset")):
            check_has_examples(dataset, name)
        source = source_of(teacher, args)
        if model is None and model_init is None and args.student is not None:
            model = dict(args.student)  # type: ignore[arg-type]  # parsed by now
        student: Any = model
        if isinstance(model, (PreTrainedConfig, Mapping)):
            student = make_student(model, source, args.teacher_init_kwargs, train_dataset)  # type: ignore[arg-type]
        # PEFT changes the student in place, so this comes first.
        check_apart(student, source if isinstance(source, (list, tuple)) else [source])
        if peft_config is not None:
            student, model_init = adapted(student, model_init, peft_config)
        self._unwrapped: tuple[Any, Any] | None = None
        self._train_tally, self._eval_tally = Tally(), Tally()
        self._whole_logits = self._predicting = False
        self._unlabelled_factor: Tensor | None = None
        self._pushed_to = {"token": args.hub_token, "revision": args.hub_revision}
        super().__init__(
            model=student,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self.args: DistillationArguments
        forget_code(processing_class)  # what a checkpoint pushes is saved and uploaded in one go
        check_unwrapped(self.model, "student")
        align_student(self.model, processing_class)
        student = self._bare(self.model)
        self.task = task_of(student)
        check_objective(args.weights, self.task, student.config)
        if train_dataset is not None:
            check_trainable(student)
        self.teachers: list[LiveTeacher | CapturedTeacher] = []
        if isinstance(source, Capture):
            self.teachers = [captured_teacher(source, student, self.task, processing_class)]
            self.data_collator = CapturedCollator(self.data_collator, source, args.temperature, missing="skip")
        elif source is not None:
            self.teachers += make_teachers(
                source,
                student,
                self.task,
                init_kwargs=args.teacher_init_kwargs,  # type: ignore[arg-type]
                weights=args.teacher_weights,  # type: ignore[arg-type]
                compile=args.teacher_compile,
                processing_class=processing_class,
                accelerator=self.accelerator,
            )
        self._begin()

    # The student and what it learns

    def _bare(self, model: Any) -> Any:
        """Return the student within its wrappers, looked for once: that walks over every module."""
        if self._unwrapped is None or self._unwrapped[0] is not model:
            self._unwrapped = (model, self.accelerator.unwrap_model(model, keep_torch_compile=False))
        return self._unwrapped[1]

    def _to_compare(self, teacher: LiveTeacher | CapturedTeacher) -> Any:
        """Return the model or capture that a teacher is; None where its weights are not whole in this process."""
        if isinstance(teacher, CapturedTeacher):
            return teacher.capture
        return None if is_sharded(self.accelerator) else teacher.bare

    def _find_head(self, student: Any) -> Head | None:
        whole = self.compute_loss_func is not None or self.label_smoother is not None or self.args.torch_compile
        return None if whole else find_head_everywhere(student, self.task, self.accelerator)

    def _begin(self) -> None:
        """Settle what this student learns by these arguments: at first, and anew for each student and each trial."""
        student = self._bare(self.model)
        teachers = [each.bare for each in self.teachers if isinstance(each, LiveTeacher)]
        check_apart(student, [*teachers, getattr(subclass_source(self.data_collator), "live_teacher", None)])
        if self.task.is_per_token or compares_vectors(self.args.weights):
            check_positions(student, "student")
            for teacher in teachers:
                check_positions(teacher, "teacher")
        self._divides: bool | None = None
        self.learning = make_learning(
            student, self.task, self.teachers, self.args, self.accelerator, head=self._find_head(student)
        )
        self._subclasses = make_targets(
            student.config,
            self.data_collator,
            self.args.temperature,
            [self._to_compare(each) for each in self.teachers],
            learned=self.learning.learns_subclasses,
            columns=getattr(self.train_dataset, "column_names", None) or (),
            keeps_columns=not self.args.remove_unused_columns,
        )
        self._reader = BatchReader(
            student,
            self.task,
            self.teachers,
            self.learning,
            self.accelerator,
            self._subclasses,
            tuple(self.label_names),
        )
        self.remove_callback(SynchronizeProjections)
        if self.learning.projections is not None:
            self.add_callback(SynchronizeProjections(self.learning.projections, self.accelerator))

    def _hp_search_setup(self, trial: Any) -> None:
        """Take a trial's arguments as `Trainer` does; what `model_init` just made then begins with them."""
        super()._hp_search_setup(trial)
        if self.model_init is None:
            return
        self.args.check_options()
        check_objective(self.args.weights, self.task, self._bare(self.model).config)
        if isinstance(self.data_collator, CapturedCollator):
            self.data_collator = self.data_collator.at(self.args.temperature)
        self._begin()

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the optimizer as `Trainer` does; it also learns the maps between widths, where there are any.

        Raises:
            OptionError: one was passed that does not have them.
        """
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if self.learning.projections is not None:
            maps = list(self.learning.projections.parameters())
            if fresh:
                optimizer.add_param_group({"params": maps, "weight_decay": 0.0})
            check_learns(optimizer, maps)
        return optimizer

    # Batches

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns that the teacher reads, too."""
        fresh = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if fresh and self._signature_columns is not None:
            self._signature_columns += self._reader.columns_of_others

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Count the items of all micro-batches, on all processes where `average_tokens_across_devices` says so."""
        if self.compute_loss_func is not None or not batch_samples:
            return super()._get_num_items_in_batch(batch_samples, device)
        training = not self._predicting
        counts = (
            torch.stack([self._reader.count(batch, training=training) for batch in batch_samples]).sum(0).to(device)
        )
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counts = self.accelerator.gather(counts).view(-1, 2).sum(0)
        items, labelled = counts
        self._unlabelled_factor = items / labelled.clamp(min=1) if training else None
        return items / (self.get_tp_size() * self.get_cp_size() * self.get_sp_size())

    # Losses

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the weighted sum of the objective's terms, each its mean over the items of the accumulated batch."""
        training = model.training
        if isinstance(self.data_collator, CapturedCollator):
            self.data_collator.check_temperature(self.args.temperature)
        batch = self._reader.read(inputs, training=training)
        if batch.has_filler:
            num_items_in_batch = None  # it counts what the dataloader only filled the last batches up with
        here = batch.mask.sum()
        items = here.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        told = num_items_in_batch is not None
        model = self._subclasses.in_classes(model, here)
        if training and self.learning.weights == {TASK_LOSS: 1.0}:
            # What `Trainer` does, to the last bit.
            loss, outputs = self._task_loss(model, batch.inputs, here, items, told)
            learned = Learned(loss, {TASK_LOSS: loss.detach() * items / self._scale(told)}, outputs)
        else:
            learned = self.learning.learn(
                model,
                self._bare(self.model),
                batch,
                lambda given: self._task_loss_sum(model, given, here, items, told, batch.labels),
                measure=not training,
                whole_logits=self._whole_logits,
            )
            total = learned.total
            if not training and self._reader.is_untaught(batch) and TASK_LOSS in learned.sums:
                total = learned.sums[TASK_LOSS]  # nothing was captured of what is evaluated: the task is what is left
            loss = total / items * self._scale(told)
        refuse_not_finite(loss, batch.inputs, batch.mask, batch.signals, self.state.global_step)
        (self._train_tally if training else self._eval_tally).add(learned.sums, here)
        return (loss, self._shown(learned.outputs, loss)) if return_outputs else loss

    def _scale(self, told: bool) -> int:
        """Return what undoes DistributedDataParallel's mean over processes, as `Trainer` has it."""
        if not told or not self.args.average_tokens_across_devices:
            return 1
        return self.accelerator.num_processes // self.get_tp_size()

    def _task_loss(
        self, model: nn.Module, inputs: dict[str, Any], here: Tensor, items: Any, told: bool
    ) -> tuple[Tensor, Any]:
        """Return the task loss as `Trainer` computes it, a mean over the `items` of the accumulated batch, and outputs."""
        if told and self._model_divides(model, inputs):
            loss, outputs = super().compute_loss(model, dict(inputs), True, items)
            return loss, outputs
        # Models that take the mean over their own batch whatever they are told (T5, BERT's classifiers).
        loss, outputs = super().compute_loss(model, dict(inputs), True, None)
        if not model.training:
            loss = torch.where(here > 0, loss, 0.0)  # the mean over nothing is not a number
        return loss * (here / items) * self._scale(told), outputs

    def _task_loss_sum(
        self, model: nn.Module, inputs: dict[str, Any], here: Tensor, items: Any, told: bool, labels: Tensor | None
    ) -> tuple[Tensor, Any]:
        """Return the task loss as a sum over the items, of which those without a label have the mean of the others."""
        loss, outputs = self._task_loss(model, inputs, here, items, told)
        loss = loss * items / self._scale(told)
        if model.training and self._subclasses.learned and labels is not None:
            factor = self._unlabelled_factor if told else here / (labels != IGNORED).sum().clamp(min=1)
            loss = loss if factor is None else loss * factor
        return loss, outputs

    def _model_divides(self, model: nn.Module, inputs: dict[str, Any]) -> bool:
        if self.compute_loss_func is not None or self.label_smoother is not None:
            return True
        if not self.model_accepts_loss_kwargs:
            return False
        if self.args.world_size == self.args.gradient_accumulation_steps == 1:
            return True  # its own batch is the whole batch
        if self._divides is None:
            self._divides = divides_by_items(model, inputs)
        return self._divides

    def _shown(self, outputs: Any, loss: Tensor) -> Any:
        """Return the outputs without what only the objective asked for: the rest is gathered as predictions."""
        if not isinstance(outputs, dict):
            return outputs
        asked = getattr(self._bare(self.model).config, "output_hidden_states", False)
        dropped = () if asked else ("hidden_states", "decoder_hidden_states", "encoder_hidden_states")
        return {name: value for name, value in outputs.items() if name not in dropped} | {"loss": loss.detach()}

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Predict as `Trainer` does; without labels there is no loss, and no teacher is asked."""
        if not all(inputs.get(name) is not None for name in self.label_names):
            inputs = self._reader.inputs_of_student(inputs)
            model = self._subclasses.in_classes(model)
        self._whole_logits, self._predicting = not prediction_loss_only, True
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._whole_logits = self._predicting = False

    # Logs

    def _terms_of(self, means: Mapping[str, float]) -> dict[str, float]:
        weights = self.args.weights
        weighted = {f"{name}_weighted": weights[name] * value for name, value in means.items() if name in weights}
        return dict(means) | weighted

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as `Trainer` does, and in training every term, raw and weighted."""
        if "loss" in logs:
            logs |= self._terms_of(self._train_tally.means(self.accelerator, self.args.weights))
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate as `Trainer` does, and measure every term, the task loss, perplexity and agreement."""
        self._eval_tally = Tally()
        output = super().evaluation_loop(*args, **kwargs)
        prefix = (
            inspect.signature(super().evaluation_loop).bind(*args, **kwargs).arguments.get("metric_key_prefix", "eval")
        )
        means = self._eval_tally.means(self.accelerator, {*self.args.weights, TASK_LOSS, AGREEMENT, TEACHER_LOSS})
        if self.task.is_language_model:
            for loss, perplexity in ((TASK_LOSS, "perplexity"), (TEACHER_LOSS, "teacher_perplexity")):
                if loss in means:
                    means[perplexity] = math.exp(min(means[loss], 700.0))
        metrics = dict(output.metrics or {})
        metrics.update({f"{prefix}_{name}": value for name, value in self._terms_of(means).items()})
        return output._replace(metrics=metrics)

    # Files

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with saved_publicly(self):
            super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir or "")
        if self.args.should_save:
            clean_saved_folder(folder)
            remove_paths_from_card(folder)
        if self.args.should_save and self.learning.projections is not None:
            if folder.name.startswith("checkpoint-"):  # what resumes needs them; what is published does not
                self.learning.projections.save(folder)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        remove_paths_from_state(Path(checkpoint_folder))
        with saved_publicly(self):
            super()._push_from_checkpoint(checkpoint_folder)

    def save_state(self) -> None:
        """Save `trainer_state.json` into `output_dir` as `Trainer` does, but for the path of the best checkpoint."""
        super().save_state()
        if self.args.should_save:
            remove_paths_from_state(Path(self.args.output_dir or ""))

    def _load_callback_state(self) -> None:
        """Find the best checkpoint of a resumed run by its step: the state that was saved does not hold its path."""
        super()._load_callback_state()
        best = Path(self.args.output_dir or "") / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if self.state.best_model_checkpoint is None and self.state.best_global_step and best.is_dir():
            self.state.best_model_checkpoint = str(best)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.learning.projections is not None:
            self.learning.projections.load(Path(resume_from_checkpoint))

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo:
        """Push as `Trainer` does; the card that is kept is that of the revision that is pushed to."""
        self._pushed_to = {"token": token or self.args.hub_token, "revision": revision or self.args.hub_revision}
        return super().push_to_hub(commit_message, blocking, token, revision, private, **kwargs)

    def create_model_card(
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Draw the student's card in `output_dir`, and write the record that it is drawn from.

        The arguments are `Trainer`'s. What a card tells of the teacher, the task and the results is known here, so
        `finetuned_from` and `tasks` are not looked at; `dataset_tags` are ids on the Hub, `dataset` and `dataset_args` names
        for people. A card that is there keeps its own text.
        """
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir or "")
        if self.hub_model_id is not None:
            fetch_card(self.hub_model_id, folder, **self._pushed_to)
        names = _list(dataset) or _list(dataset_args)
        record = make_record(self, datasets=_list(dataset_tags), evaluated_on=names, languages=_list(language))
        save_record(folder, record)
        attach_record(self._bare(self.model), record)
        write_model_card(
            folder,
            model_id=self.hub_model_id or model_name,
            license=license,
            language=language,
            tags=_list(tags) or None,
        )

    def save_merged_model(self, output_dir: str | os.PathLike[str]) -> None:
        """Save the student with its adapter merged into it: a stock model, as `from_pretrained` loads it.

        What is written is loaded again and compared with the student. Embeddings that were tied, and of which the adapter
        changed one alone, are written as two tensors.

        Raises:
            OptionError: the student has no adapter, or one that cannot be merged; or its weights are sharded.
        """
        student = self._bare(self.model)
        if is_sharded(self.accelerator):
            raise OptionError(
                "The student's weights are spread over processes, and cannot be merged here. Save the adapter with "
                "save_model, and merge it in one process: PeftModel.from_pretrained(base, folder).merge_and_unload()."
            )
        if not self.args.should_save:
            return
        with replaced_files(Path(output_dir)) as folder:
            save_merged(student, folder)
            tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            record = getattr(student, "distillation_record", None)
            if record is not None:
                save_record(folder, record)
            clean_saved_folder(folder)


def _list(given: "str | list[str] | None") -> list[str]:
    return [given] if isinstance(given, str) else list(given or [])
