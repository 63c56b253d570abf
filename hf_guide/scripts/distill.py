"""Distill a student as one configuration file specifies: what `hf-guide distill` does.

Does: load models and data, train, evaluate, save and push. Does not: compute losses (`distillation/`).
"""

import copy
import dataclasses
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset
from torch import Tensor
from transformers import EvalPrediction, PreTrainedConfig, PreTrainedModel

from hf_guide.data.arguments import DataArguments, ModelArguments
from hf_guide.data.chat import set_chat_template
from hf_guide.data.class_labels import student_labels, value_kind
from hf_guide.data.loading import find_column, load_named_splits
from hf_guide.data.preprocessing import ProcessedData, preprocess
from hf_guide.distillation.arguments import DistillationArguments, Seq2SeqDistillationArguments, validate_arguments
from hf_guide.distillation.checkpoints import validate_checkpoint
from hf_guide.distillation.losses.registry import required_signals
from hf_guide.distillation.trainer import DistillationTrainer, Seq2SeqDistillationTrainer
from hf_guide.errors import HfGuideError, OptionError, TaskError, TeacherError, one_paragraph
from hf_guide.modeling import from_teacher
from hf_guide.models.adapters import without_adapter
from hf_guide.models.modes import on_meta_device
from hf_guide.models.pretrained import load_config, load_processing_class, unreadable_as
from hf_guide.models.token_rows import attached_tokenizer
from hf_guide.scripts.config_file import parse_config
from hf_guide.scripts.error_rates import TranscriptErrorRates
from hf_guide.scripts.run_record import (
    DistillConfig,
    checkpoint_to_resume,
    recorded_options,
    teacher_names,
    write_record,
)
from hf_guide.scripts.stages import as_stages, check_earlier_runs, check_stages, run_stages, stage_changes
from hf_guide.scripts.text_scores import GeneratedTextScores
from hf_guide.signal_cache.reader import Capture
from hf_guide.tasks import OutputKind, Task, model_class_names, task_of
from hf_guide.teachers.loading import hub_kwargs, is_trusted, load_complete_model
from hf_guide.utils.distributed import raise_on_all_ranks
from hf_guide.utils.labels import IGNORE_INDEX

DATACLASSES = (ModelArguments, DataArguments, Seq2SeqDistillationArguments)

# Their tokenizers accept text split into words only with a space before each word.
_NEEDS_PREFIX_SPACE = ("bloom", "gpt2", "roberta", "deberta")


def read_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> DistillConfig:
    """Read a YAML or JSON file of fields of `ModelArguments`, `DataArguments` and `Seq2SeqDistillationArguments`.

    With `stages`, each has the options of the file with its own changes.

    Args:
        path: The file.
        overrides: Command-line arguments such as `--learning_rate 1e-4`; they take precedence over the file.

    Raises:
        OptionError: A key is not a field (names the nearest one), or a value is invalid.
        OSError: The file cannot be read.
    """

    def parse(changes: Mapping[str, Any]) -> DistillConfig:
        prog = "hf-guide distill CONFIG"
        return DistillConfig(*parse_config(path, DATACLASSES, overrides=overrides, changes=changes, prog=prog))

    config = parse({})
    if config.models.stages is None:
        return config
    stages = as_stages([parse(changes) for changes in stage_changes(config)])
    return dataclasses.replace(stages[-1], stages=stages)


def distill(config: DistillConfig) -> dict[str, float]:
    """Train a student, in one or several stages, and save it with its tokenizer and model card into `output_dir`.

    Returns:
        The metrics of the evaluation after training, or of the training if there is no evaluation dataset.

    Raises:
        OptionError: Options that contradict each other or the dataset.
        HfGuideError: Any other error of `DistillationTrainer`.
        OSError: A model, dataset or file is not available.
    """
    if config.stages:
        first = config.stages[0].training
        source = first.student_init_kwargs.get("teacher")  # type: ignore[union-attr]  # parsed by now
        of_source = _load_config(source, first.teacher_init_kwargs) if isinstance(source, str) else None
        check_stages(config.stages, of_source or _teacher_name_and_config(first)[1])
    for stage in config.stages or [config]:
        _check_config(stage.models, stage.training)
    with raise_on_all_ranks(OptionError):  # a disk that not all share has the record in one process only
        check_earlier_runs(config.stages or [config])
    return run_stages(config.stages, _distill) if config.stages else _distill(config)


