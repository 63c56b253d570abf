"""Match a teacher's classes with the student's: tokens of two vocabularies, labels of two classifiers, queries, patches.

Does: compare tokenizers and configs, before the first step.
Does not: look at weights, or map one tokenizer's tokens onto another's (`vocabulary.py` does, where one has some of the
other's).
"""

from typing import Any

from transformers import PreTrainedConfig

from hf_guide.errors import VocabularyError
from hf_guide.models.targets import num_queries
from hf_guide.tasks import OutputKind, Task, output_kind
from hf_guide.utils.labels import config_class_names


def shared_vocabulary_size(
    student_tokenizer: Any | None, teacher_tokenizer: Any | None, student_size: int, teacher_size: int
) -> int:
    """Return how many leading classes mean the same in two language models.

    - Equal sizes and the same tokens: all. Equal sizes are also accepted where a tokenizer is not known.
    - Different sizes and the same tokens, one vocabulary being padded (151936 and 152064 for 151665 tokens): the tokens.
    - A tokenizer may have special tokens after all those of the other (a padding token that was added): the classes
      before them.

    Args:
        student_tokenizer: The tokenizer, or its processor, that makes the data; None where it is not known.
        teacher_tokenizer: The teacher's own.
        student_size: The number of classes of the student's logits.
        teacher_size: The number of classes of the teacher's logits.

    Raises:
        VocabularyError: The vocabularies differ: both sizes and the first token that differs are named; or a tokenizer is
            missing.
    """
    student_tokens, teacher_tokens = tokens_by_id(student_tokenizer), tokens_by_id(teacher_tokenizer)
    sizes = f"The student's vocabulary has {student_size} classes and the teacher's {teacher_size}"
    if student_tokens is None or teacher_tokens is None:
        if student_size == teacher_size:
            return student_size
        whose = (
            "neither tokenizer is"
            if student_tokens is teacher_tokens
            else ("the student's tokenizer is not" if student_tokens is None else "the teacher's tokenizer is not")
        )
        raise VocabularyError(
            f"{sizes}, and {whose} known, so it is unknown which of them are shared. Pass `processing_class`, and a "
            "teacher whose folder has its tokenizer."
        )
    both = min(len(student_tokens), len(teacher_tokens), student_size, teacher_size)
    for token_id in range(both):
        if student_tokens[token_id] != teacher_tokens[token_id]:
            raise VocabularyError(
                f"{sizes}, and they do not mean the same: token {token_id} is {student_tokens[token_id]!r} to the student "
                f"and {teacher_tokens[token_id]!r} to the teacher. Distil from a teacher with the student's tokenizer."
            )
    for tokenizer, tokens, whose, other, size in (
        (student_tokenizer, student_tokens, "student", "teacher", student_size),
        (teacher_tokenizer, teacher_tokens, "teacher", "student", teacher_size),
    ):
        special = _special_ids(tokenizer)
        for token_id in range(both, min(len(tokens), size)):
            if tokens[token_id] is not None and token_id not in special:
                raise VocabularyError(
                    f"{sizes}, and token {token_id}, {tokens[token_id]!r} to the {whose}, is none of the {other}'s, which has "
                    f"{both} tokens. Distil from a teacher with the student's tokenizer."
                )
    if student_size == teacher_size and len(student_tokens) == len(teacher_tokens):
        return student_size
    return both


_LEARNED_QUERIES = (
    *("detr", "yolos", "table-transformer", "conditional_detr", "dab-detr", "deformable_detr"),
    *("maskformer", "mask2former", "oneformer", "eomt", "eomt_dinov3", "videomt"),
)
"""Types of models whose queries are parameters. Others select them among the encoder's proposals, by image."""

_MASKING_SETTINGS = ("image_size", "patch_size", "num_channels", "mask_ratio")


def incomparable_logits(task: Task, student_config: Any, teacher_config: Any) -> str | None:
    """Return why the logits of two models for a task cannot be compared item by item; None if they can.

    Labels and vocabularies are compared by `align_labels` and `shared_vocabulary_size`.
    """
    configs = (student_config, teacher_config)
    items = task.row.outputs[0].items
    if task.row.outputs[0].kind is OutputKind.FEATURES:
        return f"A model for {task} has no logits"
    if items == "query":
        counts = [num_queries(config) for config in configs]
        if None in counts or counts[0] != counts[1]:
            return f"The student has {counts[0]} queries and the teacher {counts[1]}"
        for config in configs:
            if config.model_type not in _LEARNED_QUERIES or getattr(config, "two_stage", False):
                return (
                    f"A {config.model_type} model selects its queries among the proposals for each image, so that those of "
                    "student and teacher are not of the same objects"
                )
    if items == "row" and output_kind(task, student_config) is not output_kind(task, teacher_config):
        kinds = [output_kind(task, config) for config in configs]
        return f"The student's similarities are {kinds[0]} (softmax or sigmoid) and the teacher's {kinds[1]}"
    if items == "patch":
        for name in _MASKING_SETTINGS:
            values = [getattr(config, name, None) for config in configs]
            if values[0] != values[1]:
                return f"The student's {name} is {values[0]} and the teacher's {values[1]}, so they reconstruct other patches"
    return None


