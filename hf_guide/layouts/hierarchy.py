"""Blocks within stages: models whose blocks are numbered twice, `stages.{block}.layers.{item}`, with a depth for each stage.

Does: choose, stage by stage, which of the teacher's blocks feed a student's, among those of the same kind.
Does not: choose stages; a student has as many as its teacher.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from hf_guide.errors import LayoutError, OptionError, ShapeError
from hf_guide.layouts.grammar import axis_names
from hf_guide.layouts.registry import Layout, LayoutMatch
from hf_guide.models.module_signature import ModuleSignature, module_signature, stack_modules

SHARED_POSITION_BIAS = re.compile(r"(^|\.)rel(ative)?_\w*(bias|embed)\w*")
"""A table that the first block of a stack may hold for all, whichever of the teacher's blocks feeds it."""

ListLengths = dict[str, int]
"""By the name of each list of modules, with its own number filled in (`stages.2.layers.{item}`), its length."""


def is_blocks_only(layout: Layout) -> bool:
    """Whether a layout knows nothing of axes, so that every one must keep its length."""
    names = {name for row in layout.rows for axis in row.axes for name in axis_names(axis)}
    return all(name.startswith("fixed") or name == "blocks" for name in names)


def check_single_stage_width(layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a model whose stages have residual streams of their own, where a method needs one stream.

    Args:
        shapes: of the teacher's tensors, by their names relative to the base model.

    Raises:
        LayoutError: names the list of stages.
    """
    seen: dict[tuple[str, str], tuple[int, ...]] = {}
    for name, shape in shapes.items() if is_blocks_only(layout) else ():
        match = layout.find(name)
        if match is None or not nested_lists(match):
            continue
        if seen.setdefault((match.row.pattern, match.suffix), tuple(shape)) != tuple(shape):
            raise LayoutError(
                f"method='calibrated' follows one residual stream, but the stages {match.row.pattern.partition('.{')[0]!r} of "
                f"{layout.family!r} have streams of several widths. Choose method='guide', 'uniform' or 'random'."
            )


def check_immovable_blocks(layout: Layout, stacks: Mapping[str, Sequence[int]]) -> None:
    """Refuse that blocks change places where one parameter has other axes in other blocks, so that each has rows of its own.

    Raises:
        ShapeError: names the parameter.
    """
    if not is_blocks_only(layout):
        return
    for stack, chosen in stacks.items():
        prefix = stack.partition("{")[0]
        own: dict[str, list[int]] = {}
        for row in layout.rows:
            number, _, rest = row.pattern.removeprefix(prefix).partition(".")
            if row.pattern.startswith(prefix) and number.isdigit():
                own.setdefault(rest, []).append(int(number))
        for rest, blocks in own.items():
            if len(blocks) > 1 and list(chosen) != list(range(len(chosen))):
                raise ShapeError(
                    f"{prefix}{blocks[0]}.{rest} has another shape than in other blocks, so none can take another's place: "
                    "name the teacher's first blocks with layer_selection='first', or keep the depth."
                )


def nested_lists(match: LayoutMatch) -> list[tuple[str, str, int]]:
    """Return for each placeholder of a match after the first its list and number.

    The list is named twice: as the layout has it, and with this parameter's own numbers before it.
    """
    found: list[tuple[str, str, int]] = []
    named = match.row.pattern
    for placeholder, number in match.numbers.items():
        mark = "{" + placeholder + "}"
        generic, actual = (text.partition(mark)[0] + mark for text in (match.row.pattern, named))
        if generic != actual:
            found.append((generic, actual, int(number)))
        named = named.replace(mark, number)
    return found


def nested_list_lengths(matches: Iterable[LayoutMatch]) -> dict[str, ListLengths]:
    """Return by the layout's name of a nested list how many modules stand in it under each outer number."""
    depths: dict[str, ListLengths] = {}
    for match in matches:
        for generic, actual, number in nested_lists(match):
            known = depths.setdefault(generic, {})
            known[actual] = max(known.get(actual, 0), number + 1)
    return depths


def lists_of_varying_length(teacher: Mapping[str, ListLengths], student: Mapping[str, ListLengths]) -> set[str]:
    """Return the nested lists whose length depends on the outer number, in either model or between the two."""
    return {
        generic
        for generic in student
        if generic in teacher
        and (
            len(set(student[generic].values())) > 1 or set(student[generic].values()) != set(teacher[generic].values())
        )
    }


def module_signatures(model: PreTrainedModel, stack: str, depth: int) -> list[ModuleSignature | None]:
    """Return the signature of each module of a list, such as "stages.2.layers.{item}"; None for each that is not found."""
    modules = stack_modules(model, stack)[:depth]
    return [module_signature(module) for module in modules] if modules else [None] * depth


def match_by_signature(teacher: Sequence[Any], student: Sequence[Any], ideal: Sequence[int]) -> list[int] | None:
    """Return the increasing indices into `teacher` whose kinds are the student's, nearest to `ideal`, or None."""
    costs: list[dict[int, tuple[int, int | None]]] = []
    for number, kind in enumerate(student):
        row: dict[int, tuple[int, int | None]] = {}
        for index, had in enumerate(teacher):
            if had != kind:
                continue
            before = {p: c for p, (c, _) in costs[-1].items() if p < index} if number else {-1: 0}
            if before:
                best = min(before, key=lambda p: (before[p], p))  # noqa: B023
                row[index] = (before[best] + (index - ideal[number]) ** 2, best if number else None)
        costs.append(row)
    if not costs or not costs[-1]:
        return None
    last: int | None = min(costs[-1], key=lambda p: (costs[-1][p][0], p))
    chosen: list[int] = []
    for row in reversed(costs):
        assert last is not None
        chosen.append(last)
        last = row[last][1]
    return chosen[::-1]


def select_stage_blocks(
    stage: str,
    teacher_kinds: Sequence[Any],
    student_kinds: Sequence[Any],
    choose: Callable[[int, int], list[int]],
    *,
    explicit: bool,
) -> list[int]:
    """Return the teacher's block that feeds each block of one of the student's stages.

    Args:
        stage: the stage's list, for errors.
        choose: what chooses blocks by their numbers alone, given how many there are and how many are kept.
        explicit: whether that is the user's own list, which is then taken or refused, never adjusted.

    Raises:
        ShapeError: more blocks than the teacher's stage has, or no choice of blocks of the kinds that the student has.
        OptionError: the user's own list names blocks of other kinds.
    """
    had, wanted = len(teacher_kinds), len(student_kinds)
    ideal = choose(had, wanted)
    if explicit:
        wrong = [block for block, kind in zip(ideal, student_kinds, strict=True) if teacher_kinds[block] != kind]
        if wrong:
            raise OptionError(
                f"layer_selection names the teacher's blocks {wrong} in {stage!r}, where the student has blocks of another kind "
                f"(such as windows that are shifted in every other block). {_describe_signatures(teacher_kinds, student_kinds)}"
            )
        return ideal
    chosen = match_by_signature(teacher_kinds, student_kinds, ideal)
    if chosen is None:
        raise ShapeError(
            f"The student's {wanted} blocks in {stage!r} cannot be chosen among the teacher's {had}: no choice in their order "
            f"is of the same kinds. {_describe_signatures(teacher_kinds, student_kinds)} Choose another depth for this stage."
        )
    return chosen


def _describe_signatures(teacher: Sequence[Any], student: Sequence[Any]) -> str:
    known = list(dict.fromkeys([*teacher, *student]))
    letters = ["".join(chr(ord("A") + known.index(kind) % 26) for kind in kinds) for kinds in (teacher, student)]
    return f"By kind the teacher's are {letters[0]}, the student's {letters[1]}."
