"""The targets are exactly the tokens of the assistant or of completions; an error states why they are not known."""

from collections.abc import Mapping
from typing import Any

import pytest
from transformers import ByT5Tokenizer

from hf_guide.chat.encoding import ChatEncoder, EncodedExample
from hf_guide.chat.formats import detect_format
from hf_guide.errors import OptionError
from tests.chat.small import (
    CONVERSATIONS,
    MARKED,
    PLAIN,
    TOOLS,
    WORDS,
    byte_tokenizer,
    message,
    messages_reference,
    reference,
    tokenizer,
)

END = WORDS.index("</s>")


def encode(row: Mapping[str, Any], tok: Any, **options: Any) -> EncodedExample:
    data_format = detect_format(list(row), row, "some/data")
    assert data_format is not None
    return ChatEncoder(tok, data_format, **options)(row, 0)


def result(example: EncodedExample) -> tuple[list[int], list[int]]:
    return example.input_ids, example.labels


# Every format with every option, against the turns tokenized one by one


@pytest.mark.parametrize("assistant_only", [False, True])
@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["prefixes", "markers"])
@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
def test_targets_of_conversations_are_the_assistants_tokens(number: int, template: str, assistant_only: bool) -> None:
    messages, tools = CONVERSATIONS[number], TOOLS[number]
    for row in (
        {"messages": messages, "tools": tools},
        {
            "conversations": [
                {
                    "from": each["role"],
                    "value": each["content"],
                    **({"tool_calls": each["tool_calls"]} if "tool_calls" in each else {}),
                }
                for each in messages
            ],
            "tools": tools,
        }
        if number != 3
        else {"conversations": messages, "tools": tools},
    ):
        found = encode(row, tokenizer(template), assistant_only_loss=assistant_only)
        assert result(found) == messages_reference(messages, tools, assistant_only=assistant_only)


@pytest.mark.parametrize("completion_only", [None, True, False])
@pytest.mark.parametrize("assistant_only", [False, True])
@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["prefixes", "markers"])
@pytest.mark.parametrize("number", range(4))
def test_targets_of_completions_of_messages(
    number: int, template: str, assistant_only: bool, completion_only: Any
) -> None:
    messages, tools = CONVERSATIONS[number], TOOLS[number]
    first = next(index for index, each in enumerate(messages) if each["role"] == "assistant")
    row = {"prompt": messages[:first], "completion": messages[first:], "tools": tools}
    found = encode(row, tokenizer(template), assistant_only_loss=assistant_only, completion_only_loss=completion_only)
    expected = messages_reference(
        messages,
        tools,
        assistant_only=assistant_only,
        first_completion=first if completion_only is not False else None,
    )
    assert result(found) == expected


@pytest.mark.parametrize("completion_only", [None, True, False])
@pytest.mark.parametrize("adds_specials", [False, True])
def test_targets_of_completions_of_texts(completion_only: Any, adds_specials: bool) -> None:
    from tokenizers import processors

    tok = tokenizer()
    if adds_specials:
        tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", WORDS.index("<s>")), ("</s>", END)]
        )
    begin = ["<s>"] if adds_specials else []
    for completion in (" w3 w4", " w3 w4 </s>"):
        found = encode({"prompt": "w1 w2", "completion": completion}, tok, completion_only_loss=completion_only)
        full = completion_only is False
        assert result(found) == reference([(begin, full), (["w1", "w2"], full), (["w3", "w4", "</s>"], True)])
    assert encode({"prompt": "", "completion": "w3"}, tok).labels[len(begin) :] == [WORDS.index("w3"), END]


