"""Rank the pieces of a tokenizer by how little a text needs them, so that a smaller vocabulary keeps the others.

Does: order the removable pieces of BPE, Unigram and WordPiece models by the tokens that their removal adds to a text.
Does not: read texts, or change a tokenizer (`tokenizer_reduction` does).
"""

import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from hf_guide.errors import VocabularyError

SUPPORTED_MODELS = ("BPE", "Unigram", "WordPiece")
_UNKNOWN_PENALTY = 10.0
"""By how much an unknown character scores below the lowest piece of a Unigram model, as in `tokenizers`."""


@dataclass(frozen=True)
class PieceRanking:
    """The order in which pieces are removed from a vocabulary; each size keeps a subset of what a larger size keeps.

    Attributes:
        required: Ids that are always kept: special and added tokens, bytes, and characters that bytes do not replace, so that
            every text that the tokenizer could encode still is, and decodes to the same.
        removal_order: All other ids, the one that is removed first in front.
    """

    required: tuple[int, ...]
    removal_order: tuple[int, ...]

    def kept_ids(self, size: int) -> list[int]:
        """Return the ids that a vocabulary of `size` pieces keeps, in ascending order.

        Raises:
            VocabularyError: Fewer than the required ones, or more than there are.

        Example:
            >>> PieceRanking(required=(0, 1), removal_order=(4, 2, 3)).kept_ids(4)
            [0, 1, 2, 3]
        """
        total = len(self.required) + len(self.removal_order)
        if not len(self.required) <= size <= total:
            raise VocabularyError(
                f"vocab_size must be from {len(self.required)} (the special tokens, and the bytes or characters without which "
                f"texts could not be encoded) to {total} (the tokenizer's); found {size}."
            )
        return sorted([*self.required, *self.removal_order[total - size :]])


def rank_pieces(spec: Mapping[str, Any], counts: Mapping[int, float], required: Collection[int] = ()) -> PieceRanking:
    """Return the order in which to remove the pieces of a tokenizer, given how often a text uses each.

    The piece whose removal adds the fewest tokens to the text goes first: its count times the number of pieces that replace
    it, less one. They inherit its count. A piece of a BPE model goes only when no kept piece is merged from it (leaf-based
    pruning, arXiv 2512.03989), so every kept piece can still be reached. Of unused pieces the later ones go first.

    Args:
        spec: The parsed tokenizer.json.
        counts: By id, how often the tokenizer uses a piece in the text.
        required: Further ids to keep, such as those that a model's config names.

    Raises:
        VocabularyError: A model other than BPE, Unigram or WordPiece.
    """
    rules, ids = _rules_of(spec)
    added = {token["content"]: token["id"] for token in spec.get("added_tokens", ())}
    names = {index: piece for piece, index in ids.items()}
    protected = {*added, *rules.required, *(names[index] for index in required if index in names)}
    weights = defaultdict(float, {names[index]: float(count) for index, count in counts.items() if index in names})
    order = _removal_order(rules, ids, weights, protected)
    removed = {ids[piece] for piece in order}
    return PieceRanking(
        tuple(sorted({*ids.values(), *added.values()} - removed)), tuple(ids[piece] for piece in order)
    )


def replacements(spec: Mapping[str, Any], kept_ids: Collection[int]) -> dict[int, tuple[int, ...]]:
    """Return, by the id of each removed piece, the ids of the kept pieces that encode its text.

    Pieces that no text is encoded with, because no merges make them, are left out.

    Args:
        spec: The parsed tokenizer.json, with all pieces.
        kept_ids: The ids of the pieces that are kept, as from `PieceRanking.kept_ids`.

    Raises:
        VocabularyError: A model other than BPE, Unigram or WordPiece.

    Example:
        >>> model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "aba": 3}, "merges": [["a", "b"], ["ab", "a"]]}
        >>> replacements({"model": model}, [0, 1])
        {2: (0, 1), 3: (0, 1, 0)}
    """
    rules, ids = _rules_of(spec)
    added = {token["id"] for token in spec.get("added_tokens", ())}
    kept_set = set(kept_ids)
    kept = {piece for piece, index in ids.items() if index in kept_set}

    def parts(piece: str) -> tuple[int, ...] | None:
        if piece in kept:
            return (ids[piece],)
        found = [parts(part) for part in rules.replacement(piece, kept)] if piece in ids else [None]
        return None if None in found else tuple(index for each in found for index in each or ())

    replaced = {index: parts(piece) for piece, index in ids.items() if piece not in kept and index not in added}
    return {index: found for index, found in replaced.items() if found is not None}


