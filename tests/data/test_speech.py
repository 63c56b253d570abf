"""Sounds of a dataset become what the feature extractor makes of them; what cannot be read or learned is an error."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import PreTrainedConfig

from hf_guide.data.arguments import DataArguments
from hf_guide.data.preprocessing import ProcessedData, preprocess
from hf_guide.data.sounds import decode_sound
from hf_guide.data.speech import num_ctc_frames, set_language
from hf_guide.errors import OptionError
from hf_guide.tasks import Task
from tests.small_speech import (
    RATE,
    ctc_model,
    ctc_processor,
    sound_classifier,
    spectrogram_classifier,
    tone,
    whisper,
    whisper_processor,
    write_dataset,
    write_wav,
)


def decode(value: Any, rate: int = RATE, **options: Any) -> np.ndarray:
    return decode_sound(value, rate, row=3, column="audio", dataset="tones", **options)


@pytest.mark.parametrize(("width", "tolerance"), [(1, 1e-2), (2, 1e-4), (3, 1e-6), (4, 1e-7)])
def test_files_bytes_and_arrays_are_the_same_sound(width: int, tolerance: float, tmp_path: Path) -> None:
    sound = tone("low", "high")
    path = write_wav(tmp_path / "a.wav", sound, width=width)
    read = decode(path)
    assert read.dtype == np.float32 and np.abs(read - sound).max() < tolerance
    stereo = write_wav(tmp_path / "b.wav", sound, width=width, channels=2)
    forms = [{"path": path, "bytes": None}, {"path": None, "bytes": Path(path).read_bytes()}, stereo]
    forms += [
        {"array": read.tolist(), "sampling_rate": RATE},
        {"array": np.stack([read, read]), "sampling_rate": RATE},
    ]
    assert all(np.array_equal(decode(form), read) for form in forms)
    assert np.array_equal(decode("a.wav", folder=tmp_path), read)


def test_channels_are_averaged_as_datasets_does() -> None:
    left, right = tone("low"), tone("high")
    for array in (np.stack([left, right]), np.stack([left, right], axis=1)):
        assert np.allclose(decode({"array": array, "sampling_rate": RATE}), (left + right) / 2, atol=1e-7)


def test_another_sampling_rate_is_resampled(tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    for rate in (8_000, 22_050, 48_000):
        made = decode(write_wav(tmp_path / f"{rate}.wav", tone("low", rate=rate), rate=rate))
        expected = tone("low")
        assert abs(len(made) - len(expected)) <= 1
        inner = slice(400, 2800)  # the filter has its ends at the sound's
        assert np.abs(made[inner] - expected[inner]).max() < 0.08


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "its sound in row 3, column 'audio', is None. It must be a path"),
        ({"array": [0.5], "sampling_rate": None}, "sampling_rate=None. It must be a whole number"),
        ({"array": [], "sampling_rate": RATE}, "is empty"),
        ({"array": [0.1, float("nan")], "sampling_rate": RATE}, "not finite"),
        ([0.1, 0.2], "is of type list"),
        ("nothing.wav", "the sound nothing.wav in row 3.*cannot be read: No such file"),
        ("cut.wav", "the sound cut.wav.*(torchcodec|soundfile)"),
        ("empty.wav", "the sound empty.wav in row 3, column 'audio', is empty. Remove the row"),
        ("song.mp3", "the sound song.mp3.*(torchcodec|soundfile)"),
    ],
)
def test_a_sound_that_cannot_be_read_is_an_error_that_names_its_row(value: Any, message: str, tmp_path: Path) -> None:
    write_wav(tmp_path / "empty.wav", np.zeros(0, dtype=np.float32))
    (tmp_path / "cut.wav").write_bytes(b"RIFF\x00\x00")
    (tmp_path / "song.mp3").write_bytes(b"ID3 no sound")
    with pytest.raises(OptionError, match=f"tones: .*{message}"):
        decode(value, folder=tmp_path)


CTC_LETTERS = "abcdeghilmow "


def prepared(task: Task, processor: Any, config: PreTrainedConfig, file: Path, **options: Any) -> ProcessedData:
    arguments = DataArguments(data_files=str(file), validation_split_percentage=0, **options)
    raw = datasets.Dataset.from_json(str(file), cache_dir=str(file.parent / "cache"))
    labels = ["high", "low", "middle"] if task is Task.AUDIO_CLASSIFICATION else None
    return preprocess(task, raw, raw, processor, arguments, labels=labels, config=config)


def test_whisper_learns_transcripts_in_a_language(tmp_path: Path) -> None:
    processor = whisper_processor()
    config = whisper(processor).config
    file = write_dataset(tmp_path)
    data = prepared(Task.SPEECH_SEQ2SEQ, processor, config, file, language="german", speech_task="transcribe")
    batch = data.collator([data.train[0], data.train[1]])
    sounds = [tone("low", "low", seconds=0.15), tone("middle", seconds=0.15 + 0.02, seed=1)]
    written = [decode(write_wav(tmp_path / "again.wav", sound)) for sound in sounds]
    expected = processor.feature_extractor(written, sampling_rate=RATE, return_tensors="pt").input_features
    assert torch.allclose(batch["input_features"], expected, atol=1e-6)
    text = processor.tokenizer.decode(batch["labels"][0])
    assert text == "<|de|><|transcribe|><|notimestamps|>low low<|endoftext|>", "the model prepends its start itself"
    assert batch["labels"][1].tolist().count(-100) == 1 and set(batch) == {"input_features", "labels"}


@pytest.mark.parametrize("masked", [False, True])
def test_ctc_learns_letters_and_is_padded(masked: bool, tmp_path: Path) -> None:
    processor = ctc_processor(tmp_path / "p", CTC_LETTERS, return_attention_mask=masked)
    model = ctc_model(processor)
    data = prepared(Task.CTC, processor, model.config, write_dataset(tmp_path))
    batch = data.collator([data.eval[0], data.eval[1]])
    assert processor.tokenizer.decode(batch["labels"][0][batch["labels"][0] >= 0], group_tokens=False) == "low low"
    assert ("attention_mask" in batch) == masked and batch["input_values"].ndim == 2
    assert batch["input_values"][1, -1] == 0 and model(**batch).loss.isfinite()
    frames = model(**batch).logits.shape[1]
    assert num_ctc_frames(model.config, batch["input_values"].shape[1]) == frames


@pytest.mark.parametrize("spectrogram", [False, True])
def test_classes_of_sounds_are_the_students(spectrogram: bool, tmp_path: Path) -> None:
    model, extractor = (
        spectrogram_classifier() if spectrogram else (sound_classifier(), ctc_processor(tmp_path).feature_extractor)
    )
    file = write_dataset(tmp_path)
    data = prepared(Task.AUDIO_CLASSIFICATION, extractor, model.config, file, max_duration_in_seconds=0.16)
    batch = data.collator([data.train[0], data.train[1], data.train[2]])
    assert batch["labels"].tolist() == [1, 2, 0], "by the order of the labels that were passed"
    assert batch["input_values"].shape == ((3, 32, 16) if spectrogram else (3, 2560)), "longer sounds are cut"
    assert model(**batch).loss.isfinite()


@pytest.mark.parametrize(
    ("task", "options", "columns", "message"),
    [
        (Task.CTC, {"text_column": "words"}, {}, "has no column 'words'; it has"),
        (Task.CTC, {"audio_column": "sounds"}, {}, "no column 'sounds'; it has .*Set audio_column"),
        (Task.CTC, {}, {"text": "LOW!"}, "4 of the 4 characters|characters of the texts are unknown.*letter case"),
        (Task.CTC, {}, {"text": 7}, "column 'text' must contain text; row 0"),
        (Task.CTC, {"language": "german"}, {}, "language would be ignored"),
        (
            Task.CTC,
            {"max_duration_in_seconds": 0.01},
            {},
            "no row of the evaluation split is left.*longer than 0.01 s",
        ),
        (Task.CTC, {}, {"text": "low " * 100}, "no row of the .* split is left.*does not fit its text"),
        (Task.SPEECH_SEQ2SEQ, {"language": "french"}, {}, "language is 'fr', and the tokenizer has no token <.fr.>"),
        (Task.SPEECH_SEQ2SEQ, {"language": "klingon"}, {}, "language must be one of Whisper's; found 'klingon'"),
        (Task.SPEECH_SEQ2SEQ, {"max_duration_in_seconds": 2}, {}, "must be at most 1, the window of the Whisper"),
        (Task.AUDIO_CLASSIFICATION, {"label_column": "pitch"}, {}, "has no column 'pitch'"),
    ],
)
def test_what_no_model_can_learn_is_an_error(
    task: Task, options: dict[str, Any], columns: dict[str, Any], message: str, tmp_path: Path
) -> None:
    processor = whisper_processor() if task is Task.SPEECH_SEQ2SEQ else ctc_processor(tmp_path / "p", CTC_LETTERS)
    config = whisper(processor).config if task is Task.SPEECH_SEQ2SEQ else ctc_model(processor).config
    with pytest.raises(OptionError, match=message):
        prepared(task, processor, config, write_dataset(tmp_path, 4, **columns), **options)


def test_a_language_that_is_refused_leaves_the_tokenizer_as_it_was() -> None:
    processor = whisper_processor()
    before = processor.tokenizer("a").input_ids
    with pytest.raises(OptionError):
        set_language(processor, "french", None)
    assert processor.tokenizer("a").input_ids == before
    with pytest.raises(OptionError, match="speech_task=.transcibe. is not known"):
        DataArguments(dataset_name="x", speech_task="transcibe")


def test_rows_that_are_left_out_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write_dataset(tmp_path, 6)
    processor = ctc_processor(tmp_path / "p", CTC_LETTERS)
    data = prepared(Task.CTC, processor, ctc_model(processor).config, file, max_duration_in_seconds=0.3)
    assert len(data.train) == 5 and "1 of the 6 rows of the training split are left out" in caplog.text


@pytest.mark.skipif(importlib.util.find_spec("torchcodec") is not None, reason="with torchcodec audiofolder works")
def test_a_column_of_the_audio_feature_needs_no_torchcodec(tmp_path: Path) -> None:
    """As a dataset on the Hub has it: bytes, read here."""
    processor = ctc_processor(tmp_path / "p", CTC_LETTERS)
    rows = [json.loads(line) for line in write_dataset(tmp_path, 4).read_text().splitlines()]
    raw = datasets.Dataset.from_list(
        [row | {"audio": {"path": None, "bytes": Path(row["audio"]).read_bytes()}} for row in rows]
    )
    raw = raw.cast_column("audio", datasets.Audio(sampling_rate=8_000))
    data = preprocess(
        Task.CTC, raw, None, processor, DataArguments(dataset_name="x"), config=ctc_model(processor).config
    )
    assert len(data.train) == 4
