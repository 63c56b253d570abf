"""A teacher loaded to be listened to, of the class that its config names."""

import os
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from hf_guide.distillation.tasks import Task, task_of
from hf_guide.errors import TeacherError
from hf_guide.pretrained import load_config, needs_permission, unreadable_as


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
    loader = _loader(config, name, trust_remote_code)
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


def task_of_files(
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
    loader = _loader(config, name, trust_remote_code)
    with unreadable_as(TeacherError, f"{name} cannot be loaded"), torch.device("meta"):
        auto = loader.__name__.startswith("Auto")
        model = loader.from_config(config, trust_remote_code=True) if auto else loader(config)
    return task_of(model)


def _loader(config: Any, name: str, trust: bool) -> Any:
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
        raise needs_permission(name)
    raise TeacherError(
        f"The config of {name} names the class {architecture!r}, which Transformers does not have. Set `architectures` to a "
        "known class, or pass a loaded model."
    )