def _rules_of(spec: Mapping[str, Any]) -> "tuple[_Rules, Mapping[str, int]]":
    """Return how a tokenizer's model encodes removed pieces, and the id of each piece.

    Raises:
        VocabularyError: A model other than BPE, Unigram or WordPiece.
    """
    model = spec["model"]
    if model.get("type") not in SUPPORTED_MODELS:
        raise VocabularyError(
            f"The tokenizer's model is {model.get('type')!r}; a vocabulary can be reduced of {', '.join(SUPPORTED_MODELS)}. "
            "Leave vocab_size at the teacher's."
        )
    rules: _Rules
    if model["type"] == "WordPiece":
        rules = _WordPieceRules(model)
    else:
        rules = {"BPE": _MergeRules, "Unigram": _UnigramRules}[model["type"]](model, _ByteFallback(spec))
    return rules, {piece: i for i, piece in enumerate(rules.pieces)} if model["type"] == "Unigram" else model["vocab"]


def _removal_order(
    rules: "_Rules", ids: Mapping[str, int], counts: "defaultdict[str, float]", protected: Collection[str]
) -> list[str]:
    """Return the removable pieces, cheapest first; `counts` gains what removed pieces pass on."""
    kept = set(ids)
    dependents = Counter(part for piece in ids for part in rules.parts(piece))
    removable = {piece for piece in ids if piece not in protected and rules.can_be_replaced(piece)}

    def cost(piece: str) -> float:
        if not counts[piece]:
            return 0.0
        return counts[piece] * max(len(rules.replacement(piece, kept)) - 1, 0)

    heap = [(cost(piece), -ids[piece], piece) for piece in removable if not dependents[piece]]
    heapq.heapify(heap)
    order = []
    while heap:
        least, rank, piece = heapq.heappop(heap)
        current = cost(piece)  # grew if pieces that it replaces, or that replace it, went meanwhile
        if current > least and heap:
            heapq.heappush(heap, (current, rank, piece))
            continue
        if counts[piece]:
            for part in rules.replacement(piece, kept):
                counts[part] += counts[piece]
        kept.discard(piece)
        order.append(piece)
        for part in rules.parts(piece):
            dependents[part] -= 1
            if not dependents[part] and part in removable:
                heapq.heappush(heap, (cost(part), -ids[part], part))
    return order


class _Rules:
    """How one kind of model encodes a piece that it no longer has.

    Attributes:
        pieces: All pieces.
        required: Pieces that encoding needs whatever the text.
    """

    pieces: Sequence[str]
    required: set[str]

    def can_be_replaced(self, piece: str) -> bool:
        """Return whether other pieces, none of which is ever removed before it, encode the same text."""
        raise NotImplementedError

    def replacement(self, piece: str, kept: Collection[str]) -> Sequence[str]:
        """Return the kept pieces that encode a piece's text once it is removed."""
        raise NotImplementedError

    def parts(self, piece: str) -> Sequence[str]:
        """Return the pieces without which this one cannot be reached."""
        return ()


def byte_pieces(text: str) -> list[str]:
    """Return the pieces of byte fallback that encode a text.

    Example:
        >>> byte_pieces("é")
        ['<0xC3>', '<0xA9>']
    """
    return [f"<0x{byte:02X}>" for byte in text.encode("utf-8", "surrogatepass")]


