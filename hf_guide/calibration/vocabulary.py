"""Choose a smaller vocabulary by a text, and cut a teacher to it: what `from_teacher(vocab_size=...)` does.

Does: count the pieces that a text uses, keep the most useful, and measure on held-out texts what the smaller vocabulary costs;
and decide between this, another tokenizer, and the teacher's own vocabulary (`change_vocabulary`).
Does not: make a student. From here on student and teacher have the same vocabulary, so every method works as without a cut.
"""

import copy
import dataclasses
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from hf_guide.calibration.data import iter_texts
from hf_guide.errors import OptionError, VocabularyError
from hf_guide.initialization.generation_config import load_generation_config
from hf_guide.initialization.tokenizer_change import OtherVocabulary, change_tokenizer, own_tokenizer
from hf_guide.models.piece_ranking import PieceRanking, rank_pieces
from hf_guide.models.token_rows import (
    check_one_vocabulary,
    config_token_ids,
    is_token_field,
    reduced_config,
    translate_token_ids,
    vocabulary_axes,
)
from hf_guide.models.tokenizer_reduction import reduce_spec, reduce_tokenizer, tokenizer_spec
from hf_guide.teachers.checkpoint import TeacherCheckpoint
from hf_guide.teachers.tensor_source import OtherVocabularyTensors, TensorSource

HELD_OUT_EVERY = 10
"""Every tenth text is left out of the counts by which the reported share of tokens is measured."""
_BATCH = 256


@dataclass(frozen=True)
class ReducedVocabulary:
    """Some of the pieces of a teacher's tokenizer.

    Attributes:
        tokenizer: The tokenizer of these pieces, of the teacher's tokenizer's class.
        kept_ids: Of each of its ids, the teacher's; ascending.
        facts: What the initialization report states: `size` and `teacher_size`; `share_kept`, the share of the text's tokens
            (the teacher's) that are kept; `token_ratio`, how many tokens the text takes, per token of the teacher's; and
            `held_out`, whether both are of texts that the pieces were not chosen by.
    """

    tokenizer: PreTrainedTokenizerBase
    kept_ids: list[int]
    facts: dict[str, Any]

    @property
    def new_ids(self) -> dict[int, int]:
        """The id of each kept token, by the teacher's id."""
        return {old: new for new, old in enumerate(self.kept_ids)}

    def translate(self, config: Any) -> list[str]:
        """Replace the token ids in a config or generation config, in place; see `translate_token_ids`."""
        return translate_token_ids(config, self.new_ids)

    @property
    def identity(self) -> str:
        """A hash of the kept ids."""
        return hashlib.sha256(json.dumps(self.kept_ids).encode()).hexdigest()


class VocabularyReducer:
    """The pieces of a tokenizer, counted once on a text, from which vocabularies of any size are made.

    Each size keeps a subset of what a larger one keeps, so a search over sizes counts once.

    Args:
        tokenizer: A fast tokenizer with a BPE, Unigram or WordPiece model.
        texts: All of them are counted.
        required: Ids to keep besides special and added tokens, such as those that a model's config names.

    Raises:
        VocabularyError: A tokenizer of another kind.
        OptionError: There is no text.

    Example:
        >>> from tokenizers import ByteLevelBPETokenizer
        >>> from transformers import PreTrainedTokenizerFast
        >>> trained = ByteLevelBPETokenizer()
        >>> trained.train_from_iterator(["the cat sat on the mat"] * 9, show_progress=False)
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer)
        >>> reducer = VocabularyReducer(tokenizer, ["the cat", "the mat"])
        >>> smaller = reducer.reduce(reducer.min_size + 3).tokenizer
        >>> smaller.tokenize("the cat"), smaller.decode(smaller("any text é")["input_ids"])
        (['the', 'Ġ', 'c', 'at'], 'any text é')
    """

    def __init__(self, tokenizer: Any, texts: Iterable[str], required: Collection[int] = ()):
        self.tokenizer, self._required = tokenizer, required
        self._spec = tokenizer_spec(tokenizer)
        self._counts, self._held_out_counts = Counter[int](), Counter[int]()
        seen: list[str] = []  # until there is a held-out text
        held_out: list[str] = []
        for index, (text, ids) in enumerate(_encode(_backend(self._spec), texts)):
            self._counts.update(ids)
            if index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1:
                held_out.append(text)
                self._held_out_counts.update(ids)
            elif index < HELD_OUT_EVERY:
                seen.append(text)
        self._measured = held_out or seen
        if not self._counts:
            raise OptionError("The text that chooses the vocabulary holds not one token: pass texts.")

    @functools.cached_property
    def ranking(self) -> PieceRanking:
        """The order in which pieces are removed, by all texts."""
        return rank_pieces(self._spec, self._counts, self._required)

    @functools.cached_property
    def _counted_ranking(self) -> PieceRanking:
        return rank_pieces(self._spec, self._counts - self._held_out_counts, self._required)

    @property
    def min_size(self) -> int:
        """The size of the smallest vocabulary that encodes every text that the tokenizer encodes."""
        return len(self.ranking.required)

    @property
    def max_size(self) -> int:
        """The number of the tokenizer's pieces."""
        return len(self.ranking.required) + len(self.ranking.removal_order)

    def reduce(self, size: int) -> ReducedVocabulary:
        """Return the vocabulary of a size, with its tokenizer and what it costs.

        Raises:
            VocabularyError: A size outside of `min_size` to `max_size`.
        """
        kept_ids = self.ranking.kept_ids(size)
        return ReducedVocabulary(reduce_tokenizer(self.tokenizer, kept_ids), kept_ids, self.measure(size))

    def measure(self, size: int) -> dict[str, Any]:
        """Return the `facts` of a size (see `ReducedVocabulary`), without making its tokenizer's files.

        Raises:
            VocabularyError: A size outside of `min_size` to `max_size`.
        """
        self.ranking.kept_ids(size)  # raises for a size that cannot be made
        held_out = bool(self._held_out_counts)
        counts = self._held_out_counts if held_out else self._counts
        kept = (self._counted_ranking if held_out else self.ranking).kept_ids(size)
        backend = _backend(reduce_spec(self._spec, kept))
        num_tokens = sum(len(ids) for _, ids in _encode(backend, self._measured))
        return {
            "size": size,
            "teacher_size": self.max_size,
            "share_kept": sum(counts[index] for index in kept) / counts.total(),
            "token_ratio": num_tokens / counts.total(),
            "held_out": held_out,
        }


