"""Copy a teacher's generation config to a student, with block and head indices mapped to the student's."""

import copy
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from hf_guide.errors import TeacherError
from hf_guide.models.pretrained import unreadable_as


def load_generation_config(teacher: Any, **hub_kwargs: Any) -> GenerationConfig | None:
    """Return a copy of a teacher's generation config; None if it has none of its own.

    Args:
        teacher: A model, a folder or a Hub id.
        **hub_kwargs: As in `from_pretrained`.

    Raises:
        TeacherError: The teacher's file cannot be read.
    """
    if isinstance(teacher, PreTrainedModel):
        return copy.deepcopy(getattr(teacher, "generation_config", None))
    name = os.fspath(teacher)
    with unreadable_as(TeacherError, f"{GENERATION_CONFIG_NAME} of {name} cannot be read"):
        path = cached_file(name, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
        return None if path is None else GenerationConfig.from_pretrained(name, **hub_kwargs)


def copy_generation_config(
    student: PreTrainedModel,
    teacher: Any,
    *,
    translate: Callable[[GenerationConfig], list[str]] | None = None,
    **hub_kwargs: Any,
) -> None:
    """Give a generative student its teacher's generation config, if the teacher has its own.

    Indices of blocks and heads follow the student's initialization report, whose notes gain what was dropped.

    Args:
        student: Changed in place; a model that cannot generate is left as it is.
        teacher: A model, a folder or a Hub id.
        translate: Replaces the token ids in place and returns notes, where the student has another vocabulary.
        **hub_kwargs: As in `from_pretrained`.

    Raises:
        TeacherError: The teacher's file cannot be read.
        VocabularyError: Token ids in a form that cannot be translated.
    """
    generation = load_generation_config(teacher, **hub_kwargs) if student.can_generate() else None
    if generation is None:
        return
    report = getattr(student, "initialization_report", None)
    notes = [] if translate is None else translate(generation)
    if report is not None:
        report.notes += [*notes, *remap_generation_config(generation, report.blocks, report.heads)]
    student.generation_config = generation


def remap_generation_config(
    generation: GenerationConfig, blocks: Mapping[str, list[int]], heads: Mapping[str, list[list[int]]]
) -> list[str]:
    """Map a generation config's indices of blocks and heads to a student's, in place; return notes on what was dropped.

    Whisper's `alignment_heads` are pairs of a decoder block and a head of its cross-attention;
    `assistant_early_exit` and `dola_layers` count the blocks before them.

    Args:
        generation: The teacher's.
        blocks: By stack, the teacher's block for each block of the student.
        heads: By attention module, the teacher's heads in each of the student's blocks, where it has fewer.
    """
    stacks = [stack for stack in blocks if "decoder" in stack] or [stack for stack in blocks if "encoder" not in stack]
    text_stacks = [stack for stack in stacks if "language" in stack or "text" in stack] or stacks
    if not text_stacks:
        if getattr(generation, "alignment_heads", None) is None:
            return []
        _drop_alignment_heads(generation)
        return [
            "generation_config.alignment_heads names heads of the teacher that the student does not have: dropped."
        ]
    stack = text_stacks[0]
    sources = blocks[stack]
    notes = []
    pairs = getattr(generation, "alignment_heads", None)
    if pairs is not None:
        kept = _remap_alignment_heads(pairs, stack, sources, heads)
        if kept:
            generation.alignment_heads = kept  # type: ignore[attr-defined]
        else:
            _drop_alignment_heads(generation)
        dropped = len(pairs) - len(kept)
        if dropped > 0:
            rest = (
                "none is left, so token timestamps are not available"
                if dropped == len(pairs)
                else "the others are kept"
            )
            notes.append(
                f"generation_config.alignment_heads names {dropped} heads that the student does not have: {rest}."
            )
    if isinstance(generation.assistant_early_exit, int):
        generation.assistant_early_exit = sum(block < generation.assistant_early_exit for block in sources) or None
    if isinstance(generation.dola_layers, list):
        generation.dola_layers = sorted({sum(block < layer for block in sources) for layer in generation.dola_layers})
    return notes


def _drop_alignment_heads(generation: GenerationConfig) -> None:
    """Delete the attribute: `generate` refuses token timestamps where there is none, and fails where it is None."""
    vars(generation).pop("alignment_heads")


def _remap_alignment_heads(
    pairs: list[list[int]], stack: str, sources: list[int], heads: Mapping[str, list[list[int]]]
) -> list[list[int]]:
    """Return the (block, head) pairs that the student still has, in its own indices."""
    selected = {module: per_block for module, per_block in heads.items() if module.startswith(stack + ".")}
    cross = [per_block for module, per_block in selected.items() if re.search("encoder_attn|cross|EncDec", module)]
    remapped = []
    for block, head in pairs:
        for index, source in enumerate(sources):
            kept_heads = cross[0][index] if cross else None
            if source == block and (kept_heads is None or head in kept_heads):
                remapped.append([index, head if kept_heads is None else kept_heads.index(head)])
    return remapped