class _ByteFallback:
    """The bytes by which a model encodes characters that it has no piece of.

    Bytes stand for a character only where the decoder makes the same text of them. It often maps characters before it joins
    bytes: "▁" becomes a space as a piece, and stays itself as three bytes.

    Attributes:
        pieces: All 256 of them; empty without byte fallback, or where some are missing.
    """

    def __init__(self, spec: Mapping[str, Any]):
        model = spec["model"]
        names = (entry[0] for entry in model["vocab"]) if model["type"] == "Unigram" else model["vocab"]
        every_byte = {f"<0x{byte:02X}>" for byte in range(256)}
        self.pieces = every_byte if model.get("byte_fallback") and every_byte <= set(names) else set()
        self._decoder: Any = None
        self._found: dict[str, bool] = {}
        if self.pieces:
            # Only the decoder is read, without the time that a large model takes to load.
            parts: dict[str, Any] = {"version": "1.0", "added_tokens": [], "decoder": spec.get("decoder")}
            unused = {
                name: None for name in ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor")
            }
            empty = {"type": "BPE", "vocab": {}, "merges": []}
            self._decoder = Tokenizer.from_str(json.dumps({**parts, **unused, "model": empty})).decoder

    def replaces(self, symbol: str) -> bool:
        """Return whether the bytes of a symbol decode to the same text, wherever it is."""
        if self._decoder is None:
            return False
        if symbol not in self._found:
            # A decoder may treat the first and the last piece unlike others.
            texts = [self._decoder.decode([*each, "a", *each, "a", *each]) for each in ([symbol], byte_pieces(symbol))]
            self._found[symbol] = texts[0] == texts[1]
        return self._found[symbol]


class _MergeRules(_Rules):
    """BPE: a piece is replaced by the two that it is merged from, a character by its bytes."""

    def __init__(self, model: Mapping[str, Any], fallback: _ByteFallback):
        if model.get("continuing_subword_prefix"):
            raise VocabularyError(
                f"The tokenizer merges pieces with the prefix {model['continuing_subword_prefix']!r}, of which a vocabulary "
                "cannot be reduced. Leave vocab_size at the teacher's."
            )
        self.pieces = list(model["vocab"])
        self._suffix = model.get("end_of_word_suffix") or ""
        self._known, self._fallback = frozenset(self.pieces), fallback
        self.required = {model["unk_token"]} if model.get("unk_token") else set()
        self.required |= fallback.pieces
        self._ranks = {pair: rank for rank, pair in reversed(list(enumerate(map(merge_pair, model["merges"]))))}
        by_result: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for pair in self._ranks:
            by_result["".join(pair)].append(pair)
        self._last_merges = {piece: self._last_merge(piece, pairs) for piece, pairs in by_result.items()}

    def _last_merge(self, piece: str, pairs: Sequence[tuple[str, str]]) -> tuple[str, str] | None:
        """Return the merge that makes a piece when its text is encoded alone; None where it ends in other pieces."""
        if len(pairs) == 1:
            return pairs[0]
        symbols = _characters(piece, self._suffix)
        while len(symbols) > 2:
            ranked = [
                (self._ranks[pair], index)
                for index, pair in enumerate(zip(symbols, symbols[1:], strict=False))
                if pair in self._ranks
            ]
            if not ranked:
                return None
            index = min(ranked)[1]
            symbols[index : index + 2] = ["".join(symbols[index : index + 2])]
        last = (symbols[0], symbols[-1])
        return last if len(symbols) == 2 and last in self._ranks else None

    def can_be_replaced(self, piece: str) -> bool:
        symbols = _characters(piece, self._suffix)
        if len(symbols) < 2:
            return self._fallback.replaces(piece)
        return not self._fallback.pieces or all(
            symbol in self._known or self._fallback.replaces(symbol) for symbol in symbols
        )

    def replacement(self, piece: str, kept: Collection[str]) -> Sequence[str]:
        return self.parts(piece) or byte_pieces(piece)

    def parts(self, piece: str) -> Sequence[str]:
        return self._last_merges.get(piece) or ()


