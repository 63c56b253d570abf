"""Tiny vision-language models with their own processors, and conversations about images."""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import PreTrainedModel

from tests.examples.local import tokenizer

TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
TEXT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
TEXT |= {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


@dataclass(frozen=True)
class Family:
    """A model with its processor.

    Attributes:
        image: What stands for an image in a rendered text, before the processor expands it.
        make: Returns the config and the processor for a tokenizer that knows the tokens.
        tokens: Its special tokens.
    """

    model_class: str
    image: str
    tokens: tuple[str, ...]
    make: Callable[[Any, int], tuple[Any, Any]]

    def build(self, seed: int = 0, **changes: Any) -> tuple[PreTrainedModel, Any]:
        """Return a seeded model, float32, and its processor."""
        words = vocabulary(self.tokens)
        config, processor = self.make(words, words.convert_tokens_to_ids(self.tokens[0]))
        processor.chat_template = TEMPLATE.replace("IMAGE", self.image)
        for part, values in changes.items():
            for name, value in values.items():
                setattr(getattr(config, part), name, value)
        torch.manual_seed(seed)
        model = getattr(transformers, self.model_class)(config).eval()
        return model, processor

    def save(self, folder: Path) -> PreTrainedModel:
        """Save a model and its processor, and return the model."""
        model, processor = self.build()
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return model


def vocabulary(tokens: tuple[str, ...]) -> Any:
    """Return a tokenizer that knows special tokens."""
    words = tokenizer.__wrapped__()  # a new one: tokens are added to it
    words.add_special_tokens({"additional_special_tokens": list(tokens)})
    return words


def _llava(words: Any, image: int) -> tuple[Any, Any]:
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(vocab_size=len(words), **TEXT),
        vision_config=transformers.CLIPVisionConfig(**VISION, image_size=16, patch_size=8, projection_dim=16),
        image_token_index=image,
    )
    size = {"height": 16, "width": 16}
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size)
    return config, transformers.LlavaProcessor(
        images, words, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def _idefics3(words: Any, image: int) -> tuple[Any, Any]:
    config = transformers.Idefics3Config(
        text_config=transformers.LlamaConfig(vocab_size=len(words), **TEXT),
        vision_config={**VISION, "image_size": 16, "patch_size": 4},
        image_token_id=image,
        scale_factor=2,
        pad_token_id=0,
    )
    images = transformers.Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    return config, transformers.Idefics3Processor(images, words, image_seq_len=4)


def _paligemma(words: Any, image: int) -> tuple[Any, Any]:
    config = transformers.PaliGemmaConfig(
        text_config={**TEXT, "model_type": "gemma", "vocab_size": len(words), "head_dim": 8},
        vision_config={**VISION, "model_type": "siglip_vision_model", "image_size": 16, "patch_size": 8},
        image_token_index=image,
        projection_dim=32,
    )
    images = transformers.SiglipImageProcessorPil(size={"height": 16, "width": 16})
    images.image_seq_length = 4
    return config, transformers.PaliGemmaProcessor(images, words)


def _gemma3(words: Any, image: int) -> tuple[Any, Any]:
    config = transformers.Gemma3Config(
        text_config={**TEXT, "vocab_size": len(words), "head_dim": 8, "sliding_window": 32},
        vision_config={**VISION, "image_size": 16, "patch_size": 4},
        mm_tokens_per_image=4,
        image_token_index=image,
        boi_token_index=words.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=words.convert_tokens_to_ids("<end_of_image>"),
    )
    names = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    words._set_model_specific_special_tokens(special_tokens=names)
    images = transformers.Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    return config, transformers.Gemma3Processor(images, words, image_seq_length=4)


FAMILIES = {
    "llava": Family("LlavaForConditionalGeneration", "<image>", ("<image>",), _llava),
    "idefics3": Family(
        "Idefics3ForConditionalGeneration",
        "<image>",
        ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<row_1_col_1>"),
        _idefics3,
    ),
    "paligemma": Family("PaliGemmaForConditionalGeneration", "<image>", ("<image>",), _paligemma),
    "gemma3": Family(
        "Gemma3ForConditionalGeneration",
        "<start_of_image>",
        ("<image_soft_token>", "<start_of_image>", "<end_of_image>"),
        _gemma3,
    ),
}


@functools.cache
def pictures(count: int = 6) -> tuple[Image.Image, ...]:
    """Return images of several sizes."""
    draw = np.random.default_rng(0)
    shapes = [(20, 28, 3), (24, 20, 3)]
    return tuple(
        Image.fromarray(draw.integers(0, 256, shapes[number % 2]).astype(np.uint8)) for number in range(count)
    )


def conversation(
    question: str = "The teacher loves", answer: str = "the sea.", images: int = 1
) -> list[dict[str, Any]]:
    """Return a question about images, and its answer."""
    parts: list[dict[str, Any]] = [{"type": "image"}] * images
    parts = [*parts, {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]


def rows(count: int = 6) -> list[dict[str, Any]]:
    """Return rows of messages and images, of unequal length."""
    answers = ["the sea.", "this town and long books.", "quiet music."]
    return [
        {"messages": conversation(answer=answers[number % 3]), "images": [picture]}
        for number, picture in enumerate(pictures(count))
    ]


def write_conversations(folder: Path, count: int = 6) -> Path:
    """Write a JSON-lines file of conversations, and their images in the same folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, row in enumerate(rows(count)):
        row["images"][0].save(folder / f"{number}.png")
        lines.append(json.dumps({"messages": row["messages"], "images": [f"{number}.png"]}))
    (folder / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder / "train.jsonl"
