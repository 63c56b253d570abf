"""Match a teacher's classes with the student's: tokens of two vocabularies, labels of two classifiers.

Does: compare tokenizers and configs, before the first step.
Does not: look at weights, or map one tokenizer's tokens onto another's.
"""

from typing import Any

from transformers import PreTrainedConfig

from hf_guide.errors import VocabularyError
from hf_guide.tasks import NON_CATEGORICAL_PROBLEM_TYPES
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
    student_tokens, teacher_tokens = _tokens_by_id(student_tokenizer), _tokens_by_id(teacher_tokenizer)
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


def align_labels(student_config: PreTrainedConfig, teacher_config: PreTrainedConfig) -> list[int] | None:
    """Return the teacher's class for each of the student's, so that `teacher_logits[:, order]` are the student's classes.

    Labels are aligned by name. If either model has default names (LABEL_0, ...), the order of both is taken as the same.

    Returns:
        The order, or None where it is the same already.

    Raises:
        VocabularyError: The numbers of labels, their names, or the problem types differ; both are named.
    """
    kinds = [getattr(config, "problem_type", None) for config in (student_config, teacher_config)]
    if (kinds[0] in NON_CATEGORICAL_PROBLEM_TYPES or kinds[1] in NON_CATEGORICAL_PROBLEM_TYPES) and kinds[0] != kinds[
        1
    ]:
        raise VocabularyError(
            f"The student's problem_type is {kinds[0]} and the teacher's {kinds[1]}: their logits do not mean the same. "
            "Distil from a teacher of the same problem_type."
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
    return [teacher.index(name) for name in student]


def _subclass_hint(student: PreTrainedConfig, classes: int) -> str:
    outputs = student.num_labels or 0
    if getattr(student, "num_subclasses", None) or outputs <= classes or outputs % classes:
        return ""
    return (
        f" If its outputs are {outputs // classes} subclasses of each class, its config must record it: make it by "
        f"from_teacher(num_subclasses={outputs // classes}), or set config.num_subclasses."
    )


def _tokens_by_id(tokenizer: Any | None) -> list[str | None] | None:
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