@pytest.mark.parametrize("template", [None, PLAIN], ids=["headings", "template"])
@pytest.mark.parametrize("context", [None, "", "w7"])
def test_targets_of_instructions_are_the_outputs(template: str | None, context: str | None) -> None:
    row = {"instruction": "w1 w2", "input": context, "output": "w3"}
    found = encode(row, tokenizer(template))
    given = ["w1", "w2", "w7"] if context else ["w1", "w2"]
    if template:
        assert result(found) == reference([(["<user>", *given, "</s>", "<assistant>"], False), (["w3", "</s>"], True)])
    else:
        unknown = ["w0", "w0"]  # "###" and a heading
        words = [*unknown, "w1", "w2", *([*unknown, "w7"] if context else []), *unknown]
        assert result(found) == reference([(words, False), (["w3", "</s>"], True)])
    assert encode({"instruction": "w1 w2", "response": "w3"}, tokenizer(template)).labels[-2:] == [
        WORDS.index("w3"),
        END,
    ]


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["prefixes", "markers"])
def test_targets_decode_to_what_the_assistant_wrote(template: str) -> None:
    """With subwords, where a turn's tokens need not be those of its text alone."""
    tok = byte_tokenizer()
    tok.chat_template = (
        template.replace(" </s>", "</s>").replace("> {{", ">\n{{").replace("<assistant> ", "<assistant>\n")
    )
    answers = ["A student loves\n\nquiet music. ", "  Nobody, é 的 — knows", "x"]
    messages = [each for answer in answers for each in (message("user", "Who?\n"), message("assistant", answer))]
    found = encode({"messages": messages}, tok, assistant_only_loss=True)
    targets = [label for label in found.labels if label != -100]
    assert tok.decode(targets) == "".join(f"{answer}</s>" for answer in answers)
    assert (
        found.input_ids == tok(tok.apply_chat_template(messages, tokenize=False), add_special_tokens=False).input_ids
    )


def test_a_tokenizer_without_offsets_has_the_same_targets() -> None:
    tok = ByT5Tokenizer()
    for template in (PLAIN, MARKED):
        tok.chat_template = template.replace(" </s>", "</s>")
        found = encode({"messages": CONVERSATIONS[2]}, tok, assistant_only_loss=True)
        assert tok.decode([label for label in found.labels if label != -100]) == "w9</s>w11 w12 w13</s>"


# The end


