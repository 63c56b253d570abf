"""The teacher's blocks that feed the student's, stack by stack, from the names of both models' parameters alone."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_guide.errors import OptionError, ShapeError
from hf_guide.initialization.blocks.config_fields import block_lists, iter_subconfigs, kv_sharing_sources, value_at
from hf_guide.initialization.blocks.stages import select_stage_blocks, stage_signatures
from hf_guide.initialization.config import LayerSelection, PlanOptions
from hf_guide.initialization.selection import evenly_spaced_indices, select_blocks
from hf_guide.layouts.grammar import AxisName, AxisProduct, select_indices
from hf_guide.layouts.hierarchy import (
    check_immovable_blocks,
    is_blocks_only,
    lists_of_varying_length,
    nested_list_lengths,
    nested_lists,
)
from hf_guide.layouts.registry import Layout, LayoutMatch, config_sizes
from hf_guide.models.model_classes import meta_model
from hf_guide.teachers.checkpoint import TeacherCheckpoint
from hf_guide.validation import did_you_mean


def map_stacks(
    student: PreTrainedModel,
    teacher: TeacherCheckpoint,
    layout: Layout,
    options: PlanOptions,
    teacher_names: Iterable[str],
    student_names: Iterable[str],
    tied_names: Iterable[str],
) -> tuple[dict[str, list[int]], dict[str, int]]:
    """Return the teacher's blocks that feed the student's, by stack, and how many blocks each of the teacher's stacks has.

    Args:
        teacher_names, student_names: Names relative to the base model.
        tied_names: Names of the student's parameters that are tied to one of `student_names`.

    Raises:
        ShapeError: No choice fits, or blocks of another kind would feed a block.
        OptionError: A stack is listed that the teacher does not have.
    """
    teacher_depths, student_depths = stack_sizes(layout, teacher_names), stack_sizes(layout, student_names)
    check_stack_names(options, [*teacher_depths, *stage_names(layout, teacher_names)])
    stacks = {
        stack: select_blocks(teacher_depths[stack], count, options.layer_selection, stack.removesuffix(".{block}"))
        if stack.endswith("{block}")
        else _listed_module_indices(layout, teacher.config, student.config, stack, teacher_depths[stack], count)
        for stack, count in student_depths.items()
        if stack in teacher_depths and (stack.endswith("{block}") or not is_blocks_only(layout))
    }
    stacks |= _stage_block_mapping(student, teacher, layout, options, teacher_names, student_names, stacks)
    stacks |= _per_block_list_mapping(teacher.config, student.config, stacks, teacher_depths, student_depths)
    check_immovable_blocks(layout, stacks)
    check_block_kinds(layout, stacks, teacher_names, [*student_names, *tied_names])
    shallower = [stack for stack, count in student_depths.items() if count < teacher_depths.get(stack, 0)]
    if layout.fixed_depth and shallower:
        raise ShapeError(
            f"The student has fewer blocks in {shallower[0].removesuffix('.{block}')!r} than its teacher, but "
            f"{layout.fixed_depth}. Keep the teacher's depth, or choose method='random'."
        )
    return stacks, teacher_depths


def check_stack_names(options: PlanOptions, stacks: Iterable[str]) -> None:
    """Check that the stacks whose blocks are listed are the teacher's.

    Raises:
        OptionError: an unknown stack; names those of the teacher.
    """
    known = [stack.rpartition(".")[0] for stack in stacks if stack.count("{") == 1]
    for name in options.layer_selection if isinstance(options.layer_selection, dict) else ():
        if name not in known:
            raise OptionError(
                f"layer_selection names the stack {name!r}, but this teacher's stacks are {known}.{did_you_mean(name, known)}"
            )


def check_block_kinds(
    layout: Layout, stacks: Mapping[str, Sequence[int]], teacher_names: Iterable[str], student_names: Iterable[str]
) -> None:
    """Check that no block has a parameter that the student has in other blocks, but not at the block's position.

    A parameter that the student has in no block is ignored: a switch of its config, which the report notes.

    Raises:
        ShapeError: names the stack, the block, its position and the first such parameter.
    """
    if is_blocks_only(layout):  # blocks in stages are selected by kind, stage by stage
        teacher_names, student_names = (
            [name for name in names if (match := layout.find(name)) and not nested_lists(match)]
            for names in (teacher_names, student_names)
        )
    teacher, student = parameters_by_block(layout, teacher_names), parameters_by_block(layout, student_names)
    for stack, positions in student.items():
        known = set().union(*positions.values())
        for position, block in enumerate(stacks.get(stack, ())):
            surplus = sorted((teacher[stack].get(block, set()) - positions.get(position, set())) & known)
            if surplus:
                raise ShapeError(
                    f"The teacher's block {block} of {stack.removesuffix('.{block}')!r} cannot feed the student's block "
                    f"{position}: it has {surplus[0]!r}, which the student's block lacks: they are of different kinds. "
                    "Select blocks of the same kinds with layer_selection=[...], or leave per-block lists as in the teacher's "
                    "config."
                )


def parameters_by_block(layout: Layout, names: Iterable[str]) -> dict[str, dict[int, set[str]]]:
    """Return the parameters (row and suffix) of each block of each stack.

    Args:
        names: relative to the base model.
    """
    parameters: dict[str, dict[int, set[str]]] = {}
    for name in names:
        match = layout.find(name)
        if match is not None and "block" in match.numbers:
            blocks = parameters.setdefault(stack_pattern(match, "block"), {})
            blocks.setdefault(int(match.numbers["block"]), set()).add(match.row.pattern + match.suffix)
    return parameters


def stack_sizes(layout: Layout, names: Iterable[str]) -> dict[str, int]:
    """Return the number of blocks (or listed modules) of each stack, by its pattern.

    Args:
        names: relative to the base model.
    """
    sizes: dict[str, int] = {}
    for name in names:
        match = layout.find(name)
        if match is None:
            continue
        for placeholder, number in match.numbers.items():
            stack = stack_pattern(match, placeholder)
            sizes[stack] = max(sizes.get(stack, 0), int(number) + 1)
    return sizes


def stack_pattern(match: LayoutMatch, placeholder: str) -> str:
    """Return the pattern of a stack: the row's up to and including the placeholder."""
    return match.row.pattern.partition("{" + placeholder + "}")[0] + "{" + placeholder + "}"


