"""Layouts of models whose blocks are in stages: `stages.{block}.layers.{item}`, with a depth for each stage.

The teacher's blocks that feed a student's are selected stage by stage (`initialization.blocks.stages`). A student has as many
stages as its teacher.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from hf_guide.errors import LayoutError, ShapeError
from hf_guide.layouts.grammar import axis_names
from hf_guide.layouts.registry import Layout, LayoutMatch

SHARED_POSITION_BIAS = re.compile(r"(^|\.)rel(ative)?_\w*(bias|embed)\w*")
"""A table of relative positions that the first block of a stack may hold for all, whichever teacher block feeds it."""

ListLengths = dict[str, int]
"""The length of each list of modules by its name, outer indices filled in: `stages.2.layers.{item}`."""


def is_blocks_only(layout: Layout) -> bool:
    """Return whether a layout names no axis, so that every axis must keep its length."""
    names = {name for row in layout.rows for axis in row.axes for name in axis_names(axis)}
    return all(name.startswith("fixed") or name in ("blocks", "labels") for name in names)


def check_single_stage_width(layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that all stages share one residual stream, as a calibrated initialization needs.

    Args:
        shapes: of the teacher's tensors, by name relative to the base model.

    Raises:
        LayoutError: the stages have several widths; names their list.
    """
    first_shapes: dict[tuple[str, str], tuple[int, ...]] = {}
    for name, shape in shapes.items() if is_blocks_only(layout) else ():
        match = layout.find(name)
        if match is None or not nested_lists(match):
            continue
        if first_shapes.setdefault((match.row.pattern, match.suffix), tuple(shape)) != tuple(shape):
            raise LayoutError(
                f"method='calibrated' follows one residual stream, but the stages {match.row.pattern.partition('.{')[0]!r} of "
                f"{layout.family!r} have streams of several widths. Choose method='guide', 'uniform' or 'random'."
            )


def check_immovable_blocks(layout: Layout, stacks: Mapping[str, Sequence[int]]) -> None:
    """Check that blocks keep their indices where a parameter has another shape in other blocks.

    Raises:
        ShapeError: another block would feed such a parameter; names it.
    """
    if not is_blocks_only(layout):
        return
    for stack, selected in stacks.items():
        prefix = stack.partition("{")[0]
        blocks_by_parameter: dict[str, list[int]] = {}
        for row in layout.rows:
            number, _, rest = row.pattern.removeprefix(prefix).partition(".")
            if row.pattern.startswith(prefix) and number.isdigit():
                blocks_by_parameter.setdefault(rest, []).append(int(number))
        for rest, blocks in blocks_by_parameter.items():
            if len(blocks) > 1 and list(selected) != list(range(len(selected))):
                raise ShapeError(
                    f"{prefix}{blocks[0]}.{rest} has another shape than in other blocks, so no other block can feed it: "
                    "select the teacher's first blocks with layer_selection='first', or keep the depth."
                )


def nested_lists(match: LayoutMatch) -> list[tuple[str, str, int]]:
    """Return the list and the index for each placeholder of a match after the first.

    The list has two names: the layout's, and the one with this parameter's outer indices filled in.
    """
    lists: list[tuple[str, str, int]] = []
    filled = match.row.pattern
    for placeholder, number in match.numbers.items():
        mark = "{" + placeholder + "}"
        generic, actual = (text.partition(mark)[0] + mark for text in (match.row.pattern, filled))
        if generic != actual:
            lists.append((generic, actual, int(number)))
        filled = filled.replace(mark, number)
    return lists


def nested_list_lengths(matches: Iterable[LayoutMatch]) -> dict[str, ListLengths]:
    """Return the length of every nested list under each outer index, by the layout's name of the list."""
    lengths: dict[str, ListLengths] = {}
    for match in matches:
        for generic, actual, number in nested_lists(match):
            known = lengths.setdefault(generic, {})
            known[actual] = max(known.get(actual, 0), number + 1)
    return lengths


def lists_of_varying_length(teacher: Mapping[str, ListLengths], student: Mapping[str, ListLengths]) -> set[str]:
    """Return the nested lists whose length differs between outer indices, or between the two models."""
    return {
        generic
        for generic in student
        if generic in teacher
        and (
            len(set(student[generic].values())) > 1 or set(student[generic].values()) != set(teacher[generic].values())
        )
    }
