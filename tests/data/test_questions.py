"""Questions and labels become what the models' losses take: spans, choices, real numbers, several classes at once."""

import copy
from typing import Any

import datasets
import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig

from hf_guide.data.arguments import DataArguments
from hf_guide.data.class_labels import value_encoder, value_kind
from hf_guide.data.preprocessing import preprocess
from hf_guide.errors import OptionError
from hf_guide.tasks import OutputKind, Task
from tests.examples.local import tokenizer

CONTEXT = "Nobody loves the great machine. Every child hates the sea. My neighbour praises long books."
QUESTION = "What is it about?"


def prepared(task: Task, rows: list[dict[str, Any]], **options: Any) -> Any:
    arguments = DataArguments(data_files=["rows.json"], **options)
    return preprocess(task, datasets.Dataset.from_list(rows), None, tokenizer(), arguments)


def question(answer: str | None) -> dict[str, Any]:
    found = {"text": [answer], "answer_start": [CONTEXT.index(answer)]} if answer else {"text": [], "answer_start": []}
    return {"question": QUESTION, "context": CONTEXT, "answers": found}


def test_the_span_of_an_answer_is_its_text_in_every_piece_that_has_it() -> None:
    """Long contexts are split with an overlap; a piece without the answer, and a question without one, point at the start."""
    tok = tokenizer()
    for length in (64, 32):
        data = prepared(
            Task.QUESTION_ANSWERING, [question("the great machine"), question(None)], max_length=length
        ).train
        texts = []
        for row in data:
            start, end = row["start_positions"], row["end_positions"]
            texts.append(tok.decode(row["input_ids"][start : end + 1]).strip() if start else "")
        assert set(texts) <= {"the great machine", ""} and texts[0] == "the great machine"
        assert texts[-1] == "" and (length == 64) == (len(data) == 2)


def test_a_tokenizer_that_adds_no_special_token_points_at_the_first_token_for_no_answer() -> None:
    """As GPT-2's, which has a bos_token and does not add it."""
    tok = copy.deepcopy(tokenizer())  # the tests share one
    tok.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    rows = datasets.Dataset.from_list([question("the great machine"), question(None)])
    arguments = DataArguments(data_files=["rows.json"], max_length=64)
    spans = preprocess(Task.QUESTION_ANSWERING, rows, None, tok, arguments).train
    assert tok.bos_token_id is not None and tok.bos_token_id not in spans[0]["input_ids"]
    first = spans[0]
    text = tok.decode(first["input_ids"][first["start_positions"] : first["end_positions"] + 1])
    assert text.strip() == "the great machine" and (spans[1]["start_positions"], spans[1]["end_positions"]) == (0, 0)


def test_choices_are_grouped_and_padded_together() -> None:
    """From numbered columns with a common beginning, or from a list; the label is a number, a digit or a letter."""
    columns = {
        "sent1": "Nobody",
        "sent2": "loves",
        "ending0": "the sea.",
        "ending1": "this town and long books.",
        "label": 1,
    }
    listed = {"question": "Nobody loves", "choices": ["the sea.", "this town and long books."], "answer": "B"}
    made = [prepared(Task.MULTIPLE_CHOICE, [row] * 2, max_length=32) for row in (columns, listed)]
    batches = [each.collator([each.train[0], each.train[1]]) for each in made]
    assert all(batch["input_ids"].shape[:2] == (2, 2) and batch["labels"].tolist() == [1, 1] for batch in batches)
    text = tokenizer().decode(made[0].train[0]["input_ids"][1], skip_special_tokens=True)
    assert text.endswith("loves this town and long books.")


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        (Task.QUESTION_ANSWERING, {"answers": "the sea"}, "as in SQuAD"),
        (Task.QUESTION_ANSWERING, {"context": None}, "column 'context'"),
        (Task.MULTIPLE_CHOICE, {"label": 4}, "0 to 1, or its letter; row 0 has 4"),
        (Task.MULTIPLE_CHOICE, {"choices": ["one"]}, "two at least"),
    ],
)
def test_other_contents_are_an_error_that_states_what_is_expected(task: Task, change: Any, message: str) -> None:
    row = question("the sea") if task is Task.QUESTION_ANSWERING else {"text": "a", "choices": ["b", "c"], "label": 0}
    with pytest.raises(OptionError, match=message):
        prepared(task, [row | change], max_length=32)


def test_missing_columns_are_named() -> None:
    with pytest.raises(OptionError, match="none of .'question', 'query'.; it has .'text'."):
        prepared(Task.QUESTION_ANSWERING, [{"text": "a"}], max_length=32)
    with pytest.raises(OptionError, match="ending0, ending1"):
        prepared(Task.MULTIPLE_CHOICE, [{"text": "a", "label": 0}], max_length=32)


CLASSES = BertConfig(num_labels=3)
SEVERAL = BertConfig(num_labels=3, problem_type="multi_label_classification")
ONE = BertConfig(num_labels=1)


def labels(values: list[Any]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"label": values})


@pytest.mark.parametrize(
    ("values", "config", "kind", "expected"),
    [
        ([0.5, -2.0], ONE, OutputKind.REAL, [0.5, -2.0]),
        ([1, 5], ONE, OutputKind.REAL, [1.0, 5.0]),
        ([["b", "c"], []], SEVERAL, OutputKind.BERNOULLI, [[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]]),
        ([[2], [0, 1]], SEVERAL, OutputKind.BERNOULLI, [[0.0, 0.0, 1.0], [1.0, 1.0, 0.0]]),
        (["c", "a"], CLASSES, OutputKind.CATEGORICAL, [2, 0]),
    ],
)
def test_labels_are_what_the_model_predicts(values: Any, config: Any, kind: OutputKind, expected: Any) -> None:
    data = labels(values)
    assert value_kind(data, "label", Task.SEQUENCE_CLASSIFICATION, [None, config]) is kind
    names = ["a", "b", "c"] if kind is not OutputKind.REAL else None
    encode = value_encoder(kind, data, "label", names)
    assert [encode(value) for value in data["label"]] == expected


@pytest.mark.parametrize(
    ("values", "config", "message"),
    [
        ([0.5], CLASSES, "contains real numbers, and .* predicts one class for each example"),
        ([[1]], ONE, "contains a list of classes .* predicts real numbers"),
        ([1], SEVERAL, "contains one class .* predicts a list of classes"),
        (["a"], ONE, "contains one class .* predicts real numbers"),
    ],
)
def test_other_labels_than_the_models_are_refused(values: Any, config: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        value_kind(labels(values), "label", Task.SEQUENCE_CLASSIFICATION, [config])


@pytest.mark.parametrize(
    ("kind", "values", "wrong"),
    [
        (OutputKind.REAL, [0.5], np.nan),
        (OutputKind.REAL, [0.5], None),
        (OutputKind.BERNOULLI, [[0, 1, 2]], [0, 1, 1, 0]),
        (OutputKind.BERNOULLI, [[0, 1, 2]], None),
    ],
)
def test_a_label_that_means_nothing_is_an_error(kind: OutputKind, values: Any, wrong: Any) -> None:
    """Such as a vector of zeros and ones in place of a list of classes."""
    encode = value_encoder(kind, labels(values), "label", None)
    with pytest.raises(OptionError, match="must contain a"):
        encode(wrong)
