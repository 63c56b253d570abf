"""Raw examples made into what a model is fed, for every task, and the collator that makes batches of them.

Does: tokenise, lay texts end to end, mask, bring labels into the student's order, turn images into pixels.
Does not: augment, or anything else that a capture could not find again, but for the masking of a masked language model.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from datasets import Dataset, Image
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedConfig,
    default_data_collator,
)

from hf_guide.data.arguments import DEFAULT_TARGET_LENGTH, DataArguments
from hf_guide.data.class_labels import label_encoder
from hf_guide.data.loading import class_names, find_column
from hf_guide.data.texts import check_strings, check_words, encode_with_eos, render_texts
from hf_guide.errors import OptionError
from hf_guide.models.positions import max_input_tokens
from hf_guide.tasks import Task
from hf_guide.utils.labels import IGNORE_INDEX

DEFAULT_MAX_LENGTH = 512

Examples = dict[str, list[Any]]


@dataclass(frozen=True)
class ProcessedData:
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


def preprocess(
    task: Task,
    train: Dataset,
    held_out: Dataset | None,
    processing_class: Any,
    options: DataArguments,
    *,
    labels: Sequence[str] | None = None,
    mask_once: bool = False,
    config: "PreTrainedConfig | Sequence[PreTrainedConfig | None] | None" = None,
) -> ProcessedData:
    """Return two raw splits as what a model of `task` is fed.

    Args:
        task: what the student is for.
        train, held_out: raw, as `load_splits` gives them.
        processing_class: the tokenizer, or the image processor.
        options: names of columns, lengths, packing.
        labels: of classifiers, the names of the student's classes in their order; None where labels stand as they are.
        mask_once: mask what is trained on only once, as `options.mask_once`.
        config: of every model that reads the texts, as `resolve_lengths` takes it.

    Raises:
        OptionError: a column that is missing, a label that the student does not know, a length that tokenizer or model cannot
            take, or too little text for one example.
    """
    number: Callable[[Any], int] | None = None
    if not task.is_language_model:
        column = find_column(train, task, "label", options)
        number = label_encoder(class_names(train, column), labels, column)  # one numbering for both splits
    if task is Task.IMAGE_CLASSIFICATION:
        seen, watched = (_image_dataset(split, processing_class, options, number) for split in (train, held_out))
        return ProcessedData(seen, watched, default_data_collator, keep_columns=True)
    options = resolve_lengths(options, processing_class, config)
    _ensure_pad_token(processing_class, options, task)
    fixed = (mask_once or options.mask_once, True)
    made = [
        None if split is None else _tokenize_split(task, split, processing_class, options, number, once, name)
        for split, once, name in zip((train, held_out), fixed, ("training", "evaluation"), strict=True)
    ]
    return ProcessedData(made[0], made[1], _make_collator(task, processing_class, options))


def resolve_lengths(
    options: DataArguments, tokenizer: Any, config: "PreTrainedConfig | Sequence[PreTrainedConfig | None] | None"
) -> DataArguments:
    """Return the options with a `max_length` and a `max_target_length` that tokenizer and models can take.

    Args:
        options: lengths that are asked for; None takes the longest, but at most `DEFAULT_MAX_LENGTH`.
        tokenizer: its `model_max_length` counts.
        config: of every model that reads the texts: the student's, the teacher's; None where one is not known.

    Raises:
        OptionError: a length that is asked for is longer.
    """
    configs = [config] if config is None or isinstance(config, PreTrainedConfig) else list(config)
    limits = [limit for each in configs if (limit := max_input_tokens(each)) is not None]
    most = min([tokenizer.model_max_length, *limits])
    if options.max_length is not None and options.max_length > most:
        raise OptionError(
            f"max_length must be at most {most}: the model reads at most {most} tokens; found {options.max_length}."
        )
    targets = [limit for each in configs if (limit := max_input_tokens(each, target=True)) is not None]
    longest_target = min([options.max_target_length, *targets])
    if longest_target < options.max_target_length != DEFAULT_TARGET_LENGTH:
        raise OptionError(
            f"max_target_length must be at most {longest_target}, which is what the model's decoder reads; found "
            f"{options.max_target_length}."
        )
    return dataclasses.replace(
        options,
        max_length=options.max_length or min(most, DEFAULT_MAX_LENGTH),
        max_target_length=longest_target,
    )


def _tokenize_split(
    task: Task,
    split: Dataset,
    tokenizer: Any,
    options: DataArguments,
    number: Callable[[Any], int] | None,
    once: bool,
    name: str,
) -> Dataset:
    make: Callable[..., Examples]
    text = find_column(split, task, "text", options)
    if task is Task.SEQ2SEQ_LM:
        make = _seq2seq_preprocessor(text, find_column(split, task, "target", options), tokenizer, options)
    elif number is None:
        make = _text_preprocessor(text, tokenizer, options, masked=task is Task.MASKED_LM)
    else:
        column = find_column(split, task, "label", options)
        make = (_word_preprocessor if task is Task.TOKEN_CLASSIFICATION else _sentence_preprocessor)(
            text, column, number, tokenizer, options
        )
    workers = options.preprocessing_num_workers
    made = split.map(
        make, batched=True, with_indices=True, remove_columns=split.column_names, num_proc=workers, desc="Tokenising"
    )
    if len(made) == 0:
        raise _too_little_text_error(split, text, options, name)
    if task is Task.MASKED_LM and once:
        made = made.map(
            _masking_preprocessor(tokenizer, options),
            batched=True,
            with_indices=True,
            num_proc=workers,
            desc="Masking",
        )
        made = made.remove_columns("special_tokens_mask")
    return made


def _too_little_text_error(split: Dataset, column: str, options: DataArguments, name: str) -> OptionError:
    of = f"{options.name}: column {column!r} of the {name} split, {len(split)} rows,"
    if options.pack and any(len(value) > 0 for value in split[column]):
        return OptionError(
            f"{of} does not fill one block of {options.max_length} tokens; lower max_length, set pack to false, or give "
            "more text."
        )
    return OptionError(f"{of} holds no text, only empty strings. Name another column with text_column.")


def _ensure_pad_token(tokenizer: Any, options: DataArguments, task: Task) -> None:
    packed = options.pack and task in (Task.CAUSAL_LM, Task.MASKED_LM)
    if packed or tokenizer.pad_token is not None:
        return
    if tokenizer.eos_token is None:
        raise OptionError(
            "The tokenizer has neither a padding nor an end token; give it one with tokenizer.pad_token."
        )
    tokenizer.pad_token = tokenizer.eos_token


def _text_preprocessor(
    column: str, tokenizer: Any, options: DataArguments, *, masked: bool
) -> Callable[..., Examples]:
    size = options.max_length if options.pack else None

    def encode_causal(values: Sequence[Any], rows: Sequence[int]) -> Examples:
        texts, rendered = render_texts(values, rows, column, options.name, tokenizer)
        length = None if options.pack else options.max_length
        ids = encode_with_eos(tokenizer, [text for text in texts if text], rendered=rendered, max_length=length)
        return {"input_ids": ids, "attention_mask": [[1] * len(each) for each in ids]}

    def encode_masked(values: Sequence[Any], rows: Sequence[int]) -> Examples:
        texts = [text for text in check_strings(values, rows, column, options.name) if text]
        if not texts:
            return {"input_ids": [], "attention_mask": [], "special_tokens_mask": []}
        return dict(
            tokenizer(
                texts,
                truncation=not options.pack,
                max_length=None if options.pack else options.max_length,
                return_special_tokens_mask=True,
                return_token_type_ids=False,
                verbose=False,
            )
        )

    def make(examples: Examples, rows: list[int]) -> Examples:
        made = (encode_masked if masked else encode_causal)(examples[column], rows)
        if size is not None:
            joined = {name: list(chain.from_iterable(values)) for name, values in made.items()}
            starts = range(0, len(joined["input_ids"]) - size + 1, size)
            made = {name: [row[start : start + size] for start in starts] for name, row in joined.items()}
        return made if masked else made | {"labels": [list(ids) for ids in made["input_ids"]]}

    return make


def _seq2seq_preprocessor(text: str, target: str, tokenizer: Any, options: DataArguments) -> Callable[..., Examples]:
    def make(examples: Examples, rows: list[int]) -> Examples:
        sources, targets = (check_strings(examples[name], rows, name, options.name) for name in (text, target))
        made = dict(
            tokenizer(
                [options.source_prefix + source for source in sources], truncation=True, max_length=options.max_length
            )
        )
        made["labels"] = tokenizer(
            text_target=targets, truncation=True, max_length=options.max_target_length
        ).input_ids
        for column, values in ((text, made["input_ids"]), (target, made["labels"])):
            _check_not_empty(values, rows, column, options)
        return made

    return make


def _sentence_preprocessor(
    text: str, label: str, number: Callable[[Any], int], tokenizer: Any, options: DataArguments
) -> Callable[..., Examples]:
    pair = options.text_pair_column

    def make(examples: Examples, rows: list[int]) -> Examples:
        if pair is not None and pair not in examples:
            raise OptionError(f"{options.name} has no column {pair!r}; it has {sorted(examples)}.")
        columns = (text,) if pair is None else (text, pair)
        texts = [check_strings(examples[column], rows, column, options.name) for column in columns]
        made = dict(tokenizer(*texts, truncation=True, max_length=options.max_length))
        _check_not_empty(made["input_ids"], rows, text, options)
        return made | {"labels": [number(value) for value in examples[label]]}

    return make


def _check_not_empty(
    values: Sequence[Sequence[int]], rows: Sequence[int], column: str, options: DataArguments
) -> None:
    for ids, row in zip(values, rows, strict=True):
        if not ids:
            raise OptionError(
                f"{options.name}: column {column!r} has a text without any token in row {row}. Remove the row, or fill it."
            )


def _word_preprocessor(
    text: str, label: str, number: Callable[[Any], int], tokenizer: Any, options: DataArguments
) -> Callable[..., Examples]:
    def make(examples: Examples, rows: list[int]) -> Examples:
        texts = check_words(examples[text], rows, text, options.name)
        made = tokenizer(texts, is_split_into_words=True, truncation=True, max_length=options.max_length)
        _check_not_empty(made["input_ids"], rows, text, options)
        labels = []
        for place, values in enumerate(examples[label]):
            if not isinstance(values, list) or len(values) != len(texts[place]):
                found = f"{len(values)} labels" if isinstance(values, list) else f"a {type(values).__name__}"
                raise OptionError(
                    f"{options.name}: column {label!r} must hold one label for each word of {text!r}, and row {rows[place]} "
                    f"has {found} for {len(texts[place])} words."
                )
            words = made.word_ids(place)
            # The first token of a word stands for it, as in Transformers' own example.
            first = [
                word is not None and word != before for word, before in zip(words, [None, *words[:-1]], strict=True)
            ]
            labels.append(
                [
                    number(values[word]) if is_first else IGNORE_INDEX
                    for word, is_first in zip(words, first, strict=True)
                ]
            )
        return dict(made) | {"labels": labels}

    return make


def _masking_preprocessor(tokenizer: Any, options: DataArguments) -> Callable[[Examples, list[int]], Examples]:
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


def _make_collator(task: Task, tokenizer: Any, options: DataArguments) -> Callable[[Any], Mapping[str, Any]]:
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


def _image_dataset(
    split: Dataset | None, processor: Any, options: DataArguments, number: Callable[[Any], int] | None
) -> Dataset | None:
    if split is None or number is None:
        return None
    image = find_column(split, Task.IMAGE_CLASSIFICATION, "image", options)
    column = find_column(split, Task.IMAGE_CLASSIFICATION, "label", options)
    if isinstance(split.features[image], Image):
        split = split.cast_column(image, Image(decode=False))  # decoded below, where an error can name the image
    split = split.add_column(_ROW_COLUMN, range(len(split)))

    def make(examples: Examples) -> dict[str, Any]:
        opened = [
            decode_image(value, row, image, options.name)
            for value, row in zip(examples[image], examples[_ROW_COLUMN], strict=True)
        ]
        pixels = processor(opened, return_tensors="pt")["pixel_values"]
        return {"pixel_values": list(pixels), "labels": [number(value) for value in examples[column]]}

    return split.with_transform(make)


_ROW_COLUMN = "__row__"


def decode_image(value: Any, row: int, column: str, dataset: str) -> PIL.Image.Image:
    """Return an image of a dataset, decoded and in RGB.

    Args:
        value: an image, or its path or bytes as `datasets.Image(decode=False)` gives them.
        row: its number; column, dataset: names, for the error.

    Raises:
        OptionError: it cannot be read; names its file, or its row.
    """
    if isinstance(value, PIL.Image.Image):
        return value.convert("RGB")
    path = value.get("path") if isinstance(value, Mapping) else None
    try:
        return Image().decode_example(value).convert("RGB")
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, PIL.Image.DecompressionBombError) as error:
        name = f"the image {Path(path).name}" if path else "its image"
        raise OptionError(
            f"{dataset}: {name} in row {row}, column {column!r}, cannot be read: {error or type(error).__name__}. Replace or "
            "remove it."
        ) from error
