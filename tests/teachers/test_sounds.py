"""A teacher of sounds gets what its own feature extractor would have made, or the difference is an error."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    ASTFeatureExtractor,
    AutoModelForCTC,
    PreTrainedModel,
    Wav2Vec2FeatureExtractor,
)

from hf_guide.errors import TeacherError, VocabularyError
from hf_guide.tasks import Task
from hf_guide.teachers.inputs import build_teacher_inputs
from hf_guide.teachers.processors import batch_tokenizer
from tests.small_speech import (
    RATE,
    ctc_model,
    ctc_processor,
    sound_classifier,
    spectrogram_classifier,
    tone,
    whisper,
    whisper_processor,
)

SOUNDS = [tone("low", "high", seed=1), 0.3 * tone("middle", seconds=0.3, seed=2) + 0.1]


def saved(model: PreTrainedModel, folder: Path, *processors: Any) -> PreTrainedModel:
    """Return the model loaded from a folder with its processors."""
    for each in (model, *processors):
        each.save_pretrained(folder)
    return type(model).from_pretrained(folder)


def batch(extractor: Any) -> dict[str, torch.Tensor]:
    return dict(extractor(SOUNDS, sampling_rate=RATE, padding=True, return_tensors="pt").items())


def waves(**changes: Any) -> Wav2Vec2FeatureExtractor:
    return Wav2Vec2FeatureExtractor(**changes)


@pytest.mark.parametrize(
    ("own", "teachers"),
    [
        (waves(), waves()),
        (waves(do_normalize=False, return_attention_mask=True), waves(return_attention_mask=True)),
        (waves(return_attention_mask=True), waves()),
        (ASTFeatureExtractor(mean=1.0, std=2.0, num_mel_bins=16, max_length=32), None),
        (ASTFeatureExtractor(do_normalize=False, num_mel_bins=16, max_length=32), None),
    ],
    ids=["equal", "normalised", "unmasked", "shifted", "raw"],
)
def test_converted_sounds_are_those_of_the_teachers_extractor(own: Any, teachers: Any, tmp_path: Path) -> None:
    model, extractor = spectrogram_classifier() if teachers is None else (sound_classifier(), teachers)
    teacher = saved(model, tmp_path, extractor)
    inputs = build_teacher_inputs(teacher, Task.AUDIO_CLASSIFICATION, own)
    made, converted, expected = batch(own), inputs.convert(batch(own)), batch(extractor)
    real = torch.ones_like(converted["input_values"])
    if "attention_mask" in made and "attention_mask" not in expected:  # its own normalisation counts the padding
        expected = batch(waves(return_attention_mask=True))
        del expected["attention_mask"]
    assert converted.keys() == expected.keys()
    assert torch.allclose(converted["input_values"] * real, expected["input_values"], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert torch.allclose(teacher(**converted).logits, teacher(**expected).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("own", "teachers", "message"),
    [
        (waves(sampling_rate=8000), waves(), "sampling_rate is 8000 there and 16000 for the teacher"),
        (waves(), waves(do_normalize=False), "do_normalize is True there and False for the teacher"),
        (waves(), waves(return_attention_mask=True), "return_attention_mask is False there. Set it to True"),
        (ASTFeatureExtractor(num_mel_bins=16, max_length=32), waves(), "ASTFeatureExtractor, and the teacher"),
        (ASTFeatureExtractor(num_mel_bins=16, max_length=40), None, "max_length is 40 there and 32 for the teacher"),
        (ASTFeatureExtractor(num_mel_bins=32, max_length=32), None, "num_mel_bins is 32 there and 16 for the teacher"),
    ],
)
def test_sounds_that_cannot_be_converted_are_an_error(own: Any, teachers: Any, message: str, tmp_path: Path) -> None:
    model, extractor = spectrogram_classifier() if teachers is None else (sound_classifier(), teachers)
    with pytest.raises(TeacherError, match=message):
        build_teacher_inputs(saved(model, tmp_path, extractor), Task.AUDIO_CLASSIFICATION, own)


def test_waveforms_are_not_normalised_over_unknown_padding(tmp_path: Path) -> None:
    teacher = saved(sound_classifier(), tmp_path, waves())
    inputs = build_teacher_inputs(teacher, Task.AUDIO_CLASSIFICATION, waves(do_normalize=False))
    with pytest.raises(TeacherError, match="has no attention_mask. Set return_attention_mask=True"):
        inputs.convert(batch(waves(do_normalize=False)))


def test_whisper_takes_any_mask_and_any_language(tmp_path: Path) -> None:
    """It does not mask its windows, and the tokens before a text name its language: neither is a difference."""
    processor = whisper_processor()
    teacher = saved(whisper(processor), tmp_path, processor)
    own = whisper_processor(language="de")
    own.feature_extractor.return_attention_mask = True
    assert own.tokenizer("ab").input_ids != processor.tokenizer("ab").input_ids
    inputs = build_teacher_inputs(teacher, Task.SPEECH_SEQ2SEQ, own)
    assert inputs.sounds is None
    other = copy.deepcopy(own)
    other.feature_extractor = type(other.feature_extractor)(feature_size=16, chunk_length=1, hop_length=80)
    with pytest.raises(TeacherError, match="hop_length is 80 there and 160"):
        build_teacher_inputs(teacher, Task.SPEECH_SEQ2SEQ, other)


def test_a_feature_extractor_alone_still_has_the_students_tokenizer_compared(tmp_path: Path) -> None:
    """As the scripts for speech pass it; equal sizes of other vocabularies are not mistaken for the same."""
    processor, other = ctc_processor(tmp_path / "a"), ctc_processor(tmp_path / "b", "zyxwvutsrqpo ")
    assert len(processor.tokenizer) == len(other.tokenizer)
    teacher = saved(ctc_model(processor), tmp_path / "teacher", processor)
    student = saved(ctc_model(other), tmp_path / "student", other)
    assert batch_tokenizer(other.feature_extractor, student).get_vocab() == other.tokenizer.get_vocab()
    assert batch_tokenizer(other.feature_extractor) is None
    for processing_class in (other, other.feature_extractor):
        with pytest.raises(VocabularyError, match="token 4 is 'z' to the student and 'a' to the teacher"):
            build_teacher_inputs(teacher, Task.CTC, processing_class, student=student)
    same = AutoModelForCTC.from_pretrained(tmp_path / "teacher")
    build_teacher_inputs(teacher, Task.CTC, processor.feature_extractor, student=same)
