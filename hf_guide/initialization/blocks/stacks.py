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
    """Refuse blocks that are named for a stack which the teacher does not have.

    Raises:
        OptionError: names the stacks that it has.
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
    """Refuse blocks with a parameter that the student has in other blocks, but not where the block is to stand.

    What the student has in no block does not count: a switch of its config, which the report names.

    Raises:
        ShapeError: names the stack, the block, its position and the first such parameter.
    """
    if is_blocks_only(layout):  # what stands in stages is chosen stage by stage, with kinds of its own
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
                    f"{position}: it has {surplus[0]!r}, which the student's block lacks: blocks of another kind. "
                    "Choose blocks of the same kinds with layer_selection=[...], or leave per-block lists to the teacher's config."
                )


def parameters_by_block(layout: Layout, names: Iterable[str]) -> dict[str, dict[int, set[str]]]:
    """Return the kinds of parameters (row and suffix) that each block of each stack has, from canonical names."""
    found: dict[str, dict[int, set[str]]] = {}
    for name in names:
        match = layout.find(name)
        if match is not None and "block" in match.numbers:
            blocks = found.setdefault(stack_pattern(match, "block"), {})
            blocks.setdefault(int(match.numbers["block"]), set()).add(match.row.pattern + match.suffix)
    return found


def stack_sizes(layout: Layout, names: Iterable[str]) -> dict[str, int]:
    """Return how many blocks (or listed modules) stand in each stack, by the text before the placeholder."""
    sizes: dict[str, int] = {}
    for name in names:
        found = layout.find(name)
        if found is None:
            continue
        for placeholder, number in found.numbers.items():
            stack = stack_pattern(found, placeholder)
            sizes[stack] = max(sizes.get(stack, 0), int(number) + 1)
    return sizes


def stack_pattern(match: LayoutMatch, placeholder: str) -> str:
    """Return the pattern of the modules of a stack, up to the number of the block."""
    return match.row.pattern.partition("{" + placeholder + "}")[0] + "{" + placeholder + "}"


def stage_names(layout: Layout, names: Iterable[str]) -> list[str]:
    """Return the names of the lists of blocks within stages, in a model of whose axes nothing is known."""
    if not is_blocks_only(layout):
        return []
    depths = nested_list_lengths(match for name in names if (match := layout.find(name)))
    return [actual for by_stage in depths.values() for actual in by_stage]


def source_name(match: LayoutMatch, stacks: Mapping[str, list[int]]) -> tuple[str, int | None]:
    """Return the canonical name of the teacher's parameter that feeds a match, and the student's block number."""
    pattern, block = match.row.pattern, None
    source = named = pattern
    for placeholder, number in match.numbers.items():
        mark = "{" + placeholder + "}"
        stack, own = (text.partition(mark)[0] + mark for text in (pattern, named))
        chosen = stacks.get(own, stacks.get(stack))
        fed = chosen[int(number)] if chosen is not None else int(number)
        source = source.replace(mark, str(fed))
        named = named.replace(mark, number)
        if placeholder == "block":
            block = int(number)
    return source + match.suffix, block


def shared_kv_sources(config: PreTrainedConfig, sizes: Mapping[str, int]) -> dict[str, dict[int, int]]:
    """Return, by stack, from which block the blocks without keys and values of their own take them."""
    found: dict[str, dict[int, int]] = {}
    for _, part in iter_subconfigs(config):
        sources = kv_sharing_sources(part)
        depth = part.__dict__.get(part.attribute_map.get("num_hidden_layers", "num_hidden_layers"))
        if sources:
            found |= {stack: sources for stack, size in sizes.items() if size == depth}
    return found


def shared_kv_source(
    match: LayoutMatch, stacks: Mapping[str, list[int]], sources: Mapping[str, Mapping[int, int]]
) -> str | None:
    """Return what feeds a parameter of a block whose keys and values are another's in the teacher."""
    stack = match.row.pattern.partition("{block}")[0] + "{block}"
    if "block" not in match.numbers or stack not in sources or stack not in stacks:
        return None
    block = stacks[stack][int(match.numbers["block"])]
    other = sources[stack].get(block)
    return None if other is None else source_name(match, {**stacks, stack: [other] * len(stacks[stack])})[0]


