"""Small seeded students, teachers and data for the trainer's tests."""

import copy
import random
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

VOCABULARY = 61
CLASSES = 5


def llama(seed: int = 0, *, width: int = 32, blocks: int = 2, **changes: Any) -> LlamaForCausalLM:
    set_seed(seed)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": blocks,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": width // 4,
        "pad_token_id": 0,
        "initializer_range": 0.3,
    }
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes)))


def _bert_config(width: int, blocks: int, **changes: Any) -> BertConfig:
    return BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        max_position_embeddings=32,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
        **changes,
    )


def _t5(seed: int, width: int, blocks: int) -> T5ForConditionalGeneration:
    set_seed(seed)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=width,
        d_ff=2 * width,
        num_layers=blocks,
        num_decoder_layers=blocks,
        num_heads=4,
        d_kv=width // 4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def _vit(seed: int, width: int, blocks: int) -> ViTForImageClassification:
    set_seed(seed)
    config = ViTConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        image_size=8,
        patch_size=4,
        num_labels=CLASSES,
        initializer_range=0.3,
    )
    return ViTForImageClassification(config)


def model_for(task: str, seed: int, *, width: int = 32, blocks: int = 2) -> PreTrainedModel:
    """Return a small model of a task, random from its seed."""
    if task == "causal-lm":
        return llama(seed, width=width, blocks=blocks)
    if task == "seq2seq-lm":
        return _t5(seed, width, blocks)
    if task == "image-classification":
        return _vit(seed, width, blocks)
    classes = {
        "masked-lm": BertForMaskedLM,
        "sequence-classification": BertForSequenceClassification,
        "token-classification": BertForTokenClassification,
    }
    set_seed(seed)
    return classes[task](_bert_config(width, blocks))


TASKS = [
    "causal-lm",
    "masked-lm",
    "seq2seq-lm",
    "sequence-classification",
    "token-classification",
    "image-classification",
]


def examples_for(task: str, count: int = 16, seed: int = 0) -> list[dict[str, Any]]:
    """Return examples of unequal length, some of whose places have no target."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        length = draw.randint(4, 12)
        ids = [draw.randint(1, VOCABULARY - 1) for _ in range(length)]
        if task == "image-classification":
            torch.manual_seed(draw.randint(0, 10**6))
            found.append({"pixel_values": torch.randn(3, 8, 8), "labels": draw.randrange(CLASSES)})
            continue
        example: dict[str, Any] = {"input_ids": ids, "attention_mask": [1] * length}
        if task == "sequence-classification":
            example["labels"] = draw.randrange(CLASSES)
        elif task == "token-classification":
            example["labels"] = [draw.randrange(CLASSES) if draw.random() < 0.7 else -100 for _ in ids]
        elif task == "causal-lm":
            cut = draw.randint(0, length - 2)  # a prompt that is not learned
            example["labels"] = [-100] * cut + ids[cut:]
        elif task == "masked-lm":
            chosen = [number == 1 or draw.random() < 0.4 for number in range(length)]
            example["labels"] = [token if take else -100 for token, take in zip(ids, chosen, strict=True)]
        else:
            example["labels"] = [draw.randint(1, VOCABULARY - 1) for _ in range(draw.randint(2, 7))]
        found.append(example)
    return found


def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad to the longest of the batch."""
    batch = {}
    for name in examples[0]:
        rows = [example[name] for example in examples]
        if isinstance(rows[0], torch.Tensor):
            batch[name] = torch.stack(rows)
        elif isinstance(rows[0], int):
            batch[name] = torch.tensor(rows)
        else:
            longest, fill = max(map(len, rows)), -100 if name == "labels" else 0
            batch[name] = torch.tensor([row + [fill] * (longest - len(row)) for row in rows])
    return batch


def copy_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy that shares nothing."""
    return copy.deepcopy(model)
