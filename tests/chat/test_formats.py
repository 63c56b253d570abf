"""The columns decide the format, and columns of no format or of several are an error that lists what is understood."""

from typing import Any

import pytest

from hf_guide.chat.formats import RowFormat, check_messages, detect_format
from hf_guide.errors import OptionError

KNOWN: list[tuple[list[str], dict[str, Any], RowFormat, tuple[str, ...]]] = [
    (["messages"], {}, RowFormat.MESSAGES, ("messages",)),
    (["id", "conversations", "tools"], {}, RowFormat.MESSAGES, ("conversations",)),
    (["chat"], {"chat": "w1"}, RowFormat.TEXT, ("chat",)),
    (["prompt", "completion"], {}, RowFormat.PROMPT_COMPLETION, ("prompt", "completion")),
    (["completion", "source", "prompt"], {}, RowFormat.PROMPT_COMPLETION, ("prompt", "completion")),
    (["instruction", "output"], {}, RowFormat.INSTRUCTION, ("instruction", "output")),
    (["instruction", "input", "output", "id"], {}, RowFormat.INSTRUCTION, ("instruction", "output", "input")),
    (["instruction", "response", "category"], {}, RowFormat.INSTRUCTION, ("instruction", "response")),
    (["text", "label"], {}, RowFormat.TEXT, ("text",)),
    (["dialogue"], {"dialogue": [{"role": "user"}]}, RowFormat.MESSAGES, ("dialogue",)),
    (["text"], {"text": [{"role": "user"}]}, RowFormat.MESSAGES, ("text",)),
]


@pytest.mark.parametrize(("columns", "first", "kind", "used"), KNOWN)
def test_known_columns_are_a_format(
    columns: list[str], first: dict[str, Any], kind: RowFormat, used: tuple[str, ...]
) -> None:
    found = detect_format(columns, first, "some/data")
    assert found is not None and (found.kind, found.columns) == (kind, used)
    assert found.has_completions == (kind in (RowFormat.PROMPT_COMPLETION, RowFormat.INSTRUCTION))


@pytest.mark.parametrize("columns", [["sentence", "label"], ["question", "answer"], ["prompt"], ["whatever"], []])
def test_other_columns_are_no_format_of_chat_data(columns: list[str]) -> None:
    assert detect_format(columns, {}, "some/data") is None


MIXED = [
    ["messages", "prompt", "prompt_id"],
    ["messages", "conversations"],
    ["messages", "text"],
    ["messages", "system"],
    ["prompt", "completion", "messages"],
    ["prompt", "chosen", "rejected"],
    ["prompt", "response"],
    ["prompt", "id"],
    ["instruction", "input", "output", "text"],
    ["instruction", "output", "response"],
    ["instruction", "id"],
    ["completion", "id"],
    ["text", "output"],
]


@pytest.mark.parametrize("columns", MIXED)
def test_columns_of_several_formats_are_an_error(columns: list[str]) -> None:
    with pytest.raises(
        OptionError, match="not those of one format.*'messages'.*'prompt' and 'completion'.*text_column"
    ):
        detect_format(columns, {}, "some/data")


@pytest.mark.parametrize("columns", MIXED)
def test_columns_that_are_named_decide(columns: list[str]) -> None:
    first = {name: [] if name in ("messages", "conversations") else "w1" for name in columns}
    for name in columns:
        found = detect_format(columns, first, "some/data", text_column=name)
        assert found is not None and found.columns == (name,)
        assert found.kind is (RowFormat.MESSAGES if first[name] == [] else RowFormat.TEXT)
    pair = detect_format(columns, first, "some/data", text_column=columns[-1], target_column=columns[0])
    assert pair is not None and pair.kind is RowFormat.PROMPT_COMPLETION and pair.columns == (columns[-1], columns[0])


def test_an_instruction_that_is_named_has_its_input() -> None:
    columns = ["instruction", "input", "output", "text"]
    found = detect_format(columns, {}, "some/data", text_column="instruction", target_column="output")
    assert found is not None and found.columns == ("instruction", "output", "input")


def test_columns_that_are_not_there_are_an_error() -> None:
    with pytest.raises(OptionError, match="no column 'mesages'.*Did you mean 'messages'"):
        detect_format(["messages"], {}, "some/data", text_column="mesages")
    with pytest.raises(OptionError, match="set text_column to its prompt"):
        detect_format(["question", "answer"], {}, "some/data", target_column="answer")


def test_messages_have_the_keys_and_roles_of_transformers() -> None:
    value = [
        {"from": "system", "value": "a"},
        {"from": "human", "value": "b"},
        {"from": "gpt", "value": "c", "weight": None},
    ]
    roles = ["system", "user", "assistant"]
    assert check_messages(value, 0, "conversations", "some/data") == [
        {"role": role, "content": content} for role, content in zip(roles, "abc", strict=True)
    ]
    calls = [{"function": {"name": "f", "arguments": {"x": 1, "y": None}}, "id": None}]
    (found,) = check_messages(
        [{"role": "assistant", "content": None, "tool_calls": calls}], 0, "messages", "some/data"
    )
    assert found == {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
