"""Turn raw examples into model inputs, for every task, and build the collator that batches them.

Does: tokenize, pack texts into blocks, mask, map labels to the student's classes; of other data call their modules.
Does not: augment, or do anything else whose result a teacher cache could not find again, except random masking in training.
"""

import dataclasses
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

from hf_guide.chat.packing import PackedCollator
from hf_guide.data.arguments import DEFAULT_TARGET_LENGTH, DataArguments
from hf_guide.data.chat import chat_format, check_chat_options, preprocess_chat
from hf_guide.data.class_labels import value_encoder
from hf_guide.data.image_text import preprocess_image_conversations
from hf_guide.data.images import image_dataset
from hf_guide.data.loading import check_options_of_task, check_strings, find_column
from hf_guide.data.questions import preprocess_questions
from hf_guide.data.sentences import preprocess_sentences
from hf_guide.data.speech import preprocess_speech
from hf_guide.errors import OptionError
from hf_guide.models.packed_rows import check_keeps_packed_texts_apart
from hf_guide.models.positions import max_input_tokens
from hf_guide.tasks import OutputKind, Task
from hf_guide.utils.labels import IGNORE_INDEX

DEFAULT_MAX_LENGTH = 512

Examples = dict[str, list[Any]]


@dataclass(frozen=True)
class ProcessedData:
    """The datasets and the collator for a `Trainer`.

    Attributes:
        train, eval: Datasets of model inputs.
        collator: Builds the batches of both.
        keep_columns: The datasets transform raw columns when they are read, so `remove_unused_columns` must be False.
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
    label_kind: OutputKind = OutputKind.CATEGORICAL,
    static_masking: bool = False,
    config: "PreTrainedConfig | Sequence[PreTrainedConfig | None] | None" = None,
) -> ProcessedData:
    """Convert two raw splits to the inputs of a model for `task`.

    Args:
        task: The student's task.
        train, held_out: Raw splits, as `load_splits` returns them.
        processing_class: The tokenizer, image processor, feature extractor or processor.
        options: Column names, lengths, packing.
        labels: For classifiers, the names of the student's classes in order; None keeps the dataset's class indices.
        label_kind: What the labels are, as from `class_labels.value_kind`: classes, lists of classes, or real numbers.
        static_masking: Mask the training split once, as `options.static_masking`.
        config: Configs of all models that read the texts, as for `resolve_lengths`.

    Raises:
        OptionError: A column is missing, a label is not among the student's classes, a length is not supported, an option is
            not for the task, or there is too little text for one example; conversations are to be packed for a model that
            would mix them; or the task is one whose datasets are not prepared here.
    """
    if task not in _PREPARATIONS:
        raise OptionError(
            f"Datasets for {task} are not prepared here, only those for {', '.join(map(str, _PREPARATIONS))}. Prepare the "
            "dataset in a script of your own and pass it to DistillationTrainer, or to capture_teacher."
        )
    check_options_of_task(task, options)
    check_chat_options(task, options)
    encode_label: Callable[[Any], Any] | None = None
    if task.has_labels:
        column = find_column(train, task, "label", options)
        encode_label = value_encoder(label_kind, train, column, labels)  # one encoding for both splits
    static_masking = static_masking or options.static_masking
    source = RawSplits(
        task, train, held_out, processing_class, options, encode_label, _configs(config), static_masking
    )
    return _PREPARATIONS[task](source)


@dataclass(frozen=True)
class RawSplits:
    """What the preparation of a task reads: the arguments of `preprocess`, with the encoder of labels."""

    task: Task
    train: Dataset
    held_out: Dataset | None
    processing_class: Any
    options: DataArguments
    encode_label: Callable[[Any], Any] | None
    configs: list[PreTrainedConfig]
    static_masking: bool

    def with_lengths(self) -> "RawSplits":
        """Return the same with the lengths that the models support, and a tokenizer that pads."""
        options = resolve_lengths(self.options, self.processing_class, self.configs)
        _ensure_pad_token(self.processing_class, options, self.task)
        return dataclasses.replace(self, options=options)


def _prepare_images(source: RawSplits) -> ProcessedData:
    splits = [
        image_dataset(split, source.processing_class, source.options, source.encode_label)
        for split in (source.train, source.held_out)
    ]
    return ProcessedData(splits[0], splits[1], default_data_collator, keep_columns=True)


def _prepare_sounds(source: RawSplits) -> ProcessedData:
    return ProcessedData(
        *preprocess_speech(
            source.task,
            source.train,
            source.held_out,
            source.processing_class,
            source.options,
            source.encode_label,
            source.configs,
        )
    )


def _prepare_questions(source: RawSplits) -> ProcessedData:
    source = source.with_lengths()
    splits = (source.train, source.held_out)
    return ProcessedData(*preprocess_questions(source.task, *splits, source.processing_class, source.options))


def _prepare_sentences(source: RawSplits) -> ProcessedData:
    source = source.with_lengths()
    return ProcessedData(*preprocess_sentences(source.train, source.held_out, source.processing_class, source.options))


def _prepare_image_conversations(source: RawSplits) -> ProcessedData:
    made = preprocess_image_conversations(source.train, source.held_out, source.processing_class, source.options)
    return ProcessedData(*made, keep_columns=True)


def _prepare_texts(source: RawSplits) -> ProcessedData:
    source = source.with_lengths()
    task, options, tokenizer = source.task, source.options, source.processing_class
    static = (source.static_masking, True)
    tokenized, evaluated = (
        None
        if split is None
        else _tokenize_split(task, split, tokenizer, options, source.encode_label, is_static, name)
        for split, is_static, name in zip(
            (source.train, source.held_out), static, ("training", "evaluation"), strict=True
        )
    )
    assert tokenized is not None
    collator = _make_collator(task, tokenizer, options)
    if "position_ids" in tokenized.column_names:
        collator = PackedCollator()
        for each in source.configs:
            check_keeps_packed_texts_apart(each, "model")
    return ProcessedData(tokenized, evaluated, collator)


_PREPARATIONS: dict[Task, Callable[[RawSplits], ProcessedData]] = {
    **dict.fromkeys((Task.CAUSAL_LM, Task.MASKED_LM, Task.SEQ2SEQ_LM), _prepare_texts),
    **dict.fromkeys((Task.SEQUENCE_CLASSIFICATION, Task.TOKEN_CLASSIFICATION), _prepare_texts),
    Task.IMAGE_CLASSIFICATION: _prepare_images,
    **dict.fromkeys((Task.SPEECH_SEQ2SEQ, Task.CTC, Task.AUDIO_CLASSIFICATION), _prepare_sounds),
    **dict.fromkeys((Task.QUESTION_ANSWERING, Task.MULTIPLE_CHOICE), _prepare_questions),
    Task.FEATURE_EXTRACTION: _prepare_sentences,
    Task.IMAGE_TEXT_TO_TEXT: _prepare_image_conversations,
}
"""How `hf-guide distill` prepares the data of each task; others need a script."""


def resolve_lengths(
    options: DataArguments, tokenizer: Any, config: "PreTrainedConfig | Sequence[PreTrainedConfig | None] | None"
) -> DataArguments:
    """Return the options with a `max_length` and a `max_target_length` that the tokenizer and the models support.

    Args:
        options: Requested lengths; `max_length=None` selects the longest supported, at most `DEFAULT_MAX_LENGTH`.
        tokenizer: Limits the length by its `model_max_length`.
        config: Configs of all models that read the texts, such as student and teacher; None for an unknown one.

    Raises:
        OptionError: A requested length is not supported.
    """
    configs = _configs(config)
    limits = [limit for each in configs if (limit := max_input_tokens(each)) is not None]
    most = min([tokenizer.model_max_length, *limits])
    if options.max_length is not None and options.max_length > most:
        raise OptionError(
            f"max_length must be at most {most}: the model supports at most {most} tokens; found {options.max_length}."
        )
    targets = [limit for each in configs if (limit := max_input_tokens(each, target=True)) is not None]
    longest_target = min([options.max_target_length, *targets])
    if longest_target < options.max_target_length != DEFAULT_TARGET_LENGTH:
        raise OptionError(
            f"max_target_length must be at most {longest_target}, the longest target that the model's decoder supports; found "
            f"{options.max_target_length}."
        )
    return dataclasses.replace(
        options,
        max_length=options.max_length or min(most, DEFAULT_MAX_LENGTH),
        max_target_length=longest_target,
    )


def _configs(config: "PreTrainedConfig | Sequence[PreTrainedConfig | None] | None") -> list[PreTrainedConfig]:
    configs = [config] if config is None or isinstance(config, PreTrainedConfig) else config
    return [each for each in configs if each is not None]


def _tokenize_split(
    task: Task,
    split: Dataset,
    tokenizer: Any,
    options: DataArguments,
    encode_label: Callable[[Any], int] | None,
    static_masking: bool,
    name: str,
) -> Dataset:
    to_inputs: Callable[..., Examples]
    data_format = chat_format(split, task, options)
    if data_format is not None:
        return preprocess_chat(split, data_format, tokenizer, options, name)
    text = find_column(split, task, "text", options)
    if task is Task.SEQ2SEQ_LM:
        to_inputs = _seq2seq_preprocessor(text, find_column(split, task, "target", options), tokenizer, options)
    elif encode_label is None:
        to_inputs = _text_preprocessor(text, tokenizer, options, masked=task is Task.MASKED_LM)
    else:
        column = find_column(split, task, "label", options)
        to_inputs = (_word_preprocessor if task is Task.TOKEN_CLASSIFICATION else _sentence_preprocessor)(
            text, column, encode_label, tokenizer, options
        )
    workers = options.preprocessing_num_workers
    tokenized = split.map(
        to_inputs,
        batched=True,
        with_indices=True,
        remove_columns=split.column_names,
        num_proc=workers,
        desc="Tokenizing",
    )
    if len(tokenized) == 0:
        raise _too_little_text_error(split, text, options, name)
    if task is Task.MASKED_LM and static_masking:
        tokenized = tokenized.map(
            _masking_preprocessor(tokenizer, options),
            batched=True,
            with_indices=True,
            num_proc=workers,
            desc="Masking",
        )
        tokenized = tokenized.remove_columns("special_tokens_mask")
    return tokenized


def _too_little_text_error(split: Dataset, column: str, options: DataArguments, name: str) -> OptionError:
    source = f"{options.name}: column {column!r} of the {name} split, {len(split)} rows,"
    if options.packing and any(len(value) > 0 for value in split[column]):
        return OptionError(
            f"{source} does not fill one block of {options.max_length} tokens; lower max_length, set packing to false, or use "
            "more text."
        )
    return OptionError(f"{source} contains only empty strings. Set text_column to another column.")


def _ensure_pad_token(tokenizer: Any, options: DataArguments, task: Task) -> None:
    packed = options.packing and task in (Task.CAUSAL_LM, Task.MASKED_LM)
    if packed or tokenizer.pad_token is not None:
        return
    if tokenizer.eos_token is None:
        raise OptionError("The tokenizer has neither a padding nor an end-of-sequence token; set tokenizer.pad_token.")
    tokenizer.pad_token = tokenizer.eos_token


def _text_preprocessor(
    column: str, tokenizer: Any, options: DataArguments, *, masked: bool
) -> Callable[..., Examples]:
    size = options.max_length if options.packing else None

    def encode_causal(values: Sequence[Any], rows: Sequence[int]) -> Examples:
        texts = check_strings(values, rows, column, options.name)
        length = None if options.packing else options.max_length
        ids = encode_with_eos(tokenizer, [text for text in texts if text], max_length=length)
        return {"input_ids": ids, "attention_mask": [[1] * len(each) for each in ids]}

    def encode_masked(values: Sequence[Any], rows: Sequence[int]) -> Examples:
        texts = [text for text in check_strings(values, rows, column, options.name) if text]
        if not texts:
            return {"input_ids": [], "attention_mask": [], "special_tokens_mask": []}
        return dict(
            tokenizer(
                texts,
                truncation=not options.packing,
                max_length=None if options.packing else options.max_length,
                return_special_tokens_mask=True,
                return_token_type_ids=False,
                verbose=False,
            )
        )

    def to_inputs(examples: Examples, rows: list[int]) -> Examples:
        encoded = (encode_masked if masked else encode_causal)(examples[column], rows)
        if size is not None:
            joined = {name: list(chain.from_iterable(values)) for name, values in encoded.items()}
            starts = range(0, len(joined["input_ids"]) - size + 1, size)
            encoded = {name: [row[start : start + size] for start in starts] for name, row in joined.items()}
        return encoded if masked else encoded | {"labels": [list(ids) for ids in encoded["input_ids"]]}

    return to_inputs


def _seq2seq_preprocessor(text: str, target: str, tokenizer: Any, options: DataArguments) -> Callable[..., Examples]:
    def to_inputs(examples: Examples, rows: list[int]) -> Examples:
        sources, targets = (check_strings(examples[name], rows, name, options.name) for name in (text, target))
        encoded = dict(
            tokenizer(
                [options.source_prefix + source for source in sources], truncation=True, max_length=options.max_length
            )
        )
        encoded["labels"] = tokenizer(
            text_target=targets, truncation=True, max_length=options.max_target_length
        ).input_ids
        for column, values in ((text, encoded["input_ids"]), (target, encoded["labels"])):
            _check_not_empty(values, rows, column, options)
        return encoded

    return to_inputs


def _sentence_preprocessor(
    text: str, label: str, encode_label: Callable[[Any], int], tokenizer: Any, options: DataArguments
) -> Callable[..., Examples]:
    pair = options.text_pair_column

    def to_inputs(examples: Examples, rows: list[int]) -> Examples:
        if pair is not None and pair not in examples:
            raise OptionError(f"{options.name} has no column {pair!r}; it has {sorted(examples)}.")
        columns = (text,) if pair is None else (text, pair)
        texts = [check_strings(examples[column], rows, column, options.name) for column in columns]
        encoded = dict(tokenizer(*texts, truncation=True, max_length=options.max_length))
        _check_not_empty(encoded["input_ids"], rows, text, options)
        return encoded | {"labels": [encode_label(value) for value in examples[label]]}

    return to_inputs


def _check_not_empty(
    values: Sequence[Sequence[int]], rows: Sequence[int], column: str, options: DataArguments
) -> None:
    for ids, row in zip(values, rows, strict=True):
        if not ids:
            raise OptionError(
                f"{options.name}: column {column!r} has a text without any token in row {row}. Remove or complete the row."
            )


def _word_preprocessor(
    text: str, label: str, encode_label: Callable[[Any], int], tokenizer: Any, options: DataArguments
) -> Callable[..., Examples]:
    def to_inputs(examples: Examples, rows: list[int]) -> Examples:
        texts = check_words(examples[text], rows, text, options.name)
        encoded = tokenizer(texts, is_split_into_words=True, truncation=True, max_length=options.max_length)
        _check_not_empty(encoded["input_ids"], rows, text, options)
        labels = []
        for index, values in enumerate(examples[label]):
            if not isinstance(values, list) or len(values) != len(texts[index]):
                description = f"{len(values)} labels" if isinstance(values, list) else f"a {type(values).__name__}"
                raise OptionError(
                    f"{options.name}: column {label!r} must contain one label per word of {text!r}; row {rows[index]} "
                    f"has {description} for {len(texts[index])} words."
                )
            words = encoded.word_ids(index)
            # Only the first token of a word has a label, as in Transformers' own example.
            first = [
                word is not None and word != before for word, before in zip(words, [None, *words[:-1]], strict=True)
            ]
            labels.append(
                [
                    encode_label(values[word]) if is_first else IGNORE_INDEX
                    for word, is_first in zip(words, first, strict=True)
                ]
            )
        return dict(encoded) | {"labels": labels}

    return to_inputs


def _masking_preprocessor(tokenizer: Any, options: DataArguments) -> Callable[[Examples, list[int]], Examples]:
    def to_inputs(examples: Examples, row_indices: list[int]) -> Examples:
        mask = DataCollatorForLanguageModeling(tokenizer, mlm_probability=options.mlm_probability, seed=0)
        masked: Examples = {"input_ids": [], "labels": []}
        for row, row_index in enumerate(row_indices):
            mask.generator = torch.Generator().manual_seed(row_index)
            batch = mask([{name: values[row] for name, values in examples.items()}])
            for name, rows in masked.items():
                rows.append(batch[name][0].tolist())
        return masked

    return to_inputs


def _make_collator(task: Task, tokenizer: Any, options: DataArguments) -> Callable[[Any], Mapping[str, Any]]:
    if task is Task.CAUSAL_LM and options.packing:
        return default_data_collator
    if task in (Task.CAUSAL_LM, Task.SEQ2SEQ_LM):
        return DataCollatorForSeq2Seq(tokenizer)
    if task is Task.MASKED_LM:
        return MaskingCollator(tokenizer, options.mlm_probability)
    return DataCollatorForTokenClassification(tokenizer) if task.is_per_token else DataCollatorWithPadding(tokenizer)


class MaskingCollator:
    """Masks examples at random; examples with labels were masked before and are only padded."""

    def __init__(self, tokenizer: Any, mlm_probability: float):
        self.mask = DataCollatorForLanguageModeling(tokenizer, mlm_probability=mlm_probability)
        self.pad = DataCollatorForTokenClassification(tokenizer) if tokenizer.pad_token else default_data_collator

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Pad examples that are masked already; mask and pad others."""
        return self.pad(list(examples)) if "labels" in examples[0] else self.mask(list(examples))


