"""Select the teacher's blocks that feed a student's in models with a depth for each stage: those of the same kind."""

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedModel

from hf_guide.errors import OptionError, ShapeError
from hf_guide.initialization.blocks.selection import BlockRequirements, nearest_blocks
from hf_guide.models.module_signature import ModuleSignature, module_signature, stack_modules


def stage_signatures(model: PreTrainedModel, stage: str, depth: int) -> list[ModuleSignature | None]:
    """Return the signature of each block of a stage, such as "stages.2.layers.{item}"; None for each that is not found."""
    modules = stack_modules(model, stage)[:depth]
    return [module_signature(module) for module in modules] if modules else [None] * depth


def match_by_signature(teacher: Sequence[Any], student: Sequence[Any], ideal: Sequence[int]) -> list[int] | None:
    """Return the increasing indices into `teacher` whose signatures are the student's, nearest to `ideal`; None if none are.

    Example:
        >>> match_by_signature("ABABAB", "ABA", [0, 1, 5])
        [0, 1, 4]
    """

    def same_kind(position: int, block: int) -> bool:
        return bool(teacher[block] == student[position])

    return nearest_blocks(ideal, len(teacher), BlockRequirements(), same_kind)


def select_stage_blocks(
    stage: str,
    teacher_signatures: Sequence[Any],
    student_signatures: Sequence[Any],
    choose: Callable[[int, int], list[int]],
    *,
    explicit: bool,
) -> list[int]:
    """Return the teacher's block that feeds each block of one of the student's stages.

    Args:
        stage: the stage's list, for errors.
        choose: selects blocks by index alone, given the number of the teacher's blocks and of the student's.
        explicit: whether `choose` returns the user's own list, which is checked but never adjusted.

    Raises:
        ShapeError: more blocks than the teacher's stage has, or no selection of blocks of the student's kinds.
        OptionError: the user's own list names blocks of other kinds.
    """
    teacher_size, student_size = len(teacher_signatures), len(student_signatures)
    ideal = choose(teacher_size, student_size)
    kinds = _describe_signatures(teacher_signatures, student_signatures)
    if explicit:
        wrong = [
            block for block, kind in zip(ideal, student_signatures, strict=True) if teacher_signatures[block] != kind
        ]
        if wrong:
            raise OptionError(
                f"layer_selection names the teacher's blocks {wrong} in {stage!r}, where the student has blocks of another "
                f"kind (such as windows that are shifted in every other block). {kinds}"
            )
        return ideal
    selected = match_by_signature(teacher_signatures, student_signatures, ideal)
    if selected is None:
        raise ShapeError(
            f"The student's {student_size} blocks in {stage!r} cannot be selected from the teacher's {teacher_size}: no "
            f"selection in their order has the same kinds. {kinds} Choose another depth for this stage."
        )
    return selected


def _describe_signatures(teacher: Sequence[Any], student: Sequence[Any]) -> str:
    distinct = list(dict.fromkeys([*teacher, *student]))
    letters = ["".join(chr(ord("A") + distinct.index(kind) % 26) for kind in kinds) for kinds in (teacher, student)]
    return f"By kind the teacher's are {letters[0]}, the student's {letters[1]}."