def test_an_end_that_the_template_leaves_out_is_added_once() -> None:
    bare = tokenizer("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    messages = [message("user", "w1"), message("assistant", "w2")]
    assert encode({"messages": messages}, bare).labels == [WORDS.index("w1"), WORDS.index("w2"), END]
    assert encode({"messages": messages}, tokenizer(PLAIN)).input_ids.count(END) == 2  # of the template alone


def test_an_end_after_another_end_of_turn_is_no_target() -> None:
    """A student that ends its turn with the first would never come to the second."""
    tok = tokenizer(PLAIN.replace("</s>", "<tools>"))
    found = encode({"messages": CONVERSATIONS[0]}, tok, assistant_only_loss=True)
    assert found.input_ids[-2:] == [WORDS.index("<tools>"), END]
    assert [label for label in found.labels if label != -100] == [WORDS.index("w3"), WORDS.index("<tools>")]
    assert not found.is_open


def test_a_turn_without_an_end_is_noticed() -> None:
    open_ended = MARKED.replace(" </s>{% endgeneration %}", "{% endgeneration %} </s>")
    assert encode({"messages": CONVERSATIONS[0]}, tokenizer(open_ended), assistant_only_loss=True).is_open
    assert not encode({"messages": CONVERSATIONS[0]}, tokenizer(MARKED), assistant_only_loss=True).is_open


def test_a_template_that_ends_a_conversation_with_another_token_than_a_turn() -> None:
    """As Phi-3's: the conversation up to a turn has the end token, where the whole goes on."""
    ended = PLAIN.replace(" </s>\n", " <tools>\n").replace("{% if add_generation_prompt %}<assistant> {% endif %}", "")
    ended += "{% if add_generation_prompt %}<assistant> {% else %}</s>{% endif %}"
    found = encode({"messages": CONVERSATIONS[2]}, tokenizer(ended), assistant_only_loss=True)
    expected = ["w9", "<tools>", "w11", "w12", "w13", "<tools>", "</s>"]
    assert [WORDS[label] for label in found.labels if label != -100] == expected and not found.is_open


# Tokens that cross a boundary


def test_a_token_across_the_boundary_is_a_target_and_noticed() -> None:
    tok = byte_tokenizer()
    whole = tok("The teacher", add_special_tokens=False).input_ids
    found = encode({"prompt": "The tea", "completion": "cher"}, tok)
    prompt = tok("The tea", add_special_tokens=False).input_ids
    assert found.has_merged_token and whole[: len(prompt)] != prompt
    assert tok.decode([label for label in found.labels if label != -100]).endswith("cher</s>")
    assert not encode({"prompt": "The ", "completion": "X"}, tok).has_merged_token


# Truncation


@pytest.mark.parametrize("side", ["right", "left"])
def test_truncation_keeps_tokens_and_labels_together(side: str) -> None:
    example = EncodedExample([1, 5, 6, 7, 8], [-100, -100, -100, 7, 8], num_special=1)
    assert example.truncate(5, side) is example
    cut = example.truncate(3, side)
    assert result(cut) == (([1, 5, 6], [-100] * 3) if side == "right" else ([1, 7, 8], [-100, 7, 8]))
    assert cut.has_targets == (side == "left")


def test_the_first_token_is_no_target() -> None:
    assert not EncodedExample([1, 2], [1, -100]).has_targets
    assert EncodedExample([1, 2], [-100, 2]).has_targets


# What cannot be


NOT_PRESERVING = {
    "the last turn is written otherwise": PLAIN.replace(
        "{{ m['content'] }}", "{{ '<tool>' if loop.last else '' }}{{ m['content'] }}"
    ),
    "the generation prompt is written otherwise": PLAIN.replace(
        "<assistant> {% endif %}", "<assistant> <tool> {% endif %}"
    ),
}


@pytest.mark.parametrize("template", NOT_PRESERVING.values(), ids=NOT_PRESERVING)
def test_a_template_whose_prefixes_change_cannot_mark_turns(template: str) -> None:
    row = {"messages": CONVERSATIONS[2]}
    with pytest.raises(OptionError, match=r"no \{% generation %\} and writes turn .*chat_template_path"):
        encode(row, tokenizer(template), assistant_only_loss=True)
    assert encode(row, tokenizer(template)).has_targets


def test_a_prompt_that_is_written_otherwise_alone_is_an_error() -> None:
    template = NOT_PRESERVING["the generation prompt is written otherwise"]
    row = {"prompt": CONVERSATIONS[0][:1], "completion": CONVERSATIONS[0][1:]}
    with pytest.raises(OptionError, match="writes the prompt otherwise.*completion_only_loss to false"):
        encode(row, tokenizer(template))
    assert encode(row, tokenizer(template), completion_only_loss=False).has_targets


WRONG: dict[str, tuple[Mapping[str, Any], Any, dict[str, Any], str]] = {
    "no template": ({"messages": CONVERSATIONS[0]}, None, {}, "no chat_template"),
    "empty": ({"messages": []}, PLAIN, {}, "empty conversation in row 0"),
    "missing role": ({"messages": [{"content": "w1"}]}, PLAIN, {}, r"row 0 has the keys \['content'\]"),
    "role of None": ({"messages": [{"role": None, "content": "w1"}]}, PLAIN, {}, "row 0 has the keys"),
    "role of a number": ({"messages": [{"role": 3, "content": "w1"}]}, PLAIN, {}, "a role of type int"),
    "unknown role": (
        {"messages": [message("usr", "w1")]},
        PLAIN,
        {},
        "row 0 has the role 'usr'.*system, user, assistant, tool",
    ),
    "no content": ({"messages": [message("user", None)]}, PLAIN, {}, "content of type NoneType"),
    "content of a number": ({"messages": [message("user", 3)]}, PLAIN, {}, "content of type int"),  # type: ignore[arg-type]
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        PLAIN,
        {},
        "parts of the types.*image",
    ),
    "a message of text": ({"messages": ["w1"]}, PLAIN, {}, "row 0 has a str"),
    "mixed keys": ({"messages": [{"role": "user", "value": "w1"}]}, PLAIN, {}, "content of type NoneType"),
    "template raises": (
        {"messages": CONVERSATIONS[0]},
        "{{ raise_exception('roles must alternate') }}",
        {},
        "row 0: roles must",
    ),
    "template is wrong": ({"messages": CONVERSATIONS[0]}, "{% for m in messages %}", {}, "chat template fails on"),
    "assistant first": (
        {"messages": CONVERSATIONS[0][1:]},
        PLAIN,
        {"assistant_only_loss": True},
        "begins with the assistant's turn",
    ),
    "markers mark nothing": (
        {"messages": CONVERSATIONS[0]},
        PLAIN + "{% if false %}{% generation %}{% endgeneration %}{% endif %}",
        {"assistant_only_loss": True},
        "marks nothing",
    ),
    "tools not written": (
        {"messages": CONVERSATIONS[3], "tools": TOOLS[3]},
        PLAIN.replace("tools", "other"),
        {},
        "has tools, which",
    ),
    "calls not written": (
        {"messages": CONVERSATIONS[3]},
        PLAIN.replace("tool_calls", "calls"),
        {},
        "has tool_calls, which",
    ),
    "tools of text": ({"messages": CONVERSATIONS[0], "tools": "{no json"}, PLAIN, {}, "'tools' must be valid JSON"),
    "tools of numbers": (
        {"messages": CONVERSATIONS[0], "tools": [1]},
        PLAIN,
        {},
        "'tools' must contain lists of JSON schemas",
    ),
    "prompt of text": ({"prompt": "w1", "completion": CONVERSATIONS[0][1:]}, PLAIN, {}, "must both be texts or both"),
    "no prompt": ({"prompt": None, "completion": "w1"}, None, {}, "'prompt' must contain text; row 0 has None"),
    "completion of a number": (
        {"prompt": "w1", "completion": 4},
        None,
        {},
        "'completion' must contain text; row 0 has a value of type int",
    ),
    "no output": ({"instruction": "w1", "output": None}, None, {}, "'output' must contain text; row 0 has None"),
    "assistants of texts": (
        {"prompt": "w1", "completion": "w2"},
        None,
        {"assistant_only_loss": True},
        "assistant_only_loss needs conversations",
    ),
    "completions of conversations": (
        {"messages": CONVERSATIONS[0]},
        PLAIN,
        {"completion_only_loss": True},
        "completion_only_loss needs prompts",
    ),
    "template arguments": (
        {"messages": CONVERSATIONS[0], "chat_template_kwargs": 3},
        PLAIN,
        {},
        "must contain mappings",
    ),
}


