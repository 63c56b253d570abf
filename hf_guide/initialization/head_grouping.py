"""Attention heads that a student would cut the same weights into otherwise than its teacher does.

Four heads of 16 and two heads of 32 have projections of the same shape. No comparison of shapes tells them apart, and weights
that are copied from the one to the other compute something else.
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
    """Refuse modules whose parameters all have the shapes of the teacher's, but whose heads are others.

    Args:
        planned: Where each parameter of the student comes from.

    Raises:
        ShapeError: names the module, its setting and both values.
    """
    if not _heads_differ(student.config, teacher_config):
        return
    try:
        built = meta_model(teacher_class, teacher_config)
    except MODEL_ERRORS:
        return
    theirs, ours = _base_modules(built), _base_modules(student)
    parameters: dict[str, list[_Planned]] = {}
    for parameter in planned:
        path = parameter.canonical
        while "." in path:
            path = path.rpartition(".")[0]
            parameters.setdefault(path, []).append(parameter)
    for path, held in parameters.items():
        settings = _head_settings(ours.get(path))
        if not settings or any(site.source is None or site.shape != site.source_shape for site in held):
            continue
        sources = {_strip_suffix(site.source or "", site.canonical[len(path) :]) for site in held}
        for source in sources:
            if _parameter_shapes(theirs.get(source)) != _parameter_shapes(ours.get(path)):
                continue  # fewer modules of a list with one for each head: heads are selected, and not cut anew
            had = _head_settings(theirs.get(source))
            for name, value in settings.items():
                if value != had.get(name, value):
                    raise ShapeError(
                        f"{path}.{name} must be the teacher's {had[name]}, found {value}: its weights have the teacher's "
                        "shapes, and would be cut into other heads than they were trained as. Keep the number of heads, "
                        "or choose method='random'."
                    )


def _heads_differ(config: PreTrainedConfig, teacher: PreTrainedConfig) -> bool:
    for name, value in vars(config).items():
        had = teacher.__dict__.get(name)
        if isinstance(value, PreTrainedConfig) and isinstance(had, PreTrainedConfig):
            if _heads_differ(value, had):
                return True
        elif value != had and (_HEAD_SETTING.search(name) or "num_heads" in name):
            return True
    return False


def _base_modules(model: PreTrainedModel) -> Mapping[str, nn.Module]:
    """Return the modules of a model by their names relative to its base model, as a plan has them."""
    prefix = model.base_model_prefix + "."
    return {name.removeprefix(prefix): module for name, module in model.named_modules()}


def _head_settings(module: nn.Module | None) -> dict[str, int]:
    """Return the numbers and sizes of heads that a module holds as attributes of its own."""
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
