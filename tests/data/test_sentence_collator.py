"""A batch of texts, of pairs of texts and of scored pairs: each row in its position, with the prompt and the cut."""

from typing import Any

import pytest
import torch

from hf_guide import OptionError, SentenceCollator
from tests.sentence_folder import tokenizer

PAIRS = [{"a": "w1", "b": "w2 w3", "score": 0.5}, {"a": "w4 w5", "b": "w6", "score": 1}]


def rows(batch: dict[str, torch.Tensor]) -> list[str]:
    """Return the words of each row, without padding."""
    return [tokenizer().decode([token for token in row if token != 0]) for row in batch["input_ids"].tolist()]


def test_each_text_is_a_row_and_those_of_an_example_follow_each_other() -> None:
    batch = SentenceCollator(tokenizer())(PAIRS)
    assert rows(batch) == ["[CLS] w1 [SEP]", "[CLS] w2 w3 [SEP]", "[CLS] w4 w5 [SEP]", "[CLS] w6 [SEP]"]
    assert batch["rows_per_example"].tolist() == [2, 2, 2, 2] and batch["scores"].tolist() == [0.5, 0.5, 1.0, 1.0]
    single = SentenceCollator(tokenizer())([{"text": "w7"}, {"text": "w8"}])
    assert rows(single) == ["[CLS] w7 [SEP]", "[CLS] w8 [SEP]"] and "scores" not in single


def test_pairs_for_a_cross_encoder_are_one_row_each() -> None:
    example = {"q": "w1", "p": "w2", "n": "w3", "id": 7}
    batch = SentenceCollator(tokenizer(), [("q", "p"), ("q", "n")])([example])
    assert rows(batch) == ["[CLS] w1 [SEP] w2 [SEP]", "[CLS] w1 [SEP] w3 [SEP]"]
    labeled = SentenceCollator(tokenizer(), [("q", "p")], label_column="id")([example, example])
    assert labeled["labels"].tolist() == [7.0, 7.0]


def test_prompts_and_the_maximal_length() -> None:
    collator = SentenceCollator(tokenizer(), ["b", "a"], prompts={"a": "w9 "}, max_length=4)
    assert rows(collator(PAIRS[:1])) == ["[CLS] w2 w3 [SEP]", "[CLS] w9 w1 [SEP]"]
    assert rows(collator([{"a": "w1 w2", "b": "w3"}])) == ["[CLS] w3 [SEP]", "[CLS] w9 w1 [SEP]"]
    by_tokenizer = SentenceCollator(tokenizer())([{"text": "w1 " * 100}])
    assert by_tokenizer["input_ids"].shape == (1, 40)  # its model_max_length


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": "text"}, "columns must be a list"),
        ({"columns": []}, "columns must be a list"),
        ({"columns": [("a", "b", "c")]}, "names or pairs of names"),
        ({"columns": ["a", ("a", "b")]}, "all be names, or all pairs"),
        ({"columns": ["query"], "prompts": {"querry": "q"}}, "Did you mean 'query'"),
        ({"columns": ["a", "b"], "label_column": "score"}, "one row per example"),
        ({"max_length": 0}, "max_length"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        SentenceCollator(tokenizer(), **options)


@pytest.mark.parametrize(
    ("options", "example", "message"),
    [
        ({"columns": ["texts"]}, {"text": "w1"}, "must have the column 'texts'; found .*Did you mean 'text'"),
        ({"columns": ["a"]}, {"a": 3}, "must hold texts; found 3"),
        ({}, {"input_ids": [1]}, r"must have a text; found the columns \['input_ids'\]"),
        ({}, {"a": "w1", "b": "w2", "score": None}, "must hold a number in every example"),
        ({"prompts": {"c": "w9 "}}, {"a": "w1"}, r"prompts has \['c'\]"),
        ({"label_column": "label"}, {"a": "w1", "b": "w2", "label": 1}, "one row per example"),
    ],
)
def test_wrong_examples_are_refused(options: dict[str, Any], example: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        SentenceCollator(tokenizer(), **options)([example])
