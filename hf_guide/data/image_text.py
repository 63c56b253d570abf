"""Turn conversations about images into the inputs of a vision-language model.

Does: render messages by the processor's chat template, process the images, make labels of the assistant's turns alone; check
and open what `hf-guide distill` reads.
Does not: cut (an image has as many tokens as the model expects), pack.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow
import pyarrow.compute
import torch
from datasets import Dataset, Image, List
from torch import Tensor

from hf_guide.data.arguments import DataArguments
from hf_guide.data.images import ROW_COLUMN, decode_image
from hf_guide.data.loading import dataset_folder
from hf_guide.errors import OptionError
from hf_guide.utils.labels import IGNORE_INDEX
from hf_guide.validation import did_you_mean

Message = Mapping[str, Any]


@dataclass(frozen=True)
class ImageTextCollator:
    """Makes batches of rows with `messages` and, where there are images, `images` (a list) or `image`.

    A message has a `role` and a `content`: a text, or parts of the types "text" and "image". The images belong to the parts of
    the type "image", in their order. Tokens are padded on the right.

    Attributes:
        processor: The model's: it has a chat template, a tokenizer and an image processor.
        assistant_only_loss: Whether only the assistant's turns are targets, as TRL names it; otherwise all texts are. Tokens
            that stand for images never are.
    """

    processor: Any
    assistant_only_loss: bool = True

    keeps_columns: ClassVar[bool] = True
    """It makes the model's inputs of columns that no model takes, so none is removed before it."""

    def __post_init__(self) -> None:
        if (
            getattr(self.processor, "tokenizer", None) is None
            or getattr(self.processor, "image_processor", None) is None
        ):
            raise OptionError(
                "The processor of a vision-language model must have a tokenizer and an image processor, as AutoProcessor "
                f"loads it; found a {type(self.processor).__name__}."
            )
        if not getattr(self.processor, "chat_template", None):
            raise OptionError(
                f"The {type(self.processor).__name__} has no chat template, by which messages become a text: set "
                "processor.chat_template."
            )

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the batch: what the processor makes, and `labels`.

        Raises:
            OptionError: A row without messages, of another number of images than parts of the type "image", or without a
                target; the message names what was found.
        """
        conversations = [_messages(example) for example in examples]
        images = [_images(example) for example in examples]
        for messages, of_row in zip(conversations, images, strict=True):
            _check_images(messages, len(of_row))
        batch = self._process([self._render(messages) for messages in conversations], images)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE_INDEX)
        if self.assistant_only_loss:
            for row, messages in zip(labels, conversations, strict=True):
                targets = torch.zeros_like(row, dtype=torch.bool)
                for start, stop in self._assistant_spans(messages, row[row != IGNORE_INDEX].tolist()):
                    targets[start:stop] = True
                row.masked_fill_(~targets, IGNORE_INDEX)
        for token in self._image_tokens():
            labels.masked_fill_(labels == token, IGNORE_INDEX)
        if not bool((labels != IGNORE_INDEX).any(1).all()):
            raise OptionError(
                "A row of the batch has no target: "
                + (
                    "its messages have no turn of the assistant."
                    if self.assistant_only_loss
                    else "its texts are empty."
                )
            )
        return batch | {"labels": labels}

    def _render(self, messages: Sequence[Message], *, for_answer: bool = False) -> str:
        return str(
            self.processor.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=for_answer)
        )

    def _process(self, texts: list[str], images: list[list[Any]]) -> dict[str, Tensor]:
        given = {"images": images} if any(images) else {}
        return dict(
            self.processor(
                text=texts, **given, padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt"
            )
        )

    def _assistant_spans(self, messages: Sequence[Message], row: list[int]) -> list[tuple[int, int]]:
        """Return the first and the last position of each turn of the assistant in a row of tokens.

        A turn's own tokens are found in the row, with those that announce it before them, from the last turn to the first:
        images before it have an unknown number of tokens.
        """
        full = self._tokens(self._render(messages))
        spans, end = [], len(row)
        for index in reversed([index for index, each in enumerate(messages) if each["role"] == "assistant"]):
            before, announced, through = (
                self._tokens(text)
                for text in (
                    self._render(messages[:index]) if index else "",
                    self._render(messages[:index], for_answer=True) if index else "",
                    self._render(messages[: index + 1]),
                )
            )
            if any(full[: len(tokens)] != tokens for tokens in (before, announced, through)):
                raise OptionError(
                    f"The chat template of the {type(self.processor).__name__} renders a conversation's first turns otherwise "
                    "than the whole, so the assistant's tokens cannot be found. Choose assistant_only_loss=False, or a "
                    "template that renders turns one after another."
                )
            turn = full[len(before) : len(through)]
            starts = [at for at in range(end - len(turn) + 1) if row[at : at + len(turn)] == turn]
            if not turn or not starts:
                raise OptionError(
                    f"The {type(self.processor).__name__} tokenizes a turn of the assistant otherwise than its tokenizer, so "
                    "its tokens cannot be found. Choose assistant_only_loss=False."
                )
            end = starts[-1]
            spans.append((end + len(announced) - len(before), end + len(turn)))
        return spans

    def _tokens(self, text: str) -> list[int]:
        return list(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _image_tokens(self) -> set[int]:
        names = ("image_token_id", "boi_token_id", "eoi_token_id")
        parts = (self.processor, self.processor.tokenizer)  # Gemma 3's processor has the begin of an image there
        tokens = {getattr(part, name, None) for part in parts for name in names}
        return {token for token in tokens if isinstance(token, int)}


def _messages(example: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the messages of a row, each content as a list of parts without empty entries."""
    messages = example.get("messages")
    if not isinstance(messages, list) or not messages:
        raise OptionError(
            f"A row must have messages, a list of turns with role and content; it has {sorted(example)}."
        )
    rendered = []
    for message in messages:
        content = message.get("content")
        if not isinstance(message.get("role"), str):
            raise OptionError(f"A message must have a role, such as 'user' or 'assistant'; found {sorted(message)}.")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not all(isinstance(part, Mapping) and "type" in part for part in parts):
            raise OptionError(
                f"The content of a message must be a text, or a list of parts such as {{'type': 'image'}} and "
                f"{{'type': 'text', 'text': ...}}; found {content!r}."
            )
        # datasets gives every part the fields of all, None where it has none.
        parts = [{name: value for name, value in part.items() if value is not None} for part in parts]
        rendered.append({"role": message["role"], "content": parts})
    return rendered


