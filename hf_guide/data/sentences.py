"""Prepare plain texts for embedding models: each text of each column is one to embed, and pairs may have gold scores."""

import logging
from collections.abc import Sequence
from typing import Any

from datasets import Dataset, Value

from hf_guide.data.arguments import DataArguments
from hf_guide.data.loading import check_strings
from hf_guide.data.sentence_collator import SentenceCollator
from hf_guide.errors import OptionError
from hf_guide.models.sentence_files import read_sentence_modules
from hf_guide.validation import did_you_mean

logger = logging.getLogger(__name__)

DEFAULT_SCORE_COLUMN = "score"


def preprocess_sentences(
    train: Dataset, held_out: Dataset | None, tokenizer: Any, options: DataArguments
) -> tuple[Dataset, Dataset | None, SentenceCollator]:
    """Return both splits as they are, checked, and the collator that makes the inputs of their texts.

    The texts are those of `text_column` and `text_pair_column`, or of every column of texts. They are cut at `max_length`
    tokens, by default at the `max_seq_length` of a sentence-transformers folder. `label_column`, by default "score", has the
    gold similarity of the first two texts of a row, for evaluation.

    Raises:
        OptionError: A column is missing, there is none of texts, or a value is no text.
    """
    named = [name for name in (options.text_column, options.text_pair_column) if name is not None]
    columns: list[str] = []
    for split, name in ((train, "training"), (held_out, "evaluation")):
        if split is None:
            continue
        found = named or _text_columns(split)
        _check_columns(split, found, name, options)
        columns += [column for column in found if column not in columns]
    if not named and len(columns) > 1:
        logger.warning(
            "%s: every text of the columns %s is embedded by itself. Set text_column, and text_pair_column, to select.",
            *(options.name, columns),
        )
    if options.label_column is not None:
        measured = held_out if held_out is not None else train
        _check_columns(measured, [options.label_column], "evaluation", options, of_texts=False)
    collator = SentenceCollator(
        tokenizer,
        named or None,
        prompts=dict.fromkeys(columns, options.source_prefix) if options.source_prefix else None,
        max_length=_max_length(tokenizer, options),
        score_column=options.label_column or DEFAULT_SCORE_COLUMN,
    )
    return train, held_out, collator


def _text_columns(split: Dataset) -> list[str]:
    strings = (Value("string"), Value("large_string"))
    return [name for name, feature in split.features.items() if feature in strings]


def _check_columns(
    split: Dataset, columns: Sequence[str], name: str, options: DataArguments, *, of_texts: bool = True
) -> None:
    if not columns:
        raise OptionError(
            f"{options.name}: the {name} split has no column of texts; it has {split.column_names}. Set text_column."
        )
    for column in columns:
        if column not in split.column_names:
            raise OptionError(
                f"{options.name}: the {name} split has no column {column!r}; it has {split.column_names}."
                f"{did_you_mean(column, split.column_names)} Set text_column, text_pair_column and label_column to these."
            )
        if of_texts:
            check_strings(split[column][:], range(len(split)), column, options.name)


def _max_length(tokenizer: Any, options: DataArguments) -> int | None:
    """Return the number of tokens of a text: `max_length`, at most the `max_seq_length` of the tokenizer's folder."""
    modules = read_sentence_modules(tokenizer.name_or_path, if_unknown="warn") if tokenizer.name_or_path else None
    own = None if modules is None else (modules.files.transformer_config or {}).get("max_seq_length")
    return min(own, options.max_length) if isinstance(own, int) and options.max_length else options.max_length
