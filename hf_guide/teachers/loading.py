"""A teacher loaded to be listened to, of the class that its config names.

Teachers opened: loaded where they are named, compared with the student, and placed where it is trained.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import accelerate
import torch
import transformers
from accelerate.utils import DistributedType
from transformers import PreTrainedModel

from hf_guide.errors import OptionError, TaskError, TeacherError
from hf_guide.models.adapters import validate_unwrapped
from hf_guide.models.pretrained import find_tokenizer, load_config, remote_code_error, unreadable_as
from hf_guide.tasks import Task, task_of
from hf_guide.teachers.isolation import check_no_shared_parameters, check_teachers_independent


def load_teacher(
    name: str | os.PathLike[str],
    *,
    dtype: "str | torch.dtype | None" = None,
    device: torch.device | None = None,
    revision: str | None = None,
    token: "str | bool | None" = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Return a teacher as `from_pretrained` loads it, of the class its config names, in evaluation mode.

    Args:
        name: a Hub id or a folder.
        dtype: None or "auto" takes that of the checkpoint.
        device: None leaves it on the CPU.
        revision, token, trust_remote_code: as in `from_pretrained`.

    Raises:
        TeacherError: it cannot be read, names no class, or lacks parameters, which would be random.
    """
    name = os.fspath(name)
    hub: dict[str, Any] = {"revision": revision, "token": token}
    config = load_config(name, hub, trust_remote_code, what=f"{name} cannot be loaded")
    loader = _model_loader(config, name, trust_remote_code)
    with unreadable_as(TeacherError, f"{name} cannot be loaded"):
        if loader.__name__.startswith("Auto"):
            hub["trust_remote_code"] = trust_remote_code
        if device is not None and device.type != "cpu":
            hub["device_map"] = {"": device}
        loaded: Any = loader.from_pretrained(name, dtype=dtype or "auto", output_loading_info=True, **hub)
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise TeacherError(
            f"{len(missing)} parameters are not in the checkpoint {name} and would be random: {', '.join(missing[:5])}. "
            "Use a complete checkpoint, or set `architectures` in its config to the class it holds."
        )
    return model.eval()


def task_of_checkpoint(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: "str | bool | None" = None,
    trust_remote_code: bool = False,
) -> Task:
    """Return what the head of a Hub id's or folder's model is for, without its weights.

    Raises:
        TeacherError: its config cannot be read, or names no class.
        TaskError: none of the tasks that can be distilled.
    """
    name = os.fspath(name)
    config = load_config(
        name, {"revision": revision, "token": token}, trust_remote_code, what=f"{name} cannot be loaded"
    )
    loader = _model_loader(config, name, trust_remote_code)
    with unreadable_as(TeacherError, f"{name} cannot be loaded"), torch.device("meta"):
        auto = loader.__name__.startswith("Auto")
        model = loader.from_config(config, trust_remote_code=True) if auto else loader(config)
    return task_of(model)


def _model_loader(config: Any, name: str, trust: bool) -> Any:
    architecture = (config.architectures or [""])[0]
    remote = [
        auto for auto, reference in (getattr(config, "auto_map", None) or {}).items() if architecture in str(reference)
    ]
    if remote and trust and architecture:
        return getattr(transformers, remote[0])
    found = getattr(transformers, architecture, None)
    if isinstance(found, type) and issubclass(found, PreTrainedModel):
        return found
    if remote:
        raise remote_code_error(name)
    raise TeacherError(
        f"The config of {name} names the class {architecture!r}, which Transformers does not have. Set `architectures` to a "
        "known class, or pass a loaded model."
    )


def load_teachers(
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
            model = _load_for_task(os.fspath(one), task, dict(init_kwargs or {}))
        elif isinstance(one, torch.nn.Module):
            model = one  # type: ignore[assignment]
        else:
            raise OptionError(f"A teacher is a Hub id, a folder or a PreTrainedModel, not a {type(one).__name__}.")
        validate_unwrapped(model, "teacher")
        if task_of(model) is not task:
            raise TaskError(
                f"The teacher {model_name(model)} is a {type(model).__name__}, for {task_of(model)}; the student is for {task}. "
                "Give a teacher of the student's task."
            )
        opened.append(model)
    check_no_shared_parameters(student, opened)
    check_teachers_independent(opened)
    for model in opened:
        model.eval()
        model.requires_grad_(False)
    return opened


def _load_for_task(name: str, task: Task, init_kwargs: dict[str, Any]) -> PreTrainedModel:
    loader = getattr(transformers, task.row.auto_class)
    load_config(name, _hub_kwargs(init_kwargs), bool(init_kwargs.get("trust_remote_code")))
    given = f" with teacher_init_kwargs={sorted(init_kwargs)}" if init_kwargs else ""
    with unreadable_as(TeacherError, f"The teacher {name} does not load as a model for {task}{given}"):
        model, found = loader.from_pretrained(name, output_loading_info=True, **init_kwargs)
    if found["missing_keys"]:
        raise TeacherError(
            f"{len(found['missing_keys'])} weights of {type(model).__name__} are not in {name} and would be random: "
            f"{', '.join(sorted(found['missing_keys'])[:3])}, ... A teacher must be trained for {task}."
        )
    return model


def model_name(model: Any) -> str:
    """Return where a model came from, or its class's name."""
    return getattr(model.config, "_name_or_path", "") or type(model).__name__


def teacher_tokenizer(model: Any, init_kwargs: Mapping[str, Any] | None = None) -> Any:
    """Return the tokenizer beside a model's files, or None where there is none to be had (see `find_tokenizer`)."""
    name = model.config._name_or_path
    return find_tokenizer(name, **_hub_kwargs(init_kwargs)) if name else None


def _hub_kwargs(init_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return those of the keywords of `from_pretrained` that say where files are found."""
    names = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
    return {key: value for key, value in (init_kwargs or {}).items() if key in names}


def prepare_teacher(model: PreTrainedModel, accelerator: accelerate.Accelerator) -> tuple[PreTrainedModel, bool]:
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
        return _prepare_with_deepspeed(model, accelerator)
    return model.to(accelerator.device), False


def _prepare_with_deepspeed(
    model: PreTrainedModel, accelerator: accelerate.Accelerator
) -> tuple[PreTrainedModel, bool]:
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
