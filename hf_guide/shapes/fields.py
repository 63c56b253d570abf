"""Find the size fields of a teacher's config, and what each is the size of, through the layout of its family.

Each field is changed alone and the model built on the meta device: the axes of the layout that change are what it is the size
of. Fields of the same role (the depths of an encoder and a decoder) change in proportion.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from hf_guide.errors import HfGuideError, LayoutError
from hf_guide.initialization.blocks.mapping import stack_depths
from hf_guide.initialization.build import untie_like_teacher
from hf_guide.initialization.infer_layout import layout_for
from hf_guide.initialization.size_checks import is_size
from hf_guide.initialization.student_config import derive_student_config
from hf_guide.layouts.grammar import AxisName, axis_size, name_and_repeats
from hf_guide.layouts.hierarchy import is_blocks_only
from hf_guide.layouts.registry import Layout, config_sizes
from hf_guide.models.model_classes import meta_model, strip_base_prefix
from hf_guide.models.module_signature import ModuleSignature, module_signature
from hf_guide.models.tiny_models import MODEL_ERRORS
from hf_guide.teachers.checkpoint import TeacherCheckpoint
from hf_guide.validation import StringEnum


class SizeRole(StringEnum):
    """What a field of a config is the size of."""

    WIDTH = "width"
    DEPTH = "depth"
    HEADS = "heads"
    KEY_VALUE_HEADS = "key_value_heads"
    HEAD_SIZE = "head_size"
    MLP = "mlp"
    EXPERTS = "experts"


@dataclass(frozen=True)
class SizeField:
    """A field of the teacher's config that is the size of something, and the teacher's value."""

    name: str
    size: int
    role: SizeRole


@dataclass(frozen=True)
class SizeFields:
    """The size fields of a teacher's config.

    Attributes:
        fields: Those that a student may change.
        head_size: The size of a head of every student: the teacher's, or the user's; None where the layout has no heads.
        teacher_head_size: The teacher's.
        heads_follow_width: Whether the size of a head is the width divided by the number of heads, so that whole heads
            need a width of whole heads.
        kept: Overrides that state the teacher's own sizes which would follow another field's.
        stacks: By the prefix of a block's parameters, such as "layers.", the field of its depth.
    """

    fields: tuple[SizeField, ...]
    head_size: int | None
    teacher_head_size: int | None
    heads_follow_width: bool
    kept: Mapping[str, int]
    stacks: Mapping[str, str]

    def of(self, role: SizeRole) -> list[SizeField]:
        """Return the fields of a role."""
        return [each for each in self.fields if each.role is role]

    def follows(self, field: SizeField) -> bool:
        """Return whether a field is always equal to another of its role: a width that the teacher has twice."""
        main = self.main(SizeRole.WIDTH)
        return field.role is SizeRole.WIDTH and main is not None and field is not main and field.size == main.size

    def moved_by(self, field: SizeField) -> list[str]:
        """Return the name of a field, and those of the fields that follow it."""
        return [field.name, *(each.name for each in self.of(field.role) if each is not field and self.follows(each))]

    def main(self, role: SizeRole) -> SizeField | None:
        """Return the field of a role that the others follow: the largest; None where there is none."""
        return max(self.of(role), key=lambda each: each.size, default=None)


@dataclass
class ModelProbe:
    """Builds models of a teacher's family on the meta device, each config once.

    Attributes:
        base: The user's overrides that every student has.
    """

    teacher: TeacherCheckpoint
    model_class: type[PreTrainedModel]
    base: Mapping[str, Any] = field(default_factory=dict)
    _built: dict[str, "tuple[PreTrainedConfig, PreTrainedModel] | None"] = field(default_factory=dict)

    def build(self, overrides: Mapping[str, Any]) -> "tuple[PreTrainedConfig, PreTrainedModel] | None":
        """Return the config with overrides and its model; None where the family rejects them."""
        key = repr(sorted(overrides.items()))
        if key not in self._built:
            try:
                config = derive_student_config(self.teacher.config, {**self.base, **overrides})
                self._built[key] = config, build_on_meta(self.model_class, config, self.teacher)
            except (HfGuideError, *MODEL_ERRORS):
                self._built[key] = None
        return self._built[key]


def build_on_meta(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, teacher: TeacherCheckpoint
) -> PreTrainedModel:
    """Return a student on the meta device, its weights tied as those of the student that is initialized."""
    model = meta_model(model_class, config)
    model.tie_weights()
    with torch.device("meta"):
        untie_like_teacher(model, teacher)
    return model


def find_size_fields(probe: ModelProbe) -> SizeFields:
    """Return the size fields of a teacher.

    Raises:
        LayoutError: Shapes cannot be enumerated for this family; with the reason and what to do instead.
    """
    teacher = probe.teacher
    layout = layout_for(teacher.config, teacher.model_class)
    _check_enumerable(layout, teacher)
    depths = {path[0]: depth for path, depth in stack_depths(teacher, layout).items()}
    stacks = {stack.partition("{block}")[0]: name for name, depth in depths.items() for stack in depth.stacks}
    fields = [SizeField(name, depth.size, SizeRole.DEPTH) for name, depth in depths.items() if depth.stacks]
    built = probe.build({})
    if built is None:
        raise LayoutError(
            f"No {probe.model_class.__name__} of the teacher's own config can be built with {probe.base}."
        )
    sizes, signature = _axis_sizes(layout, *built), module_signature(built[1])
    for name, value in _candidate_fields(teacher.config, {each.name for each in fields}):
        found = _probe_role(probe, layout, name, value, sizes, signature)
        if found is not None:
            fields.append(found)
    fields = [each for each in fields if each.role is not SizeRole.HEAD_SIZE]
    head_size = config_sizes(layout, built[0]).get("head_dim")
    follows = _heads_follow_width(probe, layout, fields, head_size)
    stated = {each.name: each.size for each in fields if vars(teacher.config).get(each.name) is None}
    teacher_head_size = config_sizes(layout, teacher.config).get("head_dim")
    return SizeFields(tuple(fields), head_size, teacher_head_size, follows, stated, stacks)


def _check_enumerable(layout: Layout, teacher: TeacherCheckpoint) -> None:
    config = teacher.config
    nested = [
        name for name, value in vars(config).items() if isinstance(value, PreTrainedConfig) and _has_sizes(value)
    ]
    stages = [
        name for name in ("depths", "hidden_sizes", "embed_dims") if isinstance(vars(config).get(name), (list, tuple))
    ]
    if is_blocks_only(layout):
        reason = "has axes that are not known, so only its blocks can be chosen"
    elif nested:
        reason = f"is made of several models ({', '.join(nested)}), and shapes are enumerated for models of one config"
    elif stages:
        reason = (
            f"has stages of several widths ({', '.join(stages)}), and shapes are enumerated for stacks of one width"
        )
    else:
        return
    raise LayoutError(
        f"No shape can be searched for a budget: {config.model_type!r} {reason}. Leave out the budget, and pass the sizes "
        f"themselves{_depth_example(layout, teacher)}."
    )


def _depth_example(layout: Layout, teacher: TeacherCheckpoint) -> str:
    """Return half of a teacher's blocks as an argument, by the field that its config has; "" where none is known.

    A list with an entry per stage comes first: the numbers of a hierarchical config are computed from it.
    """
    per_stage = vars(teacher.config).get("depths")
    if isinstance(per_stage, (list, tuple)):
        return f", such as depths={[max(1, depth // 2) for depth in per_stage]}"
    depths = stack_depths(teacher, layout)
    if not depths:
        return ""
    standard = {"num_hidden_layers", teacher.config.attribute_map.get("num_hidden_layers")}
    # The most blocks of those: wav2vec 2.0 has convolutions too, which are no blocks to leave out.
    path, depth = max(depths.items(), key=lambda each: (each[0][-1] in standard, each[1].size))
    value: Any = max(1, depth.size // 2)
    for name in reversed(path[1:]):
        value = {name: value}
    return f", such as {path[0]}={value}"


def _has_sizes(config: PreTrainedConfig) -> bool:
    """Return whether a nested config states any size: MPT's `attn_config` has only what kind of attention it is."""
    return any(value is not None for _, value in _candidate_fields(config, set()))


