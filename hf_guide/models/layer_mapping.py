"""Which of the teacher's layers each of the student's is compared with."""

from collections.abc import Mapping, Sequence
from typing import Any

from hf_guide.errors import OptionError

_DECODER_DEPTHS = ("decoder_layers", "num_decoder_layers")


def depth_of_config(config: Any) -> int:
    """Return a model's number of blocks: of an encoder-decoder, the decoder's.

    Raises:
        OptionError: its config does not say.
    """
    text = config.get_text_config(decoder=True)
    # A text config made of an encoder-decoder's, as BART's, has the decoder's depth elsewhere, and the default by this name.
    for each, names in ((config, _DECODER_DEPTHS), (text, (*_DECODER_DEPTHS, "num_hidden_layers"))):
        for name in names:
            found = getattr(each, name, None)
            if isinstance(found, int):
                return found
    raise OptionError(
        f"{type(text).__name__} does not say how many blocks there are; leave the loss 'hidden_states' out."
    )


def width_of_config(config: Any) -> int:
    """Return the width of a model's hidden states.

    Raises:
        OptionError: its config does not say.
    """
    found = getattr(config.get_text_config(decoder=True), "hidden_size", None)
    if not isinstance(found, int):
        raise OptionError(
            f"{type(config).__name__} does not say how wide hidden states are; leave the loss 'hidden_states' out."
        )
    return found


def hidden_states_of(outputs: Any) -> tuple[Any, ...]:
    """Return a model's hidden states, the embeddings first: of an encoder-decoder, the decoder's."""
    found = outputs.get("decoder_hidden_states")
    return tuple(outputs["hidden_states"] if found is None else found)


def resolve_layer_mapping(
    student: Any, teacher_depths: Sequence[int], given: Mapping[int, int] | None
) -> dict[int, int]:
    """Return the teacher's layer for each of the student's, both by number of blocks passed, 0 being the embeddings.

    By default every block of the student is paired: with the block that it was made from, where `from_teacher` made it,
    otherwise with evenly spaced ones, the last with the last.

    Raises:
        OptionError: a layer that is not there, or teachers of several depths and no `layer_mapping`.
    """
    depth = depth_of_config(student.config)
    if given is not None:
        for mine, theirs in given.items():
            if not 0 <= mine <= depth or any(not 0 <= theirs <= each for each in teacher_depths):
                raise OptionError(
                    f"layer_mapping pairs layer {mine} of the student with {theirs} of the teacher; the student has layers 0 "
                    f"to {depth}, the teacher 0 to {min(teacher_depths)}."
                )
        if not given:
            raise OptionError("layer_mapping is empty; name at least one pair, or leave the loss 'hidden_states' out.")
        return dict(given)
    if len(set(teacher_depths)) > 1:
        raise OptionError(
            f"The teachers have {sorted(set(teacher_depths))} blocks; specify with layer_mapping what to compare."
        )
    teacher_depth = teacher_depths[0]
    report = getattr(student, "initialization_report", None)
    stacks = [blocks for blocks in report.blocks.values() if len(blocks) == depth] if report is not None else []
    if len(stacks) == 1 and max(stacks[0]) < teacher_depth:
        return {number + 1: int(block) + 1 for number, block in enumerate(stacks[0])}
    return {layer: round(layer * teacher_depth / depth) for layer in range(1, depth + 1)}
