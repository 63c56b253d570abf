"""Raw examples made into what a model is fed, for every task, and the collator that makes batches of them.

Does: tokenise, lay texts end to end, mask, bring labels into the student's order, turn images into pixels.
Does not: augment, or anything else that a capture could not find again, but for the masking of a masked language model.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedConfig,
    default_data_collator,
)

from hf_guide.distillation.class_labels import label_numbers
from hf_guide.distillation.data_options import DataOptions
from hf_guide.distillation.splits import class_names, find_column
from hf_guide.distillation.tasks import IGNORED, Task
from hf_guide.errors import OptionError

USUAL_LENGTH = 512

Examples = dict[str, list[Any]]


@dataclass(frozen=True)
class Prepared:
    """What a `Trainer` takes.

    Attributes:
        train, eval: datasets of model inputs.
        collator: makes batches of both.
        keep_columns: the datasets make inputs of raw columns when they are read, so that `remove_unused_columns` must be
            off.
    """

    train: Any
    eval: Any
    collator: Callable[[Any], Mapping[str, Any]]
    keep_columns: bool = False


def prepare(
    task: Task,
    train: Dataset,
    held_out: Dataset | None,
    processing_class: Any,
    options: DataOptions,
    *,
    labels: Sequence[str] | None = None,
    mask_once: bool = False,
    config: PreTrainedConfig | None = None,
) -> Prepared:
    """Return two raw splits as what a model of `task` is fed.

    Args:
        task: what the student is for.
        train, held_out: raw, as `read_splits` gives them.
        processing_class: the tokenizer, or the image processor.
        options: names of columns, lengths, packing.
        labels: of classifiers, the names of the student's classes in their order; None where labels stand as they are.
        mask_once: mask what is trained on only once, as `options.mask_once`.
        config: of the student, or of the teacher that it is made out of, where a length is to be checked against it.

    Raises:
        OptionError: a column that is missing, a label that the student does not know, a length that tokenizer or model cannot
            take, or too little text for one example.
    """
    number: Callable[[Any], int] | None = None
    if not task.is_language_model:
        column = find_column(train, task, "label", options)
        number = label_numbers(class_names(train, column), labels, column)  # one numbering for both splits
    if task is Task.IMAGE_CLASSIFICATION:
        seen, watched = (_images(split, processing_class, options, number) for split in (train, held_out))
        return Prepared(seen, watched, default_data_collator, keep_columns=True)
    options = resolve_length(options, processing_class, config)
    _give_padding(processing_class, options, task)
    fixed = (mask_once or options.mask_once, True)
    made = [
        None if split is None else _tokenised(task, split, processing_class, options, number, once)
        for split, once in zip((train, held_out), fixed, strict=True)
    ]
    return Prepared(made[0], made[1], _collator(task, processing_class, options))


def resolve_length(options: DataOptions, tokenizer: Any, config: PreTrainedConfig | None) -> DataOptions:
    """Return the options with a `max_length` that tokenizer and model can take.

    Args:
        config: of the student, or of the teacher that it is made out of.

    Raises:
        OptionError: the one that is asked for is longer.
    """
    positions = getattr(config, "max_position_embeddings", None)
    most = min(tokenizer.model_max_length, positions if isinstance(positions, int) and positions > 0 else sys.maxsize)
    if options.max_length is not None and options.max_length > most:
        raise OptionError(f"max_length is {options.max_length}; the model reads at most {most} tokens.")
    return dataclasses.replace(options, max_length=options.max_length or min(most, USUAL_LENGTH))


def _tokenised(
    task: Task,
    split: Dataset,
    tokenizer: Any,
    options: DataOptions,
    number: Callable[[Any], int] | None,
    once: bool,
) -> Dataset:
    make: Callable[..., Examples]
    text = find_column(split, task, "text", options)
    if task is Task.SEQ2SEQ_LM:
        make = _pairs(text, find_column(split, task, "target", options), tokenizer, options)
    elif number is None:
        make = _texts(text, tokenizer, options, masked=task is Task.MASKED_LM)
    else:
        column = find_column(split, task, "label", options)
        make = (_words if task is Task.TOKEN_CLASSIFICATION else _sentences)(text, column, number, tokenizer, options)
    workers = options.preprocessing_num_workers
    made = split.map(make, batched=True, remove_columns=split.column_names, num_proc=workers, desc="Tokenising")
    if len(made) == 0:
        raise OptionError(
            f"{options.name} does not fill one block of {options.max_length} tokens; lower max_length, set pack to false, "
            "or give more text."
        )
    if task is Task.MASKED_LM and once:
        made = made.map(_mask(tokenizer, options), batched=True, with_indices=True, num_proc=workers, desc="Masking")
        made = made.remove_columns("special_tokens_mask")
    return made


def _give_padding(tokenizer: Any, options: DataOptions, task: Task) -> None:
    packed = options.pack and task in (Task.CAUSAL_LM, Task.MASKED_LM)
    if packed or tokenizer.pad_token is not None:
        return
    if tokenizer.eos_token is None:
        raise OptionError(
            "The tokenizer has neither a padding nor an end token; give it one with tokenizer.pad_token."
        )
    tokenizer.pad_token = tokenizer.eos_token


def _texts(column: str, tokenizer: Any, options: DataOptions, *, masked: bool) -> Callable[[Examples], Examples]:
    end, size = tokenizer.eos_token_id, options.max_length if options.pack else None

    def make(examples: Examples) -> Examples:
        made = tokenizer(
            [text for text in examples[column] if text],
            truncation=not options.pack,
            max_length=None if options.pack else options.max_length,
            return_special_tokens_mask=masked,
            return_token_type_ids=False,
            verbose=False,
        )
        if size is None:
            return dict(made) if masked else {**made, "labels": [list(ids) for ids in made["input_ids"]]}
        if not masked and end is not None:  # or a model would not learn where a text ends
            made = {
                name: [
                    row if ids[-1:] == [end] else [*row, end if name == "input_ids" else 1]
                    for row, ids in zip(rows, made["input_ids"], strict=True)
                ]
                for name, rows in made.items()
            }
        joined = {name: list(chain.from_iterable(rows)) for name, rows in made.items()}
        starts = range(0, len(joined["input_ids"]) - size + 1, size)
        blocks = {name: [row[start : start + size] for start in starts] for name, row in joined.items()}
        return blocks if masked else blocks | {"labels": [list(ids) for ids in blocks["input_ids"]]}

    return make


def _pairs(text: str, target: str, tokenizer: Any, options: DataOptions) -> Callable[[Examples], Examples]:
    def make(examples: Examples) -> Examples:
        sources = [options.source_prefix + source for source in examples[text]]
        made = dict(tokenizer(sources, truncation=True, max_length=options.max_length))
        made["labels"] = tokenizer(
            text_target=examples[target], truncation=True, max_length=options.max_target_length
        ).input_ids
        return made

    return make


def _sentences(
    text: str, label: str, number: Callable[[Any], int], tokenizer: Any, options: DataOptions
) -> Callable[[Examples], Examples]:
    pair = options.text_pair_column

    def make(examples: Examples) -> Examples:
        if pair is not None and pair not in examples:
            raise OptionError(f"{options.name} has no column {pair!r}; it has {sorted(examples)}.")
        texts = (examples[text],) if pair is None else (examples[text], examples[pair])
        made = dict(tokenizer(*texts, truncation=True, max_length=options.max_length))
        return made | {"labels": [number(value) for value in examples[label]]}

    return make


def _words(
    text: str, label: str, number: Callable[[Any], int], tokenizer: Any, options: DataOptions
) -> Callable[[Examples], Examples]:
    def make(examples: Examples) -> Examples:
        made = tokenizer(examples[text], is_split_into_words=True, truncation=True, max_length=options.max_length)
        labels = []
        for row, values in enumerate(examples[label]):
            words = made.word_ids(row)
            # The first token of a word stands for it, as in Transformers' own example.
            first = [
                word is not None and word != before for word, before in zip(words, [None, *words[:-1]], strict=True)
            ]
            labels.append(
                [number(values[word]) if is_first else IGNORED for word, is_first in zip(words, first, strict=True)]
            )
        return dict(made) | {"labels": labels}

    return make


def _mask(tokenizer: Any, options: DataOptions) -> Callable[[Examples, list[int]], Examples]:
    def make(examples: Examples, numbers: list[int]) -> Examples:
        mask = DataCollatorForLanguageModeling(tokenizer, mlm_probability=options.mlm_probability, seed=0)
        made: Examples = {"input_ids": [], "labels": []}
        for row, number in enumerate(numbers):
            mask.generator = torch.Generator().manual_seed(number)
            batch = mask([{name: values[row] for name, values in examples.items()}])
            for name, rows in made.items():
                rows.append(batch[name][0].tolist())
        return made

    return make


def _collator(task: Task, tokenizer: Any, options: DataOptions) -> Callable[[Any], Mapping[str, Any]]:
    if task is Task.CAUSAL_LM and options.pack:
        return default_data_collator
    if task in (Task.CAUSAL_LM, Task.SEQ2SEQ_LM):
        return DataCollatorForSeq2Seq(tokenizer)
    if task is Task.MASKED_LM:
        return MaskingCollator(tokenizer, options.mlm_probability)
    return DataCollatorForTokenClassification(tokenizer) if task.is_per_token else DataCollatorWithPadding(tokenizer)


class MaskingCollator:
    """Masks examples at random, but for those that carry labels because they were masked before; those are only padded."""

    def __init__(self, tokenizer: Any, mlm_probability: float):
        self.mask = DataCollatorForLanguageModeling(tokenizer, mlm_probability=mlm_probability)
        self.pad = DataCollatorForTokenClassification(tokenizer) if tokenizer.pad_token else default_data_collator

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        return self.pad(list(examples)) if "labels" in examples[0] else self.mask(list(examples))


def _images(
    split: Dataset | None, processor: Any, options: DataOptions, number: Callable[[Any], int] | None
) -> Dataset | None:
    if split is None or number is None:
        return None
    image = find_column(split, Task.IMAGE_CLASSIFICATION, "image", options)
    column = find_column(split, Task.IMAGE_CLASSIFICATION, "label", options)

    def make(examples: Examples) -> dict[str, Any]:
        pixels = processor([one.convert("RGB") for one in examples[image]], return_tensors="pt")["pixel_values"]
        return {"pixel_values": list(pixels), "labels": [number(value) for value in examples[column]]}

    return split.with_transform(make)