def _distill(config: DistillConfig) -> dict[str, float]:
    """Distill once."""
    models, data, args = config.models, config.data, config.training
    options = recorded_options(config)  # before `Trainer` changes any
    transformers.set_seed(args.seed)
    checkpoints = _inspect_checkpoints(models, args)
    _check_generation(checkpoints.task, args, data)
    train, held_out, evaluated_on = load_named_splits(data)
    labels, label_kind = _labels_of(checkpoints, models, train, data)
    student = _init_with_own_vocabulary(checkpoints, args, train)
    processing_class = attached_tokenizer(student) or _load_processing_class(checkpoints, models, args)
    set_chat_template(processing_class, data.chat_template_path)
    with args.main_process_first(desc="preprocessing the dataset"):
        processed = preprocess(
            checkpoints.task,
            train,
            held_out,
            processing_class,
            data,
            labels=labels,
            label_kind=label_kind,
            static_masking=args.teacher_cache is not None,
            config=[checkpoints.student_config or _requested_config(checkpoints, args), checkpoints.teacher_config],
        )
    if processed.keep_columns:
        args.remove_unused_columns = False
    student = student or _load_student(checkpoints, models, labels if checkpoints.needs_new_head else None, label_kind)
    metrics = _metrics_of(checkpoints.task, label_kind, processing_class, args)
    trainer = _make_trainer(
        student, args, processed, processing_class, metrics, checkpoints.task, _make_peft_config(models)
    )
    _set_generation_language(trainer, data)
    write_record(args, options)
    return _train_and_save(trainer, data, evaluated_on)


@dataclass(frozen=True)
class _Checkpoints:
    """What the configs of student and teacher specify, before any weights are loaded.

    Attributes:
        task: The task to train for.
        student_config, student_task: Of an existing student; None if it is initialized from the teacher.
        teacher_name: Hub id or folder of the first teacher; None for a cache.
        teacher_config, teacher_task: Of the first teacher; None without a teacher or if its task cannot be distilled.
    """

    task: Task
    student_config: PreTrainedConfig | None
    student_task: Task | None
    teacher_name: str | None
    teacher_config: PreTrainedConfig | None
    teacher_task: Task | None

    @property
    def needs_new_head(self) -> bool:
        """Whether an existing student was saved for another task, so that its head is missing."""
        return self.student_task is not self.task


def _labels_of(
    checkpoints: _Checkpoints, models: ModelArguments, train: Dataset, data: DataArguments
) -> tuple[list[str] | None, OutputKind]:
    """Return the names of the student's labels, None for a task without any, and what they are."""
    task = checkpoints.task
    if not task.has_labels:
        return None, task.row.outputs[0].kind
    column = find_column(train, task, "label", data)
    student = None if checkpoints.needs_new_head else checkpoints.student_config
    teacher = checkpoints.teacher_config if checkpoints.teacher_task is task else None
    kind = value_kind(train, column, task, [student, teacher])
    is_new_head = bool(models.model_name_or_path)
    return student_labels(train, column, student, teacher, is_new_head=is_new_head, kind=kind), kind


def _inspect_checkpoints(models: ModelArguments, args: DistillationArguments) -> _Checkpoints:
    """Read the configs of student and teacher, and determine the task."""
    teacher_name, teacher_config = _teacher_name_and_config(args)
    student_config = None
    if models.model_name_or_path:
        student_config = _load_config(models.model_name_or_path, models.model_init_kwargs)
    student_task, teacher_task = (
        None if config is None else task_of_config(config) for config in (student_config, teacher_config)
    )
    task = Task(models.task) if models.task is not None else teacher_task or student_task
    if models.task is not None and student_config is None:
        _check_task_of_source(Task(models.task), args, teacher_config)
    if task is None:
        raise OptionError(f"The task cannot be inferred; set task to one of {list(map(str, Task))}.")
    return _Checkpoints(task, student_config, student_task, teacher_name, teacher_config, teacher_task)


