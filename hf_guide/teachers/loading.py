"""Load teachers: ids, folders and loaded models, with every parameter from the checkpoint, in evaluation mode.

Does: make the model that is run from a checkpoint, for the whole package; `checkpoint.py` loads through it what it cannot
read tensor by tensor (GGUF, quantised files).
Does not: compare a teacher with a student (`alignment.py`, `inputs.py`) or run it (`forward.py`).
"""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from hf_guide.errors import HfGuideError, OptionError, TaskError, TeacherError
from hf_guide.models.adapters import validate_unwrapped
from hf_guide.models.model_classes import candidate_model_classes
from hf_guide.models.pretrained import find_tokenizer, load_config, unreadable_as
from hf_guide.models.token_rows import attached_tokenizer
from hf_guide.tasks import Task, task_of, task_of_class_name
from hf_guide.teachers.isolation import check_no_shared_parameters, check_teachers_independent

_SHOWN_PARAMETERS = 5
_COMPLETE = "Use a complete checkpoint, or set `architectures` in its config to the class it holds."


def load_teacher(
    teacher: "str | os.PathLike[str] | PreTrainedModel",
    *,
    dtype: "str | torch.dtype | None" = None,
    device: torch.device | None = None,
    revision: str | None = None,
    token: "str | bool | None" = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Return a teacher of the class that its config names; a loaded model is returned as it is.

    Args:
        teacher: A Hub id, a folder, or a model, also with a PEFT adapter.
        dtype: None or "auto" takes that of the checkpoint.
        device: None leaves a model that is loaded here on the CPU.
        revision, token, trust_remote_code: As in `from_pretrained`.

    Raises:
        OptionError: `teacher` is none of these, or a loaded model with `dtype` or `revision`.
        TeacherError: It cannot be read, names no known class, or lacks parameters, which would be random.

    Example:
        >>> load_teacher("HuggingFaceTB/SmolLM2-135M", dtype="bfloat16").dtype
        torch.bfloat16
    """
    if is_loaded(teacher):
        if dtype is not None or revision is not None:
            raise OptionError(
                "dtype and revision are for a teacher that is loaded here; this one is loaded already. Leave them out."
            )
        return teacher  # type: ignore[return-value]
    check_is_teacher(teacher)
    name = os.fspath(teacher)  # type: ignore[arg-type]
    _, model_class = _config_and_class(name, revision, token, trust_remote_code)
    options: dict[str, Any] = {"revision": revision, "token": token, "trust_remote_code": trust_remote_code}
    if device is not None and device.type != "cpu":
        options["device_map"] = {"": device}
    return load_complete_model(model_class, name, f"{name} cannot be loaded", dtype=dtype or "auto", **options).eval()


def config_and_task(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: "str | bool | None" = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedConfig, Task]:
    """Return the config of a Hub id's or folder's model, and what its head is for, without reading its weights.

    Raises:
        TeacherError: Its config cannot be read, or names no known class.
        TaskError: It has no head, or one for a task that cannot be distilled.
    """
    config, model_class = _config_and_class(os.fspath(name), revision, token, trust_remote_code)
    return config, task_of(model_class)


def load_teachers(
    teacher: "str | os.PathLike[str] | PreTrainedModel | Sequence[Any]",
    task: Task,
    *,
    init_kwargs: Mapping[str, Any] | None = None,
    student: Any = None,
) -> list[PreTrainedModel]:
    """Return the teachers of a student for `task`, frozen and in evaluation mode.

    Args:
        teacher: A Hub id or folder, several of them separated by commas, a model, or a sequence of all these.
        task: The student's.
        init_kwargs: Keywords of `from_pretrained` for those that are loaded here.
        student: Its parameters must not be those of a teacher.

    Raises:
        TeacherError: One cannot be loaded.
        TaskError: One is for another task than the student.
        OptionError: One is no teacher, or shares parameters with `student` or another teacher.
    """
    if isinstance(teacher, str) and "," in teacher and not os.path.exists(teacher):
        teacher = [name.strip() for name in teacher.split(",")]
    teachers = teacher if isinstance(teacher, (list, tuple)) else [teacher]
    if not teachers:
        raise OptionError("There is no teacher in the sequence of teachers; name at least one.")
    models: list[Any] = [
        each if isinstance(each, torch.nn.Module) else _load_for_task(each, task, dict(init_kwargs or {}))
        for each in teachers
    ]
    for model in models:
        validate_unwrapped(model, "teacher")
        if not task.accepts_teacher_for(task_of(model)):
            raise TaskError(
                f"The teacher {model_name(model)} is a {type(model).__name__}, for {task_of(model)}; the student is "
                f"for {task}. Use a teacher of the student's task."
            )
    check_no_shared_parameters(student, models)
    check_teachers_independent(models)
    for model in models:
        model.eval()
        model.requires_grad_(False)
    return models


def load_complete_model(
    loader: Any,
    name: str,
    what: str,
    *,
    advice: str = _COMPLETE,
    may_be_new: Callable[[str], bool] = lambda parameter: False,
    error_class: type[HfGuideError] = TeacherError,
    **options: Any,
) -> PreTrainedModel:
    """Return a model whose parameters are all in its checkpoint.

    Args:
        loader: A model class or an Auto class.
        name: A Hub id or a folder.
        what: How an error begins if the files cannot be read.
        advice: How an error ends if parameters are missing.
        may_be_new: Whether a parameter may be missing, such as those of a new head.
        error_class: Of the errors.
        options: Keywords of `from_pretrained`.

    Raises:
        TeacherError: The files cannot be read, or lack parameters, which would be random.
    """
    with unreadable_as(error_class, what):
        model, report = loader.from_pretrained(name, output_loading_info=True, **options)
    missing = [parameter for parameter in report["missing_keys"] if not may_be_new(parameter)]
    if missing:
        raise missing_parameters_error(name, missing, advice, error_class)
    loaded: PreTrainedModel = model
    return loaded


def missing_parameters_error(
    name: str,
    missing: Collection[str],
    advice: str = _COMPLETE,
    error_class: type[HfGuideError] = TeacherError,
) -> HfGuideError:
    """Return the error for a checkpoint without some of its model's parameters."""
    shown = ", ".join(sorted(missing)[:_SHOWN_PARAMETERS]) + (", ..." if len(missing) > _SHOWN_PARAMETERS else "")
    return error_class(
        f"{len(missing)} parameters are not in the checkpoint {name} and would be random: {shown}. {advice}"
    )


def is_loaded(teacher: Any) -> bool:
    """Return whether a teacher is a model, also with a PEFT adapter."""
    return isinstance(teacher, PreTrainedModel) or hasattr(teacher, "get_base_model")


def check_is_teacher(teacher: Any) -> None:
    """Check that a teacher is a name, a folder or a model.

    Raises:
        OptionError: It is something else.
    """
    if not isinstance(teacher, (str, os.PathLike)) and not is_loaded(teacher):
        raise OptionError(f"A teacher must be a Hub id, a folder or a PreTrainedModel; found {_describe(teacher)}.")


def _describe(value: Any) -> str:
    """Return what is no teacher in a few words: a class by its name, another object by its class's, a number as it is."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    shown = repr(value)
    return f"{type(value).__name__} {shown}" if len(shown) <= 60 else f"a {type(value).__name__}"


def _load_for_task(teacher: Any, task: Task, init_kwargs: dict[str, Any]) -> PreTrainedModel:
    """Load a teacher as a model for the student's task."""
    check_is_teacher(teacher)
    name = os.fspath(teacher)
    config = load_config(name, hub_kwargs(init_kwargs), is_trusted(init_kwargs))
    stated = f" with teacher_init_kwargs={sorted(init_kwargs)}" if init_kwargs else ""
    return load_complete_model(
        _class_for_task(config, task),
        name,
        f"The teacher {name} does not load as a model for {task}{stated}",
        advice=f"A teacher must be trained for {task}.",
        **init_kwargs,
    )


def _class_for_task(config: PreTrainedConfig, task: Task) -> Any:
    """Return the task's Auto class, or the stock class for the task that a config names and no Auto class loads.

    Some families have several classes for a task: XLNetForQuestionAnswering is not the one of AutoModelForQuestionAnswering.
    """
    auto_class = getattr(transformers, task.row.auto_class)
    loaded = auto_class._model_mapping.get(type(config), ())
    names = {each.__name__ for each in (loaded if isinstance(loaded, tuple) else (loaded,))}
    for name in config.architectures or ():
        if name not in names and task_of_class_name(name) is task and hasattr(transformers, name):
            return getattr(transformers, name)
    return auto_class


def _config_and_class(
    name: str, revision: str | None, token: "str | bool | None", trust: bool
) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    """Return the config of a checkpoint, and the class that it names."""
    hub: dict[str, Any] = {"revision": revision, "token": token}
    config = load_config(name, hub, trust, what=f"{name} cannot be loaded")
    architecture = (config.architectures or [""])[0]
    model_class = candidate_model_classes(config, name, hub, trust)[0]
    if model_class.__name__ != architecture:
        raise TeacherError(
            f"The config of {name} names the class {architecture!r}, which Transformers does not have. Set "
            "`architectures` to a known class, or pass a loaded model."
        )
    return config, model_class


def model_name(model: Any) -> str:
    """Return the Hub id or folder of a model, or the name of its class."""
    return getattr(model.config, "_name_or_path", "") or type(model).__name__


def teacher_tokenizer(model: Any, init_kwargs: Mapping[str, Any] | None = None) -> Any:
    """Return a model's tokenizer, attached to it or among its files; None if it has none that loads (see `find_tokenizer`)."""
    if attached_tokenizer(model) is not None:
        return attached_tokenizer(model)
    name = model.config._name_or_path
    return find_tokenizer(name, **hub_kwargs(init_kwargs)) if name else None


def hub_kwargs(init_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return those keywords of `from_pretrained` that locate files."""
    names = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
    return {key: value for key, value in (init_kwargs or {}).items() if key in names}


def is_trusted(init_kwargs: Mapping[str, Any] | None) -> bool:
    """Return whether keywords of `from_pretrained` let the checkpoint's own code run."""
    return bool((init_kwargs or {}).get("trust_remote_code"))
