"""Turn sounds, their transcripts or their labels into inputs for speech recognition and audio classification.

Does: extract features, tokenize transcripts with the tokens of language and task, leave out what no model can train on.
Does not: decode (`sounds.py`), augment.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Audio, Dataset
from transformers import PreTrainedConfig
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from hf_guide.data.arguments import DEFAULT_TARGET_LENGTH, DataArguments
from hf_guide.data.loading import check_strings, dataset_folder, find_column
from hf_guide.data.sounds import decode_sound
from hf_guide.errors import OptionError
from hf_guide.models.positions import max_input_tokens
from hf_guide.tasks import Task
from hf_guide.utils.labels import IGNORE_INDEX
from hf_guide.validation import did_you_mean

logger = logging.getLogger(__name__)

DEFAULT_MAX_DURATION = 20.0
"""Seconds, as in the example scripts of Transformers, for models without a window of their own."""

MAX_UNKNOWN_SHARE = 0.1
"""Of the characters of a dataset, that a CTC tokenizer may not know."""


@dataclass(frozen=True)
class SpeechCollator:
    """Pads sounds by the feature extractor and transcripts by `IGNORE_INDEX`.

    Attributes:
        feature_extractor: It has `pad`, or makes inputs of one length.
        start_token: The decoder's, which the model prepends itself: cut from transcripts that all begin with it.
    """

    feature_extractor: Any
    start_token: int | None = None

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Return the batch: the features, the mask where the feature extractor makes one, and `labels`."""
        names = [name for name in examples[0] if name not in ("labels", "label")]
        features = [{name: example[name] for name in names} for example in examples]
        lengths = {len(example[names[0]]) for example in examples}
        if len(lengths) == 1:
            tensors = {name: [torch.as_tensor(each[name]) for each in features] for name in names}
            batch = {name: torch.stack(values) for name, values in tensors.items()}
        else:
            batch = dict(self.feature_extractor.pad(features, return_tensors="pt"))
        labels = [torch.as_tensor(example["labels"]) for example in examples]
        if labels[0].ndim == 0:
            return batch | {"labels": torch.stack(labels)}
        padded = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX)
        if self.start_token is not None and bool((padded[:, 0] == self.start_token).all()):
            padded = padded[:, 1:]
        return batch | {"labels": padded}


