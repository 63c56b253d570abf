"""`make_plan`: from two models' names and shapes alone, so that what cannot work is refused before any weight is read."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_guide.errors import LayoutError, OptionError, ShapeError
from hf_guide.initialization.blocks.config_fields import block_lists, iter_subconfigs, kv_sharing_sources, value_at
from hf_guide.initialization.blocks.stages import select_stage_blocks, stage_signatures
from hf_guide.initialization.config import LayerSelection, PlanOptions, SubsequentLayers
from hf_guide.initialization.head_grouping import check_head_grouping
from hf_guide.initialization.plan import AXIS_LABELS, ParameterPlan, Plan
from hf_guide.initialization.selection import evenly_spaced_indices, select_blocks
from hf_guide.layouts.grammar import Axis, AxisConcat, AxisName, AxisProduct, select_indices
from hf_guide.layouts.hierarchy import (
    check_immovable_blocks,
    is_blocks_only,
    lists_of_varying_length,
    nested_list_lengths,
    nested_lists,
)
from hf_guide.layouts.registry import Layout, LayoutMatch, config_sizes
from hf_guide.models.model_classes import meta_model, strip_base_prefix
from hf_guide.teachers.checkpoint import TeacherCheckpoint
from hf_guide.validation import did_you_mean


def merge_tied_axes(layout: Layout, names: Iterable[str]) -> Layout:
    """Return `layout` with two axes made one where the module that would tie them is not in the model."""
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


def unique_tensors(model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a model's saved tensors by name, each once, and the other names of those that are shared.

    A shared tensor bears the name of the one that the others are tied to, wherever in the model it is registered
    (XLM-RoBERTa registers its head before its embeddings).
    """
    by_tensor: dict[int, list[str]] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        by_tensor.setdefault(id(tensor), []).append(name)
    sources = set((getattr(model, "all_tied_weights_keys", None) or {}).values())
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    for names in by_tensor.values():
        first = next((name for name in names if name in sources), names[0])
        tensors[first] = state[first]
        shared |= {name: first for name in names if name != first}
    return tensors, shared


def _stack_pattern(match: LayoutMatch, placeholder: str) -> str:
    return match.row.pattern.partition("{" + placeholder + "}")[0] + "{" + placeholder + "}"


def parameters_by_block(layout: Layout, names: Iterable[str]) -> dict[str, dict[int, set[str]]]:
    """Return the kinds of parameters (row and suffix) that each block of each stack has, from canonical names."""
    found: dict[str, dict[int, set[str]]] = {}
    for name in names:
        match = layout.find(name)
        if match is not None and "block" in match.numbers:
            blocks = found.setdefault(_stack_pattern(match, "block"), {})
            blocks.setdefault(int(match.numbers["block"]), set()).add(match.row.pattern + match.suffix)
    return found


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
                    f"{position}: it has {surplus[0]!r}, for which the student's has no place: blocks of another kind. "
                    "Choose blocks of the same kinds with layer_selection=[...], or leave per-block lists to the teacher's config."
                )


def stack_sizes(layout: Layout, names: Iterable[str]) -> dict[str, int]:
    """Return how many blocks (or listed modules) stand in each stack, by the text before the placeholder."""
    sizes: dict[str, int] = {}
    for name in names:
        found = layout.find(name)
        if found is None:
            continue
        for placeholder, number in found.numbers.items():
            stack = _stack_pattern(found, placeholder)
            sizes[stack] = max(sizes.get(stack, 0), int(number) + 1)
    return sizes


