"""Make the plan of a transfer from names and shapes alone: what cannot work is an error before a weight is read."""

import dataclasses
from collections.abc import Iterable, Mapping

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_guide.errors import LayoutError, ShapeError
from hf_guide.initialization.blocks.stacks import (
    map_stacks,
    shared_kv_source,
    shared_kv_sources,
    source_name,
    stack_pattern,
)
from hf_guide.initialization.blocks.tables import block_table_transform
from hf_guide.initialization.config import PlanOptions, SubsequentLayers
from hf_guide.initialization.head_grouping import check_head_grouping
from hf_guide.initialization.plan import AXIS_LABELS, ParameterPlan, Plan
from hf_guide.initialization.tensor_names import TensorNames, is_parameter
from hf_guide.layouts.grammar import Axis, AxisConcat, AxisName, AxisProduct, axis_names
from hf_guide.layouts.registry import Layout
from hf_guide.teachers.checkpoint import TeacherCheckpoint


def make_plan(
    student: PreTrainedModel,
    teacher: TeacherCheckpoint,
    layout: Layout,
    options: PlanOptions,
    *,
    vocab_indices: Tensor | None = None,
    label_indices: Tensor | None = None,
) -> Plan:
    """Return the plan of a transfer, from names and shapes alone: it raises on what cannot work before a weight is read.

    Args:
        student: A model whose parameters may be uninitialized.
        vocab_indices: Teacher row of each of the student's vocabulary rows, -1 for a row of zeros; None for all in order.
        label_indices: The same for a classification head; empty where the labels disagree and the head is new.

    Raises:
        LayoutError: A parameter that the layout does not know, or whose axes do not multiply out.
        ShapeError: A student that is larger than its teacher on some axis, or of other blocks.
    """
    names = TensorNames.of(student, teacher)
    teacher_layout, layout = _layouts_of_both(layout, student.config, names)
    stacks, depths = map_stacks(student, teacher, layout, options, names.teacher, names.student, names.tied)
    parameters, random, borrowed = _plan_parameters(names, teacher, teacher_layout, layout, stacks, depths)
    widths = _projected_widths(layout, parameters.values())
    random_blocks = options.subsequent_layers == SubsequentLayers.RANDOM
    new_head = label_indices is not None and len(label_indices) == 0
    other_class = label_indices is None and type(student) is not teacher.model_class
    for name, parameter in list(parameters.items()):
        is_head = any("labels" in axis_names(axis) for axis in parameter.axes)
        # A multiple choice model's head has one row, whatever its config's labels.
        rows = (parameter.source_shape or parameter.shape)[:1]  # a bias that the teacher lacks is not new, but zero
        is_new = is_head and (new_head or (other_class and tuple(parameter.shape[:1]) != tuple(rows)))
        if is_new or (random_blocks and parameter.block is not None and parameter.block > 0):
            random.append(parameter.name)
            del parameters[name]
    buffers = {
        each.source for each in parameters.values() if each.source and not is_parameter(names.tensors[each.name])
    }
    plan = Plan(
        layout,
        options,
        teacher,
        student.config,
        parameters,
        names.tied,
        names.teacher,
        stacks,
        widths,
        vocab_indices,
        label_indices,
        random,
        _dropped_parameters(names, teacher, layout, stacks, parameters),
        depths=depths,
        may_be_infinite=buffers,
    )
    plan.notes += [
        f"{names.teacher[used]} replaces {missing}: that block takes its keys and values from another block, which is not "
        "selected, and the student's computes its own from its own input."
        for missing, used in borrowed.items()
    ]
    _reduce_block_tables(plan)
    for parameter in parameters.values():
        if parameter.source is not None:
            plan.maps(parameter)
    check_head_grouping(student, parameters.values(), teacher.model_class, teacher.config)
    return plan


def _layouts_of_both(layout: Layout, config: PreTrainedConfig, names: TensorNames) -> tuple[Layout, Layout]:
    """Return the layout as the teacher has it and as the student has it.

    Raises:
        ShapeError: The student's config builds blocks that are wired differently.
    """
    if layout.variant is not None and layout.variant(config) != layout.family:
        raise ShapeError(
            f"The student is built as {layout.variant(config)!r}, its teacher as {layout.family!r}: "
            "their blocks are wired differently. Leave the config's switches for the order of norms and branches as "
            "the teacher has them."
        )
    of_teacher = merge_tied_axes(layout, names.teacher)
    of_student = merge_tied_axes(layout, [*names.student, *names.tied])
    if of_teacher.projected_axes() != of_student.projected_axes():
        raise ShapeError(
            f"The teacher's projected axes are {of_teacher.projected_axes()}, the student's "
            f"{of_student.projected_axes()}: one has a projection after its embedding table, the other has not. Keep the "
            "embedding size different from, or equal to, the hidden size as there."
        )
    return of_teacher, of_student