def _check_task_of_source(task: Task, args: DistillationArguments, teacher: PreTrainedConfig | None) -> None:
    """Check that a student made of its teacher, and so of that one's class, is for the task.

    Raises:
        OptionError: Names the class and its task.
    """
    requested: dict[str, Any] = dict(args.student_init_kwargs or {})  # type: ignore[arg-type]  # parsed by now
    source = requested.get("teacher")
    keywords: dict[str, Any] = dict(args.teacher_init_kwargs or {})  # type: ignore[arg-type]
    keywords.pop("subfolder", None)  # from_teacher is not passed it
    config = _load_config(source, keywords) if isinstance(source, str) else teacher
    found = None if config is None else task_of_config(config)
    if config is None or found is None or requested.get("model_class") is not None:
        return  # the trainer checks the class of the student that is made
    (name, *_) = config.architectures or ("",)
    if not task.accepts_teacher_for(found) and not any(
        name in model_class_names(each) for each in task.row.pipeline_tags
    ):
        stated = source or args.teacher or "the teacher of teacher_cache"
        raise OptionError(
            f"task is {task}, but {stated} is a {name}, for {found}, and so is a student made of it. Leave task out, or use a "
            f"teacher for {task}; or set model_name_or_path to a student instead of student_init_kwargs."
        )


def _make_trainer(
    student: PreTrainedModel | None,
    args: Seq2SeqDistillationArguments,
    processed: ProcessedData,
    processing_class: Any,
    metrics: tuple[Any, Any],
    task: Task,
    peft_config: Any,
) -> "DistillationTrainer | Seq2SeqDistillationTrainer":
    compute_metrics, preprocess_logits = metrics
    trainer_class: Any = Seq2SeqDistillationTrainer if task in _GENERATED_TEXT_SCORES else DistillationTrainer
    try:
        return trainer_class(
            model=student,
            args=args,
            data_collator=processed.collator,
            train_dataset=processed.train,
            eval_dataset=processed.eval,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=preprocess_logits,
            peft_config=peft_config,
        )
    except HfGuideError:
        raise
    except ValueError as error:  # raised by `Trainer` for arguments that contradict each other
        raise OptionError(f"These options cannot be combined: {one_paragraph(error)}.") from error


def _metrics_of(task: Task, kind: OutputKind, processor: Any, args: Seq2SeqDistillationArguments) -> tuple[Any, Any]:
    """Return `compute_metrics` and `preprocess_logits_for_metrics` of a task whose labels are of a kind."""
    if task is Task.QUESTION_ANSWERING:
        return span_accuracy, predicted_spans
    if kind is OutputKind.REAL and task.has_labels:
        return error_and_correlation, None
    if kind is OutputKind.BERNOULLI and task.has_labels:
        return micro_f1, None
    if task.has_labels or task is Task.MULTIPLE_CHOICE:
        return accuracy, predicted_classes
    if task is Task.CTC:
        return TranscriptErrorRates(processor, frames=True), predicted_classes
    return _GENERATED_TEXT_SCORES[task](processor) if args.predict_with_generate else None, None


_GENERATED_TEXT_SCORES: Mapping[Task, Callable[[Any], Any]] = {
    Task.SPEECH_SEQ2SEQ: TranscriptErrorRates,
    **dict.fromkeys((Task.SEQ2SEQ_LM, Task.IMAGE_TEXT_TO_TEXT, Task.CAUSAL_LM), GeneratedTextScores),
}
"""The metrics of the tasks whose models generate texts, with `predict_with_generate`."""


def _check_generation(task: Task, args: Seq2SeqDistillationArguments, data: DataArguments) -> None:
    """Check that the task generates, and set the length of a text to that of the targets, as Transformers' scripts do."""
    if not args.predict_with_generate:
        return
    if task not in _GENERATED_TEXT_SCORES:
        raise OptionError(
            f"predict_with_generate is for {', '.join(map(str, _GENERATED_TEXT_SCORES))}, whose models generate texts; the "
            f"task is {task}. Leave it out."
        )
    if task is Task.CAUSAL_LM and data.packing:
        raise OptionError(
            "predict_with_generate needs one conversation, or one prompt with its completion, a row: set packing to false."
        )
    if task is not Task.SPEECH_SEQ2SEQ and args.generation_max_length is None:
        args.generation_max_length = data.max_target_length


