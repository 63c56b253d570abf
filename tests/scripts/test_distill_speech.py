"""`hf-guide distill` and `hf-guide capture` on sounds: every kind of model trains, and from a cache as from its teacher."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCTC, AutoModelForSpeechSeq2Seq

from hf_guide.cli.main import main
from hf_guide.errors import OptionError, TeacherError, VocabularyError
from hf_guide.scripts.distill import distill, read_config
from tests.small_speech import (
    ctc_model,
    ctc_processor,
    sound_classifier,
    spectrogram_classifier,
    whisper,
    whisper_processor,
    write_dataset,
)

QUICK = {"losses": {"ce": 0.5, "kd": 0.5}, "max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True}
QUICK |= {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "validation_split_percentage": 34}


def case(kind: str, folder: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return a teacher's folder, its student's arguments, and options of its data."""
    model: Any
    if kind == "whisper":
        processor: Any = whisper_processor()
        model, smaller, data = (
            whisper(processor),
            {"decoder_layers": 2},
            {"language": "german", "speech_task": "transcribe"},
        )
    elif kind == "ctc":
        processor = ctc_processor(folder / "p", return_attention_mask=True)
        model, smaller, data = ctc_model(processor, hubert=True), {"num_hidden_layers": 2}, {}
    elif kind == "spectrogram":
        model, processor = spectrogram_classifier()
        smaller, data = {"hidden_size": 24, "num_attention_heads": 2}, {}
    else:
        processor = ctc_processor(folder / "p").feature_extractor
        model, smaller, data = sound_classifier(), {"num_hidden_layers": 2}, {}
    for each in (model, processor):
        each.save_pretrained(folder / "teacher")
    return str(folder / "teacher"), smaller, data


def run(folder: Path, **options: Any) -> dict[str, float]:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(QUICK | {"output_dir": str(folder / "student")} | options))
    return distill(read_config(file))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", ["whisper", "ctc", "spectrogram", "waveform"])
def test_a_captured_teacher_of_sounds_is_as_good_as_a_live_one(kind: str, tmp_path: Path) -> None:
    teacher, smaller, data = case(kind, tmp_path)
    file = str(write_dataset(tmp_path / "data", 12))
    flags = [word for name, value in data.items() for word in (f"--{name.replace('_', '-')}", value)]
    flags += ["--top-k", "318"] if kind == "whisper" else []  # all of the vocabulary, so that nothing is rounded away
    source = ["--data-files", file, "--validation-split-percentage", "34", "--log-prob-dtype", "float32"]
    assert main(["capture", teacher, "-o", str(tmp_path / "cache"), *source, *flags, "--no-progress"]) == 0
    live = run(tmp_path, teacher=teacher, student_init_kwargs=smaller, data_files=file, **data)
    cached = run(
        tmp_path,
        teacher_cache=str(tmp_path / "cache"),
        student_init_kwargs=smaller | {"teacher": teacher},
        data_files=file,
        **data,
    )
    for name in ("eval_ce", "eval_kd", "eval_teacher_agreement"):
        assert cached[name] == pytest.approx(live[name], rel=1e-5)
    metric = {"whisper": "eval_perplexity", "ctc": "eval_wer"}.get(kind, "eval_accuracy")
    assert live[metric] >= 0 and live["eval_kd"] > 0
    if kind == "ctc":
        student = AutoModelForCTC.from_pretrained(tmp_path / "student")
        assert student.config.num_hidden_layers == 2 and (tmp_path / "student" / "vocab.json").exists()
    elif kind == "whisper":
        student = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "student")
        assert student.generation_config.language == "german" and student.generation_config.task == "transcribe"
    card = (tmp_path / "student" / "README.md").read_text(encoding="utf-8")
    recognizes = kind in ("whisper", "ctc")
    assert f"pipeline_tag: {'automatic-speech-recognition' if recognizes else 'audio-classification'}" in card


@pytest.mark.extended
def test_a_calibrated_student_is_made_of_the_sounds_that_it_trains_on(tmp_path: Path) -> None:
    teacher, smaller, data = case("whisper", tmp_path)
    run(
        tmp_path,
        teacher=teacher,
        student_init_kwargs=smaller | {"method": "calibrated"},
        data_files=str(write_dataset(tmp_path / "data", 12)),
        **data,
    )
    report = json.loads((tmp_path / "student" / "initialization_report.json").read_text())
    assert report["calibration"]["tokens"] > 0


@pytest.mark.parametrize(
    ("kind", "changes", "error", "message"),
    [
        ("ctc", {"predict_with_generate": True}, OptionError, "predict_with_generate is for .* the task is ctc"),
        ("whisper", {"language": "frnch"}, OptionError, "found 'frnch'. Did you mean 'french'"),
        ("whisper", {"text_column": "words"}, OptionError, "has no column 'words'"),
        ("whisper", {"max_target_length": 400}, OptionError, "max_target_length must be at most 40"),
        ("waveform", {"label_column": "text"}, OptionError, "text"),
    ],
)
def test_wrong_options_of_speech_are_errors(
    kind: str, changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    teacher, smaller, data = case(kind, tmp_path)
    file = str(write_dataset(tmp_path / "data", 8))
    with pytest.raises(error, match=message):
        run(tmp_path, teacher=teacher, student_init_kwargs=smaller, data_files=file, **data | changes)


@pytest.mark.parametrize(
    ("letters", "changes", "error", "message"),
    [
        ("zyxwvutsrqpo ", {}, VocabularyError, "token 4 is 'a' to the student and 'z' to the teacher"),
        ("abcdeghilmowxyz ", {}, VocabularyError, "vocabulary has 17 classes and the teacher's 20"),
        ("abcdeghilmow ", {"sampling_rate": 8000}, TeacherError, "sampling_rate is 16000 there and 8000"),
    ],
)
def test_a_ctc_teacher_of_other_letters_or_sounds_is_an_error(
    letters: str, changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    processor, other = ctc_processor(tmp_path / "a"), ctc_processor(tmp_path / "b", letters, **changes)
    for name, each in (("student", processor), ("teacher", other)):
        ctc_model(each).save_pretrained(tmp_path / f"{name} model")
        each.save_pretrained(tmp_path / f"{name} model")
    with pytest.raises(error, match=message):
        run(
            tmp_path,
            model_name_or_path=str(tmp_path / "student model"),
            teacher=str(tmp_path / "teacher model"),
            data_files=str(write_dataset(tmp_path / "data", 8)),
        )