def _plan_parameters(
    names: TensorNames,
    teacher: TeacherCheckpoint,
    teacher_layout: Layout,
    layout: Layout,
    stacks: Mapping[str, list[int]],
    depths: Mapping[str, int],
) -> tuple[dict[str, ParameterPlan], list[str], dict[str, str]]:
    """Return the student's planned parameters, those that are initialized at random, and which source replaces another.

    Raises:
        LayoutError: A parameter that the layout does not know.
        ShapeError: A block of another kind would feed a parameter.
    """
    planned: dict[str, ParameterPlan] = {}
    random: list[str] = []
    borrowed: dict[str, str] = {}
    kv_sources = shared_kv_sources(teacher.config, depths)
    known = {match.row.pattern + match.suffix for name in names.teacher if (match := layout.find(name))}
    for name, own_name in names.student.items():
        shape, match = names.tensors[own_name].shape, layout.find(name)
        if match is None:
            if name in names.teacher:
                raise LayoutError(
                    f"The layout of {layout.family!r} does not state what the axes of {own_name!r}, shape {tuple(shape)}, "
                    "mean. Add a row for it: see hf_guide.register_layout."
                )
            random.append(own_name)
            continue
        source, block = source_name(match, stacks)
        if source not in names.teacher and (other := shared_kv_source(match, stacks, kv_sources)) in names.teacher:
            borrowed[source] = source = other or source
        before = teacher_layout.find(source)
        is_head = any("labels" in axis_names(axis) for axis in match.axes)
        if is_head and before is not None and before.axes != match.axes:
            random.append(own_name)  # a head of the same name that reads something else in the teacher
            continue
        if source not in names.teacher:
            elsewhere = block is not None and match.row.pattern + match.suffix in known
            if elsewhere and not match.is_bias:
                raise ShapeError(
                    f"{own_name}: the teacher's block that feeds it has no {source!r}: blocks of another kind. Choose blocks "
                    "of the same kinds with layer_selection=[...], or leave per-block lists to the teacher's config."
                )
            if not (match.is_bias and (match.row.input_norms or elsewhere)):  # a bias that a block lacks is zero there
                random.append(own_name)
                continue
        stored = names.teacher.get(source)
        planned[name] = ParameterPlan(
            own_name,
            name,
            shape,
            names.tensors[own_name].dtype,
            match,
            source if stored is not None else None,
            teacher.weights.shape(stored) if stored is not None else None,
            block,
        )
    return planned, random, borrowed


def _dropped_parameters(
    names: TensorNames,
    teacher: TeacherCheckpoint,
    layout: Layout,
    stacks: Mapping[str, list[int]],
    parameters: Mapping[str, ParameterPlan],
) -> list[str]:
    """Return the teacher's parameters that no parameter of the student comes from; of selected blocks, by kind."""
    used = {each.source for each in parameters.values()} | set(names.student) | set(names.tied)
    dropped = [  # a head of its own, for which a tied student has no tensor
        f"{names.teacher[name]} (the student's is tied to {first}; tie_word_embeddings=False keeps it)"
        for name, first in names.tied.items()
        if first in names.teacher and names.teacher.get(name, names.teacher[first]) != names.teacher[first]
    ]
    dropped += [
        own_name
        for name, own_name in names.teacher.items()
        if name not in used
        and (match := layout.find(name))
        and "block" not in match.numbers
        and own_name.startswith(teacher.base_model_prefix + ".")
    ]
    matches = [match for name in [*names.student, *names.tied] if (match := layout.find(name))]
    kinds = {match.row.pattern + match.suffix for match in matches}
    selected = {(stack, str(block)) for stack, blocks in stacks.items() for block in blocks}
    dropped += dict.fromkeys(
        f"{match.row.pattern}{match.suffix} of every block"
        for name in names.teacher
        if (match := layout.find(name))
        and "block" in match.numbers
        and match.row.pattern + match.suffix not in kinds
        and (stack_pattern(match, "block"), match.numbers["block"]) in selected
    )
    return dropped


def merge_tied_axes(layout: Layout, names: Iterable[str]) -> Layout:
    """Return `layout` with two axes merged where the module that would tie them is not in the model."""
    names = list(names)
    renamed = {
        axis: same for module, axis, same in layout.alike if not any(name.startswith(module + ".") for name in names)
    }
    if not renamed:
        return layout

    def rename(axis: Axis) -> Axis:
        if isinstance(axis, AxisName):
            return AxisName(renamed.get(axis.name, axis.name))
        if isinstance(axis, AxisProduct):
            return AxisProduct(tuple(map(rename, axis.factors)))
        return AxisConcat(tuple(map(rename, axis.terms)))

    return dataclasses.replace(
        layout, rows=tuple(dataclasses.replace(row, axes=tuple(map(rename, row.axes))) for row in layout.rows)
    )


def _reduce_block_tables(plan: Plan) -> None:
    """Have tensors with an entry per block reduced to the selected blocks when they are read; note what is dropped."""
    for parameter in plan.parameters.values():
        stack = plan.block_table_stack(parameter)
        if stack is None or parameter.source is None:
            continue
        transform, note = block_table_transform(
            parameter.canonical, parameter.axes, plan.block_mapping[stack], plan.depths[stack]
        )
        if transform is not None:
            plan.tensor_transforms[parameter.source] = transform
        if note:
            plan.notes.append(f"{parameter.name}: {note}.")


def _projected_widths(layout: Layout, parameters: Iterable[ParameterPlan]) -> dict[str, tuple[int, int]]:
    """Return teacher's and student's width of every projected axis.

    Raises:
        ShapeError: a student that is wider than its teacher.
    """
    widths: dict[str, tuple[int, int]] = {}
    projected = layout.projected_axes()
    for parameter in parameters:
        if parameter.source_shape is None or len(parameter.source_shape) != len(parameter.axes):
            continue
        for axis, teacher_size, student_size in zip(
            parameter.axes, parameter.source_shape, parameter.shape, strict=True
        ):
            if isinstance(axis, AxisName) and axis.name in projected:
                if student_size > teacher_size:
                    raise ShapeError(
                        f"The student's {AXIS_LABELS.get(axis.name, axis.name)} is {student_size}, wider than its "
                        f"teacher's {teacher_size} (at {parameter.name}): it must be at most {teacher_size}."
                    )
                if widths.setdefault(axis.name, (teacher_size, student_size)) != (teacher_size, student_size):
                    raise LayoutError(
                        f"{parameter.name} is {teacher_size} -> {student_size} along {axis.name!r}, elsewhere it is "
                        f"{widths[axis.name]}: the layout of {layout.family!r} calls two different axes by one name."
                    )
    return widths