def make_plan(
    student: PreTrainedModel,
    teacher: TeacherCheckpoint,
    layout: Layout,
    options: PlanOptions,
    *,
    vocab_indices: Tensor | None = None,
    label_indices: Tensor | None = None,
) -> Plan:
    """Return the plan of a transfer, having checked every shape.

    Raises:
        LayoutError: a parameter that the layout does not know, or whose axes do not multiply out.
        ShapeError: a student that is longer than its teacher on some axis.
    """
    tensors, shared = unique_tensors(student)
    if layout.variant is not None and layout.variant(student.config) != layout.family:
        raise ShapeError(
            f"The student is built as {layout.variant(student.config)!r}, its teacher as {layout.family!r}: "
            "their blocks are wired differently. Leave the config's switches for the order of norms and branches as "
            "the teacher has them."
        )
    student_names = {strip_base_prefix(name, student.base_model_prefix): name for name in tensors}
    if len(student_names) < len(tensors):
        raise LayoutError(
            f"{type(student).__name__} has two parameters of one name inside and outside its base model; no layout can tell."
        )
    shared_names = {
        strip_base_prefix(name, student.base_model_prefix): strip_base_prefix(first, student.base_model_prefix)
        for name, first in shared.items()
    }
    teacher_names = {strip_base_prefix(name, teacher.base_model_prefix): name for name in teacher.weights.keys()}
    for name, first in teacher.tied.items():
        if strip_base_prefix(name, teacher.base_model_prefix) not in teacher_names and first in teacher.weights.keys():
            teacher_names[strip_base_prefix(name, teacher.base_model_prefix)] = first
    teacher_layout, layout = (
        merge_tied_axes(layout, teacher_names),
        merge_tied_axes(layout, [*student_names, *shared_names]),
    )
    if teacher_layout.projected_axes() != layout.projected_axes():
        raise ShapeError(
            f"The teacher's projected axes are {teacher_layout.projected_axes()}, the student's {layout.projected_axes()}: one has a "
            "projection after its embedding table, the other has not. Keep the embedding size different from, or equal "
            "to, the hidden size as there."
        )

    had, wanted = stack_sizes(layout, teacher_names), stack_sizes(layout, student_names)
    check_stack_names(options, [*had, *stage_names(layout, teacher_names)])
    stacks = {
        stack: select_blocks(had[stack], count, options.layer_selection, stack.removesuffix(".{block}"))
        if stack.endswith("{block}")
        else _listed_module_indices(layout, teacher.config, student.config, stack, had[stack], count)
        for stack, count in wanted.items()
        if stack in had and (stack.endswith("{block}") or not is_blocks_only(layout))
    }
    stacks |= _stage_block_mapping(student, teacher, layout, options, teacher_names, student_names, stacks)
    stacks |= _per_block_list_mapping(teacher.config, student.config, stacks, had, wanted)
    sources = _shared_kv_sources(teacher.config, had)
    borrowed: dict[str, str] = {}
    check_immovable_blocks(layout, stacks)
    known_somewhere = {found.row.pattern + found.suffix for name in teacher_names if (found := layout.find(name))}
    check_block_kinds(layout, stacks, teacher_names, [*student_names, *shared_names])
    if layout.fixed_depth and (changed := [stack for stack, count in wanted.items() if count < had.get(stack, 0)]):
        raise ShapeError(
            f"The student has fewer blocks in {changed[0].removesuffix('.{block}')!r} than its teacher, but "
            f"{layout.fixed_depth}. Keep the teacher's depth, or choose method='random'."
        )
    sites: dict[str, ParameterPlan] = {}
    random: list[str] = []
    for name, actual in student_names.items():
        match = layout.find(name)
        if match is None:
            if name in teacher_names:
                raise LayoutError(
                    f"The layout of {layout.family!r} does not say what the axes of {actual!r}, shape "
                    f"{tuple(tensors[actual].shape)}, mean. Add a row for it: see hf_guide.register_layout."
                )
            random.append(actual)
            continue
        source, block = _source_name(match, stacks)
        if source not in teacher_names and (other := _shared_kv_source(match, stacks, sources)) in teacher_names:
            borrowed[source] = source = other or source
        before = teacher_layout.find(source)
        if AxisName("labels") in match.axes and before is not None and before.axes != match.axes:
            random.append(actual)  # a head of one name that reads something else there
            continue
        if source not in teacher_names:
            elsewhere = block is not None and match.row.pattern + match.suffix in known_somewhere
            if elsewhere and not match.is_bias:
                raise ShapeError(
                    f"{actual}: the teacher's block that feeds it has no {source!r}: blocks of another kind. "
                    "Choose blocks of the same kinds with layer_selection=[...], or leave per-block lists to the teacher's config."
                )
            if not (match.is_bias and (match.row.input_norms or elsewhere)):  # a bias that a block lacks is zero there
                random.append(actual)
                continue
        source_shape = teacher.weights.shape(teacher_names[source]) if source in teacher_names else None
        sites[name] = ParameterPlan(
            actual,
            name,
            tensors[actual].shape,
            match,
            source if source in teacher_names else None,
            source_shape,
            block,
        )

    widths = _projected_widths(layout, sites.values())
    random_blocks = options.subsequent_layers == SubsequentLayers.RANDOM
    for name, site in list(sites.items()):
        carries_labels = label_indices is not None and len(label_indices) == 0 and AxisName("labels") in site.axes
        if carries_labels or (random_blocks and site.block is not None and site.block > 0):
            random.append(site.name)
            del sites[name]
    used = {site.source for site in sites.values()} | set(student_names) | set(shared_names)
    lost = [  # a head of its own, for which a tied student has no tensor
        f"{teacher_names[name]} (the student's is tied to {first}; tie_word_embeddings=False keeps it)"
        for name, first in shared_names.items()
        if first in teacher_names and teacher_names.get(name, teacher_names[first]) != teacher_names[first]
    ]
    lost += [
        actual
        for name, actual in teacher_names.items()
        if name not in used
        and (found := layout.find(name))
        and "block" not in found.numbers
        and actual.startswith(teacher.base_model_prefix + ".")
    ]
    kinds = {
        found.row.pattern + found.suffix for name in [*student_names, *shared_names] if (found := layout.find(name))
    }
    feeding = {(stack, str(block)) for stack, blocks in stacks.items() for block in blocks}
    lost += dict.fromkeys(
        f"{found.row.pattern}{found.suffix} of every block"
        for name in teacher_names
        if (found := layout.find(name))
        and "block" in found.numbers
        and found.row.pattern + found.suffix not in kinds
        and (_stack_pattern(found, "block"), found.numbers["block"]) in feeding
    )
    plan = Plan(
        layout,
        options,
        teacher,
        student.config,
        sites,
        shared_names,
        teacher_names,
        stacks,
        widths,
        vocab_indices,
        label_indices,
        random,
        lost,
        depths=had,
        bounds={site.source for site in sites.values() if site.source and not is_parameter(tensors[site.name])},
    )
    plan.notes += [
        f"{teacher_names[used]} stands for {missing}: that block takes its keys and values from another, which is not "
        "kept, and the student's makes its own from its own input."
        for missing, used in borrowed.items()
    ]
    _merge_weights_of_dropped_states(plan)
    for site in sites.values():
        if site.source is not None:
            plan.maps(site)
    check_head_grouping(student, sites.values(), teacher.model_class, teacher.config)
    return plan


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