def _listed_module_indices(
    layout: Layout, teacher: PreTrainedConfig, student: PreTrainedConfig, stack: str, had: int, wanted: int
) -> list[int]:
    """Return the teacher's listed module that feeds each of the student's: `{heads}` go as query heads do."""
    sizes = config_sizes(layout, teacher), config_sizes(layout, student)
    if stack.endswith("{heads}") and all("group" in known for known in sizes):
        heads = AxisProduct((AxisName("kv_heads"), AxisName("group")))

        def leaf(name: str) -> tuple[Tensor, Tensor]:
            places = evenly_spaced_indices(sizes[0][name], sizes[1][name])
            return torch.tensor(places), torch.ones(len(places), dtype=torch.float64)

        return select_indices(heads, leaf, sizes[0])[0].tolist()
    return select_blocks(had, wanted, LayerSelection.UNIFORM.value, stack)


def _stage_block_mapping(
    student: PreTrainedModel,
    teacher: TeacherCheckpoint,
    layout: Layout,
    options: PlanOptions,
    teacher_names: Iterable[str],
    student_names: Iterable[str],
    stacks: Mapping[str, list[int]],
) -> dict[str, list[int]]:
    """Return the chosen blocks of every stage, by the stage's own name, where stages differ in their depths.

    Raises:
        ShapeError, OptionError: as `select_stage_blocks`.
    """
    if not is_blocks_only(layout):
        return {}
    depths = [
        nested_list_lengths(match for name in names if (match := layout.find(name)))
        for names in (teacher_names, student_names)
    ]
    chosen: dict[str, list[int]] = {}
    built = None
    for generic in sorted(lists_of_varying_length(*depths)):
        outer = {key: value for key, value in stacks.items() if key != generic}
        feeds = {actual: _source_list(layout, student_names, generic, actual, outer) for actual in depths[1][generic]}
        if (ordinals := _shared_adapter_entries(depths[0][generic], depths[1][generic], feeds)) is not None:
            chosen |= dict.fromkeys(feeds, ordinals)
            continue
        if len(depths[0][generic]) != len(depths[1][generic]):
            raise ShapeError(
                f"The student has {len(depths[1][generic])} stages {generic.partition('.{')[0]!r}, its teacher "
                f"{len(depths[0][generic])}: a stage may have fewer blocks, but none may be missing."
            )
        for actual, wanted in depths[1][generic].items():
            fed = feeds[actual]
            had = depths[0][generic].get(fed, 0)
            built = built or meta_model(teacher.model_class, teacher.config)
            name = actual.rpartition(".")[0]
            of_stage = (
                options.layer_selection.get(name)
                if isinstance(options.layer_selection, dict)
                else options.layer_selection
            )
            kept = LayerSelection.UNIFORM.value if of_stage is None else of_stage
            chosen[actual] = select_stage_blocks(
                name,
                stage_signatures(built, fed, had),
                stage_signatures(student, actual, wanted),
                lambda had, wanted, kept=kept, name=name: select_blocks(had, wanted, kept, name),  # type: ignore[misc]
                explicit=not isinstance(kept, str),
            )
    return chosen


def _source_list(
    layout: Layout, student_names: Iterable[str], generic: str, actual: str, stacks: Mapping[str, list[int]]
) -> str:
    """Return the name of the teacher's nested list that feeds one of the student's, its outer block being chosen."""
    match = next(
        found
        for name in student_names
        if (found := layout.find(name)) and (generic, actual) in [each[:2] for each in nested_lists(found)]
    )
    found = layout.find(source_name(match, stacks)[0])
    return next((each[1] for each in nested_lists(found) if each[0] == generic), actual) if found else actual


def _shared_adapter_entries(
    teacher: Mapping[str, int], student: Mapping[str, int], feeds: Mapping[str, str]
) -> list[int] | None:
    """Return the entries that are kept of lists with one entry for each block that has such a list; None of others.

    Zamba2's shared blocks hold an adapter for each place where they are used.
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
    had: Mapping[str, int],
    wanted: Mapping[str, int],
) -> dict[str, list[int]]:
    """Return, of lists of modules with one for each block that a field of the config lists, those that feed the student's.

    Such are Zamba 2's adapters: one for each of `hybrid_layer_ids`.
    """
    found: dict[str, list[int]] = {}
    for path, numbers in block_lists(teacher).items():
        of_student = value_at(student, path)
        for stack in had.keys() & wanted.keys():
            outer = stack.partition("{block}")[0] + "{block}"
            if stack.endswith("{block}") or outer not in stacks or not isinstance(of_student, (list, tuple)):
                continue
            fed = [stacks[outer][block] for block in of_student if block < len(stacks[outer])]
            counts = (len(numbers), len(of_student))
            if (had[stack], wanted[stack]) == counts and set(fed) <= set(numbers) and len(of_student) == len(fed):
                found[stack] = [list(numbers).index(block) for block in fed]
    return found
