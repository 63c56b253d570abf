"""Give a teacher the vocabulary of another tokenizer: what `from_teacher(tokenizer=...)` does.

Does: make rows for the tokenizer's tokens out of the teacher's, and translate the ids in its config.
Does not: choose pieces, or make a student: from here on student and teacher have the same vocabulary.
"""

import copy
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_guide.errors import OptionError, VocabularyError
from hf_guide.models.piece_mapping import PieceMapping, map_pieces
from hf_guide.models.pretrained import find_tokenizer, load_processing_class
from hf_guide.models.token_rows import check_one_vocabulary, is_token_field, translate_token_ids, vocabulary_axes
from hf_guide.teachers.checkpoint import TeacherCheckpoint
from hf_guide.teachers.tensor_source import OtherVocabularyTensors, TensorSource


@dataclass(frozen=True)
class OtherVocabulary:
    """The tokens of another tokenizer than the teacher's.

    Attributes:
        tokenizer: The tokenizer.
        mapping: Of which of the teacher's tokens each is made.
        facts: What the initialization report states: `size` and `teacher_size`, and how many tokens are `copied` from the
            teacher, `composed` of several of its tokens, and `fresh`.
    """

    tokenizer: PreTrainedTokenizerBase
    mapping: PieceMapping
    facts: dict[str, Any]

    @property
    def identity(self) -> str:
        """A hash of what each token is made of."""
        return hashlib.sha256(json.dumps(self.mapping.parts).encode()).hexdigest()

    def translate(self, config: Any) -> list[str]:
        """Replace the token ids in a config or generation config, in place; return notes on those without a counterpart.

        Raises:
            VocabularyError: The config holds ids in a form that is not translated.
        """
        notes = []
        for name, value in vars(config).items():
            ids = value if isinstance(value, (list, tuple)) else [value]
            missing = [
                each for each in ids if isinstance(each, int) and each >= 0 and each not in self.mapping.new_ids
            ]
            if is_token_field(name) and missing:
                kept = [each for each in ids if each not in missing]
                setattr(config, name, kept if isinstance(value, (list, tuple)) and kept else None)
                notes.append(f"{name} names tokens that the new tokenizer does not have: {missing} of the teacher's.")
        return [*notes, *translate_token_ids(config, self.mapping.new_ids)]


def change_tokenizer(
    teacher: TeacherCheckpoint, tokenizer: Any, overrides: Mapping[str, Any], *, hub: Mapping[str, Any]
) -> tuple[TeacherCheckpoint, OtherVocabulary]:
    """Return a teacher that reads and predicts another tokenizer's tokens, and that vocabulary.

    The row of a token that the teacher has is copied; that of another piece is the mean of the rows of the teacher's pieces
    that spell it (fast vocabulary transfer, arXiv 2402.09977); others, such as special tokens without a counterpart, get the
    mean of all rows.

    Args:
        teacher: The opened checkpoint.
        tokenizer: A fast tokenizer, or the name or folder of one.
        overrides: The student's.
        hub: Keywords of `from_pretrained` for tokenizers.

    Raises:
        OptionError: It is not a tokenizer, or the overrides state a vocabulary, too.
        ShapeError: The model has several vocabularies.
        VocabularyError: The teacher has no tokenizer, one of both is not a fast one, or ids cannot be translated.
    """
    named = sorted(name for name in overrides if name == "vocab_size" or is_token_field(name))
    if named:
        raise OptionError(f"{named[0]} and tokenizer are both given: the vocabulary is the tokenizer's. Leave it out.")
    if isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = load_processing_class(AutoTokenizer, os.fspath(tokenizer), **hub)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise OptionError(f"tokenizer must be a tokenizer, or the name or folder of one; found {tokenizer!r}.")
    check_one_vocabulary(teacher.config)
    own = own_tokenizer(teacher, **hub)
    if own is None:
        raise VocabularyError(
            f"The teacher {teacher.name} has no tokenizer, of whose pieces the rows of another could be made: pass a folder "
            "or Hub id that has one."
        )
    mapping = map_pieces(tokenizer, own)
    facts = {"size": len(mapping.parts), "teacher_size": len(own), **mapping.facts}
    vocabulary = OtherVocabulary(tokenizer, mapping, facts)
    config = copy.deepcopy(teacher.config)
    vocabulary.translate(config)
    config.vocab_size = len(mapping.parts)
    axes = vocabulary_axes(teacher.model_class, teacher.config)
    weights = _ComposedRows(teacher.weights, axes, mapping.parts)
    return dataclasses.replace(teacher, config=config, weights=weights, tokenizer=tokenizer, whole=teacher), vocabulary


def own_tokenizer(teacher: TeacherCheckpoint, **hub: Any) -> Any:
    """Return a teacher's tokenizer; None where it has none, as a model that was never saved.

    Args:
        teacher: The opened checkpoint.
        **hub: Keywords of `from_pretrained` for it.

    Raises:
        TeacherError: Its files cannot be read.
    """
    if teacher.tokenizer is not None:
        return teacher.tokenizer
    is_saved = teacher.name != teacher.model_class.__name__
    return find_tokenizer(teacher.name, revision=teacher.revision, **hub) if is_saved else None


class _ComposedRows(OtherVocabularyTensors):
    """A teacher's tensors, of which those with an entry for each token have means of entries instead."""

    def __init__(self, weights: TensorSource, axes: Mapping[str, int], parts: Sequence[Sequence[int]]):
        super().__init__(weights, axes, len(parts))
        self._parts = parts
        self._means: dict[str, Tensor] = {}

    def get(self, name: str) -> Tensor:
        if name not in self.axes:
            return self.weights.get(name)
        return self._compose(name, self.weights.get(name), self._parts)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if self.axes.get(name) == 0:
            return self._compose(name, self.weights.get(name), self._parts[start:stop])
        rows = self.weights.rows(name, start, stop)
        return self._compose(name, rows, self._parts) if name in self.axes else rows

    def _compose(self, name: str, tensor: Tensor, parts: Sequence[Sequence[int]]) -> Tensor:
        """Return for each token the mean of its parts' entries, computed in float32 or better; a single one is copied."""
        axis = self.axes[name]
        entries = tensor.movedim(axis, 0)
        first = torch.tensor([each[0] if each else 0 for each in parts], device=tensor.device)
        result = entries[first]
        several = [index for index, each in enumerate(parts) if len(each) > 1]
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        if several:
            ids = torch.tensor([*itertools.chain(*(parts[index] for index in several))], device=tensor.device)
            counts = torch.tensor([len(parts[index]) for index in several], device=tensor.device)
            owner = torch.arange(len(several), device=tensor.device).repeat_interleave(counts)
            sums = torch.zeros(len(several), *entries.shape[1:], dtype=dtype, device=tensor.device)
            sums.index_add_(0, owner, entries[ids].to(dtype))
            result[several] = (sums / counts.view(-1, *[1] * (sums.ndim - 1))).to(tensor.dtype)
        fresh = [index for index, each in enumerate(parts) if not each]
        if fresh:
            result[fresh] = self._mean(name, entries).to(result)
        return result.movedim(0, axis)

    def _mean(self, name: str, entries: Tensor) -> Tensor:
        """Return the mean of all entries; where the axis of tokens is the first it is computed once, for any rows."""
        mean = self._means.get(name)
        if mean is None:
            mean = entries.to(torch.promote_types(entries.dtype, torch.float32)).mean(0)
            if self.axes[name] == 0:
                self._means[name] = mean
        return mean
