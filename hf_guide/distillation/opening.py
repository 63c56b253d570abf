"""Teachers opened: loaded where they are named, compared with the student, and placed where it is trained."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import accelerate
import torch
import transformers
from accelerate.utils import DistributedType
from transformers import PreTrainedModel

from hf_guide.distillation.given import check_unwrapped
from hf_guide.distillation.heads import find_head
from hf_guide.distillation.isolation import check_apart, check_teachers_apart
from hf_guide.distillation.label_shift import check_shifts
from hf_guide.distillation.tasks import Task, task_of
from hf_guide.distillation.teacher_inputs import teacher_inputs
from hf_guide.distillation.teachers import LiveTeacher
from hf_guide.distillation.vocabulary import label_alignment, shared_vocabulary
from hf_guide.errors import OptionError, TaskError, TeacherError
from hf_guide.pretrained import find_tokenizer, load_config, unreadable_as

AUTO_CLASSES = {
    Task.CAUSAL_LM: "AutoModelForCausalLM",
    Task.MASKED_LM: "AutoModelForMaskedLM",
    Task.SEQ2SEQ_LM: "AutoModelForSeq2SeqLM",
    Task.SEQUENCE_CLASSIFICATION: "AutoModelForSequenceClassification",
    Task.TOKEN_CLASSIFICATION: "AutoModelForTokenClassification",
    Task.IMAGE_CLASSIFICATION: "AutoModelForImageClassification",
}


def open_teachers(
    teacher: "str | os.PathLike[str] | PreTrainedModel | Sequence[Any]",
    task: Task,
    *,
    init_kwargs: Mapping[str, Any] | None = None,
    student: Any = None,
) -> list[PreTrainedModel]:
    """Return the teachers, loaded where they are named: a Hub id, a folder, several with commas, a model, or a sequence.

    Raises:
        TeacherError: one that cannot be loaded.
        TaskError: one for another task than the student's.
        OptionError: something else than a teacher, or one that shares parameters with `student` or another teacher.
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
        elif isinstance(one, torch.nn.Module):
            model = one  # type: ignore[assignment]
        else:
            raise OptionError(f"A teacher is a Hub id, a folder or a PreTrainedModel, not a {type(one).__name__}.")
        check_unwrapped(model, "teacher")
        if task_of(model) is not task:
            raise TaskError(
                f"The teacher {name_of(model)} is a {type(model).__name__}, for {task_of(model)}; the student is for {task}. "
                "Give a teacher of the student's task."
            )
        opened.append(model)
    check_apart(student, opened)
    check_teachers_apart(opened)
    for model in opened:
        model.eval()
        model.requires_grad_(False)
    return opened


def _load(name: str, task: Task, init_kwargs: dict[str, Any]) -> PreTrainedModel:
    loader = getattr(transformers, AUTO_CLASSES[task])
    load_config(name, _hub(init_kwargs), bool(init_kwargs.get("trust_remote_code")))
    given = f" with teacher_init_kwargs={sorted(init_kwargs)}" if init_kwargs else ""
    with unreadable_as(TeacherError, f"The teacher {name} does not load as a model for {task}{given}"):
        model, found = loader.from_pretrained(name, output_loading_info=True, **init_kwargs)
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
    """Return the tokenizer beside a model's files, or None where there is none to be had (see `find_tokenizer`)."""
    name = model.config._name_or_path
    return find_tokenizer(name, **_hub(init_kwargs)) if name else None


def _hub(init_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return those of the keywords of `from_pretrained` that say where files are found."""
    names = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
    return {key: value for key, value in (init_kwargs or {}).items() if key in names}


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
    models = open_teachers(teacher, task, init_kwargs=init_kwargs, student=student)
    shares = [1.0] * len(models) if weights is None else list(weights)
    if len(shares) != len(models):
        raise OptionError(f"There are {len(shares)} teacher_weights for {len(models)} teachers; give one weight each.")
    made = []
    for model, share in zip(models, shares, strict=True):
        if model.main_input_name != student.main_input_name:
            raise TaskError(
                f"The teacher {name_of(model)} reads {model.main_input_name}, the student {student.main_input_name}: "
                "they cannot be fed the same batch."
            )
        check_shifts(model, student, task)
        classes, order = None, None
        if task.is_language_model:
            sizes = [each.get_output_embeddings().weight.shape[0] for each in (student, model)]
            own = tokenizer_of(model, init_kwargs)
            tokenizer = getattr(processing_class, "tokenizer", processing_class)
            classes = shared_vocabulary(tokenizer, own, *sizes)
        else:
            order = label_alignment(student.config, model.config)
        inputs = teacher_inputs(model, task, processing_class, student=student, init_kwargs=init_kwargs)
        # Before it is sharded: what is proved on whole weights still holds then, but they are no longer whole.
        head = find_head(model) if task.is_language_model and not compile else None
        placed, sharded = place_teacher(model, accelerator)
        if compile:
            placed = torch.compile(placed)  # type: ignore[assignment]
        head = None if sharded else head
        made.append(LiveTeacher(placed, task, classes, order, share / sum(shares), head, inputs))
    return made
