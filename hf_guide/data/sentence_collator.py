"""`SentenceCollator`: batches of plain texts, of pairs of texts and of scored pairs, for embedding models and rerankers."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from transformers import PreTrainedTokenizerBase

from hf_guide.errors import OptionError
from hf_guide.validation import check_integer, did_you_mean

SCORES_KEY, ROWS_KEY = "scores", "rows_per_example"
SENTENCE_COLUMNS = (SCORES_KEY, ROWS_KEY)
"""What the collator adds to a batch besides a model's inputs; the trainer reads it, and no model is called with it."""


_ROW_COLUMNS = ("text", "text_pair")


class SentenceCollator:
    """A data collator that tokenizes the texts of each example.

    Every text, or pair of texts, is a row of the batch, those of one example after each other: for an embedding model one row
    a text, for a cross-encoder one row a pair. The trainer keeps the dataset's text columns for it, whatever
    `remove_unused_columns` is.

    Args:
        tokenizer: The student's.
        columns: Names of columns, or pairs of names for a cross-encoder; None takes every column of texts, in their order, so
            that one collator is right for a training set of texts and an evaluation set of scored pairs.
        prompts: By column, what its texts begin with, such as {"query": "query: "}.
        max_length: Number of tokens after which a row is cut; None takes the tokenizer's `model_max_length`.
        score_column: Column of gold similarities, which evaluation compares with those of the embeddings. Without this
            column in an example there are none.
        label_column: Column of a number that becomes the label of an example's one row; None for no labels.

    Raises:
        OptionError: Columns that are no names or pairs of names, or a prompt of another column.

    Example:
        >>> collator = SentenceCollator(tokenizer, columns=[("query", "positive"), ("query", "negative")])
        >>> example = {"query": "w1", "positive": "w2 w3", "negative": "w4"}
        >>> batch = collator([example, example])
        >>> batch["input_ids"].shape[0], batch["rows_per_example"].tolist()
        (4, [2, 2, 2, 2])
    """

    keeps_columns: ClassVar[bool] = True
    """It makes the model's inputs of columns that no model takes, so none is removed before it."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        columns: "Sequence[str | Sequence[str]] | None" = None,
        *,
        prompts: "Mapping[str, str] | None" = None,
        max_length: int | None = None,
        score_column: str = "score",
        label_column: str | None = None,
    ):
        self.tokenizer = tokenizer
        self.columns = None if columns is None else _parse_columns(columns)
        self.prompts = dict(prompts or {})
        self.max_length = None if max_length is None else check_integer("max_length", max_length)
        self.score_column, self.label_column = score_column, label_column
        known = [name for row in self.columns or () for name in row]
        for name in self.prompts:
            if known and name not in known:
                raise OptionError(
                    f"prompts has {name!r}, which is none of the columns {known}.{did_you_mean(name, known)}"
                )
        if label_column is not None and self.columns is not None and len(self.columns) != 1:
            raise OptionError(f"label_column is for one row per example; columns makes {len(self.columns)}.")

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the batch: the tokens (rows, length), `rows_per_example` (rows,), and where there are any `scores` (rows,).

        Raises:
            OptionError: An example lacks a column, or a text is not a string.
        """
        rows = self.rows(examples[0])
        texts = [[self.text(example, name) for name in row] for example in examples for row in rows]
        firsts = [row[0] for row in texts]
        seconds = [row[1] for row in texts] if len(rows[0]) == 2 else None
        batch: dict[str, Any] = dict(
            self.tokenizer(
                firsts, seconds, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
            )
        )
        batch[ROWS_KEY] = torch.full((len(texts),), len(rows))
        if self.score_column in examples[0]:
            batch[SCORES_KEY] = self._numbers(examples, self.score_column).repeat_interleave(len(rows))
        if self.label_column is not None:
            batch["labels"] = self._numbers(examples, self.label_column)
        return batch

    def rows(self, example: Mapping[str, Any]) -> list[tuple[str, ...]]:
        """Return the columns of each of an example's rows: one, or the two of a pair."""
        return self.columns if self.columns is not None else self._text_columns(example)

    def _text_columns(self, example: Mapping[str, Any]) -> list[tuple[str, ...]]:
        names = [name for name, value in example.items() if isinstance(value, str)]
        unknown = [name for name in self.prompts if name not in names]
        if not names:
            raise OptionError(f"An example must have a text; found the columns {sorted(example)}.")
        if self.label_column is not None and len(names) != 1:
            raise OptionError(f"label_column is for one row per example; the texts are {names}. Pass columns.")
        if unknown and not set(names) & set(self.prompts):
            raise OptionError(f"prompts has {unknown}, and the columns of texts are {names}.")
        return [(name,) for name in names]

    def text(self, example: Mapping[str, Any], name: str) -> str:
        """Return the text of a column, with its prompt.

        Raises:
            OptionError: The example lacks the column, or its value is no string.
        """
        if name not in example:
            raise OptionError(
                f"An example must have the column {name!r}; found {sorted(example)}.{did_you_mean(name, example)}"
            )
        if not isinstance(example[name], str):
            raise OptionError(f"The column {name!r} must hold texts; found {example[name]!r:.60}.")
        return self.prompts.get(name, "") + str(example[name])

    def _numbers(self, examples: Sequence[Mapping[str, Any]], name: str) -> torch.Tensor:
        values = [example.get(name) for example in examples]
        if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
            raise OptionError(f"The column {name!r} must hold a number in every example; found {values!r:.80}.")
        return torch.tensor(values, dtype=torch.float32)