# Texts


def check_words(values: Sequence[Any], rows: Sequence[int], column: str, dataset: str) -> list[list[str]]:
    """Return the values of a column if all are lists of strings.

    Raises:
        OptionError: A value is not; names the first such row and the value's type.
    """
    for value, row in zip(values, rows, strict=True):
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            inner = {type(word).__name__ for word in value} if isinstance(value, list) else None
            description = f"a list of {' and '.join(sorted(inner))}" if inner else type(value).__name__
            raise OptionError(
                f"{dataset}: column {column!r} must contain lists of words; row {row} has {description}. Set text_column to "
                "another column, or correct the row."
            )
    return list(values)


def encode_with_eos(tokenizer: Any, texts: Sequence[str], *, max_length: int | None = None) -> list[list[int]]:
    """Return the token ids of texts for a causal language model, each followed by the end-of-sequence token.

    A text to which its tokenizer already added the token does not get a second one; a truncated text gets none. Texts without
    any token are left out.

    Args:
        tokenizer: Its `eos_token` is appended, if it has one.
        texts: Strings.
        max_length: Truncate to this many tokens, on the side `tokenizer.truncation_side`; None keeps everything.
    """
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        return_special_tokens_mask=True,
        return_token_type_ids=False,
        return_attention_mask=False,
        verbose=False,
    )
    eos, all_ids = tokenizer.eos_token_id, []
    for ids, special in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True):
        if not ids:
            continue
        with_eos = ids if eos is None or ids[-1] == eos else [*ids, eos]
        all_ids.append(
            with_eos if max_length is None else _truncate_ids(with_eos, special, max_length, tokenizer.truncation_side)
        )
    return all_ids


def _truncate_ids(ids: list[int], special: list[int], length: int, side: str) -> list[int]:
    if len(ids) <= length:
        return ids
    if side == "right":
        return ids[:length]
    first = next((index for index, is_special in enumerate(special) if not is_special), 0)
    first = min(first, length)
    return ids[:first] + ids[len(ids) - (length - first) :]
