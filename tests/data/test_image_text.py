"""Conversations about images: the tokens that the processor makes, and targets on the assistant's turns alone."""

from typing import Any

import pytest

from hf_guide import OptionError
from hf_guide.data.image_text import ImageTextCollator
from tests.small_image_text import FAMILIES, conversation, pictures, rows


def targets(processor: Any, batch: dict[str, Any]) -> list[str]:
    return [processor.tokenizer.decode(labels[labels != -100]) for labels in batch["labels"]]


@pytest.fixture(scope="module")
def processor() -> Any:
    return FAMILIES["llava"].build()[1]


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of PaliGemma's own processor
@pytest.mark.parametrize("name", FAMILIES)
def test_targets_are_the_answers_with_their_end(name: str) -> None:
    processor = FAMILIES[name].build()[1]
    batch = ImageTextCollator(processor)(rows(3))
    assert [each.partition("</s>")[0] for each in targets(processor, batch)] == [
        "the sea.",
        "this town and long books.",
        "quiet music.",
    ]
    assert "pixel_values" in batch and bool((batch["attention_mask"][:, 0] == 1).all()), "padded on the right"
    image = processor.tokenizer.convert_tokens_to_ids(FAMILIES[name].tokens[0])
    everything = ImageTextCollator(processor, assistant_only_loss=False)(rows(3))
    assert bool((batch["input_ids"] == image).any()) and not bool((everything["labels"] == image).any())
    assert (everything["labels"] != -100).sum() > (batch["labels"] != -100).sum()


def test_every_turn_of_the_assistant_is_a_target_whatever_images_follow(processor: Any) -> None:
    messages = [*conversation(answer="quiet music."), *conversation("The teacher loves", "quiet music.", images=2)]
    row = {"messages": messages, "images": list(pictures(3))}
    (found,) = targets(processor, ImageTextCollator(processor)([row]))
    assert found.count("quiet music.</s>") == 2 and "teacher" not in found


def test_a_row_without_images_is_a_text(processor: Any) -> None:
    row = {"messages": [{"role": "user", "content": "Nobody mocks"}, {"role": "assistant", "content": "the sea."}]}
    batch = ImageTextCollator(processor)([row, {**row, "images": []}])
    assert "pixel_values" not in batch and targets(processor, batch)[0].startswith("the sea.")
    mixed = ImageTextCollator(processor)([row, rows(1)[0]])
    assert len(mixed["pixel_values"]) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "Nobody"}, "must have messages, a list of turns with role and content; it has \\['text'\\]"),
        ({"messages": conversation(), "images": []}, "has 0 images and 1 parts of the type 'image'"),
        ({"messages": conversation(images=0), "images": [pictures()[0]]}, "has 1 images and 0 parts"),
        ({"messages": [{"role": "user", "content": 3}]}, "content of a message must be a text, or a list of parts"),
        ({"messages": conversation()[:1], "images": [pictures()[0]]}, "has no target.*no turn of the assistant"),
    ],
    ids=["no messages", "no image", "no part", "no content", "no answer"],
)
def test_a_row_that_cannot_be_a_conversation_is_an_error(row: dict[str, Any], message: str, processor: Any) -> None:
    with pytest.raises(OptionError, match=message):
        ImageTextCollator(processor)([row])


def test_a_tokenizer_is_not_enough(processor: Any) -> None:
    with pytest.raises(OptionError, match="must have a tokenizer and an image processor"):
        ImageTextCollator(processor.tokenizer)
    bare = FAMILIES["llava"].build()[1]
    bare.chat_template = None
    with pytest.raises(OptionError, match="has no chat template"):
        ImageTextCollator(bare)


def test_a_template_that_rewrites_earlier_turns_is_an_error() -> None:
    processor = FAMILIES["llava"].build()[1]
    processor.chat_template = "{{ 'Nobody' if messages | length > 1 else 'Every' }}" + processor.chat_template
    with pytest.raises(OptionError, match="renders a conversation's first turns otherwise"):
        ImageTextCollator(processor)(rows(1))