@dataclass(frozen=True)
class SpeechPreprocessor:
    """Makes the inputs of a task from raw rows.

    Attributes:
        task: SPEECH_SEQ2SEQ, CTC or AUDIO_CLASSIFICATION.
        processor: A processor, or for classification a feature extractor.
        options: Columns, durations, language.
        configs: Of all models that read the examples, for the lengths that they support.
        encode_label: Returns the index of a class.
    """

    task: Task
    processor: Any
    options: DataArguments
    configs: tuple[PreTrainedConfig, ...] = ()
    encode_label: Callable[[Any], int] | None = None

    @property
    def feature_extractor(self) -> Any:
        """The part of the processor that makes features of sounds."""
        return getattr(self.processor, "feature_extractor", self.processor)

    def collator(self) -> SpeechCollator:
        """Return the collator of the prepared examples."""
        has_decoder = self.task is Task.SPEECH_SEQ2SEQ and self.configs
        return SpeechCollator(
            self.feature_extractor, getattr(self.configs[0], "decoder_start_token_id", None) if has_decoder else None
        )

    def prepare(self, split: Dataset, name: str) -> Dataset:
        """Return a split of model inputs.

        Raises:
            OptionError: A column is missing, a sound cannot be read, no row is left, or the tokenizer does not know the texts.
        """
        audio = find_column(split, self.task, "audio", self.options)
        target = find_column(split, self.task, "label" if self.encode_label else "text", self.options)
        if isinstance(split.features[audio], Audio):
            split = split.cast_column(audio, Audio(decode=False))  # decoded below, where errors name the sound
        prepared = split.map(
            _RowsToInputs(self, audio, target),
            batched=True,
            batch_size=32,
            with_indices=True,
            remove_columns=split.column_names,
            num_proc=self.options.preprocessing_num_workers,
            desc="Extracting features",
        )
        left_out = len(split) - len(prepared)
        if not len(prepared):
            raise OptionError(
                f"{self.options.name}: no row of the {name} split is left: every sound is shorter than "
                f"{self.options.min_duration_in_seconds:g} s, longer than {self.max_duration:g} s, or does not fit its text."
            )
        if left_out:
            logger.warning(
                "%s: %d of the %d rows of the %s split are left out: shorter than %g s, longer than %g s, or with a text that "
                "is too long.",
                *(self.options.name, left_out, len(split), name),
                *(self.options.min_duration_in_seconds, self.max_duration),
            )
        if self.task is Task.CTC:
            self._check_characters(prepared)
        return prepared

    @property
    def max_duration(self) -> float:
        """How many seconds a sound may have."""
        requested = self.options.max_duration_in_seconds
        window = getattr(self.feature_extractor, "chunk_length", None)
        if window is not None and requested is not None and requested > window:
            raise OptionError(
                f"max_duration_in_seconds must be at most {window}, the window of the "
                f"{type(self.feature_extractor).__name__}; found {requested:g}."
            )
        return requested if requested is not None else float(window or DEFAULT_MAX_DURATION)

    def sound_inputs(self, sound: Any) -> dict[str, Any]:
        """Return the features of one sound, without a batch axis."""
        extractor = self.feature_extractor
        made = extractor(sound, sampling_rate=extractor.sampling_rate)
        return {name: values[0] for name, values in made.items()}

    def target(self, value: Any, num_samples: int) -> Any:
        """Return the labels of one row; None where no model can learn them from so short a sound."""
        if self.encode_label is not None:
            return self.encode_label(value)
        labels = list(self.processor.tokenizer(value).input_ids)
        if self.task is Task.CTC:
            frames = min((num_ctc_frames(config, num_samples) for config in self.configs), default=num_samples)
            return labels if labels and frames >= _least_frames(labels) else None
        return labels if len(labels) <= self.max_labels else None

    @property
    def max_labels(self) -> int:
        """How many tokens a transcript may have, those of language and task included."""
        limits = [limit for each in self.configs if (limit := max_input_tokens(each, target=True)) is not None]
        requested, most = self.options.max_target_length, min(limits, default=None)
        if most is None or requested <= most:
            return requested
        if requested != DEFAULT_TARGET_LENGTH:
            raise OptionError(
                f"max_target_length must be at most {most}, the longest target that the model's decoder supports; found "
                f"{requested}."
            )
        return most

    def _check_characters(self, prepared: Dataset) -> None:
        unknown_id = self.processor.tokenizer.unk_token_id
        tokens = [token for labels in prepared["labels"] for token in labels]
        unknown = sum(token == unknown_id for token in tokens)
        if unknown > MAX_UNKNOWN_SHARE * len(tokens):
            known = sorted(self.processor.tokenizer.get_vocab())
            raise OptionError(
                f"{self.options.name}: {unknown} of the {len(tokens)} characters of the texts are unknown to the tokenizer, "
                f"whose tokens are {known[:40]}. Write the texts in its letters: in its letter case, without punctuation."
            )
        if unknown:
            logger.warning(
                "%s: %d of the %d characters of the texts are unknown to the tokenizer.",
                *(self.options.name, unknown, len(tokens)),
            )


def preprocess_speech(
    task: Task,
    train: Dataset,
    held_out: Dataset | None,
    processor: Any,
    options: DataArguments,
    encode_label: Callable[[Any], int] | None,
    configs: Sequence[PreTrainedConfig],
) -> tuple[Dataset, Dataset | None, SpeechCollator]:
    """Convert two raw splits to the inputs of a model of sounds, and return them with their collator.

    Raises:
        OptionError: As `SpeechPreprocessor.prepare`; or the tokenizer has no token for the language.
    """
    if task is not Task.AUDIO_CLASSIFICATION:
        if not hasattr(processor, "tokenizer") or not hasattr(processor, "feature_extractor"):
            raise OptionError(
                f"For {task} the processing class must have a tokenizer and a feature extractor; found a "
                f"{type(processor).__name__}. Set processing_class_name_or_path to a folder that has both."
            )
        set_language(processor, options.language, options.speech_task)
    preparing = SpeechPreprocessor(task, processor, options, tuple(configs), encode_label)
    evaluated = None if held_out is None else preparing.prepare(held_out, "evaluation")
    return preparing.prepare(train, "training"), evaluated, preparing.collator()


