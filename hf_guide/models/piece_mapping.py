"""Map the pieces of one tokenizer onto those of another: the same text, or the fewest pieces that spell it.

Does: state the bytes that each piece of a fast tokenizer stands for, match pieces and special tokens, and spell the others.
Does not: touch a model (`initialization/tokenizer_change.py` does).
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_guide.models.tokenizer_reduction import tokenizer_spec

ROLES = ("eos_token", "bos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
"""Special tokens that are matched by what they are for where their names differ, in this order."""


@dataclass(frozen=True)
class PieceMapping:
    """Of which of a teacher's tokens each token of another tokenizer is made.

    Attributes:
        parts: For each id the teacher's ids: one where the token is the same, several where they spell it, none otherwise.
        new_ids: By the teacher's id, the id of the same token.
    """

    parts: tuple[tuple[int, ...], ...]
    new_ids: Mapping[int, int]

    @property
    def facts(self) -> dict[str, int]:
        """How many tokens are `copied`, `composed` of several, and `fresh`."""
        copied = set(self.new_ids.values())
        composed = sum(bool(parts) and index not in copied for index, parts in enumerate(self.parts))
        fresh = sum(not parts for parts in self.parts)
        return {"copied": len(self.parts) - composed - fresh, "composed": composed, "fresh": fresh}


def map_pieces(tokenizer: Any, teacher_tokenizer: Any) -> PieceMapping:
    """Return of which of a teacher's tokens each token of another tokenizer is made.

    A piece is the same as the teacher's where both stand for the same bytes, whatever their tokenizers write for a space or a
    byte; a special token where both have its name, or else its role. Others are spelled with the fewest pieces of the teacher.

    Args:
        tokenizer: A fast tokenizer.
        teacher_tokenizer: Another.

    Raises:
        VocabularyError: One of them is not a fast tokenizer.

    Example:
        >>> from tokenizers import ByteLevelBPETokenizer
        >>> from transformers import PreTrainedTokenizerFast
        >>> def trained(text, size):
        ...     made = ByteLevelBPETokenizer()
        ...     made.train_from_iterator([text] * 9, vocab_size=size, show_progress=False)
        ...     return PreTrainedTokenizerFast(tokenizer_object=made._tokenizer)
        >>> large, small = trained("the theme", 265), trained("the", 258)
        >>> mapping = map_pieces(large, small)
        >>> [small.convert_ids_to_tokens(mapping.parts[large.vocab[piece]]) for piece in ("the", "Ġthe", "Ġtheme")]
        [['the'], ['Ġ', 'the'], ['Ġ', 'the', 'm', 'e']]
    """
    texts, teacher_texts = piece_bytes(tokenizer), piece_bytes(teacher_tokenizer)
    ids = {text: index for index, text in sorted(teacher_texts.items())}  # of "A" and <0x41> the later, "A"
    same = _match_special_tokens(tokenizer, teacher_tokenizer)
    teacher_vocab = teacher_tokenizer.get_vocab()
    for piece, index in tokenizer.get_vocab().items():
        teacher_index = teacher_vocab.get(piece, -1)
        if index in texts and teacher_texts.get(teacher_index) == texts[index]:
            same[index] = teacher_index
    longest = max(map(len, ids), default=0)
    parts: list[tuple[int, ...]] = []
    for index in range(1 + max(tokenizer.get_vocab().values())):
        if index in same:
            parts.append((same[index],))
        elif index in texts:
            parts.append(spell(texts[index], ids, longest))
        else:
            parts.append(())
    new_ids: dict[int, int] = {}
    for index, found in enumerate(parts):
        if index in same or (len(found) == 1 and teacher_texts.get(found[0]) == texts.get(index)):
            new_ids.setdefault(found[0], index)
    return PieceMapping(tuple(parts), new_ids)


def piece_bytes(tokenizer: Any) -> dict[int, bytes]:
    """Return the bytes that each piece of a fast tokenizer stands for, by id; without special tokens and empty pieces.

    Raises:
        VocabularyError: The tokenizer is not a fast one.
    """
    spec = tokenizer_spec(tokenizer)
    model, added = spec["model"], {token["id"]: token for token in spec.get("added_tokens", ())}
    vocab = model["vocab"]
    pieces = enumerate(entry[0] for entry in vocab) if isinstance(vocab, list) else ((i, p) for p, i in vocab.items())
    prefix = model.get("continuing_subword_prefix") if model["type"] == "WordPiece" else None
    is_byte_level = '"ByteLevel"' in json.dumps([spec.get(name) for name in ("pre_tokenizer", "decoder")])
    found = {index: _to_bytes(piece, is_byte_level, prefix) for index, piece in pieces if index not in added}
    found |= {index: token["content"].encode() for index, token in added.items() if not token["special"]}
    special = set(tokenizer.all_special_ids)
    return {index: text for index, text in found.items() if text and index not in special}


def _to_bytes(piece: str, is_byte_level: bool, prefix: str | None) -> bytes:
    if is_byte_level and all(symbol in _byte_symbols() for symbol in piece):
        return bytes(_byte_symbols()[symbol] for symbol in piece)
    if prefix is not None:  # WordPiece: what does not continue a word begins one
        return piece.removeprefix(prefix).encode() if piece.startswith(prefix) else f" {piece}".encode()
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode("utf-8", "surrogatepass")


@functools.cache
def _byte_symbols() -> dict[str, int]:
    """Return the byte of each symbol of byte-level tokenizers: printable ones are themselves, others follow from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


def _match_special_tokens(tokenizer: Any, teacher_tokenizer: Any) -> dict[int, int]:
    """Return the teacher's id of each special token that has the same name, or else the same role."""
    special, teacher_special = (
        {
            content: index
            for index, token in each.added_tokens_decoder.items()
            if token.special and (content := token.content)
        }
        for each in (tokenizer, teacher_tokenizer)
    )
    same = {index: teacher_special[name] for name, index in special.items() if name in teacher_special}
    for role in ROLES:
        index, teacher_index = (getattr(each, f"{role}_id", None) for each in (tokenizer, teacher_tokenizer))
        if index is not None and teacher_index is not None:
            same.setdefault(index, teacher_index)
    return same


def spell(text: bytes, ids: Mapping[bytes, int], longest: int) -> tuple[int, ...]:
    """Return the fewest pieces that spell a text, of these the longest first; empty where none do.

    Args:
        text: The text.
        ids: By text, the id of each piece.
        longest: The length of the longest piece.

    Example:
        >>> spell(b"abcd", {b"a": 0, b"ab": 1, b"bcd": 2, b"c": 3, b"cd": 4}, 3)
        (1, 4)
    """
    best: list[Sequence[int] | None] = [None] * len(text) + [()]
    for start in reversed(range(len(text))):
        for end in range(min(len(text), start + longest), start, -1):
            rest, piece = best[end], ids.get(text[start:end])
            shortest = best[start]
            if rest is not None and piece is not None and (shortest is None or 1 + len(rest) < len(shortest)):
                best[start] = (piece, *rest)
    return tuple(best[0] or ())
