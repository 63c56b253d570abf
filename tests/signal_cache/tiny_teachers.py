"""Tiny teachers of every task with a dataset each, for the tests of capturing."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from tests.tiny import KINDS, SIZES, Kind

VOCABULARY = 96
LABELS = {"num_labels": 3, "pad_token_id": 0}

TEACHERS: dict[str, Kind] = {
    "causal-lm": KINDS["llama"],
    "masked-lm": KINDS["bert"],
    "seq2seq-lm": Kind(
        "T5ForConditionalGeneration", "", {**KINDS["t5"].config, "decoder_start_token_id": 0, "pad_token_id": 0}, {}
    ),
    "sequence-classification": KINDS["bert classifier"],
    "sequence-classification of a decoder": Kind(
        "LlamaForSequenceClassification", "", {**SIZES, **LABELS, "num_key_value_heads": 2}, {}
    ),
    "token-classification": Kind("BertForTokenClassification", "", {**SIZES, **LABELS}, {}),
    "image-classification": KINDS["vit"],
}


class Examples(list):
    """A dataset: a length, and examples by number."""


def examples_for(task: str, count: int = 23, *, longest: int = 12) -> Examples:
    """Return seeded examples of unequal length."""
    generator = torch.Generator().manual_seed(1)

    def tokens() -> list[int]:
        length = int(torch.randint(2, longest, (1,), generator=generator))
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    if task.startswith("image"):
        return Examples({"pixel_values": torch.randn(3, 16, 16, generator=generator)} for _ in range(count))
    examples = Examples({"input_ids": tokens()} for _ in range(count))
    if task.startswith("seq2seq"):
        for example in examples:
            example["labels"] = tokens()
    return examples


@dataclass
class Pad:
    """A collator that pads, by some more than needed."""

    side: str = "right"
    extra: int = 0

    def __call__(self, features: Any) -> dict[str, Tensor]:
        if "pixel_values" in features[0]:
            return {"pixel_values": torch.stack([feature["pixel_values"] for feature in features])}
        batch = self._pad([feature["input_ids"] for feature in features], self.side)
        if "labels" in features[0]:
            decoder = self._pad([feature["labels"] for feature in features], "right")
            batch["labels"] = decoder["input_ids"].masked_fill(decoder["attention_mask"] == 0, -100)
        return batch

    def _pad(self, rows: list[list[int]], side: str) -> dict[str, Tensor]:
        length = max(map(len, rows)) + self.extra
        ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
        for number, row in enumerate(rows):
            place = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
            ids[number, place], mask[number, place] = torch.tensor(row), 1
        return {"input_ids": ids, "attention_mask": mask}


def run_teacher(model: PreTrainedModel, batch: dict[str, Any], **options: Any) -> Any:
    """Return the outputs of a live teacher for a batch; padding may be on either side."""
    inputs = {name: value for name, value in batch.items() if not name.startswith("teacher_")}
    with torch.no_grad():
        return model.eval()(**inputs, return_dict=True, **options)


def count_forwards(model: PreTrainedModel, forwards: list[int]) -> Callable[[], None]:
    """Count the examples that a model is run on into `forwards`; return what undoes it."""
    name = model.main_input_name
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: forwards.append(len(kwargs[name])), with_kwargs=True
    )
    return handle.remove


def model_of(kind: Kind, **changes: Any) -> PreTrainedModel:
    """Return the tiny teacher of a kind."""
    assert hasattr(transformers, kind.model_class)
    return kind.teacher(**changes)