@pytest.mark.parametrize(("row", "template", "options", "text"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_an_error(row: Mapping[str, Any], template: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(OptionError, match=text):
        encode(row, tokenizer(template), **options)


def test_what_is_unusual_is_right() -> None:
    tok = tokenizer(PLAIN)
    parts = [{"type": "text", "text": "w1 "}, {"type": "text", "text": "w2", "extra": None}]
    as_parts = encode(
        {"messages": [{"role": "user", "content": parts}, message("assistant", "w3", tool_calls=None)]}, tok
    )
    assert as_parts == encode({"messages": CONVERSATIONS[0]}, tok)
    as_json = encode({"messages": CONVERSATIONS[3], "tools": '[{"name": "w22"}]'}, tok)
    assert as_json == encode({"messages": CONVERSATIONS[3], "tools": TOOLS[3]}, tok)
    assert encode({"messages": CONVERSATIONS[0], "tools": []}, tok) == encode({"messages": CONVERSATIONS[0]}, tok)
    other = (
        tok.chat_template.replace("<assistant> {% endif", "<assistant> {{ style }} {% endif")
        + "{% if style %} {{ style }}{% endif %}"
    )
    styled = encode({"messages": CONVERSATIONS[0], "chat_template_kwargs": {"style": "w30"}}, tokenizer(other))
    assert WORDS.index("w30") in styled.input_ids
    named = tokenizer(PLAIN.replace("{% for m in", "{% if 'critic' %}{% endif %}{% for m in"))
    assert encode({"messages": [message("critic", "w1"), *CONVERSATIONS[0]]}, named).has_targets


def test_only_what_the_user_writes_has_no_targets() -> None:
    found = encode({"messages": CONVERSATIONS[0][:1]}, tokenizer(PLAIN), assistant_only_loss=True)
    assert set(found.labels) == {-100} and not found.has_targets and not found.is_open


def test_the_generation_markers_of_transformers_agree() -> None:
    """`assistant_masks` of `apply_chat_template`, of which TRL makes its labels."""
    tok = tokenizer(MARKED)
    for messages, tools in zip(CONVERSATIONS, TOOLS, strict=True):
        if tools:
            continue  # they mark no span that begins with a space
        found = encode({"messages": messages, "tools": tools}, tok, assistant_only_loss=True)
        theirs = tok.apply_chat_template(messages, tools=tools, return_assistant_tokens_mask=True, return_dict=True)
        assert found.input_ids == theirs["input_ids"]
        assert [int(label != -100) for label in found.labels] == theirs["assistant_masks"]