def _images(example: Mapping[str, Any]) -> list[Any]:
    images = example.get("images", example.get("image"))
    return [image.convert("RGB") for image in _as_list(images)]


def _num_images(messages: Sequence[Message]) -> int:
    return sum(part["type"] == "image" for message in messages for part in message["content"])


def _check_images(messages: Sequence[Message], count: int) -> None:
    if _num_images(messages) != count:
        raise OptionError(
            f"A row has {count} images and {_num_images(messages)} parts of the type 'image' in its messages: they must "
            "agree. Put {'type': 'image'} where each image is."
        )


def preprocess_image_conversations(
    train: Dataset, held_out: Dataset | None, processor: Any, options: DataArguments
) -> tuple[Dataset, Dataset | None, ImageTextCollator]:
    """Return both splits with `messages` and opened `images` in each row, and the collator that makes inputs of them.

    Raises:
        OptionError: A column is missing, a row is no conversation, or options that do not apply to it; (when read) an image
            cannot be opened.
    """
    if options.max_length is not None:
        raise OptionError(
            "max_length is not for conversations about images: the model expects all tokens of an image, so none is cut. "
            "Leave it out, and leave rows out that are too long."
        )
    collator = ImageTextCollator(processor, assistant_only_loss=options.assistant_only_loss)
    evaluated = None if held_out is None else _conversations(held_out, options, "evaluation")
    return _conversations(train, options, "training"), evaluated, collator


def _conversations(split: Dataset, options: DataArguments, name: str) -> Dataset:
    """Return a split whose rows are read as messages and opened images."""
    messages = options.text_column or "messages"
    image = options.image_column or next((each for each in ("images", "image") if each in split.column_names), None)
    for column, option in ((messages, "text_column"), (image, "image_column")):
        if column is not None and column not in split.column_names:
            raise OptionError(
                f"{options.name}: the {name} split has no column {column!r}; it has {split.column_names}."
                f"{did_you_mean(column, split.column_names)} Set {option} to one of these."
            )
    if image is not None:
        if isinstance(split.features[image], Image):
            split = split.cast_column(image, Image(decode=False))  # opened below, where errors name the image
        elif isinstance(getattr(split.features[image], "feature", None), Image):
            split = split.cast_column(image, List(Image(decode=False)))
    for number, (conversation, count) in enumerate(_conversations_and_counts(split, messages, image)):
        try:
            turns = _messages({"messages": conversation})
            _check_images(turns, count)
            if options.assistant_only_loss and all(each["role"] != "assistant" for each in turns):
                raise OptionError("Its messages have no turn of the assistant, so it has no target.")
        except OptionError as error:
            raise OptionError(f"{options.name}, row {number} of the {name} split: {error}") from error
    folder = dataset_folder(options)

    def read(examples: Mapping[str, Any]) -> dict[str, Any]:
        found = [None] * len(examples[messages]) if image is None else examples[image]
        opened = [
            [decode_image(each, row, str(image), options.name, folder=folder) for each in _as_list(images)]
            for images, row in zip(found, examples[ROW_COLUMN], strict=True)
        ]
        return {"messages": examples[messages], "images": opened}

    return split.add_column(ROW_COLUMN, range(len(split))).with_transform(read)


def _conversations_and_counts(split: Dataset, messages: str, image: str | None) -> Iterator[tuple[Any, int]]:
    """Yield each row's messages and its number of images, without reading an image."""
    conversations = (row[messages] for row in split.select_columns([messages]))
    counts = itertools.repeat(0, len(split)) if image is None else _image_counts(split.select_columns([image]), image)
    return zip(conversations, counts, strict=True)


def _image_counts(split: Dataset, image: str) -> Iterator[int]:
    for table in split.with_format("arrow").iter(batch_size=100):
        column = table[image]
        if pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type):
            yield from (length or 0 for length in pyarrow.compute.list_value_length(column).to_pylist())
        else:
            yield from (int(is_valid) for is_valid in column.is_valid().to_pylist())


def _as_list(images: Any) -> list[Any]:
    if images is None:
        return []
    return images if isinstance(images, list) else [images]