def check_same_tokens(student: PreTrainedConfig, teacher: PreTrainedConfig, shared: int) -> None:
    """Check that two CTC heads have the same tokens, with the same one for "blank".

    Args:
        student, teacher: The models' configs.
        shared: How many leading tokens their vocabularies share, as from `shared_vocabulary_size`.

    Raises:
        VocabularyError: A model has further tokens, whose frames could not be compared, or another blank.
    """
    sizes, blanks = (student.vocab_size, teacher.vocab_size), (student.pad_token_id, teacher.pad_token_id)
    if sizes[0] != sizes[1] or shared != sizes[0]:
        raise VocabularyError(
            f"The student's CTC head has {sizes[0]} tokens and the teacher's {sizes[1]}, of which {shared} are shared: both "
            "must have the same. Distil from a teacher with the student's tokenizer."
        )
    if blanks[0] != blanks[1]:
        raise VocabularyError(
            f"The student's blank (pad_token_id) is {blanks[0]} and the teacher's {blanks[1]}: their frames do not mean the "
            "same. Distil from a teacher with the student's tokenizer."
        )


def align_labels(
    student_config: PreTrainedConfig, teacher_config: PreTrainedConfig, task: Task = Task.SEQUENCE_CLASSIFICATION
) -> list[int] | None:
    """Return the teacher's class for each of the student's, so that `teacher_logits[:, order]` are the student's classes.

    Labels are aligned by name. If either model has default names (LABEL_0, ...), the order of both is taken as the same. The
    class "no object" of detectors that have one is the last.

    Returns:
        The order, or None where it is the same already.

    Raises:
        VocabularyError: The numbers of labels, their names, or the kinds of the outputs differ; both are named.
    """
    kinds = [output_kind(task, config) for config in (student_config, teacher_config)]
    if kinds[0] is not kinds[1]:
        types = [
            f"{kind} (problem_type={getattr(config, 'problem_type', None)}, num_labels={config.num_labels})"
            for kind, config in zip(kinds, (student_config, teacher_config), strict=True)
        ]
        raise VocabularyError(
            f"The student's outputs are {types[0]} and the teacher's {types[1]}: their logits do not mean the same. "
            "Distil from a teacher of the same problem_type and number of labels."
        )
    student, teacher = config_class_names(student_config), config_class_names(teacher_config)
    if student == teacher:
        return None
    both = f"The student's labels are {_format_labels(student)} and the teacher's {_format_labels(teacher)}"
    if len(student) != len(teacher):
        raise VocabularyError(
            f"{both}: {len(student)} against {len(teacher)}. Distil from a teacher of the same labels."
            + _subclass_hint(student_config, len(teacher))
        )
    if _are_default_labels(student) or _are_default_labels(teacher):
        return None
    if set(student) != set(teacher) or len(set(student)) < len(student):
        raise VocabularyError(
            f"{both}. Labels are aligned by name: give both configs' id2label the same names, each once, in any order."
        )
    order = [teacher.index(name) for name in student]
    has_no_object = task.row.outputs[0].items == "query" and kinds[0] is OutputKind.CATEGORICAL
    return [*order, len(teacher)] if has_no_object else order


def _subclass_hint(student: PreTrainedConfig, classes: int) -> str:
    outputs = student.num_labels or 0
    if getattr(student, "num_subclasses", None) or outputs <= classes or outputs % classes:
        return ""
    return (
        f" If its outputs are {outputs // classes} subclasses of each class, its config must record it: make it by "
        f"from_teacher(num_subclasses={outputs // classes}), or set config.num_subclasses."
    )


def tokens_by_id(tokenizer: Any | None) -> list[str | None] | None:
    """Return the tokens by id, None at an unused id; None for a processor without a vocabulary."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if tokenizer is None or not hasattr(tokenizer, "get_vocab"):
        return None
    ids: dict[str, int] = tokenizer.get_vocab()
    tokens: list[str | None] = [None] * (max(ids.values(), default=-1) + 1)
    for token, token_id in ids.items():
        tokens[token_id] = token
    return tokens


def _special_ids(tokenizer: Any) -> set[int]:
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {token_id for token_id, token in added.items() if token.special} | set(tokenizer.all_special_ids)


def _are_default_labels(labels: list[str]) -> bool:
    return labels == [f"LABEL_{number}" for number in range(len(labels))]


def _format_labels(labels: list[str]) -> str:
    few = ", ".join(labels[:20])
    return f"[{few}, ... {len(labels) - 20} more]" if len(labels) > 20 else f"[{few}]"
