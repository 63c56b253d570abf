"""Map each layer of the student to the layer of the teacher that it is compared with."""

from collections.abc import Mapping, Sequence
from typing import Any

from hf_guide.errors import OptionError, TaskError
from hf_guide.tasks import Task

_DECODER_DEPTHS = ("decoder_layers", "num_decoder_layers")


def depth_of_config(config: Any, task: Task | None = None) -> int:
    """Return a model's number of blocks, of an encoder-decoder the decoder's, of a detector the encoder's.

    Raises:
        OptionError: Its config does not state it.
    """
    encoder_depth = getattr(config, "encoder_layers", None)
    if _is_detector(task) and isinstance(encoder_depth, int):
        return encoder_depth
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


def hidden_states_of(outputs: Any, task: Task | None = None, config: Any = None) -> tuple[Any, ...]:
    """Return a model's hidden states, the input embeddings first; of an encoder-decoder the decoder's.

    Of a detector they are those of the image: its queries may be others than another model's.

    Args:
        outputs: The model's.
        task: What its head is for.
        config: The model's.

    Raises:
        TaskError: It returned none.
    """
    names = ("encoder_hidden_states",) if _is_detector(task) else ("decoder_hidden_states",)
    states = next((outputs[name] for name in (*names, "hidden_states") if outputs.get(name) is not None), None)
    if states is None:
        raise TaskError(
            f"A model for {task} that returns {sorted(outputs)} has no hidden states that could be compared. Leave the loss "
            "'hidden_states' out."
        )
    query_tokens = getattr(config, "num_detection_tokens", None) if _is_detector(task) else None
    return tuple(each[:, :-query_tokens] for each in states) if query_tokens else tuple(states)


def _is_detector(task: Task | None) -> bool:
    return task is not None and task.row.outputs[0].items == "query"


def resolve_layer_mapping(
    student: Any, teacher_depths: Sequence[int], mapping: Mapping[int, int] | None, task: Task | None = None
) -> dict[int, int]:
    """Return the teacher's layer for each of the student's; layer N follows block N, and 0 is the input embeddings.

    Args:
        student: The student.
        teacher_depths: The number of blocks of each teacher.
        mapping: Student layer -> teacher layer. None maps every block of the student: to the block that it was initialised
            from, where `from_teacher` made it, otherwise to evenly spaced ones, the last to the last.
        task: The student's.

    Raises:
        OptionError: A layer does not exist, or teachers have different depths and `mapping` is None.
    """
    depth = depth_of_config(student.config, task)
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
    stacks = {} if report is None else {stack: each for stack, each in report.blocks.items() if len(each) == depth}
    if report is not None and len(stacks) == 1:
        ((stack, blocks),) = stacks.items()
        for earlier in reversed([stage.blocks.get(stack) for stage in report.lineage]):
            if earlier is None or len(earlier) == teacher_depth:  # the teacher is the student of an earlier stage
                break
            blocks = [earlier[block] for block in blocks]
        if max(blocks) < teacher_depth:
            return {number + 1: int(block) + 1 for number, block in enumerate(blocks)}
    return {layer: round(layer * teacher_depth / depth) for layer in range(1, depth + 1)}