def stage_names(layout: Layout, names: Iterable[str]) -> list[str]:
    """Return the names of the lists of blocks within stages, where the layout is one of blocks alone."""
    if not is_blocks_only(layout):
        return []
    depths = nested_list_lengths(match for name in names if (match := layout.find(name)))
    return [actual for by_stage in depths.values() for actual in by_stage]


def source_name(match: LayoutMatch, stacks: Mapping[str, list[int]]) -> tuple[str, int | None]:
    """Return the name of the teacher's parameter that feeds a match, relative to the base model, and the student's block."""
    pattern, block = match.row.pattern, None
    source = filled = pattern
    for placeholder, number in match.numbers.items():
        placeholder_text = "{" + placeholder + "}"
        stack, filled_stack = (text.partition(placeholder_text)[0] + placeholder_text for text in (pattern, filled))
        selected = stacks.get(filled_stack, stacks.get(stack))
        teacher_index = selected[int(number)] if selected is not None else int(number)
        source = source.replace(placeholder_text, str(teacher_index))
        filled = filled.replace(placeholder_text, number)
        if placeholder == "block":
            block = int(number)
    return source + match.suffix, block


def shared_kv_sources(config: PreTrainedConfig, sizes: Mapping[str, int]) -> dict[str, dict[int, int]]:
    """Return, by stack, the block from which each block without its own keys and values takes them."""
    sources_by_stack: dict[str, dict[int, int]] = {}
    for _, part in iter_subconfigs(config):
        sources = kv_sharing_sources(part)
        depth = part.__dict__.get(part.attribute_map.get("num_hidden_layers", "num_hidden_layers"))
        if sources:
            sources_by_stack |= {stack: sources for stack, size in sizes.items() if size == depth}
    return sources_by_stack


def shared_kv_source(
    match: LayoutMatch, stacks: Mapping[str, list[int]], sources: Mapping[str, Mapping[int, int]]
) -> str | None:
    """Return the source of a parameter of a block that takes its keys and values from another block in the teacher."""
    stack = match.row.pattern.partition("{block}")[0] + "{block}"
    if "block" not in match.numbers or stack not in sources or stack not in stacks:
        return None
    block = stacks[stack][int(match.numbers["block"])]
    other = sources[stack].get(block)
    return None if other is None else source_name(match, {**stacks, stack: [other] * len(stacks[stack])})[0]


def _listed_module_indices(
    layout: Layout,
    teacher: PreTrainedConfig,
    student: PreTrainedConfig,
    stack: str,
    teacher_size: int,
    student_size: int,
) -> list[int]:
    """Return the teacher's module of a list that feeds each of the student's; `{heads}` are selected as query heads are."""
    sizes = config_sizes(layout, teacher), config_sizes(layout, student)
    if stack.endswith("{heads}") and all("group" in known for known in sizes):
        heads = AxisProduct((AxisName("kv_heads"), AxisName("group")))

        def selector(name: str) -> tuple[Tensor, Tensor]:
            indices = evenly_spaced_indices(sizes[0][name], sizes[1][name])
            return torch.tensor(indices), torch.ones(len(indices), dtype=torch.float64)

        return select_indices(heads, selector, sizes[0])[0].tolist()
    return select_blocks(teacher_size, student_size, LayerSelection.UNIFORM.value, stack)


