"""Turn rows of chat and instruction data into token ids and labels.

Does: apply the chat template, find the tokens of the assistant and of completions, append the end-of-sequence token, truncate.
Does not: read columns (`formats.py`) or put several examples into one (`packing.py`).

The tokens of the assistant are those in the spans that the template marks with `{% generation %}`. Of a template without it,
they are found by its prefixes: the conversation up to a turn with the generation prompt must be the beginning of the whole,
and so must the conversation up to the end of the turn. Both are verified for each turn; an error states where they fail.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from hf_guide.chat.formats import ROLES, DatasetFormat, Messages, PromptCompletion, RowFormat, read_row
from hf_guide.errors import OptionError
from hf_guide.utils.labels import IGNORE_INDEX

Span = tuple[int, int]
"""First and one past the last character of a text."""

_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError)
_OTHER_TEMPLATE = (
    "set chat_template_path to a template that marks the assistant's tokens with {% generation %} (TRL has them for many "
    "families: trl.chat_template_utils.get_training_chat_template), or set assistant_only_loss to false"
)


@dataclass(frozen=True)
class EncodedExample:
    """One example for a causal language model.

    Attributes:
        input_ids: Its tokens.
        labels: The same, and -100 at tokens that are no targets.
        has_merged_token: A token has the end of a prompt and the beginning of what follows it in one.
        is_open: A turn or completion ends with a target that is no special token, so that the student is not taught to stop.
        num_special: How many tokens the tokenizer added at the beginning.
    """

    input_ids: list[int]
    labels: list[int]
    has_merged_token: bool = False
    is_open: bool = False
    num_special: int = 0

    @property
    def has_targets(self) -> bool:
        """Whether a model that predicts the next token has a target; the first token is none."""
        return any(label != IGNORE_INDEX for label in self.labels[1:])

    def truncate(self, max_length: int, side: str) -> "EncodedExample":
        """Return the first `max_length` tokens, or with side "left" the last, after the special tokens at the beginning."""
        if len(self.input_ids) <= max_length:
            return self
        if side == "right":
            return dataclasses.replace(self, input_ids=self.input_ids[:max_length], labels=self.labels[:max_length])
        first = min(self.num_special, max_length)
        rest = len(self.input_ids) - (max_length - first)
        return dataclasses.replace(
            self,
            input_ids=self.input_ids[:first] + self.input_ids[rest:],
            labels=self.labels[:first] + self.labels[rest:],
        )


@dataclass(frozen=True)
class ChatEncoder:
    """Encodes the rows of one dataset.

    Args:
        tokenizer: Has the chat template and the end-of-sequence token.
        data_format: Of the dataset, not `RowFormat.TEXT`.
        assistant_only_loss: Only what the assistant writes is a target, as in TRL.
        completion_only_loss: Only completions are targets, as in TRL; None if the format has them.

    Raises:
        OptionError: The format has no assistant or no completions; (when called) a row has another form, or the template
            fails on it or cannot mark the assistant's tokens.

    Example:
        >>> from hf_guide.chat.formats import detect_format
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"2+2": 0, "is": 1, "4": 2, "</s>": 3}, unk_token="</s>"))
        >>> words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
        >>> encode = ChatEncoder(tokenizer, detect_format(["prompt", "completion"], {}, "some/data"))
        >>> example = encode({"prompt": "2+2 is", "completion": " 4"}, 0)
        >>> example.input_ids, example.labels
        ([0, 1, 2, 3], [-100, -100, 2, 3])
    """

    tokenizer: PreTrainedTokenizerBase
    data_format: DatasetFormat
    assistant_only_loss: bool = False
    completion_only_loss: bool | None = None

    def __post_init__(self) -> None:
        if self.completion_only_loss and not self.data_format.has_completions:
            raise OptionError(
                f"completion_only_loss needs prompts and completions, and {self.data_format.dataset} has the format "
                f"{self.data_format.kind}. Set assistant_only_loss for conversations, or leave completion_only_loss out."
            )
        if self.assistant_only_loss and self.data_format.kind is RowFormat.TEXT:
            raise OptionError(
                f"assistant_only_loss needs conversations, and {self.data_format.dataset} has plain texts in column "
                f"{self.data_format.columns[0]!r}. Set assistant_only_loss to false."
            )

    def __call__(self, row: Mapping[str, Any], index: int) -> EncodedExample:
        """Encode the row with this index; it is not truncated."""
        example = read_row(row, index, self.data_format, chat=self._has_template)
        if isinstance(example.completion, str):
            assert isinstance(example.prompt, str)
            return self._encode_texts(example.prompt, example.completion, index)
        return self._encode_messages(example, index)

    @property
    def _has_template(self) -> bool:
        return getattr(self.tokenizer, "chat_template", None) is not None

    @property
    def _only_completion(self) -> bool:
        if self.completion_only_loss is None:
            return self.data_format.has_completions
        return self.completion_only_loss

    @functools.cached_property
    def _special_tokens(self) -> tuple[str, ...]:
        return tuple(token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special)

    # Texts

    def _encode_texts(self, prompt: str, completion: str, index: int) -> EncodedExample:
        if self.assistant_only_loss:
            raise OptionError(
                f"{self.data_format.dataset}: assistant_only_loss needs conversations, and row {index} has texts. Set "
                "assistant_only_loss to false: of a prompt and its completion only the completion is a target anyway."
            )
        ids, num_special = self._tokenize(prompt + completion, add_special_tokens=True)
        with_end = _append_end(ids, self.tokenizer, completion)
        if not self._only_completion:
            return EncodedExample(with_end, list(with_end), num_special=num_special)
        start, is_merged = self._common_prefix(prompt, ids, add_special_tokens=True)
        is_open = len(with_end) == len(ids) and not completion.endswith(self._special_tokens)
        return EncodedExample(with_end, _labels(with_end, [(start, len(with_end))]), is_merged, is_open, num_special)

    def _tokenize(self, text: str, *, add_special_tokens: bool) -> tuple[list[int], int]:
        """Return token ids without special tokens that the tokenizer added at the end, and how many are at the beginning."""
        encoded = self.tokenizer(
            text,
            add_special_tokens=add_special_tokens,
            return_special_tokens_mask=True,
            return_attention_mask=False,
            verbose=False,
        )
        ids, special = list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
        if not add_special_tokens:
            return ids, 0
        while special and special[-1] and len(ids) > 1:
            ids.pop()
            special.pop()
        return ids, next((position for position, is_special in enumerate(special) if not is_special), len(ids))

    def _common_prefix(self, beginning: str, ids: Sequence[int], *, add_special_tokens: bool) -> tuple[int, bool]:
        """Return how many of `ids` are the tokens of the beginning alone, and whether the rest of it is merged with more."""
        prefix, _ = self._tokenize(beginning, add_special_tokens=add_special_tokens)
        count = 0
        while count < min(len(prefix), len(ids)) and prefix[count] == ids[count]:
            count += 1
        return count, count < len(prefix)

    # Messages

    def _encode_messages(self, example: PromptCompletion, index: int) -> EncodedExample:
        prompt, completion = example.prompt or [], example.completion
        assert isinstance(prompt, list) and isinstance(completion, list)
        messages = prompt + completion
        render = _Renderer(self.tokenizer, self._special_tokens, example, self.data_format, index)
        render.check(messages)
        text = render(messages)
        ids, _ = self._tokenize(text, add_special_tokens=False)
        spans: list[Span] = [(0, len(text))]
        if self._only_completion and example.prompt is not None:
            spans = [render.completion_span(prompt, text)]
        if self.assistant_only_loss:
            spans = _intersect(spans, render.assistant_spans(messages, text))
        with_end = _append_end(ids, self.tokenizer, text.rstrip())
        if spans == [(0, len(text))]:
            return EncodedExample(with_end, list(with_end))
        token_spans, merged = self._token_spans(text, ids, spans)
        closed = [text[start:end].rstrip().endswith(self._special_tokens) for start, end in spans]
        if token_spans and spans[-1][1] == len(text):  # the end belongs to what it follows
            token_spans[-1] = (token_spans[-1][0], len(with_end))
            closed[-1] |= len(with_end) > len(ids)
        return EncodedExample(with_end, _labels(with_end, token_spans), merged, not all(closed))

    def _token_spans(self, text: str, ids: list[int], spans: Sequence[Span]) -> tuple[list[Span], bool]:
        """Return spans of tokens for spans of characters, and whether a token crosses the boundary of one.

        A token that begins before a span is its first: without it the model could not learn how the span begins. One that
        ends after it is not in it.
        """
        result, any_merged = [], False
        for start, end in spans:
            first, is_merged = self._common_prefix(text[:start], ids, add_special_tokens=False)
            last, ends_merged = (
                (len(ids), False)
                if end == len(text)
                else self._common_prefix(text[:end], ids, add_special_tokens=False)
            )
            any_merged |= is_merged or ends_merged
            result.append((first, last))
        return result, any_merged


class _Renderer:
    """Applies the chat template to the messages of one row, or to the first of them."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        special_tokens: tuple[str, ...],
        example: PromptCompletion,
        data_format: DatasetFormat,
        index: int,
    ):
        self._tokenizer, self._special_tokens, self._tools = tokenizer, special_tokens, example.tools
        self._kwargs = dict(example.template_kwargs or {})
        self._dataset = data_format.dataset
        self._row = f"column {' and '.join(map(repr, data_format.columns))}, row {index}"
        self._where = f"{self._dataset}: {self._row}"
        if getattr(tokenizer, "chat_template", None) is None:
            raise OptionError(
                f"{data_format.dataset}: column {data_format.columns[0]!r} contains conversations, and the tokenizer has no "
                "chat_template to format them. Set tokenizer.chat_template, or chat_template_path in a file of `hf-guide "
                "distill`, or pass texts."
            )

    def __call__(self, messages: Messages, *, add_generation_prompt: bool = False) -> str:
        """Return the text of some messages."""
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                tools=self._tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self._kwargs,
            )
        except _TEMPLATE_ERRORS as error:
            raise OptionError(
                f"{self._dataset}: the tokenizer's chat template fails on {self._row}: {error}. Correct or remove the row."
            ) from error
        return str(text)

    @property
    def _template(self) -> str:
        try:
            return self._tokenizer.get_chat_template(None, self._tools)
        except ValueError as error:
            raise OptionError(f"{self._where}: {error}") from error

    def check(self, messages: Messages) -> None:
        """Check that the template does not drop roles, tools or calls.

        Raises:
            OptionError: Names what the template does not mention.
        """
        template = self._template
        for message in messages:
            role = message["role"]
            if role not in ROLES and f"'{role}'" not in template and f'"{role}"' not in template:
                raise OptionError(
                    f"{self._where} has the role {role!r}, which the tokenizer's chat template does not name; it must be one "
                    f"of {', '.join(ROLES)}. Rename the role."
                )
            if message.get("tool_calls") and "tool_calls" not in template:
                raise OptionError(
                    f"{self._where} has tool_calls, which the tokenizer's chat template does not write. Set "
                    "chat_template_path to one that does, or remove the row."
                )
        if self._tools and "tools" not in template:
            raise OptionError(
                f"{self._where} has tools, which the tokenizer's chat template does not write. Set chat_template_path to one "
                "that does, or remove the column 'tools'."
            )

    def completion_span(self, prompt: Messages, text: str) -> Span:
        """Return the characters of the completion, and verify that the prompt is the beginning of the text.

        Raises:
            OptionError: It is not.
        """
        beginning = self(prompt, add_generation_prompt=True)
        if not text.startswith(beginning):
            raise OptionError(
                f"{self._where}: the tokenizer's chat template writes the prompt otherwise before a completion than alone "
                f"({_difference(beginning, text)}), so the completion's tokens are not known. Use another template "
                "(chat_template_path), or set completion_only_loss to false."
            )
        return len(beginning), self._end_of_turn(text, len(beginning), len(text))

    def assistant_spans(self, messages: Messages, text: str) -> list[Span]:
        """Return the characters that the assistant writes, its end-of-turn tokens included.

        Raises:
            OptionError: The template has no generation markers and is not prefix-preserving.
        """
        if _GENERATION_MARKER.search(self._template):
            return self._marked_spans(messages, text)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if number == 0:
                raise OptionError(
                    f"{self._where} begins with the assistant's turn, whose first token is not known from the chat template. "
                    f"Remove the row; or {_OTHER_TEMPLATE}."
                )
            beginning = self(messages[:number], add_generation_prompt=True)
            through = self(messages[: number + 1])
            if not text.startswith(through):  # some templates end a conversation, however short, with this token
                through = through.removesuffix(str(self._tokenizer.eos_token))
            for part, whole in ((beginning, through), (beginning, text), (through, text)):
                if not whole.startswith(part):
                    raise OptionError(
                        f"{self._where}: the tokenizer's chat template has no {{% generation %}} and writes turn {number} "
                        f"otherwise when more follows ({_difference(part, whole)}): the assistant's tokens are not known. To "
                        f"train, {_OTHER_TEMPLATE}."
                    )
            spans.append((len(beginning), self._end_of_turn(text, len(beginning), len(through))))
        return spans

    def _marked_spans(self, messages: Messages, text: str) -> list[Span]:
        render: Any = render_jinja_template  # its annotation has no generation spans
        rendered, spans = render(
            conversations=[[dict(message) for message in messages]],
            tools=self._tools,
            chat_template=self._template,
            return_assistant_tokens_mask=True,
            **{**self._tokenizer.special_tokens_map, **self._kwargs},
        )
        if rendered[0] != text:
            raise OptionError(
                f"{self._where}: the chat template writes another text with generation markers than without "
                f"({_difference(text, rendered[0])}). Correct the template, or set assistant_only_loss to false."
            )
        written = [(start, end) for start, end in spans[0] if start < end]
        has_assistant = any(message["role"] == "assistant" for message in messages)
        if has_assistant and not written:
            raise OptionError(
                f"{self._where}: the chat template has {{% generation %}}, and marks nothing of the assistant's turns. "
                "Correct the template, or set assistant_only_loss to false."
            )
        return written

    def _end_of_turn(self, text: str, start: int, end: int) -> int:
        """Return where a turn ends: with its last special token, without line breaks that the template adds after it."""
        stripped = text[start:end].rstrip()
        return start + len(stripped) if stripped.endswith(self._special_tokens) else end


def _labels(ids: Sequence[int], spans: Sequence[Span]) -> list[int]:
    labels = [IGNORE_INDEX] * len(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    return labels


def _append_end(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return ids with the end-of-sequence token, unless the text, or what the template wrote, ends with it already."""
    end = tokenizer.eos_token_id
    has_end = end is None or (bool(ids) and ids[-1] == end) or text.endswith(str(tokenizer.eos_token))
    return list(ids) if has_end else [*ids, int(end)]


def _intersect(first: Sequence[Span], second: Sequence[Span]) -> list[Span]:
    both = [(max(a, c), min(b, d)) for a, b in first for c, d in second]
    return sorted((start, end) for start, end in both if start < end)


def _difference(expected: str, found: str) -> str:
    position = next(
        (index for index, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b),
        min(len(expected), len(found)),
    )
    return (
        f"{expected[position : position + 24]!r} and {found[position : position + 24]!r} after {position} characters"
    )