def _set_generation_language(trainer: Any, data: DataArguments) -> None:
    """Let a student of speech generate in the language and the task of its transcripts, as it is saved, too."""
    generation = getattr(without_adapter(trainer.model), "generation_config", None)
    if generation is None or (data.language is None and data.speech_task is None):
        return
    generation.forced_decoder_ids = None
    for name, value in (("language", data.language), ("task", data.speech_task)):
        if value is not None:
            setattr(generation, name, value)


def _train_and_save(
    trainer: "DistillationTrainer | Seq2SeqDistillationTrainer", data: DataArguments, evaluated_on: str | None
) -> dict[str, float]:
    args = trainer.args
    metrics = trainer.train(resume_from_checkpoint=checkpoint_to_resume(args)).metrics
    trainer.save_model()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    card_values: dict[str, Any] = {"dataset": evaluated_on} | ({} if data.is_local else {"dataset_tags": data.name})
    if args.push_to_hub:
        trainer.push_to_hub(**card_values)
    else:
        trainer.create_model_card(**card_values)
    return metrics


def _check_config(models: ModelArguments, args: DistillationArguments) -> None:
    validate_arguments(args, Seq2SeqDistillationArguments)
    if models.model_name_or_path and args.student_init_kwargs:
        raise OptionError(
            "model_name_or_path and student_init_kwargs are both given: use the first for an existing student, the "
            "second to initialize one from the teacher."
        )
    if not models.model_name_or_path and not args.student_init_kwargs:
        raise OptionError(
            "There is no student: set model_name_or_path, or set student_init_kwargs to the arguments of "
            "from_teacher, such as {num_parameters: 25%, method: calibrated}."
        )
    _check_has_teacher(args)
    if models.peft_config and args.student_init_kwargs:
        raise OptionError(
            "peft_config and student_init_kwargs are both given: the adapter would be saved without its base model. "
            "Save the student first with `hf-guide init`, and set model_name_or_path to its folder."
        )
    if "lelp" in args.loss_weights:
        raise OptionError(
            "The loss lelp needs a subclass projector, which a configuration file cannot contain. In Python: projector = "
            "fit_subclasses(...); DistillationTrainer(..., data_collator=SubclassLabelCollator(projector, tokenizer))."
        )
    resume = args.resume_from_checkpoint
    if resume and str(resume).lower() not in ("true", "false") and not os.path.isdir(resume):
        raise OptionError(
            f"resume_from_checkpoint must be true or the folder of a checkpoint; there is no folder {resume!r}."
        )
    if resume and str(resume).lower() not in ("true", "false"):
        validate_checkpoint(resume)


def _check_has_teacher(args: DistillationArguments) -> None:
    """Check that there is a teacher, for a student that is made of one or losses that compare with one."""
    if args.teacher or args.teacher_cache:
        return
    if required_signals(args.loss_weights):
        needed_by = f"the losses {args.loss_weights} compare the student with one"
    elif args.student_init_kwargs and "teacher" not in args.student_init_kwargs:
        needed_by = "student_init_kwargs makes the student of one"
    else:
        return
    raise OptionError(
        f"There is no teacher, and {needed_by}: set teacher to a Hub id or a folder, or teacher_cache to a folder that "
        "`hf-guide capture` wrote."
    )


def _teacher_name_and_config(args: DistillationArguments) -> tuple[str | None, PreTrainedConfig | None]:
    """Return the first teacher's name and its config; for a teacher cache only the config."""
    if args.teacher_cache:
        manifest = Capture.open(args.teacher_cache).manifest
        return None, manifest.teacher_config_object()
    if not args.teacher:
        return None, None
    name = teacher_names(args.teacher)[0]
    return name, _load_config(name, args.teacher_init_kwargs, what=f"The teacher {name} has no readable config")


def _cached_teacher_source(args: DistillationArguments) -> str | None:
    """Return the Hub id or folder of a cached teacher's tokenizer; None without a teacher cache."""
    if not args.teacher_cache:
        return None
    named = (args.student_init_kwargs or {}).get("teacher")  # type: ignore[union-attr]  # parsed by now
    return named if isinstance(named, str) else Capture.open(args.teacher_cache).teacher_source()


