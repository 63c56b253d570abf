"""Rules that select indices of an axis, or blocks of a stack."""

from collections.abc import Mapping, Sequence

import torch

from hf_guide.errors import OptionError, ShapeError
from hf_guide.initialization.config import LayerSelection


def evenly_spaced_indices(teacher: int, student: int) -> list[int]:
    """Return `student` evenly spaced indices below `teacher`: i * (t // s) if s divides t, else the rounded linspace.

    Weight selection (arXiv 2311.18823), section 3.

    Example:
        >>> evenly_spaced_indices(8, 4), evenly_spaced_indices(4, 3)
        ([0, 2, 4, 6], [0, 2, 3])
    """
    if teacher % student == 0:
        return [i * (teacher // student) for i in range(student)]
    return torch.linspace(0, teacher - 1, student, dtype=torch.float64).round().long().tolist()


def rope_pair_indices(
    teacher: int, student: int, teacher_rotary: int, student_rotary: int, style: str | None
) -> list[int]:
    """Return indices within a head that keep rotary pairs together.

    Pairs are chosen evenly among the rotated dimensions, the rest evenly among the others. Where the student's rotated
    size divides the teacher's, the student's own frequencies are the teacher's at those pairs.
    """
    if style is None:
        return evenly_spaced_indices(teacher, student)
    if teacher_rotary % 2 or student_rotary % 2:
        raise ShapeError(
            f"Rotary dimensions come in pairs; found {teacher_rotary} in the teacher's heads and {student_rotary} in "
            "the student's. Choose an even head_dim."
        )
    if student_rotary > teacher_rotary or student - student_rotary > teacher - teacher_rotary:
        raise ShapeError(
            f"The student's heads rotate {student_rotary} of {student} dimensions, the teacher's {teacher_rotary} of "
            f"{teacher}: choose a head_dim and a rotary size that fit into the teacher's."
        )
    pairs = evenly_spaced_indices(teacher_rotary // 2, student_rotary // 2) if student_rotary else []
    if style == "half":
        rotated = pairs + [pair + teacher_rotary // 2 for pair in pairs]
    else:
        rotated = [index for pair in pairs for index in (2 * pair, 2 * pair + 1)]
    passed = (
        evenly_spaced_indices(teacher - teacher_rotary, student - student_rotary) if student > student_rotary else []
    )
    return rotated + [teacher_rotary + index for index in passed]


def alibi_head_indices(teacher: int, student: int) -> list[int]:
    """Return the heads whose ALiBi slopes are the student's own where s divides t: the last of each run of t // s."""
    if teacher % student == 0:
        return [(i + 1) * (teacher // student) - 1 for i in range(student)]
    return evenly_spaced_indices(teacher, student)


def first_and_last_indices(teacher: int, student: int) -> list[int]:
    """Return the first and last indices below `teacher`, `student` in total, leaving out the middle.

    Weight subcloning (arXiv 2312.09299), section 3.2: the blocks at both ends change the residual stream most.
    """
    first = (student + 1) // 2
    return [*range(first), *range(teacher - student + first, teacher)]


def select_blocks(
    teacher: int, student: int, layers: "str | Sequence[int] | Mapping[str, Sequence[int]]", stack: str = ""
) -> list[int]:
    """Return the teacher's block that feeds each of the student's blocks of one stack.

    Raises:
        ShapeError: more blocks than the teacher has.
        OptionError: an explicit list of another length, or with a block that the teacher does not have.
    """
    of_stack = f" in {stack!r}" if stack else ""
    if isinstance(layers, Mapping):
        layers = layers.get(stack, LayerSelection.UNIFORM.value)
    if not isinstance(layers, str):
        chosen = list(layers)
        outside = [block for block in chosen if not 0 <= block < teacher]
        if outside:
            raise OptionError(
                f"layer_selection names the teacher blocks {outside}{of_stack}, but the teacher has only 0 to {teacher - 1}."
            )
        if len(chosen) != student:
            raise OptionError(
                f"layer_selection names {len(chosen)} teacher blocks, but the student has {student}{of_stack}: name one for "
                "each of the student's blocks, with a mapping from stack to list where there are several stacks."
            )
        return chosen
    if student > teacher:
        raise ShapeError(
            f"The student has {student} blocks{of_stack}, its teacher {teacher}: choose at most {teacher}, or set "
            "with layer_selection=[...] which of the teacher's blocks feeds each."
        )
    # What activations decide becomes a list once they are collected; until then the shape is checked with even blocks.
    if layers == LayerSelection.FIRST.value:
        return list(range(student))
    return (
        first_and_last_indices(teacher, student)
        if layers == LayerSelection.FIRST_LAST.value
        else evenly_spaced_indices(teacher, student)
    )
