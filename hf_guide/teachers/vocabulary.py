"""Give a teacher the vocabulary of a student that has some of its tokens, so that both read the same ids."""

import copy
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedModel

from hf_guide.errors import VocabularyError
from hf_guide.models.adapters import has_adapter, without_adapter
from hf_guide.models.piece_ranking import replacements
from hf_guide.models.token_rows import attach_tokenizer, select_token_rows
from hf_guide.models.tokenizer_reduction import tokenizer_spec
from hf_guide.tasks import Task, task_of
from hf_guide.teachers.alignment import tokens_by_id
from hf_guide.teachers.loading import model_name, teacher_tokenizer
from hf_guide.teachers.retokenization import Retokenizer, attach_retokenizer

logger = logging.getLogger(__name__)


def kept_token_ids(student_tokenizer: Any, teacher_tokenizer: Any) -> list[int] | None:
    """Return the teacher's id of each of a student's tokens, where these are some of the teacher's in another numbering.

    None where they have the same numbers, where the student has a token that the teacher does not, or where a tokenizer is not
    known: `shared_vocabulary_size` then states what is shared.

    Args:
        student_tokenizer, teacher_tokenizer: Tokenizers or processors, or None.
    """
    student_tokens, teacher_tokens = tokens_by_id(student_tokenizer), tokens_by_id(teacher_tokenizer)
    if student_tokens is None or teacher_tokens is None or len(student_tokens) > len(teacher_tokens):
        return None
    ids = {token: index for index, token in enumerate(teacher_tokens) if token is not None}
    if student_tokens == teacher_tokens[: len(student_tokens)] or not all(token in ids for token in student_tokens):
        return None
    return [ids[token] for token in student_tokens if token is not None]


def with_vocabulary_of(model: Any, processing_class: Any, init_kwargs: Mapping[str, Any] | None = None) -> Any:
    """Return a teacher that reads the ids of a smaller vocabulary; the teacher itself where none is smaller.

    A causal language model reads its own tokens of the text, and its distribution is summed by the next piece
    (`retokenization.Retokenizer`). Of other models the rows of the kept tokens are used alone, so the distribution is over
    these. The weights are shared with the teacher, which is not modified. A model that reads anything but tokens is returned
    as it is.

    Args:
        model: A loaded teacher.
        processing_class: The tokenizer or processor that makes the batches; None where it is not known.
        init_kwargs: Keywords of `from_pretrained` by which the teacher's tokenizer is found.

    Raises:
        ShapeError, VocabularyError: The teacher cannot be cut, as `select_token_rows`, or its tokenizer is not a fast one.
    """
    if getattr(without_adapter(model), "main_input_name", "input_ids") != "input_ids":
        return model
    whole = teacher_tokenizer(without_adapter(model), init_kwargs)
    kept_ids = kept_token_ids(processing_class, whole)
    if kept_ids is None:
        return model
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if isinstance(model, PreTrainedModel) and task_of(model) is Task.CAUSAL_LM and not has_adapter(model):
        small = copy.copy(model)  # a module of its own with the same weights
        if _num_rows(model) <= max(kept_ids):
            raise VocabularyError(
                f"The teacher {model_name(model)} has {_num_rows(model)} tokens, and its tokenizer more: distil from a "
                "teacher with the tokenizer that it was made for."
            )
        spec = tokenizer_spec(getattr(whole, "tokenizer", whole))
        replaced = replacements(spec, kept_ids)
        attach_retokenizer(small, Retokenizer(kept_ids, replaced, _num_rows(model), _Encoder(spec)))
        what = "it reads its own tokens of the text, and its distribution over them is summed by the next piece"
    else:
        small = select_token_rows(model, kept_ids)
        what = "its rows of these are used"
    attach_tokenizer(small, tokenizer)
    logger.info("The batches have %d of the tokens of the teacher %s: %s.", len(kept_ids), model_name(model), what)
    return small


class _Encoder:
    """Encodes the text of some pieces with a tokenizer's model alone: within a word, and whatever the pieces mean."""

    def __init__(self, spec: Mapping[str, Any]):
        parts = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding")
        self._backend = Tokenizer.from_str(json.dumps({**spec, **dict.fromkeys(parts), "added_tokens": []}))

    def __call__(self, ids: Sequence[int]) -> list[int]:
        text = "".join(self._backend.id_to_token(index) or "" for index in ids)
        encoded: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return encoded


def _num_rows(model: PreTrainedModel) -> int:
    head: Any = model.get_output_embeddings()
    return int(head.weight.shape[0])