def _requested_config(checkpoints: _Checkpoints, args: DistillationArguments) -> PreTrainedConfig | None:
    """Return the teacher's config with the number of positions of `student_init_kwargs`; None if it specifies none."""
    requested: Any = args.student_init_kwargs or {}
    positions = {name: requested[name] for name in ("max_position_embeddings", "n_positions") if name in requested}
    if checkpoints.teacher_config is None or not positions:
        return None
    config = copy.deepcopy(checkpoints.teacher_config)
    config.update(positions)
    return config


def _load_config(name: str, init_kwargs: Any, what: str | None = None) -> PreTrainedConfig:
    """Return the config that `from_pretrained` with these keywords reads."""
    return load_config(name, hub_kwargs(init_kwargs), is_trusted(init_kwargs), what=what)


def task_of_config(config: PreTrainedConfig) -> Task | None:
    """Return the task of the model that a config was saved with; None if it is unknown or cannot be distilled."""
    for name in config.architectures or ():
        model_class = getattr(transformers, name, None)
        if not isinstance(model_class, type) or not issubclass(model_class, PreTrainedModel):
            continue
        message = f"{name} cannot be built from the config of {config._name_or_path}"
        try:
            with unreadable_as(TeacherError, message), on_meta_device():
                return task_of(model_class._from_config(config))
        except TaskError:
            continue
    return None


def _init_with_own_vocabulary(
    checkpoints: _Checkpoints, args: DistillationArguments, train: Dataset
) -> PreTrainedModel | None:
    """Return a student whose vocabulary is smaller than its teacher's, before the data are tokenized by its own tokenizer.

    The pieces are chosen by the training data, unless `student_init_kwargs` has a `calibration_dataset`. None of other
    students, which the trainer initializes.
    """
    requested: dict[str, Any] = dict(args.student_init_kwargs or {})  # type: ignore[arg-type]  # parsed by now
    size, teacher_size = requested.get("vocab_size"), getattr(checkpoints.teacher_config, "vocab_size", None)
    if not isinstance(teacher_size, int) or not (size == "auto" or (isinstance(size, int) and size < teacher_size)):
        return None
    source = requested.pop("teacher", None) or checkpoints.teacher_name
    if source is None:
        raise OptionError(
            "A teacher_cache has the tokens of the teacher's whole vocabulary, and student_init_kwargs has a smaller "
            "vocab_size. Set teacher instead; or make the student with `hf-guide init`, and capture the teacher with the "
            "tokenizer of its folder."
        )
    options = hub_kwargs(args.teacher_init_kwargs) | {"trust_remote_code": is_trusted(args.teacher_init_kwargs)}  # type: ignore[arg-type]
    return from_teacher(source, **(options | {"calibration_dataset": train} | requested))


def _load_student(
    checkpoints: _Checkpoints, models: ModelArguments, labels: Sequence[str] | None, kind: OutputKind
) -> PreTrainedModel | None:
    """Return an existing student, with a head for `labels` if they are given; None if the trainer initializes it."""
    if not models.model_name_or_path:
        return None
    init_kwargs: dict[str, Any] = dict(models.model_init_kwargs or {})  # type: ignore[arg-type]  # parsed by now
    if labels is not None:
        id2label = dict(enumerate(labels))
        label2id = {label: index for index, label in id2label.items()}
        init_kwargs |= {"num_labels": len(labels), "id2label": id2label, "label2id": label2id}
        if kind in _PROBLEM_TYPES:
            init_kwargs["problem_type"] = _PROBLEM_TYPES[kind]
    name = models.model_name_or_path
    loader = getattr(transformers, checkpoints.task.row.auto_class)
    kwargs = f" with model_init_kwargs={sorted(models.model_init_kwargs)}" if models.model_init_kwargs else ""
    body = re.compile(r"\.\d+\.|embed")  # a new head may include more than one layer (BERT's pooler), but no block
    return load_complete_model(
        loader,
        name,
        f"The student {name} does not load as a model for {checkpoints.task}{kwargs}",
        advice="Only the head for a new task may be missing. Use a complete checkpoint.",
        may_be_new=lambda parameter: checkpoints.needs_new_head and not body.search(parameter),
        error_class=OptionError,
        **init_kwargs,
    )


