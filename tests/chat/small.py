"""A tokenizer of words with several chat templates, and rows of every format with the tokens that should be targets."""

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.examples import local

SPECIAL = ["<pad>", "<s>", "</s>", "<system>", "<user>", "<assistant>", "<tool>", "<tools>"]
WORDS = SPECIAL + [f"w{number}" for number in range(88)]
VOCABULARY = len(WORDS)

PLAIN = (
    "{% if tools %}<tools> {% for t in tools %}{{ t['name'] }} {% endfor %}{% endif %}"
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}"
    "{% for c in m['tool_calls'] or [] %} {{ c['name'] }}{% endfor %} </s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
"""Without markers; a conversation is the beginning of every longer one."""
MARKED = (
    "{% if tools %}<tools> {% for t in tools %}{{ t['name'] }} {% endfor %}{% endif %}"
    "{% for m in messages %}<{{ m['role'] }}> {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{% for c in m['tool_calls'] or [] %} {{ c['name'] }}{% endfor %} </s>{% endgeneration %}\n"
    "{% else %}{{ m['content'] }} </s>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
"""The same text, with the assistant's tokens marked."""


def tokenizer(chat_template: str | None = None, **changes: Any) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    own = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "chat_template": chat_template}
    return PreTrainedTokenizerFast(tokenizer_object=core, **(own | changes))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer that knows every text and has learned to merge within and across words."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = [text for text, _ in local.sentences(200)] + ["loves\n\n", "Who?\n\n"] * 20
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=SPECIAL[:3], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def message(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


CONVERSATIONS = [
    [message("user", "w1 w2"), message("assistant", "w3")],
    [message("system", "w4"), message("user", "w5"), message("assistant", "w6 w7")],
    [message("user", "w8"), message("assistant", "w9"), message("user", "w10"), message("assistant", "w11 w12 w13")],
    [
        message("user", "w14"),
        message("assistant", None, tool_calls=[{"name": "w15"}]),
        message("tool", "w16"),
        message("assistant", "w17"),
    ],
    [message("user", "w18"), message("assistant", "w19"), message("user", "w20 w21")],
]
TOOLS = [None, None, None, [{"name": "w22"}], None]


def turn_words(each: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return what precedes a turn and its own content, as words."""
    calls = [call["name"] for call in each.get("tool_calls") or []]
    return [f"<{each['role']}>"], [*(each["content"] or "").split(), *calls, "</s>"]


def reference(segments: list[tuple[list[str], bool]]) -> tuple[list[int], list[int]]:
    """Return token ids and labels of segments of words, of which some are targets."""
    ids = [WORDS.index(word) for words, _ in segments for word in words]
    labels = [WORDS.index(word) if target else -100 for words, target in segments for word in words]
    return ids, labels


def messages_reference(
    messages: list[dict[str, Any]], tools: Any, *, assistant_only: bool, first_completion: int | None = None
) -> tuple[list[int], list[int]]:
    """Return tokens and labels of a conversation by its turns.

    Args:
        first_completion: the index of the first message that is not of the prompt, where only the completion is a target.
    """
    segments: list[tuple[list[str], bool]] = []
    restricted = assistant_only or first_completion is not None
    if tools:
        segments.append((["<tools>", *(tool["name"] for tool in tools)], not restricted))
    for number, each in enumerate(messages):
        header, words = turn_words(each)
        in_completion = first_completion is None or number >= first_completion
        target = in_completion and (not assistant_only or each["role"] == "assistant")
        # The first header of a completion is what the prompt ends with.
        header_target = not assistant_only and (first_completion is None or number > first_completion)
        segments += [(header, header_target), (words, target)]
    return reference(segments)