def is_parameter(tensor: Tensor) -> bool:
    """Whether a model's saved tensor is learned, and no buffer."""
    return isinstance(tensor, torch.nn.Parameter)


def stage_names(layout: Layout, names: Iterable[str]) -> list[str]:
    """Return the names of the lists of blocks within stages, in a model of whose axes nothing is known."""
    if not is_blocks_only(layout):
        return []
    depths = nested_list_lengths(match for name in names if (match := layout.find(name)))
    return [actual for by_stage in depths.values() for actual in by_stage]


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
    found = layout.find(_source_name(match, stacks)[0])
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


def _source_name(match: LayoutMatch, stacks: Mapping[str, list[int]]) -> tuple[str, int | None]:
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


def _merge_weights_of_dropped_states(plan: Plan) -> None:
    """Give weights that mix hidden states by a softmax those of the states that dropped blocks leave as they were."""
    for site in plan.parameters.values():
        stack = plan.block_table_stack(site)
        if stack is None or site.source is None or len(site.axes) != 1 or not isinstance(site.axes[0], AxisConcat):
            continue
        blocks = plan.stacks[stack]
        if not site.canonical.endswith("layer_weights") or sorted(set(blocks)) != blocks:
            plan.notes.append(f"{site.name}: its entries for blocks that are not kept have no place.")
            continue
        plan.turns[site.source] = functools.partial(merge_state_weights, blocks=blocks)


def merge_state_weights(weights: Tensor, blocks: Sequence[int]) -> Tensor:
    """Return softmax weights of hidden states, (depth + 1,), with each kept state's standing for those that equal it.

    The state after a dropped block is the one before it, so the weights of both add up: in the exponent, the logarithm of
    the sum of exponentials.
    """
    merged = weights.clone()
    kept = [0, *(block + 1 for block in blocks)]
    for start, stop in zip(kept, [*kept[1:], len(weights)], strict=True):
        merged[start] = weights[start:stop].logsumexp(0)
    return merged


def _shared_kv_sources(config: PreTrainedConfig, sizes: Mapping[str, int]) -> dict[str, dict[int, int]]:
    """Return, by stack, from which block the blocks without keys and values of their own take them."""
    found: dict[str, dict[int, int]] = {}
    for _, part in iter_subconfigs(config):
        sources = kv_sharing_sources(part)
        depth = part.__dict__.get(part.attribute_map.get("num_hidden_layers", "num_hidden_layers"))
        if sources:
            found |= {stack: sources for stack, size in sizes.items() if size == depth}
    return found


def _shared_kv_source(
    match: LayoutMatch, stacks: Mapping[str, list[int]], sources: Mapping[str, Mapping[int, int]]
) -> str | None:
    """Return what feeds a parameter of a block whose keys and values are another's in the teacher."""
    stack = match.row.pattern.partition("{block}")[0] + "{block}"
    if "block" not in match.numbers or stack not in sources or stack not in stacks:
        return None
    block = stacks[stack][int(match.numbers["block"])]
    other = sources[stack].get(block)
    return None if other is None else _source_name(match, {**stacks, stack: [other] * len(stacks[stack])})[0]


def _projected_widths(layout: Layout, sites: Iterable[ParameterPlan]) -> dict[str, tuple[int, int]]:
    """Return teacher's and student's width of every projected axis.

    Raises:
        ShapeError: a student that is wider than its teacher.
    """
    widths: dict[str, tuple[int, int]] = {}
    projected = layout.projected_axes()
    for site in sites:
        if site.source_shape is None or len(site.source_shape) != len(site.axes):
            continue
        for axis, had, wanted in zip(site.axes, site.source_shape, site.shape, strict=True):
            if isinstance(axis, AxisName) and axis.name in projected:
                if wanted > had:
                    raise ShapeError(
                        f"The student's {AXIS_LABELS.get(axis.name, axis.name)} is {wanted}, wider than its teacher's {had} "
                        f"(seen at {site.name}): a student starts inside its teacher, so choose at most {had}."
                    )
                if widths.setdefault(axis.name, (had, wanted)) != (had, wanted):
                    raise LayoutError(
                        f"{site.name} is {had} -> {wanted} along {axis.name!r}, elsewhere it is {widths[axis.name]}: "
                        f"the layout of {layout.family!r} calls two different axes by one name."
                    )
    return widths
