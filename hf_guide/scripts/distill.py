"""A whole distillation by its settings: read, prepare, train, evaluate, save, push."""

import copy
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset
from torch import Tensor
from transformers import EvalPrediction, PreTrainedConfig, PreTrainedModel

from hf_guide.data.arguments import DataArguments, ModelArguments
from hf_guide.data.class_labels import has_generic_names
from hf_guide.data.loading import class_names, count_classes, find_column, load_splits
from hf_guide.data.preprocessing import preprocess
from hf_guide.distillation.arguments import DistillationArguments
from hf_guide.distillation.checkpoints import has_checkpoints, validate_checkpoint
from hf_guide.distillation.trainer import DistillationTrainer
from hf_guide.errors import HfGuideError, OptionError, TaskError, TeacherError, one_paragraph
from hf_guide.models.pretrained import load_config, load_processing_class, unreadable_as
from hf_guide.scripts.distill_config import DistillConfig
from hf_guide.signal_cache.reader import Capture
from hf_guide.tasks import Task, task_of
from hf_guide.utils.labels import IGNORE_INDEX

_HUB_KWARGS = ("revision", "token", "trust_remote_code", "cache_dir", "local_files_only")

# Their tokenizers take words apart from text only where each begins with a space.
_NEEDS_PREFIX_SPACE = ("bloom", "gpt2", "roberta", "deberta")


def distill(settings: DistillConfig) -> dict[str, float]:
    """Train a student as its settings say, and save it with its tokenizer and card into `output_dir`.

    Returns:
        The evaluation after the training; what the training measured where there is nothing to evaluate on.

    Raises:
        OptionError: settings that contradict each other or the data.
        HfGuideError: whatever else `DistillationTrainer` refuses.
        OSError: a model, a dataset or a file that cannot be had.
    """
    models, data, args = settings.models, settings.data, settings.training
    _check_config(models, args)
    transformers.set_seed(args.seed)
    source, teacher_config = _teacher_name_and_config(args)
    where = _hub_kwargs(models.model_init_kwargs)
    trust = bool(where.pop("trust_remote_code", False))
    own_config = load_config(models.model_name_or_path, where, trust) if models.model_name_or_path else None
    own_task, teacher_task = (None if one is None else task_of_config(one) for one in (own_config, teacher_config))
    task = Task(models.task) if models.task is not None else teacher_task or own_task
    if task is None:
        raise OptionError(f"What is to be learned is not known; say task: one of {list(map(str, Task))}.")
    is_classifier = not task.is_language_model
    train, held_out = load_splits(data)
    labels: list[str] | None = None
    if is_classifier:
        labels = student_labels(
            task,
            train,
            data,
            own_config if own_task is task else None,
            teacher_config if teacher_task is task else None,
            named=bool(models.model_name_or_path),
        )
    processing_class = _load_processing_class(task, models, args, source)
    with args.main_process_first(desc="preparing the examples"):
        made = preprocess(
            task,
            train,
            held_out,
            processing_class,
            data,
            labels=labels,
            mask_once=args.teacher_cache is not None,
            config=[own_config or _student_config(teacher_config, args), teacher_config],
        )
    if made.keep_columns:
        args.remove_unused_columns = False
    student = _load_student(task, models, labels if own_task is not task else None, new_head=own_task is not task)
    peft_config = _make_peft_config(models)
    try:
        trainer = DistillationTrainer(
            model=student,
            args=args,
            data_collator=made.collator,
            train_dataset=made.train,
            eval_dataset=made.eval,
            processing_class=processing_class,
            compute_metrics=accuracy if is_classifier else None,
            preprocess_logits_for_metrics=predicted_classes if is_classifier else None,
            peft_config=peft_config,
        )
    except HfGuideError:
        raise
    except ValueError as error:  # `Trainer` says so which of its arguments contradict each other
        raise OptionError(f"The training cannot begin with these options: {one_paragraph(error)}.") from error
    return _train_and_save(trainer, data)


def _train_and_save(trainer: DistillationTrainer, data: DataArguments) -> dict[str, float]:
    args = trainer.args
    resume: Any = args.resume_from_checkpoint
    if str(resume).lower() in ("true", "false"):  # go on where a run was cut off, or begin
        resume = str(resume).lower() == "true" and has_checkpoints(args.output_dir or "")
    metrics = trainer.train(resume_from_checkpoint=resume).metrics
    trainer.save_model()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    told: dict[str, Any] = {"dataset": data.name} | ({} if data.is_local else {"dataset_tags": data.name})
    if args.push_to_hub:
        trainer.push_to_hub(**told)
    else:
        trainer.create_model_card(**told)
    return metrics


