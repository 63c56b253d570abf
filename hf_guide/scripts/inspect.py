"""Describe the students that a teacher could have: the variance that each width retains, and the number of parameters."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from hf_guide.errors import HfGuideError
from hf_guide.initialization.basis import embedding_second_moments, explained_variance, fit_basis
from hf_guide.initialization.config import LayerSelection, PlanOptions
from hf_guide.initialization.planning import make_plan
from hf_guide.initialization.student_config import derive_student_config
from hf_guide.layouts.registry import Layout
from hf_guide.models.modes import on_meta_device
from hf_guide.teachers.checkpoint import TeacherCheckpoint
from hf_guide.visualization import LANDMARKS, Curve, width_reaching

_PLAN = PlanOptions(LayerSelection.FIRST_LAST.value, projects=True)


@dataclass(frozen=True)
class WidthSuggestion:
    """A student that retains at least a given fraction of the embedding variance, in a shape that its family supports.

    Attributes:
        target: The fraction to retain, 0 to 1.
        min_width: Smallest width that retains it, whether or not the heads divide it.
        overrides: Arguments for `from_teacher`; `hidden_size` is the suggested width.
        explained_variance: Fraction that the suggested width retains.
        parameters, parameters_half: Number of parameters with all of the teacher's blocks, and with half of them.
    """

    target: float
    min_width: int
    overrides: dict[str, int]
    explained_variance: float
    parameters: int
    parameters_half: int | None


def variance_curves(teacher: TeacherCheckpoint, layout: Layout) -> dict[str, list[float]]:
    """Return, for each projected axis, the cumulative fraction of variance, 0 to 1, retained at width 1, 2, ....

    Raises:
        TeacherError: An embedding matrix cannot be read, or contains numbers that are not finite.
    """
    plan = make_plan(_meta_model(teacher, teacher.config), teacher, layout, _PLAN)
    moments = embedding_second_moments(plan, list(plan.widths))
    return {
        axis: explained_variance(fit_basis(moment, len(moment)).eigenvalues).tolist()
        for axis, moment in moments.items()
    }


def suggest_widths(teacher: TeacherCheckpoint, layout: Layout, curve: Curve) -> list[WidthSuggestion]:
    """Return the smallest suitable widths that retain 50, 80, 90, 95 and 99% of the variance.

    A width is suitable if it is a multiple of 64, or of eight times the number of heads, and a student of this width can be
    planned for the teacher.
    """
    suggestions: list[WidthSuggestion] = []
    for target in LANDMARKS:
        min_width = width_reaching(curve, target)
        for width in _suitable_widths(teacher.config, min_width):
            overrides = {"hidden_size": width, **_proportional_mlp(teacher.config, width)}
            parameters = count_parameters(teacher, layout, overrides)
            if parameters is not None:
                blocks = getattr(teacher.config, "num_hidden_layers", 1)
                half = {**overrides, "num_hidden_layers": math.ceil(blocks / 2)}
                parameters_half = count_parameters(teacher, layout, half)
                suggestions.append(
                    WidthSuggestion(target, min_width, overrides, curve[width - 1], parameters, parameters_half)
                )
                break
    return suggestions


def count_parameters(teacher: TeacherCheckpoint, layout: Layout, overrides: dict[str, Any]) -> int | None:
    """Return the number of parameters of a student with these overrides; None if it cannot be made from this teacher."""
    try:
        student = _meta_model(teacher, derive_student_config(teacher.config, overrides))
        make_plan(student, teacher, layout, _PLAN)
    except HfGuideError:
        return None
    return student.num_parameters()


def _meta_model(teacher: TeacherCheckpoint, config: PreTrainedConfig) -> Any:
    with on_meta_device():
        return teacher.model_class._from_config(config)


def _suitable_widths(config: PreTrainedConfig, min_width: int) -> Iterator[int]:
    heads = getattr(config, "num_attention_heads", 1)
    for width in range(min_width, config.hidden_size):
        if width % 64 == 0 or width % (8 * heads) == 0:
            yield width


def _proportional_mlp(config: PreTrainedConfig, width: int) -> dict[str, int]:
    """Return the intermediate size in the teacher's proportion, rounded to a multiple of 64, if the config has one."""
    size = getattr(config, "intermediate_size", None)
    if not isinstance(size, int):
        return {}
    step = 64 if size >= 512 else 8
    return {"intermediate_size": min(size, max(step, round(size * width / config.hidden_size / step) * step))}