def _backend(spec: Mapping[str, Any]) -> Tokenizer:
    """Return a tokenizer that neither cuts nor pads."""
    return Tokenizer.from_str(json.dumps({**spec, "truncation": None, "padding": None}))


def _encode(backend: Tokenizer, texts: Iterable[str]) -> Iterator[tuple[str, list[int]]]:
    """Yield each text with its ids, without special tokens around it."""
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == _BATCH:
            yield from _encode_batch(backend, batch)
            batch = []
    yield from _encode_batch(backend, batch)


def _encode_batch(backend: Tokenizer, batch: Sequence[str]) -> Iterator[tuple[str, list[int]]]:
    encodings = backend.encode_batch(list(batch), add_special_tokens=False)
    yield from ((text, encoding.ids) for text, encoding in zip(batch, encodings, strict=True))


def change_vocabulary(
    teacher: TeacherCheckpoint,
    source: Any,
    config: PreTrainedConfig | None,
    overrides: Mapping[str, Any],
    dataset: Any,
    *,
    tokenizer: Any = None,
    gguf_file: str | None = None,
    **hub: Any,
) -> tuple[TeacherCheckpoint, PreTrainedConfig | None, ReducedVocabulary | OtherVocabulary | None]:
    """Return the teacher and the student's config with the vocabulary that is asked for, and that vocabulary.

    A smaller one keeps the pieces of the teacher's tokenizer that a text uses. None is chosen where none is asked for: there
    is no dataset, or the student leaves out padded rows alone.

    Args:
        teacher: The opened checkpoint.
        source: The `teacher` argument of `from_teacher`, whose generation config names tokens, too.
        config, overrides: As in `from_teacher`; token ids in the config are the teacher's.
        dataset: Texts, rows of text or conversations; all are counted.
        tokenizer: Another tokenizer, as in `from_teacher`.
        gguf_file: As in `from_pretrained`.
        **hub: Keywords of `from_pretrained` for the teacher's tokenizer.

    Raises:
        OptionError: The dataset is not text, the overrides name token ids, or a config is given with a tokenizer.
        ShapeError: The model has several vocabularies.
        VocabularyError: There is no tokenizer, a slow one or one of another kind; the size is too small; or ids that cannot be
            translated.
    """
    file = {} if gguf_file is None else {"gguf_file": gguf_file}
    if tokenizer is not None:
        if config is not None:
            raise OptionError(
                "tokenizer changes vocab_size and the token ids of the config: leave config out, and pass its sizes by name."
            )
        changed, other = change_tokenizer(teacher, tokenizer, overrides, hub={**hub, **file})
        return changed, None, other
    size = overrides.get("vocab_size") if config is None else getattr(config, "vocab_size", None)
    if size == "auto":
        raise OptionError(
            "vocab_size='auto' is chosen with the shape: set num_parameters=, active_parameters= or memory=, or a number."
        )
    teacher_size = getattr(teacher.config, "vocab_size", None)
    if size is not None and isinstance(teacher_size, int) and (isinstance(size, bool) or not isinstance(size, int)):
        raise OptionError(
            f"vocab_size must be a whole number, or 'auto' with a budget; found {size!r} ({type(size).__name__}). Pass an int."
        )
    if dataset is None or not isinstance(size, int) or not isinstance(teacher_size, int) or size >= teacher_size:
        return teacher, config, None
    tokenizer = own_tokenizer(teacher, **hub, **file)
    if tokenizer is not None and size > max(tokenizer.get_vocab().values()):
        return teacher, config, None
    check_one_vocabulary(teacher.config)
    named = sorted(filter(is_token_field, overrides))
    if named:
        raise OptionError(
            f"{named[0]} and vocab_size are both overridden: the special tokens follow the smaller vocabulary. Leave it out."
        )
    vocabulary = vocabulary_reducer(teacher, source, config, dataset, tokenizer, **hub).reduce(size)
    if config is not None:
        config = copy.deepcopy(config)
        translate_token_ids(config, vocabulary.new_ids)
    return with_vocabulary(teacher, vocabulary), config, vocabulary