def _check_config(models: ModelArguments, args: DistillationArguments) -> None:
    if models.model_name_or_path and args.student_init_kwargs:
        raise OptionError(
            "model_name_or_path and student_init_kwargs are both given: the student exists already, or it is initialized from its "
            "teacher. Keep one of them."
        )
    if not models.model_name_or_path and not args.student_init_kwargs:
        raise OptionError(
            "There is no student: give model_name_or_path, or student_init_kwargs, the arguments of from_teacher, such as "
            "{hidden_size: 288, num_hidden_layers: 10}."
        )

    if models.peft_config and args.student_init_kwargs:
        raise OptionError(
            "peft_config and student_init_kwargs are both given: the adapter would be saved without the student that it belongs "
            "to. Save the student first, with `hf-guide init`, and name its folder as model_name_or_path."
        )
    if "lelp" in args.loss_weights:
        raise OptionError(
            "The loss lelp needs the subclasses of a projector, which a file cannot give. In Python: projector = "
            "fit_subclasses(...); DistillationTrainer(..., data_collator=SubclassLabelCollator(projector, tokenizer))."
        )
    resume = args.resume_from_checkpoint
    if resume and str(resume).lower() not in ("true", "false") and not os.path.isdir(resume):
        raise OptionError(
            f"resume_from_checkpoint is true, or the folder of a checkpoint; there is no folder {resume!r}."
        )
    if resume and str(resume).lower() not in ("true", "false"):
        validate_checkpoint(resume)


def _teacher_name_and_config(args: DistillationArguments) -> tuple[str | None, PreTrainedConfig | None]:
    """Return the first teacher's name and its config; of a capture only the captured one's config."""
    if args.teacher_cache:
        manifest = Capture.open(args.teacher_cache).manifest
        return None, manifest.teacher_config_object()
    if not args.teacher:
        return None, None
    name = args.teacher if os.path.exists(args.teacher) else args.teacher.split(",")[0].strip()
    where = _hub_kwargs(args.teacher_init_kwargs)
    trust = bool(where.pop("trust_remote_code", False))
    return name, load_config(name, where, trust, what=f"The teacher {name} has no config that can be read")


def _cached_teacher_source(args: DistillationArguments) -> str | None:
    """Return what the captured teacher's tokenizer is loaded from; None without a capture."""
    if not args.teacher_cache:
        return None
    named = (args.student_init_kwargs or {}).get("teacher")  # type: ignore[union-attr]  # parsed
    return named if isinstance(named, str) else Capture.open(args.teacher_cache).teacher_source()


def _student_config(teacher: PreTrainedConfig | None, args: DistillationArguments) -> PreTrainedConfig | None:
    """Return the teacher's config with the number of positions that `student_init_kwargs` asks for, where it does."""
    asked: Any = args.student_init_kwargs or {}
    positions = {name: asked[name] for name in ("max_position_embeddings", "n_positions") if name in asked}
    if teacher is None or not positions:
        return None
    config = copy.deepcopy(teacher)
    config.update(positions)
    return config


def _hub_kwargs(init_kwargs: Any) -> dict[str, Any]:
    return {name: value for name, value in (init_kwargs or {}).items() if name in _HUB_KWARGS}


def task_of_config(config: PreTrainedConfig) -> Task | None:
    """Return what the model that a config was saved with is for; None where that is not known or cannot be distilled."""
    for name in config.architectures or ():
        model_class = getattr(transformers, name, None)
        if not isinstance(model_class, type) or not issubclass(model_class, PreTrainedModel):
            continue
        what = f"{name} cannot be built of the config of {config._name_or_path}"
        try:
            with unreadable_as(TeacherError, what), torch.device("meta"):
                return task_of(model_class._from_config(config))
        except TaskError:
            continue
    return None