def _load_processing_class(checkpoints: _Checkpoints, models: ModelArguments, args: DistillationArguments) -> Any:
    """Return the tokenizer or image processor: the requested one, otherwise the student's, otherwise the teacher's."""
    own_name = models.processing_class_name_or_path or models.model_name_or_path
    name = own_name or checkpoints.teacher_name or _cached_teacher_source(args)
    if name is None:
        raise OptionError("There is no tokenizer or image processor; set processing_class_name_or_path.")
    init_kwargs: Any = models.model_init_kwargs if own_name else args.teacher_init_kwargs
    options = hub_kwargs(init_kwargs)
    if models.processing_class_name_or_path:  # another repository
        options = {key: value for key, value in options.items() if key not in ("revision", "subfolder")}
    if is_trusted(init_kwargs):
        options["trust_remote_code"] = True
    if (
        checkpoints.task is Task.TOKEN_CLASSIFICATION
        and _load_config(name, init_kwargs).model_type in _NEEDS_PREFIX_SPACE
    ):
        options["add_prefix_space"] = True
    loader: Any = getattr(transformers, checkpoints.task.processor_class)
    try:
        return load_processing_class(loader, name, error_class=OptionError, **options)
    except OptionError as error:
        raise OptionError(f"{error} Or set processing_class_name_or_path to another one.") from error


def _make_peft_config(models: ModelArguments) -> Any:
    if not models.peft_config:
        return None
    from peft import get_peft_config

    try:
        return get_peft_config(dict(models.peft_config))  # type: ignore[arg-type]  # parsed by now
    except (KeyError, TypeError, ValueError) as error:
        raise OptionError(f"peft_config must be a valid PEFT config: {error}; found {models.peft_config}.") from error


def predicted_classes(logits: "Tensor | tuple[Tensor, ...]", labels: Tensor) -> Tensor:
    """Return the index of the largest logit, which is all that accuracy needs and much less to gather."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


_PROBLEM_TYPES = {OutputKind.REAL: "regression", OutputKind.BERNOULLI: "multi_label_classification"}


def predicted_spans(logits: Any, _labels: Any) -> Tensor:
    """Return the likeliest start and end of each answer, (examples, 2), to collect only these and not the logits."""
    return torch.stack([each.argmax(-1) for each in logits[:2]], dim=-1)


def span_accuracy(predicted: EvalPrediction) -> Mapping[str, float]:
    """Return the fraction of answers whose start and end are both right."""
    expected = np.stack([np.asarray(each) for each in predicted.label_ids], axis=-1)
    return {"exact_match": float((np.asarray(predicted.predictions) == expected).all(-1).mean())}


def error_and_correlation(predicted: EvalPrediction) -> Mapping[str, float]:
    """Return the mean squared error of real numbers and their correlation; NaN where all are the same."""
    values, labels = np.asarray(predicted.predictions).squeeze(-1), np.asarray(predicted.label_ids)
    varies = len(values) > 1 and values.std() > 0 and labels.std() > 0
    correlation = float(np.corrcoef(values, labels)[0, 1]) if varies else math.nan
    return {"mse": float(((values - labels) ** 2).mean()), "pearson": correlation}


def micro_f1(predicted: EvalPrediction) -> Mapping[str, float]:
    """Return F1 over all labels of all examples, of which each with a positive logit is predicted."""
    chosen, labels = np.asarray(predicted.predictions) > 0, np.asarray(predicted.label_ids) > 0
    return {"f1": float(2 * (chosen & labels).sum() / max(chosen.sum() + labels.sum(), 1))}


def accuracy(predicted: EvalPrediction) -> Mapping[str, float]:
    """Return the fraction of labeled items whose predicted class is their label; unlabeled positions are ignored."""
    classes, labels = np.asarray(predicted.predictions), np.asarray(predicted.label_ids)
    labeled = labels != IGNORE_INDEX
    return {"accuracy": float((classes == labels)[labeled].mean()) if labeled.any() else math.nan}
