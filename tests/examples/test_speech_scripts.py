"""The example scripts for speech and sound, each run for a few steps on sounds in files."""

from pathlib import Path

import pytest
from transformers import (
    AutoModelForAudioClassification,
    AutoModelForCTC,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    PreTrainedModel,
)

from tests.examples.test_scripts import run
from tests.small_speech import (
    ctc_model,
    ctc_processor,
    spectrogram_classifier,
    whisper,
    whisper_processor,
    write_dataset,
)


def saved(folder: Path, model: PreTrainedModel, processor: object) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.extended
def test_whisper_is_distilled_with_its_language_and_evaluated_by_word_error_rate(tmp_path):
    processor = whisper_processor()
    _, measured = run(
        "run_speech_recognition_distillation.py",
        tmp_path / "student",
        teacher=saved(tmp_path / "teacher", whisper(processor), processor),
        student_init_kwargs={"decoder_layers": 2},
        train_file=write_dataset(tmp_path / "train", 12),
        validation_file=write_dataset(tmp_path / "held_out", 4),
        language="german",
        task="transcribe",
        predict_with_generate=True,
        generation_max_length=12,
        freeze_encoder=True,
    )
    student = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "student")
    assert student.config.decoder_layers == 2 and student.generation_config.language == "german"
    assert measured["eval_wer"] >= 0 and measured["eval_cer"] >= 0
    assert AutoProcessor.from_pretrained(tmp_path / "student").feature_extractor.feature_size == 16


@pytest.mark.slow
def test_ctc_is_distilled_frame_by_frame(tmp_path):
    processor = ctc_processor(tmp_path / "p", return_attention_mask=True)
    _, measured = run(
        "run_speech_recognition_distillation.py",
        tmp_path / "student",
        teacher=saved(tmp_path / "teacher", ctc_model(processor), processor),
        student_init_kwargs={"num_hidden_layers": 2},
        train_file=write_dataset(tmp_path / "data", 12),
    )
    assert AutoModelForCTC.from_pretrained(tmp_path / "student").config.num_hidden_layers == 2
    assert measured["eval_wer"] >= 0


@pytest.mark.extended
def test_sounds_are_classified_in_the_teachers_order_of_labels(tmp_path):
    labels = {"id2label": {0: "high", 1: "low", 2: "middle"}, "label2id": {"high": 0, "low": 1, "middle": 2}}
    _, measured = run(
        "run_audio_classification_distillation.py",
        tmp_path / "student",
        teacher=saved(tmp_path / "teacher", *spectrogram_classifier(**labels)),
        student_init_kwargs={"hidden_size": 24, "num_attention_heads": 2},
        train_file=write_dataset(tmp_path / "data", 18),
    )
    student = AutoModelForAudioClassification.from_pretrained(tmp_path / "student")
    assert student.config.id2label[0] == "high" and student.config.hidden_size == 24
    assert 0 <= measured["eval_accuracy"] <= 1
