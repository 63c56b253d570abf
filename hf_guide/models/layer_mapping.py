"""Map each layer of the student to the layer of the teacher that it is compared with."""

from collections.abc import Mapping, Sequence
from typing import Any

from hf_guide.errors import OptionError

_DECODER_DEPTHS = ("decoder_layers", "num_decoder_layers")


def depth_of_config(config: Any) -> int:
    """Return a model's number of blocks, of an encoder-decoder the decoder's.

    Raises:
        OptionError: Its config does not state it.
    """
    text = config.get_text_config(decoder=True)
    # The text config of an encoder-decoder such as BART has the decoder's depth under another name, and a default by this one.
    for each, names in ((config, _DECODER_DEPTHS), (text, (*_DECODER_DEPTHS, "num_hidden_layers"))):
        for name in names:
            depth = getattr(each, name, None)
            if isinstance(depth, int):
                return depth
    raise OptionError(
        f"{type(text).__name__} does not state the number of blocks; leave the loss 'hidden_states' out."
    )


def width_of_config(config: Any) -> int:
    """Return the width of a model's hidden states.

    Raises:
        OptionError: Its config does not state it.
    """
    width = getattr(config.get_text_config(decoder=True), "hidden_size", None)
    if not isinstance(width, int):
        raise OptionError(
            f"{type(config).__name__} does not state the width of hidden states; leave the loss 'hidden_states' out."
        )
    return width


def hidden_states_of(outputs: Any) -> tuple[Any, ...]:
    """Return a model's hidden states, the input embeddings first; of an encoder-decoder the decoder's."""
    decoder = outputs.get("decoder_hidden_states")
    return tuple(outputs["hidden_states"] if decoder is None else decoder)


def resolve_layer_mapping(
    student: Any, teacher_depths: Sequence[int], mapping: Mapping[int, int] | None
) -> dict[int, int]:
    """Return the teacher's layer for each of the student's; layer N follows block N, and 0 is the input embeddings.

    Args:
        student: The student.
        teacher_depths: The number of blocks of each teacher.
        mapping: Student layer -> teacher layer. None maps every block of the student: to the block that it was initialised
            from, where `from_teacher` made it, otherwise to evenly spaced ones, the last to the last.

    Raises:
        OptionError: A layer does not exist, or teachers have different depths and `mapping` is None.
    """
    depth = depth_of_config(student.config)
    if mapping is not None:
        for student_layer, teacher_layer in mapping.items():
            if not 0 <= student_layer <= depth or any(not 0 <= teacher_layer <= each for each in teacher_depths):
                raise OptionError(
                    f"layer_mapping pairs layer {student_layer} of the student with {teacher_layer} of the teacher; "
                    f"the student has layers 0 to {depth}, the teacher 0 to {min(teacher_depths)}."
                )
        if not mapping:
            raise OptionError("layer_mapping is empty; name at least one pair, or leave the loss 'hidden_states' out.")
        return dict(mapping)
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