@dataclass(frozen=True)
class _RowsToInputs:
    """What `Dataset.map` calls: a class of its own, so that its arguments make the cache's fingerprint."""

    preprocessor: SpeechPreprocessor
    audio: str
    text: str

    def __call__(self, examples: dict[str, list[Any]], rows: list[int]) -> dict[str, list[Any]]:
        preprocessor, options = self.preprocessor, self.preprocessor.options
        rate = preprocessor.feature_extractor.sampling_rate
        targets = examples[self.text]
        if preprocessor.encode_label is None:
            targets = check_strings(targets, rows, self.text, options.name)
        made: dict[str, list[Any]] = {}
        for value, target, row in zip(examples[self.audio], targets, rows, strict=True):
            folder = dataset_folder(options)
            sound = decode_sound(value, rate, row=row, column=self.audio, dataset=options.name, folder=folder)
            longest = int(preprocessor.max_duration * rate)
            if preprocessor.encode_label is not None:
                sound = sound[:longest]
            elif len(sound) > longest:
                continue
            labels = preprocessor.target(target, len(sound))
            if labels is None or len(sound) < options.min_duration_in_seconds * rate:
                continue
            for name, values in (preprocessor.sound_inputs(sound) | {"labels": labels}).items():
                made.setdefault(name, []).append(values)
        names = [*preprocessor.feature_extractor.model_input_names[:1], "labels"]
        return made or {name: [] for name in names}


def num_ctc_frames(config: PreTrainedConfig, num_samples: int) -> int:
    """Return how many outputs a model of waveforms has for a sound; as many as samples where that is not known."""
    kernels, strides = getattr(config, "conv_kernel", None) or (), getattr(config, "conv_stride", None) or ()
    length = num_samples
    for kernel, stride in zip(kernels, strides, strict=True):
        length = max(0, (length - kernel) // stride + 1)
    if getattr(config, "add_adapter", False):
        for _ in range(config.num_adapter_layers):
            length = max(0, (length - 1) // config.adapter_stride + 1)
    return length


def _least_frames(labels: Sequence[int]) -> int:
    """Return the least frames to which CTC can align labels: one each, and a blank between two equal ones."""
    return len(labels) + sum(one == other for one, other in zip(labels, labels[1:], strict=False))


def set_language(processor: Any, language: str | None, task: str | None) -> None:
    """Let a multilingual tokenizer begin transcripts with the tokens of a language and a task, as Whisper does.

    Args:
        processor: A processor, changed in place.
        language: Its name or code, such as "german" or "de".
        task: "transcribe" or "translate".

    Raises:
        OptionError: The tokenizer has no such tokens.
    """
    if language is None and task is None:
        return
    tokenizer = getattr(processor, "tokenizer", processor)
    if not hasattr(tokenizer, "set_prefix_tokens"):
        raise OptionError(
            f"language and speech_task are for Whisper's tokenizer; found a {type(tokenizer).__name__}. Leave them out."
        )
    code = None
    if language is not None:
        code = TO_LANGUAGE_CODE.get(language.lower(), language.lower())
        if code not in TO_LANGUAGE_CODE.values():
            raise OptionError(
                f"language must be one of Whisper's; found {language!r}.{did_you_mean(language, TO_LANGUAGE_CODE)}"
            )
    vocabulary = tokenizer.get_vocab()
    for option, value in (("language", code), ("speech_task", task)):
        if value is not None and f"<|{value}|>" not in vocabulary:
            raise OptionError(
                f"{option} is {value!r}, and the tokenizer has no token <|{value}|>. Leave it out for a model of English "
                "only; otherwise use a multilingual model that knows it."
            )
    tokenizer.set_prefix_tokens(language=language, task=task)