def _candidate_fields(config: PreTrainedConfig, known: set[str]) -> Iterator[tuple[str, int | None]]:
    """Yield the config's own fields that may be the size of an axis; None is a size that follows another."""
    optional = {each.name for each in dataclasses.fields(config)}
    for name, value in vars(config).items():
        if name in known or not is_size(name) or isinstance(value, bool):
            continue
        if isinstance(value, int) and value > 0 or (value is None and name in optional):
            yield name, value


def _probe_role(
    probe: ModelProbe, layout: Layout, name: str, value: int | None, sizes: "_AxisSizes", signature: ModuleSignature
) -> SizeField | None:
    """Return what a field is the size of, by changing it; None where it changes no axis that a student may shorten."""
    for other in _other_values(value, sizes):
        built = probe.build({name: other})
        if built is None:
            continue
        try:
            changed = {key for key, size in _axis_sizes(layout, *built).items() if size != sizes.get(key)}
        except LayoutError:
            continue
        if not any(parameter for parameter, _ in changed) and module_signature(built[1]) == signature:
            continue  # only the config has it: of a Whisper classifier the number of the decoder's heads
        role = _role_of({axis for _, axis in changed}, layout)
        if role is None:
            return None
        if value is not None:
            return SizeField(name, value, role)
        axes = [sizes[key] for key in changed if key in sizes and _role_of({key[1]}, layout) is role]
        return SizeField(name, axes[0], role) if axes else None
    return None


