"""Columns of raw rows as texts: strings only, conversations rendered by the chat template, tokenised to their end."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from hf_guide.errors import OptionError

CONVERSATION_COLUMNS = ("messages", "conversations", "conversation", "chat")
"""Usual names of columns of conversations, lists of {"role": ..., "content": ...}."""


def check_strings(values: Sequence[Any], rows: Sequence[int], column: str, dataset: str) -> list[str]:
    """Return the values of a column, all of which must be strings.

    Args:
        values: of some rows.
        rows: their numbers.
        column, dataset: names, for the error.

    Raises:
        OptionError: names the column, the first row whose value is no string, and that value's type.
    """
    for value, row in zip(values, rows, strict=True):
        if not isinstance(value, str):
            raise _not_text_error(value, row, column, dataset)
    return list(values)


def check_words(values: Sequence[Any], rows: Sequence[int], column: str, dataset: str) -> list[list[str]]:
    """Return the values of a column, all of which must be lists of strings.

    Raises:
        OptionError: names the column, the first row whose value is something else, and the type.
    """
    for value, row in zip(values, rows, strict=True):
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            inner = {type(word).__name__ for word in value} if isinstance(value, list) else None
            found = f"a list of {' and '.join(sorted(inner))}" if inner else type(value).__name__
            raise OptionError(
                f"{dataset}: column {column!r} must hold lists of words, and row {row} has {found}. Name another column with "
                "text_column, or fix the row."
            )
    return list(values)


def render_texts(
    values: Sequence[Any], rows: Sequence[int], column: str, dataset: str, tokenizer: Any
) -> tuple[list[str], bool]:
    """Return the texts of a column, and whether they are conversations that the chat template rendered.

    A rendered text has the special tokens that the template writes: tokenise it with `add_special_tokens=False`.

    Args:
        values: strings, or conversations: lists of {"role": ..., "content": ...}.
        rows: their numbers.
        column, dataset: names, for errors.
        tokenizer: has the chat template.

    Raises:
        OptionError: values of another type, a conversation of another form, or one that the template refuses; names the row.
            Or conversations, and no chat template.
    """
    if not any(isinstance(value, list) for value in values):
        return check_strings(values, rows, column, dataset), False
    if getattr(tokenizer, "chat_template", None) is None:
        raise OptionError(
            f"{dataset}: column {column!r} holds conversations, no text, and the tokenizer has no chat_template to render "
            "them. Give it one, name a column of text with text_column, or make one."
        )
    texts = []
    for value, row in zip(values, rows, strict=True):
        _check_conversation(value, row, column, dataset)
        try:
            texts.append(tokenizer.apply_chat_template(value, tokenize=False))
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise OptionError(
                f"{dataset}: the tokenizer's chat template does not render column {column!r} of row {row}: {error}."
            ) from error
    return texts, True


def _check_conversation(value: Any, row: int, column: str, dataset: str) -> None:
    if not isinstance(value, list):
        raise _not_text_error(value, row, column, dataset)
    for message in value:
        content = message.get("content") if isinstance(message, Mapping) else None
        without = isinstance(message, Mapping) and content is None and bool(message.get("tool_calls"))
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            found = f"the keys {sorted(message)}" if isinstance(message, Mapping) else f"a {type(message).__name__}"
        elif not isinstance(content, str) and not without:
            found = f"content of type {type(content).__name__}"
        else:
            continue
        raise OptionError(
            f"{dataset}: column {column!r} holds no text, and is no conversation: each message must be a mapping with the "
            f"texts 'role' and 'content'; row {row} has {found}. Rename its keys, or make a column of text and name it with "
            "text_column."
        )
    if not value:
        raise OptionError(f"{dataset}: column {column!r} has an empty conversation in row {row}. Remove the row.")


def _not_text_error(value: Any, row: int, column: str, dataset: str) -> OptionError:
    found = "nothing (None)" if value is None else f"a value of type {type(value).__name__}"
    return OptionError(
        f"{dataset}: column {column!r} must hold text, and row {row} has {found}. Name a column of text, or fix the row."
    )


def encode_with_eos(
    tokenizer: Any, texts: Sequence[str], *, rendered: bool = False, max_length: int | None = None
) -> list[list[int]]:
    """Return the token ids of texts for a causal language model, each with the end-of-text token after it.

    A text that has one already, by its tokenizer or by its chat template, gets no second. A text that is cut is not at its
    end and gets none. Texts without a token are left out.

    Args:
        tokenizer: of which `eos_token` is the end; where it has none, none is added.
        texts: strings.
        rendered: they are of a chat template, which writes special tokens itself.
        max_length: tokens at which texts are cut, at the side that `tokenizer.truncation_side` names; None for no cut.
    """
    if not texts:
        return []
    made = tokenizer(
        list(texts),
        add_special_tokens=not rendered,
        return_special_tokens_mask=True,
        return_token_type_ids=False,
        return_attention_mask=False,
        verbose=False,
    )
    end, found = tokenizer.eos_token_id, []
    for text, ids, special in zip(texts, made["input_ids"], made["special_tokens_mask"], strict=True):
        if not ids:
            continue
        has_end = ids[-1] == end or (rendered and text.rstrip().endswith(str(tokenizer.eos_token)))
        whole = ids if end is None or has_end else [*ids, end]
        found.append(
            whole if max_length is None else _truncate_ids(whole, special, max_length, tokenizer.truncation_side)
        )
    return found


def _truncate_ids(ids: list[int], special: list[int], length: int, side: str) -> list[int]:
    if len(ids) <= length:
        return ids
    if side == "right":
        return ids[:length]
    first = next((place for place, is_special in enumerate(special) if not is_special), 0)
    first = min(first, length)
    return ids[:first] + ids[len(ids) - (length - first) :]
