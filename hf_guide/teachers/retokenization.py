"""Run a teacher on its own tokens of a text whose batch has the pieces of a smaller vocabulary, and score these pieces.

Does: join the pieces of a row to the teacher's tokens, and sum its distribution over its next token by the next piece.
Does not: run a model (`forward.py` does), or decide which teachers need it (`vocabulary.py` does).
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_guide.errors import TeacherError
from hf_guide.models.adapters import without_adapter

_ATTRIBUTE = "retokenizer"
_MAX_CACHED = 1 << 16
_RULED_OUT = 40.0
"""How far below the likeliest piece one is that the pieces before rule out: a probability of 4e-18."""


@dataclass(frozen=True)
class RetokenizedBatch:
    """A batch of pieces as a teacher reads it.

    Attributes:
        inputs: The batch with the teacher's tokens, and fewer of them.
        positions: For each piece of the batch, the position of the teacher's last token that ends there or before,
            (batch, length): what the teacher knows when it predicts the next piece.
        states: For each piece, which parts of a token of the teacher's end there, (batch, length); 0 for none.
    """

    inputs: dict[str, Any]
    positions: Tensor
    states: Tensor

    def select(self, values: Tensor) -> Tensor:
        """Return the values (batch, teacher's length, ...) of the teacher's tokens, for each piece (batch, length, ...)."""
        rows = torch.arange(len(values), device=values.device)[:, None]
        return values[rows, self.positions.to(values.device)]


@dataclass
class _Row:
    """The teacher's tokens of a row and their positions in their texts; for each piece, as in `RetokenizedBatch`."""

    tokens: list[int] = field(default_factory=list)
    counted: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    states: list[int] = field(default_factory=list)


class Retokenizer:
    r"""Converts between the pieces of a smaller vocabulary and the tokens of the teacher that it is a part of.

    A removed token v is encoded by kept pieces R(v), every other token by itself. The teacher reads the tokens that the text
    has in its own vocabulary, v_1 ... v_n, so its distribution p over the next one is that of the text. That over the next
    piece a, after the first k pieces of v_{i+1}, r, is the share of the tokens that agree with what is known:

        q(a | v_1 ... v_i, r) = sum of p(v) over v with R(v) = r a ...  /  sum of p(v) over v with R(v) = r b ... for any b.

    For k = 0 this is the distribution of the next piece exactly: a removed token's probability goes to the piece it begins
    with. Within a token it is conditioned on the token being one that goes on, which the text shows: over texts of the
    teacher the mean of q is again the distribution of the next piece given the pieces before. The product of q over the
    pieces of a text is at least the teacher's probability of it. Cf. marginalizing over tokenizations, arXiv 2406.16829.

    The text is joined to the tokens that the teacher's tokenizer makes of it as far as that encodes a removed token by R: of
    BPE models in all but a few in a thousand tokens; a Unigram model chooses the pieces of a whole word at once, so there some
    words are read in other tokens of the same text.

    Args:
        kept_ids: Of each piece's id, the teacher's id of the same token.
        replacements: By the teacher's id of every other token, the teacher's ids of the pieces R(v) that encode it.
        size: The number of the teacher's tokens; rows beyond its tokenizer's are left out.
        encode: Returns the teacher's tokens of the text of some pieces, given their ids. Where it is None, and where what it
            returns is not made of these pieces, the longest token is taken from the left.

    Example:
        >>> both = Retokenizer(kept_ids=[0, 1], replacements={2: (0, 1)}, size=3)  # "a", "b" and "ab"
        >>> batch = both.retokenize({"input_ids": torch.tensor([[1, 0, 1]])})
        >>> batch.inputs["input_ids"].tolist(), batch.positions.tolist(), batch.states.tolist()
        ([[1, 2]], [[0, 0, 1]], [[0, 1, 0]])
        >>> both.merge(torch.tensor([[0.2, 0.3, 0.5]]).log(), torch.tensor([0])).exp()
        tensor([[0.7000, 0.3000]])
    """

    def __init__(
        self,
        kept_ids: Sequence[int],
        replacements: Mapping[int, Sequence[int]],
        size: int,
        encode: Callable[[Sequence[int]], Sequence[int]] | None = None,
    ):
        self.kept_ids = list(kept_ids)
        new_ids = {old: new for new, old in enumerate(kept_ids)}
        parts = {old: tuple(new_ids[part] for part in pieces) for old, pieces in replacements.items()}
        first = new_ids | {old: pieces[0] for old, pieces in parts.items()}
        self._tokens = torch.tensor([old for old in range(size) if old in first])
        self._first = torch.tensor([first[int(old)] for old in self._tokens])
        self._encode, self._parts = encode, parts | {old: (new,) for old, new in new_ids.items()}
        self._known: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        self._pairs = {pair for pieces in parts.values() for pair in zip(pieces, pieces[1:], strict=False)}
        self._joined: dict[int, list[tuple[tuple[int, ...], int]]] = defaultdict(list)
        self._states: dict[tuple[int, ...], int] = {(): 0}
        continued: list[list[tuple[int, int]]] = [[]]
        for old, pieces in parts.items():
            self._joined[pieces[0]].append((pieces, old))
            for known in range(1, len(pieces)):
                state = self._states.setdefault(pieces[:known], len(self._states))
                continued += [[]] * (state == len(continued))
                continued[state] = [*continued[state], (old, pieces[known])]
        for found in self._joined.values():
            found.sort(key=lambda each: -len(each[0]))
        self._continued = [torch.tensor(pairs).view(-1, 2) for pairs in continued]

    def retokenize(self, inputs: Mapping[str, Any]) -> RetokenizedBatch:
        """Return a batch of pieces as the teacher reads it.

        Args:
            inputs: `input_ids`, and where there are padding or several texts in a row `attention_mask` and `position_ids`,
                each (batch, length).

        Raises:
            TeacherError: The batch has other inputs for each token.
        """
        ids, mask, starts = inputs["input_ids"], inputs.get("attention_mask"), inputs.get("position_ids")
        for name, value in inputs.items():
            known = ("input_ids", "attention_mask", "position_ids", "labels")
            if isinstance(value, Tensor) and value.shape[:2] == ids.shape and (name not in known or value.ndim > 2):
                raise TeacherError(
                    f"The batch has {name} {tuple(value.shape)} for its tokens, which the teacher reads joined to fewer, "
                    "as the student has a smaller vocabulary. Leave it out."
                )
        attended = [
            list(range(len(row))) if mask is None else [at for at, kept in enumerate(mask[index].tolist()) if kept]
            for index, row in enumerate(ids.tolist())
        ]
        rows = []
        for index, (row, at) in enumerate(zip(ids.tolist(), attended, strict=True)):
            begins = {0}
            if starts is not None:
                counted = starts[index].tolist()
                begins |= {number for number, position in enumerate(at) if counted[position] == 0}
            rows.append(self._read_row([row[position] for position in at], begins))
        return self._batch(inputs, rows, attended)

    def _join(self, pieces: list[int], begins: set[int]) -> Iterator[tuple[int, int]]:
        """Yield each of the teacher's tokens with the number of pieces that it is joined of.

        The first token of a text is not joined: the teacher has no distribution over it.
        """
        at = 0
        while at < len(pieces):
            end = at + 1
            if at in begins:
                yield self.kept_ids[pieces[at]], 1
            else:
                while end < len(pieces) and end not in begins and (pieces[end - 1], pieces[end]) in self._pairs:
                    end += 1
                yield from self._tokens_of(tuple(pieces[at:end]))
            at = end

    def _tokens_of(self, pieces: tuple[int, ...]) -> list[tuple[int, int]]:
        """Return the teacher's tokens of pieces that may belong together, each with the number of its pieces."""
        if pieces not in self._known:
            if len(self._known) == _MAX_CACHED:
                self._known.clear()
            self._known[pieces] = self._encoded(pieces) or list(self._longest_tokens(pieces))
        return self._known[pieces]

    def _encoded(self, pieces: tuple[int, ...]) -> list[tuple[int, int]] | None:
        if self._encode is None or len(pieces) == 1:
            return None
        tokens = self._encode([self.kept_ids[piece] for piece in pieces])
        parts = [self._parts.get(token, ()) for token in tokens]
        if tuple(piece for each in parts for piece in each) != pieces:
            return None
        return [(token, len(each)) for token, each in zip(tokens, parts, strict=True)]

    def _longest_tokens(self, pieces: tuple[int, ...]) -> Iterator[tuple[int, int]]:
        at = 0
        while at < len(pieces):
            fitting = (
                (token, len(parts))
                for parts, token in self._joined.get(pieces[at], ())
                if pieces[at : at + len(parts)] == parts
            )
            found = next(fitting, (self.kept_ids[pieces[at]], 1))
            yield found
            at += found[1]

    def _read_row(self, pieces: list[int], begins: set[int]) -> "_Row":
        """Return what the teacher reads of the pieces of a row, of which texts begin at `begins`."""
        row = _Row()
        at = text = 0
        for token, count in self._join(pieces, begins):
            text = len(row.tokens) if at in begins else text
            for known in range(1, count):  # within the token the teacher has read the one before
                row.positions.append(len(row.tokens) - 1)
                row.states.append(self._states[tuple(pieces[at : at + known])])
            row.positions.append(len(row.tokens))
            row.states.append(0)
            row.counted.append(len(row.tokens) - text)
            row.tokens.append(token)
            at += count
        return row

    def _batch(self, inputs: Mapping[str, Any], rows: "list[_Row]", attended: list[list[int]]) -> RetokenizedBatch:
        ids, mask, starts = inputs["input_ids"], inputs.get("attention_mask"), inputs.get("position_ids")
        length = max((len(row.tokens) for row in rows), default=0)

        def padded(values: list[list[int]], padding: Callable[[int], list[int]], like: Tensor) -> Tensor:
            filled = [each + padding(length - len(each)) for each in values]
            return torch.tensor(filled, dtype=like.dtype, device=like.device).view(len(rows), length)

        joined = {"input_ids": padded([row.tokens for row in rows], lambda count: [0] * count, ids)}
        if mask is not None:
            joined["attention_mask"] = padded([[1] * len(row.tokens) for row in rows], lambda count: [0] * count, mask)
        if starts is not None:  # padding is a separate text where positions separate texts
            joined["position_ids"] = padded([row.counted for row in rows], lambda count: list(range(count)), starts)
        positions, states = torch.zeros(ids.shape, dtype=torch.long), torch.zeros(ids.shape, dtype=torch.long)
        for index, (row, at) in enumerate(zip(rows, attended, strict=True)):
            positions[index, at] = torch.tensor(row.positions, dtype=torch.long)
            states[index, at] = torch.tensor(row.states, dtype=torch.long)
        others = {name: value for name, value in inputs.items() if name not in joined}
        return RetokenizedBatch({**others, **joined}, positions.to(ids.device), states.to(ids.device))

    def merge(self, logits: Tensor, states: Tensor) -> Tensor:
        """Return logits of the pieces, log q up to a constant, from the teacher's.

        Args:
            logits: (..., teacher's vocabulary).
            states: (...), as `RetokenizedBatch` has them.
        """
        shape, device = (*logits.shape[:-1], len(self.kept_ids)), logits.device
        logits = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
        states = states.flatten().to(device)
        merged = logits.new_full((len(logits), len(self.kept_ids)), -torch.inf)
        for state in states.unique().tolist():
            rows = states == state
            tokens, pieces = (
                (self._tokens, self._first)
                if state == 0
                else (self._continued[state][:, 0], self._continued[state][:, 1])
            )
            merged[rows] = _sum_by_piece(logits[rows][:, tokens.to(device)], pieces.to(device), shape[-1])
        return merged.view(shape)


def _sum_by_piece(logits: Tensor, pieces: Tensor, count: int) -> Tensor:
    peak = logits.amax(-1, keepdim=True)
    weights = (logits - peak).exp()
    sums = weights.new_zeros(len(logits), count).index_add_(1, pieces, weights)
    return sums.log().clamp_min(-_RULED_OUT) + peak


def attach_retokenizer(model: Any, retokenizer: Retokenizer) -> None:
    """Attach to a teacher what converts the batches that it is given."""
    model.__dict__[_ATTRIBUTE] = retokenizer


def attached_retokenizer(model: Any) -> Retokenizer | None:
    """Return the retokenizer that was attached to a teacher; None for none."""
    found: Retokenizer | None = without_adapter(model).__dict__.get(_ATTRIBUTE)
    return found