def merge_pair(merge: "str | Sequence[str]") -> tuple[str, str]:
    """Return both parts of a merge, which older tokenizer.json files write as one text with a space between.

    Example:
        >>> merge_pair("a b"), merge_pair(["a", "b c"])
        (('a', 'b'), ('a', 'b c'))
    """
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def _characters(piece: str, suffix: str) -> list[str]:
    """Return the symbols with which BPE begins: characters, the last one of a word with the suffix of a word's end."""
    if suffix and piece.endswith(suffix) and piece != suffix:
        text = piece.removesuffix(suffix)
        return [*text[:-1], text[-1] + suffix]
    return list(piece)


class _UnigramRules(_Rules):
    """Unigram: a piece is replaced by the likeliest segmentation of its text."""

    def __init__(self, model: Mapping[str, Any], fallback: _ByteFallback):
        self._scores = {piece: float(score) for piece, score in model["vocab"]}
        self.pieces = [piece for piece, _ in model["vocab"]]
        self._fallback = fallback
        lowest = min(self.pieces, key=self._scores.__getitem__)
        # The score of an unknown character follows from the lowest one, which must not change.
        self.required = {lowest, *fallback.pieces}
        if model.get("unk_id") is not None:
            self.required.add(self.pieces[model["unk_id"]])
        self._unknown = self._scores[lowest] - _UNKNOWN_PENALTY

    def can_be_replaced(self, piece: str) -> bool:
        if len(piece) == 1:
            return self._fallback.replaces(piece)
        return all(character in self._scores or self._fallback.replaces(character) for character in piece)

    def replacement(self, piece: str, kept: Collection[str]) -> Sequence[str]:
        best: list[tuple[float, list[str]]] = [(0.0, [])]
        for end in range(1, len(piece) + 1):
            candidates = []
            for start in range(end):
                part = piece[start:end]
                if part != piece and part in kept:
                    candidates.append((best[start][0] + self._scores[part], start, [part]))
                elif len(part) == 1:
                    candidates.append((best[start][0] + self._unknown, start, byte_pieces(part)))
            score, start, parts = max(candidates, key=lambda candidate: candidate[0])
            best.append((score, [*best[start][1], *parts]))
        return best[-1][1]


class _WordPieceRules(_Rules):
    """WordPiece: a piece is replaced by the longest pieces that match its text from the left."""

    def __init__(self, model: Mapping[str, Any]):
        self._vocab = model["vocab"]
        self.pieces = list(self._vocab)
        self._prefix = model.get("continuing_subword_prefix", "##")
        self.required = {model.get("unk_token", "[UNK]")}

    def _split(self, piece: str, length: Callable[[str, bool], int]) -> list[str]:
        """Return the pieces of a text of which `length` decides how long the next is, given the rest and if it begins."""
        begins = not piece.startswith(self._prefix) or piece == self._prefix
        rest, parts = piece if begins else piece[len(self._prefix) :], []
        while rest:
            size = length(rest, begins)
            parts.append(("" if begins else self._prefix) + rest[:size])
            rest, begins = rest[size:], False
        return parts

    def can_be_replaced(self, piece: str) -> bool:
        characters = self._split(piece, lambda rest, begins: 1)
        return len(characters) > 1 and all(character in self._vocab for character in characters)

    def replacement(self, piece: str, kept: Collection[str]) -> Sequence[str]:
        def longest(rest: str, begins: bool) -> int:
            prefix = "" if begins else self._prefix
            sizes = range(len(rest), 1, -1)
            return next((size for size in sizes if prefix + rest[:size] in kept and prefix + rest[:size] != piece), 1)

        return self._split(piece, longest)