def _stage_block_mapping(
    student: PreTrainedModel,
    teacher: TeacherCheckpoint,
    layout: Layout,
    options: PlanOptions,
    teacher_names: Iterable[str],
    student_names: Iterable[str],
    stacks: Mapping[str, list[int]],
) -> dict[str, list[int]]:
    """Return the selected blocks of every stage, by the stage's name, where stages differ in depth.

    Raises:
        ShapeError, OptionError: as `select_stage_blocks`.
    """
    if not is_blocks_only(layout):
        return {}
    depths = [
        nested_list_lengths(match for name in names if (match := layout.find(name)))
        for names in (teacher_names, student_names)
    ]
    selected: dict[str, list[int]] = {}
    teacher_model = None
    for generic in sorted(lists_of_varying_length(*depths)):
        outer = {key: value for key, value in stacks.items() if key != generic}
        feeds = {actual: _source_list(layout, student_names, generic, actual, outer) for actual in depths[1][generic]}
        if (ordinals := _shared_adapter_entries(depths[0][generic], depths[1][generic], feeds)) is not None:
            selected |= dict.fromkeys(feeds, ordinals)
            continue
        if len(depths[0][generic]) != len(depths[1][generic]):
            raise ShapeError(
                f"The student has {len(depths[1][generic])} stages {generic.partition('.{')[0]!r}, its teacher "
                f"{len(depths[0][generic])}: a stage may have fewer blocks, but none may be missing."
            )
        for actual, student_size in depths[1][generic].items():
            source = feeds[actual]
            teacher_size = depths[0][generic].get(source, 0)
            teacher_model = teacher_model or meta_model(teacher.model_class, teacher.config)
            name = actual.rpartition(".")[0]
            of_stage = (
                options.layer_selection.get(name)
                if isinstance(options.layer_selection, dict)
                else options.layer_selection
            )
            rule = LayerSelection.UNIFORM.value if of_stage is None else of_stage
            selected[actual] = select_stage_blocks(
                name,
                stage_signatures(teacher_model, source, teacher_size),
                stage_signatures(student, actual, student_size),
                lambda size, count, rule=rule, name=name: select_blocks(size, count, rule, name),  # type: ignore[misc]
                explicit=not isinstance(rule, str),
            )
    return selected


def _source_list(
    layout: Layout, student_names: Iterable[str], generic: str, actual: str, stacks: Mapping[str, list[int]]
) -> str:
    """Return the name of the teacher's nested list that feeds one of the student's, given the selected outer blocks."""
    match = next(
        candidate
        for name in student_names
        if (candidate := layout.find(name)) and (generic, actual) in [each[:2] for each in nested_lists(candidate)]
    )
    candidate = layout.find(source_name(match, stacks)[0])
    return next((each[1] for each in nested_lists(candidate) if each[0] == generic), actual) if candidate else actual


def _shared_adapter_entries(
    teacher: Mapping[str, int], student: Mapping[str, int], feeds: Mapping[str, str]
) -> list[int] | None:
    """Return the selected entries of lists with one entry for each block that has such a list; None for other lists.

    Zamba2's shared blocks hold an adapter for each block that uses them.
    """
    if len(teacher) == len(student) or not set(feeds.values()) <= teacher.keys():
        return None
    if set(teacher.values()) != {len(teacher)} or set(student.values()) != {len(student)}:
        return None
    order = sorted(teacher, key=_numbers)
    return [order.index(feeds[actual]) for actual in sorted(student, key=_numbers)]


def _numbers(name: str) -> list[int]:
    return [int(part) for part in name.split(".") if part.isdecimal()]


def _per_block_list_mapping(
    teacher: PreTrainedConfig,
    student: PreTrainedConfig,
    stacks: Mapping[str, list[int]],
    teacher_sizes: Mapping[str, int],
    student_sizes: Mapping[str, int],
) -> dict[str, list[int]]:
    """Return the selected entries of lists with one module for each block that a field of the config lists.

    Zamba2's adapters are such a list: one for each of `hybrid_layer_ids`.
    """
    mapping: dict[str, list[int]] = {}
    for path, numbers in block_lists(teacher).items():
        student_numbers = value_at(student, path)
        for stack in teacher_sizes.keys() & student_sizes.keys():
            outer = stack.partition("{block}")[0] + "{block}"
            if stack.endswith("{block}") or outer not in stacks or not isinstance(student_numbers, (list, tuple)):
                continue
            sources = [stacks[outer][block] for block in student_numbers if block < len(stacks[outer])]
            counts = (len(numbers), len(student_numbers))
            if (
                (teacher_sizes[stack], student_sizes[stack]) == counts
                and set(sources) <= set(numbers)
                and len(student_numbers) == len(sources)
            ):
                mapping[stack] = [list(numbers).index(block) for block in sources]
    return mapping