def student_labels(
    task: Task,
    train: Dataset,
    data: DataArguments,
    own: PreTrainedConfig | None,
    teacher: PreTrainedConfig | None,
    *,
    named: bool,
) -> list[str]:
    """Return the names of a student's classes in their order.

    They are its own where it is a classifier already, else its teacher's, else those of the data.

    Args:
        task: what the student is for.
        train, data: the raw training split, and which of its columns has labels.
        own, teacher: configs of classifiers; None where there is none.
        named: the student is not made out of its teacher, so that it may have names where its teacher has only numbers.
    """
    column = find_column(train, task, "label", data)
    names = class_names(train, column)
    config = own if own is not None else teacher
    if config is None:
        return names or [f"LABEL_{number}" for number in range(count_classes(train, column))]
    known: Any = config.id2label
    labels = [str(known[number]) for number in sorted(known)]
    nameless = own is None and named and has_generic_names(labels)
    return names if nameless and names is not None and len(names) == len(labels) else labels


def _load_student(
    task: Task, models: ModelArguments, labels: Sequence[str] | None, *, new_head: bool
) -> "transformers.PreTrainedModel | None":
    """Return the student that is there already, with `labels` where it is given any.

    `new_head` says that it was saved for another task, so that its head is not there.

    None where the trainer makes it out of its teacher.
    """
    if not models.model_name_or_path:
        return None
    given: dict[str, Any] = dict(models.model_init_kwargs or {})  # type: ignore[arg-type]  # parsed by now
    if labels is not None:
        names = dict(enumerate(labels))
        given |= {"num_labels": len(labels), "id2label": names, "label2id": {v: k for k, v in names.items()}}
    name = models.model_name_or_path
    loader = getattr(transformers, task.row.auto_class)
    kwargs = f" with model_init_kwargs={sorted(models.model_init_kwargs)}" if models.model_init_kwargs else ""
    with unreadable_as(OptionError, f"The student {name} does not load as a model for {task}{kwargs}"):
        student, found = loader.from_pretrained(name, output_loading_info=True, **given)
    # A new head may need more than a layer of its own (BERT's pooler), but no block and no embeddings.
    blocks = re.compile(r"\.\d+\.|embed")
    missing = sorted(key for key in found["missing_keys"] if not new_head or blocks.search(key))
    if missing:
        raise OptionError(
            f"{len(missing)} weights of {type(student).__name__} are not in {name} and would be random: "
            f"{', '.join(missing[:3])}. Only the head of a new task may be missing. Use a complete checkpoint."
        )
    return student


def _load_processing_class(task: Task, models: ModelArguments, args: DistillationArguments, source: str | None) -> Any:
    own = models.processor_name_or_path or models.model_name_or_path
    name = own or source or _cached_teacher_source(args)
    if name is None:
        raise OptionError("Nothing says how the data is to be read; give processor_name_or_path.")
    where = _hub_kwargs(models.model_init_kwargs if own else args.teacher_init_kwargs)
    auto: Any = getattr(transformers, task.processor_class)
    if task is Task.TOKEN_CLASSIFICATION:
        trust = bool(where.get("trust_remote_code", False))
        hub = {key: value for key, value in where.items() if key != "trust_remote_code"}
        if load_config(name, hub, trust).model_type in _NEEDS_PREFIX_SPACE:
            where["add_prefix_space"] = True
    try:
        return load_processing_class(auto, name, error_class=OptionError, **where)
    except OptionError as error:
        raise OptionError(f"{error} Or name another one with processor_name_or_path.") from error


def _make_peft_config(models: ModelArguments) -> Any:
    if not models.peft_config:
        return None
    from peft import get_peft_config

    try:
        return get_peft_config(dict(models.peft_config))  # type: ignore[arg-type]  # parsed by now
    except (KeyError, TypeError, ValueError) as error:
        raise OptionError(f"peft_config is not one that PEFT knows: {error}; found {models.peft_config}.") from error


def predicted_classes(logits: "Tensor | tuple[Tensor, ...]", labels: Tensor) -> Tensor:
    """Return the class with the largest logit: all that accuracy needs, and much less to gather."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def accuracy(predicted: EvalPrediction) -> Mapping[str, float]:
    """Return the share of items whose best class is the labelled one; places without a label do not count."""
    classes, labels = np.asarray(predicted.predictions), np.asarray(predicted.label_ids)
    counted = labels != IGNORE_INDEX
    return {"accuracy": float((classes == labels)[counted].mean()) if counted.any() else math.nan}
