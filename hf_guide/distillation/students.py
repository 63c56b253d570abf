"""The student that a trainer makes out of its teacher, where it is given arguments instead of a model."""

import os
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from hf_guide.errors import OptionError


def make_student(
    student: "PreTrainedConfig | Mapping[str, Any]", teacher: Any, init_kwargs: Mapping[str, Any] | None
) -> PreTrainedModel:
    """Return what `from_teacher` makes of a config or of its own arguments.

    Args:
        student: a config, or what `from_teacher` takes: method, hidden_size and so on; `teacher` among it names another
            one than the one that is listened to.
        teacher: the one that is listened to.
        init_kwargs: of them revision, token and trust_remote_code count here too.

    Raises:
        OptionError: there is no single teacher to make it out of.
    """
    from hf_guide.students import from_teacher  # only here: distillation works without initialization

    where = {
        name: value
        for name, value in (init_kwargs or {}).items()
        if name in ("revision", "token", "trust_remote_code")
    }
    chosen = dict(student) if isinstance(student, Mapping) else {"config": student}
    source = chosen.pop("teacher", teacher)
    if not isinstance(source, (str, os.PathLike, PreTrainedModel)):
        raise OptionError(
            f"A student is made out of one teacher, a Hub id, a folder or a model; found {type(source).__name__}. Name it "
            "with 'teacher' among the student's arguments, or pass a model."
        )
    return from_teacher(source, **(where | chosen))
