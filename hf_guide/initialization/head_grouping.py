"""Detect students that divide the same weights into other attention heads than their teacher.

Four heads of 16 and two heads of 32 have projections of the same shape: shapes cannot distinguish them, and weights that are
copied from one to the other compute something else.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_guide.errors import ShapeError
from hf_guide.models.model_classes import meta_model
from hf_guide.models.tiny_models import MODEL_ERRORS

_HEAD_SETTING = re.compile(r"(^|_)(heads?|n_head|head_(dim|size)|d_head|d_kv)$")


class _Planned(Protocol):
    """A parameter of the student and its source, by names relative to the base model, as `plan.ParameterPlan` has them."""

    @property
    def canonical(self) -> str: ...
    @property
    def shape(self) -> torch.Size: ...
    @property
    def source(self) -> str | None: ...
    @property
    def source_shape(self) -> torch.Size | None: ...


def check_head_grouping(
    student: PreTrainedModel,
    planned: Iterable[_Planned],
    teacher_class: type[PreTrainedModel],
    teacher_config: PreTrainedConfig,
) -> None:
    """Check that modules whose parameters all have the teacher's shapes have the teacher's heads too.

    Args:
        planned: the plan of each of the student's parameters.

    Raises:
        ShapeError: names the module, its setting and both values.
    """
    if not _heads_differ(student.config, teacher_config):
        return
    try:
        teacher_model = meta_model(teacher_class, teacher_config)
    except MODEL_ERRORS:
        return
    teacher_modules, student_modules = _base_modules(teacher_model), _base_modules(student)
    parameters: dict[str, list[_Planned]] = {}
    for parameter in planned:
        path = parameter.canonical
        while "." in path:
            path = path.rpartition(".")[0]
            parameters.setdefault(path, []).append(parameter)
    for path, plans in parameters.items():
        settings = _head_settings(student_modules.get(path))
        if not settings or any(plan.source is None or plan.shape != plan.source_shape for plan in plans):
            continue
        sources = {_strip_suffix(plan.source or "", plan.canonical[len(path) :]) for plan in plans}
        for source in sources:
            if _parameter_shapes(teacher_modules.get(source)) != _parameter_shapes(student_modules.get(path)):
                continue  # fewer modules of a list with one for each head: heads are selected, not regrouped
            teacher_settings = _head_settings(teacher_modules.get(source))
            for name, value in settings.items():
                if value != teacher_settings.get(name, value):
                    raise ShapeError(
                        f"{path}.{name} must be the teacher's {teacher_settings[name]}, found {value}: its weights have the "
                        "teacher's shapes, and would be divided into other heads than they were trained with. Keep the number "
                        "of heads, or choose method='random'."
                    )


def _heads_differ(config: PreTrainedConfig, teacher: PreTrainedConfig) -> bool:
    for name, value in vars(config).items():
        teacher_value = teacher.__dict__.get(name)
        if isinstance(value, PreTrainedConfig) and isinstance(teacher_value, PreTrainedConfig):
            if _heads_differ(value, teacher_value):
                return True
        elif value != teacher_value and (_HEAD_SETTING.search(name) or "num_heads" in name):
            return True
    return False


def _base_modules(model: PreTrainedModel) -> Mapping[str, nn.Module]:
    """Return the modules of a model by name relative to its base model."""
    prefix = model.base_model_prefix + "."
    return {name.removeprefix(prefix): module for name, module in model.named_modules()}


def _head_settings(module: nn.Module | None) -> dict[str, int]:
    """Return the attributes of a module that are numbers or sizes of heads."""
    if module is None:
        return {}
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, int) and not isinstance(value, bool) and _HEAD_SETTING.search(name)
    }


def _parameter_shapes(module: nn.Module | None) -> dict[str, tuple[int, ...]]:
    return {} if module is None else {name: tuple(each.shape) for name, each in module.named_parameters()}


def _strip_suffix(name: str, end: str) -> str:
    return name.removesuffix(end) if name.endswith(end) else ""