class SentenceRows:
    """The rows of a dataset of texts, each an example of its own: what a teacher is captured on.

    Args:
        dataset: It has a length and an index, and the same columns of texts in every example.
        collator: Names the columns and has their prompts.
    """

    def __init__(self, dataset: Any, collator: SentenceCollator):
        self.dataset, self._collator = dataset, collator
        self._rows = collator.rows(dataset[0])

    def __len__(self) -> int:
        return len(self.dataset) * len(self._rows)

    def __getitem__(self, number: int) -> dict[str, str]:
        """Return the one or two texts of a row, as columns that `row_collator` reads."""
        index, row = divmod(number, len(self._rows))
        example = self.dataset[index]
        return {
            column: self._collator.text(example, name)
            for column, name in zip(_ROW_COLUMNS, self._rows[row], strict=False)
        }

    def row_collator(self) -> SentenceCollator:
        """Return the collator of the rows, which tokenizes as that of the examples does."""
        columns = [_ROW_COLUMNS[: len(self._rows[0])]]
        return SentenceCollator(self._collator.tokenizer, columns, max_length=self._collator.max_length)


class CollatedBatches:
    """The batches that a collator makes of a dataset, without what no model is called with: calibration data.

    Args:
        dataset: Of examples, in the order in which they are used.
        collator: Makes a batch of them.
        size: Examples per batch.
    """

    def __init__(self, dataset: Iterable[Any], collator: Callable[[list[Any]], Mapping[str, Any]], size: int = 16):
        self.dataset, self.collator, self.size = dataset, collator, size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the batches, as often as they are asked for."""
        examples = iter(self.dataset)
        while rows := list(itertools.islice(examples, self.size)):
            yield {name: value for name, value in self.collator(rows).items() if name not in SENTENCE_COLUMNS}


def _parse_columns(columns: Any) -> list[tuple[str, ...]]:
    like = "['sentence1', 'sentence2'] for embeddings, or [('query', 'passage')] for a cross-encoder"
    if isinstance(columns, str) or not isinstance(columns, Sequence) or not columns:
        raise OptionError(f"columns must be a list, such as {like}; found {columns!r}.")
    rows = [(row,) if isinstance(row, str) else tuple(row) for row in columns]
    if any(len(row) not in (1, 2) or not all(isinstance(name, str) for name in row) for row in rows):
        raise OptionError(f"columns must be names or pairs of names, such as {like}; found {columns!r}.")
    if len({len(row) for row in rows}) > 1:
        raise OptionError(f"columns must all be names, or all pairs; found {columns!r}.")
    return rows
