"""The student that a trainer makes out of its teacher, where it is given arguments instead of a model."""

import os
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_guide.errors import OptionError
from hf_guide.signal_cache.reader import Capture


def init_student_from_teacher(
    student: "PreTrainedConfig | Mapping[str, Any]",
    teacher: Any,
    init_kwargs: Mapping[str, Any] | None,
    train_dataset: Any = None,
) -> PreTrainedModel:
    """Return what `from_teacher` makes of a config or of its own arguments.

    Args:
        student: a config, or what `from_teacher` takes: method, hidden_size and so on; `teacher` among it names another
            one than the one that is listened to.
        teacher: the one that is listened to, or a capture of it.
        init_kwargs: of them revision, token and trust_remote_code count here too.
        train_dataset: of token ids; a calibrated student is made with it where no `calibration_dataset` is given.

    Raises:
        OptionError: there is no single teacher to make it out of.
        TeacherError: the teacher has an adapter, or cannot be read.
    """
    # Only here: distillation works without initialization.
    from hf_guide.initialization.config import InitializationConfig, Method
    from hf_guide.modeling import from_teacher

    where = {
        name: value
        for name, value in (init_kwargs or {}).items()
        if name in ("revision", "token", "trust_remote_code")
    }
    chosen: dict[str, Any] = dict(student) if isinstance(student, Mapping) else {"config": student}
    source = chosen.pop("teacher", teacher)
    if isinstance(source, Capture):
        source = source.teacher_source()
    if not isinstance(source, (str, os.PathLike, nn.Module)):
        raise OptionError(
            f"A student is made out of one teacher, a Hub id, a folder or a model; found {type(source).__name__}. Name it "
            "with 'teacher' among the student's arguments, or pass a model."
        )
    calibrated = InitializationConfig.parse(chosen.get("method", "guide")).method == Method.CALIBRATED
    if calibrated and "calibration_dataset" not in chosen and _has_token_ids(train_dataset):
        chosen["calibration_dataset"] = train_dataset
    return from_teacher(source, **(where | chosen))  # type: ignore[arg-type]  # it says what is wrong with another module


def _has_token_ids(dataset: Any) -> bool:
    """Whether a dataset's examples are rows of token ids."""
    first = None if dataset is None else next(iter(dataset), None)
    return isinstance(first, Mapping) and "input_ids" in first
