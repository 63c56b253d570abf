"""Turn questions into model inputs: answers in a context (SQuAD's format), and endings to choose from (SWAG's format).

Does: find the columns, tokenize, split long contexts, find the tokens of an answer.
Does not: turn logits into texts of answers (`examples/run_qa_distillation.py` does).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

from datasets import Dataset, List
from transformers import DataCollatorForMultipleChoice, DataCollatorWithPadding

from hf_guide.data.arguments import DataArguments
from hf_guide.data.loading import check_strings
from hf_guide.errors import OptionError
from hf_guide.tasks import Task

Examples = dict[str, list[Any]]

_QUESTION_COLUMNS = ("question", "query")
_CONTEXT_COLUMNS = ("context", "passage")
_ANSWER_COLUMNS = ("answers", "answer")
_STORY_COLUMNS = ("sent1", "question", "context", "text")
_CHOICES_COLUMNS = ("choices", "endings", "options")
_NUMBERED_CHOICE = re.compile(r"(ending|choice|option)_?\d+")
_LABEL_COLUMNS = ("label", "labels", "answer")


def preprocess_questions(
    task: Task, train: Dataset, held_out: Dataset | None, tokenizer: Any, options: DataArguments
) -> tuple[Dataset, Dataset | None, Callable[[Any], Mapping[str, Any]]]:
    """Return the splits as inputs of a model that answers questions or chooses among endings, and their collator.

    Args:
        task: Question answering or multiple choice.
        train, held_out: Raw splits.
        tokenizer: The models' own.
        options: `text_column` has the questions, `text_pair_column` the contexts (or, for a choice, the text that each ending
            continues), `label_column` the answers (or the number of the right ending); by default SQuAD's and SWAG's names.

    Raises:
        OptionError: A column is missing or has other contents; what is expected is named.
    """
    is_choice = task is Task.MULTIPLE_CHOICE
    make = _choice_preprocessor if is_choice else _answer_preprocessor
    made = [
        None
        if split is None
        else split.map(
            make(split, tokenizer, options),
            batched=True,
            with_indices=True,
            remove_columns=split.column_names,
            num_proc=options.preprocessing_num_workers,
            desc="Tokenizing",
        )
        for split in (train, held_out)
    ]
    collator = DataCollatorForMultipleChoice(tokenizer) if is_choice else DataCollatorWithPadding(tokenizer)
    assert made[0] is not None
    return made[0], made[1], collator


def _column(split: Dataset, options: DataArguments, option: str, defaults: Sequence[str]) -> str:
    requested = getattr(options, option)
    found = [name for name in ([requested] if requested else defaults) if name in split.column_names]
    if not found:
        expected = repr(requested) if requested else f"none of {list(defaults)}"
        raise OptionError(
            f"{options.name} has {'no column ' if requested else ''}{expected}; it has {split.column_names}. Set {option} to "
            "one of these."
        )
    return found[0]


def _answer_preprocessor(split: Dataset, tokenizer: Any, options: DataArguments) -> Callable[..., Examples]:
    question = _column(split, options, "text_column", _QUESTION_COLUMNS)
    context = _column(split, options, "text_pair_column", _CONTEXT_COLUMNS)
    answer = _column(split, options, "label_column", _ANSWER_COLUMNS)
    if not tokenizer.is_fast:
        raise OptionError(
            f"{type(tokenizer).__name__} must be a fast tokenizer, for the positions of tokens in the text. Use another "
            "tokenizer, or prepare the dataset in a script of your own."
        )

    def to_inputs(examples: Examples, rows: list[int]) -> Examples:
        texts = [check_strings(examples[name], rows, name, options.name) for name in (question, context)]
        first, second = texts if tokenizer.padding_side == "right" else texts[::-1]
        encoded = tokenizer(
            first,
            second,
            truncation="only_second" if tokenizer.padding_side == "right" else "only_first",
            max_length=options.max_length,
            stride=min(128, (options.max_length or 512) // 4),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        sources = encoded.pop("overflow_to_sample_mapping")
        offsets = encoded.pop("offset_mapping")
        spans = []
        for piece, source in enumerate(sources):
            none = no_answer_token(encoded["input_ids"][piece], tokenizer)
            parts = encoded.sequence_ids(piece)
            own = [token for token, part in enumerate(parts) if part == int(tokenizer.padding_side == "right")]
            characters = _answer_characters(examples[answer][source], rows[source], answer, options)
            spans.append(_answer_tokens(offsets[piece], own, characters, none))
        return dict(encoded) | {
            "start_positions": [start for start, _ in spans],
            "end_positions": [end for _, end in spans],
        }

    return to_inputs


def no_answer_token(ids: list[int], tokenizer: Any) -> int:
    """Return the position that is the answer of a question without one.

    That of the cls_token, or else of the bos_token, or else the first, as in Transformers' run_qa.py: many tokenizers of
    decoders have a bos_token and do not add it.
    """
    candidates = [token for token in (tokenizer.cls_token_id, tokenizer.bos_token_id) if token in ids]
    return ids.index(candidates[0]) if candidates else 0


def _answer_characters(value: Any, row: int, column: str, options: DataArguments) -> tuple[int, int] | None:
    """Return where an answer begins and ends in its context; None for a question without one."""
    if not isinstance(value, Mapping) or not {"text", "answer_start"} <= value.keys():
        raise OptionError(
            f"{options.name}: column {column!r} must have answers as in SQuAD, {{'text': [...], 'answer_start': [...]}}; "
            f"row {row} has {str(value):.60}."
        )
    if not value["text"]:
        return None
    start = value["answer_start"][0]
    return start, start + len(value["text"][0])


def _answer_tokens(
    offsets: Sequence[Sequence[int]], context: Sequence[int], characters: tuple[int, int] | None, none: int
) -> tuple[int, int]:
    """Return the first and the last token of an answer; `none` for both where this piece of the context lacks it."""
    if characters is None or not context:
        return none, none
    first, last = characters
    if offsets[context[0]][0] > first or offsets[context[-1]][1] < last:
        return none, none
    start = max(token for token in context if offsets[token][0] <= first)
    return start, min(token for token in context if offsets[token][1] >= last)


def _choice_preprocessor(split: Dataset, tokenizer: Any, options: DataArguments) -> Callable[..., Examples]:
    story = _column(split, options, "text_column", _STORY_COLUMNS)
    label = _column(split, options, "label_column", _LABEL_COLUMNS)
    begin = _column(split, options, "text_pair_column", ("sent2",)) if options.text_pair_column else None
    if begin is None and "sent2" in split.column_names:
        begin = "sent2"
    numbered = sorted(name for name in split.column_names if _NUMBERED_CHOICE.fullmatch(name))
    listed = [name for name in _CHOICES_COLUMNS if isinstance(split.features.get(name), List)]
    if not numbered and not listed:
        raise OptionError(
            f"{options.name} must have the texts to choose from in columns ending0, ending1, ..., or in a list, 'choices'; it "
            f"has {split.column_names}."
        )

    def to_inputs(examples: Examples, rows: list[int]) -> Examples:
        stories = check_strings(examples[story], rows, story, options.name)
        begins = check_strings(examples[begin], rows, begin, options.name) if begin else None
        if numbered:
            columns = [check_strings(examples[name], rows, name, options.name) for name in numbered]
            choices = [list(each) for each in zip(*columns, strict=True)]
        else:
            choices = examples[listed[0]]
        counts = {len(each) for each in choices}
        if len(counts) != 1 or min(counts) < 2:
            raise OptionError(
                f"{options.name}: every row must have as many texts to choose from, two at least; found {sorted(counts)}."
            )
        count = counts.pop()
        labels = [
            _choice_number(value, row, label, count, options) for value, row in zip(examples[label], rows, strict=True)
        ]
        first = list(chain.from_iterable([each] * count for each in stories))
        second = [f"{begins[row]} {text}" if begins else text for row, texts in enumerate(choices) for text in texts]
        encoded = tokenizer(first, second, truncation=True, max_length=options.max_length)
        grouped = {
            name: [values[start : start + count] for start in range(0, len(values), count)]
            for name, values in encoded.items()
        }
        return grouped | {"labels": labels}

    return to_inputs


def _choice_number(value: Any, row: int, column: str, count: int, options: DataArguments) -> int:
    """Return the number of the right choice, which may be written as a digit or, from A, as a letter."""
    if isinstance(value, str) and len(value) == 1 and value.isalpha():
        value = ord(value.upper()) - ord("A")
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if not isinstance(value, int) or not 0 <= value < count:
        raise OptionError(
            f"{options.name}: column {column!r} must have the number of the right choice, 0 to {count - 1}, or its letter; "
            f"row {row} has {value!r}."
        )
    return value