def vocabulary_reducer(
    teacher: TeacherCheckpoint,
    source: Any,
    config: PreTrainedConfig | None,
    dataset: Any,
    tokenizer: Any = None,
    *,
    gguf_file: str | None = None,
    **hub: Any,
) -> VocabularyReducer:
    """Return the reducer of a teacher's tokenizer on a dataset, which keeps the tokens that its configs name.

    Args:
        teacher, source, config, dataset, gguf_file, **hub: As in `change_vocabulary`.
        tokenizer: The teacher's, where it is loaded already.

    Raises:
        OptionError: The dataset is not text.
        ShapeError: The model has several vocabularies.
        VocabularyError: The teacher has no tokenizer, or one of another kind.
    """
    check_one_vocabulary(teacher.config)
    if tokenizer is None:
        tokenizer = own_tokenizer(teacher, **hub, **({} if gguf_file is None else {"gguf_file": gguf_file}))
    if tokenizer is None:
        raise VocabularyError(
            f"The teacher {teacher.name} has no tokenizer, of which a vocabulary could be reduced: leave vocab_size out, or "
            "pass a folder or Hub id that has the teacher's tokenizer."
        )
    if isinstance(dataset, (str, bytes, Mapping, Iterator)) or not isinstance(dataset, Iterable):
        found = repr(dataset) if dataset is None or isinstance(dataset, str) else f"a {type(dataset).__name__}"
        once = ", which is read once" if isinstance(dataset, Iterator) else ""
        raise OptionError(
            "The pieces of a smaller vocabulary are chosen by all texts of calibration_dataset; it must be a list of texts or "
            f"a datasets dataset, found {found}{once}."
        )
    generation = load_generation_config(source, **hub, revision=teacher.revision)
    required = set().union(
        *(config_token_ids(each) for each in (teacher.config, config, generation) if each is not None)
    )
    return VocabularyReducer(tokenizer, iter_texts(dataset, tokenizer), required)


class _SelectedRows(OtherVocabularyTensors):
    """A teacher's tensors, of which those with an entry for each token have the kept ones alone."""

    def __init__(self, weights: TensorSource, axes: Mapping[str, int], kept: Tensor):
        super().__init__(weights, axes, len(kept))
        self._kept = kept

    def get(self, name: str) -> Tensor:
        tensor = self.weights.get(name)
        return tensor.index_select(self.axes[name], self._kept.to(tensor.device)) if name in self.axes else tensor

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if self.axes.get(name) == 0:
            kept = self._kept[start:stop]
            between = self.weights.rows(name, int(kept[0]), int(kept[-1]) + 1)  # ids ascend
            return between.index_select(0, (kept - kept[0]).to(between.device))
        tensor = self.weights.rows(name, start, stop)
        return tensor.index_select(self.axes[name], self._kept.to(tensor.device)) if name in self.axes else tensor


def with_vocabulary(teacher: TeacherCheckpoint, vocabulary: ReducedVocabulary) -> TeacherCheckpoint:
    """Return a teacher that has the kept tokens alone, whose rows are read when they are needed."""
    axes = vocabulary_axes(teacher.model_class, teacher.config)
    return dataclasses.replace(
        teacher,
        config=reduced_config(teacher.config, vocabulary.kept_ids),
        weights=_SelectedRows(teacher.weights, axes, torch.tensor(vocabulary.kept_ids)),
        tokenizer=vocabulary.tokenizer,
        whole=teacher,
    )
