"""Find the format of a dataset for language models by its columns, and read its rows.

Does: choose columns by their names; convert a row to a prompt and a completion, each a text or a list of messages; check
messages. Does not: apply a chat template or tokenize (`encoding.py` does).
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_guide.errors import OptionError
from hf_guide.validation import StringEnum, did_you_mean

Messages = list[dict[str, Any]]

MESSAGES_COLUMNS = ("messages", "conversations", "conversation", "chat")
"""Columns of conversations, the preferred name first."""
OUTPUT_COLUMNS = ("output", "response")
ROLES = ("system", "user", "assistant", "tool")
"""Roles that every template is expected to know; it may name more."""

_TEXT_COLUMN = "text"
_CONTENT_COLUMNS = (*MESSAGES_COLUMNS, _TEXT_COLUMN, "prompt", "completion", "instruction", "input", *OUTPUT_COLUMNS)
_UNUSED_CONTENT = ("chosen", "rejected", "system", "system_prompt")
"""Columns with content that no format uses."""

UNDERSTOOD = (
    "a column 'messages' (or 'conversations'): lists of {role, content}, optionally with 'tools'; 'prompt' and 'completion': "
    "strings, or lists of messages; 'instruction' and 'output', optionally with 'input'; 'text'"
)

_SHARE_GPT_ROLES = {"human": "user", "gpt": "assistant"}


class RowFormat(StringEnum):
    """What the rows of a dataset are."""

    TEXT = "text"
    """One text each."""
    MESSAGES = "messages"
    """One conversation each."""
    PROMPT_COMPLETION = "prompt-completion"
    """A prompt and its completion: two strings, or two lists of messages."""
    INSTRUCTION = "instruction"
    """An instruction, perhaps an input for it, and the output."""


@dataclass(frozen=True)
class DatasetFormat:
    """The format of a dataset and the columns that have it.

    Attributes:
        kind: The format.
        columns: The texts; the conversations; the prompts and completions; or the instructions, outputs and, if there are
            any, inputs.
        dataset: Name of the dataset, for errors.
    """

    kind: RowFormat
    columns: tuple[str, ...]
    dataset: str

    @property
    def has_completions(self) -> bool:
        """Whether prompts and completions can be distinguished."""
        return self.kind in (RowFormat.PROMPT_COMPLETION, RowFormat.INSTRUCTION)


@dataclass(frozen=True)
class PromptCompletion:
    """One row: what a completion follows, and the completion; both texts, or both lists of messages.

    Attributes:
        prompt: None if the row has one conversation, which is then the completion.
        completion: The text or messages after the prompt.
        tools: JSON schemas of the functions that the assistant may call.
        template_kwargs: Further arguments of the chat template.
    """

    prompt: str | Messages | None
    completion: str | Messages
    tools: list[Any] | None = None
    template_kwargs: Mapping[str, Any] | None = None


def detect_format(
    columns: Sequence[str],
    first_row: Mapping[str, Any],
    dataset: str,
    *,
    text_column: str | None = None,
    target_column: str | None = None,
) -> DatasetFormat | None:
    """Return the format of a dataset; None if no name of its columns is known.

    Args:
        columns: Names of all its columns.
        first_row: Distinguishes texts from conversations where the name of a column does not.
        dataset: Name, for errors.
        text_column: The column to train on alone, or with `target_column` the prompts.
        target_column: The completions.

    Raises:
        OptionError: There is no such column, or columns of several formats; lists what is understood.

    Example:
        >>> detect_format(["prompt", "completion", "id"], {}, "some/data").kind.value
        'prompt-completion'
    """
    for option, name in (("text_column", text_column), ("target_column", target_column)):
        if name is not None and name not in columns:
            raise OptionError(
                f"{dataset} has no column {name!r}; it has {list(columns)}.{did_you_mean(name, columns)} Set {option} to one "
                "of these."
            )
    if target_column is not None:
        if text_column is None:
            raise OptionError(f"target_column={target_column!r} is the completion: set text_column to its prompt.")
        if text_column == "instruction" and target_column in OUTPUT_COLUMNS:
            return DatasetFormat(RowFormat.INSTRUCTION, _with_input(text_column, target_column, columns), dataset)
        return DatasetFormat(RowFormat.PROMPT_COMPLETION, (text_column, target_column), dataset)
    if text_column is not None:
        return _format_of_column(text_column, first_row, dataset)
    formats = _formats_by_name(columns, first_row, dataset)
    used = {name for each in formats for name in each.columns}
    further = [name for name in columns if name in (*_CONTENT_COLUMNS, *_UNUSED_CONTENT) and name not in used]
    if not formats and len(columns) == 1:  # whatever its name
        only = _format_of_column(columns[0], first_row, dataset)
        return only if only.kind is RowFormat.MESSAGES else None
    if not formats and not further:
        return None
    if len(formats) != 1 or further:
        raise _mixed_columns_error(columns, dataset)
    return formats[0]


def _formats_by_name(columns: Sequence[str], first_row: Mapping[str, Any], dataset: str) -> list[DatasetFormat]:
    formats = [_format_of_column(name, first_row, dataset) for name in MESSAGES_COLUMNS if name in columns]
    if {"prompt", "completion"} <= set(columns):
        formats.append(DatasetFormat(RowFormat.PROMPT_COMPLETION, ("prompt", "completion"), dataset))
    outputs = [name for name in OUTPUT_COLUMNS if name in columns]
    if "instruction" in columns and outputs:
        formats.append(DatasetFormat(RowFormat.INSTRUCTION, _with_input("instruction", outputs[0], columns), dataset))
    if _TEXT_COLUMN in columns:
        formats.append(_format_of_column(_TEXT_COLUMN, first_row, dataset))
    return formats


def _format_of_column(column: str, first_row: Mapping[str, Any], dataset: str) -> DatasetFormat:
    value = first_row.get(column)
    if column in MESSAGES_COLUMNS:
        is_conversation = not isinstance(value, str)
    else:
        is_conversation = isinstance(value, list) and any(isinstance(each, (Mapping, list)) for each in value)
    return DatasetFormat(RowFormat.MESSAGES if is_conversation else RowFormat.TEXT, (column,), dataset)


def _with_input(instruction: str, output: str, columns: Collection[str]) -> tuple[str, ...]:
    return (instruction, output, "input") if "input" in columns else (instruction, output)


def _mixed_columns_error(columns: Sequence[str], dataset: str) -> OptionError:
    return OptionError(
        f"{dataset} has the columns {list(columns)}, which are not those of one format. Understood are {UNDERSTOOD}. Set "
        "text_column to the column to train on, text_column and target_column to the prompts and the completions, or remove "
        "the other columns."
    )


def read_row(row: Mapping[str, Any], index: int, data_format: DatasetFormat, *, chat: bool) -> PromptCompletion:
    """Return the prompt and the completion of a row.

    Args:
        row: Values by column.
        index: Of the row, for errors.
        data_format: Of the dataset, not `RowFormat.TEXT`.
        chat: Whether instructions become messages, for a chat template; otherwise a text with headings.

    Raises:
        OptionError: A value has the wrong type or form; names the row, the column and what it has.
    """
    tools, template_kwargs = _read_tools(row, index, data_format), _read_template_kwargs(row, index, data_format)
    values = [row.get(column) for column in data_format.columns]
    if data_format.kind is RowFormat.MESSAGES:
        messages = check_messages(values[0], index, data_format.columns[0], data_format.dataset)
        return PromptCompletion(None, messages, tools, template_kwargs)
    if data_format.kind is RowFormat.INSTRUCTION:
        return _read_instruction(values, index, data_format, chat=chat)
    if all(isinstance(value, list) for value in values):
        prompt, completion = (
            check_messages(value, index, column, data_format.dataset)
            for value, column in zip(values, data_format.columns, strict=True)
        )
        return PromptCompletion(prompt, completion, tools, template_kwargs)
    if any(isinstance(value, list) for value in values):
        kinds = " and ".join(
            f"{name!r} {_describe(value)}" for name, value in zip(data_format.columns, values, strict=True)
        )
        raise OptionError(
            f"{data_format.dataset}: a prompt and its completion must both be texts or both be lists of messages; row "
            f"{index} has in {kinds}. Correct the row."
        )
    texts = [
        _check_text(value, index, column, data_format.dataset)
        for value, column in zip(values, data_format.columns, strict=True)
    ]
    return PromptCompletion(texts[0], texts[1])


def _read_instruction(
    values: Sequence[Any], index: int, data_format: DatasetFormat, *, chat: bool
) -> PromptCompletion:
    names = data_format.columns
    has_input = len(values) > 2 and values[2] is not None
    instruction, output, *inputs = (
        _check_text(value, index, column, data_format.dataset)
        for value, column in zip(values[: 3 if has_input else 2], names, strict=False)
    )
    context = inputs[0] if inputs else ""
    if chat:
        content = f"{instruction}\n\n{context}" if context else instruction
        return PromptCompletion([{"role": "user", "content": content}], [{"role": "assistant", "content": output}])
    sections = {"Instruction": instruction} | ({"Input": context} if context else {})
    prompt = "".join(f"### {name}:\n{text}\n\n" for name, text in sections.items())
    return PromptCompletion(f"{prompt}### Response:\n", output)


def _check_text(value: Any, index: int, column: str, dataset: str) -> str:
    if not isinstance(value, str):
        raise OptionError(
            f"{dataset}: column {column!r} must contain text; row {index} has {_describe(value)}. Correct or remove the row."
        )
    return value


def _describe(value: Any) -> str:
    return "None" if value is None else f"a value of type {type(value).__name__}"


# Messages


def check_messages(value: Any, index: int, column: str, dataset: str) -> Messages:
    """Return the messages of a conversation with the keys `role` and `content`, without keys whose value is None.

    Keys `from` and `value` are renamed, with the roles `human` and `gpt`; contents in parts are joined if all are text.

    Raises:
        OptionError: Something else than a list of messages, or none; names the row and what it has.

    Example:
        >>> check_messages([{"from": "human", "value": "Hello"}], 0, "conversations", "some/data")
        [{'role': 'user', 'content': 'Hello'}]
    """
    where = f"{dataset}: column {column!r}"
    if not isinstance(value, list):
        raise OptionError(
            f"{where} must contain text or conversations, of one kind; row {index} has {_describe(value)}. Set text_column "
            "to another column, or correct the row."
        )
    if not value:
        raise OptionError(f"{where} has an empty conversation in row {index}. Remove the row.")
    return [_check_message(message, index, where) for message in value]


def _check_message(message: Any, index: int, where: str) -> dict[str, Any]:
    problem = None
    if not isinstance(message, Mapping):
        problem = f"a {type(message).__name__}"
    else:
        message = _without_none(message)
        if {"from", "value"} <= message.keys() and not {"role", "content"} & message.keys():
            role = message.pop("from")
            message["role"], message["content"] = _SHARE_GPT_ROLES.get(role, role), message.pop("value")
        content = message.get("content")
        if isinstance(content, list):
            content = message["content"] = _join_parts(content, index, where)
        if not isinstance(message.get("role"), str):
            problem = (
                f"the keys {sorted(message)}"
                if "role" not in message
                else f"a role of type {type(message['role']).__name__}"
            )
        elif not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            problem = f"content of type {type(content).__name__}"
    if problem is not None:
        raise OptionError(
            f"{where} contains neither texts nor valid conversations: each message must be a mapping with the strings 'role' "
            f"and 'content'; row {index} has {problem}. Rename its keys, correct the row, or set text_column to a column of "
            "texts."
        )
    return dict(message)


def _join_parts(parts: list[Any], index: int, where: str) -> str:
    kinds = {part.get("type", "?") if isinstance(part, Mapping) else type(part).__name__ for part in parts}
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in parts]
    if kinds - {"text"} or not all(isinstance(text, str) for text in texts):
        raise OptionError(
            f"{where} has a content in parts of the types {sorted(map(str, kinds))} in row {index}; for a language model all "
            "parts must be {'type': 'text', 'text': ...}. Remove the others, or use a model for image-text-to-text."
        )
    return "".join(map(str, texts))


def _without_none(value: Any) -> Any:
    """Return a value without the keys that `datasets` adds with None to mappings that lack them."""
    if isinstance(value, Mapping):
        return {key: _without_none(each) for key, each in value.items() if each is not None}
    return [_without_none(each) for each in value] if isinstance(value, list) else value


def _read_tools(row: Mapping[str, Any], index: int, data_format: DatasetFormat) -> list[Any] | None:
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except json.JSONDecodeError as error:
            raise OptionError(
                f"{data_format.dataset}: column 'tools' must be valid JSON where it is text; row {index}: {error}."
            ) from error
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise OptionError(
            f"{data_format.dataset}: column 'tools' must contain lists of JSON schemas (mappings), or such lists as JSON "
            f"text; row {index} has {_describe(tools)}."
        )
    return _without_none(tools) or None


def _read_template_kwargs(row: Mapping[str, Any], index: int, data_format: DatasetFormat) -> Mapping[str, Any] | None:
    kwargs = row.get("chat_template_kwargs")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise OptionError(
            f"{data_format.dataset}: column 'chat_template_kwargs' must contain mappings; row {index} has "
            f"{_describe(kwargs)}."
        )
    return _without_none(kwargs)
