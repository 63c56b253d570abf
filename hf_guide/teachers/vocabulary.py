"""Give a teacher the vocabulary of a student that has some of its tokens, so that both read the same ids."""

import logging
from collections.abc import Mapping
from typing import Any

from hf_guide.models.adapters import without_adapter
from hf_guide.models.token_rows import attach_tokenizer, select_token_rows
from hf_guide.teachers.alignment import tokens_by_id
from hf_guide.teachers.loading import model_name, teacher_tokenizer

logger = logging.getLogger(__name__)


def kept_token_ids(student_tokenizer: Any, teacher_tokenizer: Any) -> list[int] | None:
    """Return the teacher's id of each of a student's tokens, where these are some of the teacher's in another numbering.

    None where they have the same numbers, where the student has a token that the teacher does not, or where a tokenizer is not
    known: `shared_vocabulary_size` then states what is shared.

    Args:
        student_tokenizer, teacher_tokenizer: Tokenizers or processors, or None.
    """
    student_tokens, teacher_tokens = tokens_by_id(student_tokenizer), tokens_by_id(teacher_tokenizer)
    if student_tokens is None or teacher_tokens is None or len(student_tokens) >= len(teacher_tokens):
        return None
    ids = {token: index for index, token in enumerate(teacher_tokens) if token is not None}
    if student_tokens == teacher_tokens[: len(student_tokens)] or not all(token in ids for token in student_tokens):
        return None
    return [ids[token] for token in student_tokens if token is not None]


def with_vocabulary_of(model: Any, processing_class: Any, init_kwargs: Mapping[str, Any] | None = None) -> Any:
    """Return a teacher with the rows of the tokens of a smaller vocabulary alone; the teacher itself where none is smaller.

    Its logits are those of the kept tokens, so its distribution is over them, and it reads their ids. The weights are shared
    with the teacher, which is not modified. A model that reads anything but tokens is returned as it is.

    Args:
        model: A loaded teacher.
        processing_class: The tokenizer or processor that makes the batches; None where it is not known.
        init_kwargs: Keywords of `from_pretrained` by which the teacher's tokenizer is found.

    Raises:
        ShapeError, VocabularyError: The teacher cannot be cut, as `select_token_rows`.
    """
    if getattr(without_adapter(model), "main_input_name", "input_ids") != "input_ids":
        return model
    kept_ids = kept_token_ids(processing_class, teacher_tokenizer(without_adapter(model), init_kwargs))
    if kept_ids is None:
        return model
    small = select_token_rows(model, kept_ids)
    attach_tokenizer(small, getattr(processing_class, "tokenizer", processing_class))
    logger.info(
        "The batches have %d of the tokens of the teacher %s: its rows of these are used.",
        len(kept_ids),
        model_name(model),
    )
    return small