def _other_values(value: int | None, sizes: "_AxisSizes") -> list[int]:
    if value is None:
        return sorted(
            {size // 2 for (_, axis), size in sizes.items() if axis.endswith(("mlp", "head_dim")) and size > 1}
        )
    divisors = [value // divisor for divisor in (2, 3, 5) if value % divisor == 0]
    return [*divisors, *([value - 1] if value > 1 and not divisors else []), 2 * value]


def _role_of(changed: set[str], layout: Layout) -> SizeRole | None:
    if changed & set(layout.projected_axes()):
        return SizeRole.WIDTH
    heads = {axis for axis in changed if axis.endswith("heads") or axis == "group"}
    if "kv_heads" in heads:
        return SizeRole.KEY_VALUE_HEADS if "heads" not in heads else SizeRole.HEADS
    if heads:
        return SizeRole.HEADS
    if any(axis.endswith("experts") for axis in changed):
        return SizeRole.EXPERTS
    if changed and all(axis.endswith("mlp") for axis in changed):
        return SizeRole.MLP
    if changed and all(axis.endswith(("q_dim", "k_dim", "head_dim")) for axis in changed):
        return SizeRole.HEAD_SIZE
    return None


_AxisSizes = dict[tuple[str, str], int]
"""The size of an axis, by the name of a parameter and of the axis. An axis that the config gives has the parameter ""."""


def _axis_sizes(layout: Layout, config: PreTrainedConfig, model: PreTrainedModel) -> _AxisSizes:
    """Return the size of every named axis of a model: from its config, or from each tensor that it is alone an axis of.

    By tensor, since an encoder and a decoder have MLPs of the same axis, and a field for each.
    """
    given = config_sizes(layout, config)
    sizes = {("", axis): size for axis, size in given.items()}
    for name, parameter in model.named_parameters():
        match = layout.find(strip_base_prefix(name, model.base_model_prefix))
        if match is None or len(match.axes) != parameter.ndim:
            continue
        for axis, size in zip(match.axes, parameter.shape, strict=True):
            inner, repeats = name_and_repeats(axis)
            if inner and not inner.isdigit() and inner not in given and (isinstance(axis, AxisName) or repeats > 1):
                sizes[name, inner] = size // repeats
    return sizes


def _heads_follow_width(probe: ModelProbe, layout: Layout, fields: list[SizeField], head_size: int | None) -> bool:
    """Return whether the size of a head is another at another width.

    Raises:
        LayoutError: The family has no field of its width.
    """
    widths = [each for each in fields if each.role is SizeRole.WIDTH]
    if not widths:
        raise LayoutError(
            f"No field of {type(probe.teacher.config).__name__} was found to be the width of {layout.family!r}, so its shapes "
            "cannot be enumerated for a budget. Pass the sizes themselves."
        )
    if head_size is None:
        return False
    width = max(widths, key=lambda each: each.size)
    for other in _other_values(width.size, {}):
        changed = {each.name: other for each in widths if each.size == width.size}
        built = probe.build(changed)
        if built is not None:
            return config_sizes(layout, built[0]).get("head_dim") != head_size
    return True


def axes_agree(layout: Layout, config: PreTrainedConfig, model: PreTrainedModel) -> bool:
    """Return whether a model's heads are as many, and as large, as its config states: some follow the width instead."""
    sizes = config_sizes(layout, config)
    for name, parameter in model.named_parameters():
        match = layout.find(strip_base_prefix(name, model.base_model_prefix))
        for axis, size in zip(match.axes, parameter.shape, strict=True) if match is not None else ():
            expected = axis_size(axis, sizes)
            if not isinstance(axis, AxisName) and expected is not None and expected != size:
                return False
    return True
