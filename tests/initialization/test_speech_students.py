"""Whisper's students: transcripts, timestamps and word alignment, from a folder that a process without hf_guide loads."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, WhisperProcessor

from hf_guide import from_teacher
from hf_guide.errors import OptionError
from tests.small_speech import RATE, ctc_model, ctc_processor, sound_classifier, tone, whisper, whisper_processor
from tests.tiny import run_python

NARROW = {"d_model": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32}


@pytest.fixture(scope="module")
def processor() -> WhisperProcessor:
    return whisper_processor()


@pytest.fixture(scope="module")
def teacher(processor: WhisperProcessor) -> PreTrainedModel:
    return whisper(processor)


GENERATE = """
    import json, sys
    import torch
    from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor
    results = {}
    for folder in sys.argv[1:]:
        model, processor = AutoModelForSpeechSeq2Seq.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
        sound = torch.sin(torch.arange(16000) * 0.1).numpy()
        inputs = processor(sound, sampling_rate=16000, return_tensors="pt", return_attention_mask=True)
        plain = model.generate(**inputs, language="de", task="transcribe")
        timed = model.generate(**inputs, language="en", return_timestamps=True)
        try:
            words = model.generate(**inputs, return_timestamps=True, return_token_timestamps=True)
            words = words["token_timestamps"].tolist()
        except ValueError as error:
            words = str(error)
        text = processor.batch_decode(timed, decode_with_timestamps=True)
        results[folder] = [plain.tolist(), timed.tolist(), text, words]
    assert "hf_guide" not in sys.modules
    print(json.dumps(results))
"""


@pytest.mark.extended
def test_students_transcribe_with_timestamps_in_a_process_without_hf_guide(
    teacher: PreTrainedModel, processor: WhisperProcessor, tmp_path: Path
) -> None:
    """Word timestamps too, and where no aligned head is left `generate` refuses them."""
    students = {
        "teacher": teacher,
        "copy": from_teacher(teacher, show_progress=False),
        "short": from_teacher(teacher, decoder_layers=1, show_progress=False),
        "unaligned": from_teacher(teacher, decoder_layers=1, method="random", show_progress=False),
    }
    for name, student in students.items():
        student.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    found = json.loads(run_python(GENERATE, *(tmp_path / name for name in students)).splitlines()[-1])
    of_teacher, of_copy, short, unaligned = (found[str(tmp_path / name)] for name in students)
    assert of_copy == of_teacher and any("<|0." in text for text in of_teacher[2])
    assert isinstance(short[3], list) and short[1] != of_teacher[1]
    assert "token-level timestamps not available" in unaligned[3]


@pytest.mark.parametrize(
    ("changes", "heads", "note"),
    [
        ({"encoder_layers": 2}, [[0, 1], [2, 3], [3, 0], [3, 2]], ""),
        ({"decoder_layers": 2}, [[0, 1], [1, 0], [1, 2]], "names 1 heads"),
        ({"decoder_layers": 2} | NARROW, [[1, 0], [1, 1]], "names 2 heads"),
        ({"d_model": 24}, [[0, 1], [2, 3], [3, 0], [3, 2]], ""),
    ],
)
def test_the_generation_config_follows_blocks_and_heads(
    changes: dict[str, Any], heads: list[list[int]], note: str, teacher: PreTrainedModel
) -> None:
    student = from_teacher(teacher, show_progress=False, **changes)
    inherited, own = teacher.generation_config.to_dict(), student.generation_config.to_dict()
    assert own.pop("alignment_heads") == heads
    assert own == {name: value for name, value in inherited.items() if name != "alignment_heads"}
    notes = [each for each in student.initialization_report.notes if "alignment_heads" in each]
    assert bool(notes) == bool(note) and all(note in each for each in notes)
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
    positions = student.model.encoder.embed_positions.weight
    assert not positions.requires_grad and positions.shape == (50, student.config.d_model)


@torch.no_grad()
def test_an_encoder_that_is_kept_gives_the_teachers_states(teacher: PreTrainedModel, processor: Any) -> None:
    """As in Distil-Whisper, which cuts the decoder only."""
    student = from_teacher(teacher, decoder_layers=2, show_progress=False)
    inputs = processor(tone("low", "high"), sampling_rate=RATE, return_tensors="pt")
    states = [model.get_encoder()(**inputs).last_hidden_state for model in (student, teacher)]
    assert torch.equal(*states)
    assert student.config.encoder_layers == 4 and student.config.decoder_layers == 2


@pytest.mark.sampled(2)
@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("kind", ["wav2vec2", "hubert", "classifier"])
@torch.no_grad()
def test_an_encoder_of_waveforms_may_have_fewer_blocks(kind: str, stable: bool, tmp_path: Path) -> None:
    """Equal to the teacher whose other blocks are removed."""
    changes = {"do_stable_layer_norm": stable, "feat_extract_norm": "layer" if stable else "group"}
    build = ctc_model if kind != "classifier" else lambda processor, hubert, **more: sound_classifier(**more)
    teacher = build(ctc_processor(tmp_path), hubert=kind == "hubert", **changes)
    inputs = torch.from_numpy(tone("low", "high"))[None]
    assert torch.equal(from_teacher(teacher, show_progress=False)(inputs).logits, teacher(inputs).logits)
    student = from_teacher(teacher, num_hidden_layers=2, show_progress=False)
    layers = teacher.base_model.encoder.layers
    teacher.base_model.encoder.layers = torch.nn.ModuleList([layers[0], layers[3]])
    assert torch.equal(student(inputs).logits, teacher(inputs).logits)


def calibrated(teacher: PreTrainedModel, data: Any, **changes: Any) -> PreTrainedModel:
    return from_teacher(teacher, method="calibrated", calibration_dataset=data, show_progress=False, **changes)


@pytest.mark.extended
def test_sounds_calibrate_from_rows_as_from_batches(tmp_path: Path, teacher: PreTrainedModel, processor: Any) -> None:
    """Rows as `Dataset.map` leaves them: spectrograms, and transcripts that begin with the decoder's own first token."""
    sounds = [tone("low", "high", seed=seed) for seed in range(8)]
    features = processor.feature_extractor(sounds, sampling_rate=RATE, return_tensors="pt").input_features
    labels = [processor.tokenizer("low " * (1 + seed % 2)).input_ids for seed in range(8)]
    rows = datasets.Dataset.from_dict({"input_features": features.numpy(), "labels": labels})
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(each[1:]) for each in labels], True, -100)
    student = calibrated(teacher, rows, decoder_layers=2, d_model=24)
    same = calibrated(teacher, [{"input_features": features, "labels": padded}], decoder_layers=2, d_model=24)
    assert all(torch.equal(one, other) for one, other in zip(student.parameters(), same.parameters(), strict=True))
    unequal = [{"input_values": [0.1] * 2000}, {"input_values": [0.1] * 2400}]
    with pytest.raises(OptionError, match="input_values of the shapes .*must be the same in each row of a batch"):
        calibrated(sound_classifier(), unequal, num_hidden_layers=2)


def test_the_convolutions_of_a_waveform_encoder_are_never_left_out(tmp_path: Path) -> None:
    """Their influence cannot be measured: they change the length."""
    teacher = ctc_model(ctc_processor(tmp_path))
    batches = [
        {"input_values": torch.from_numpy(np.stack([tone("low", seed=s), tone("high", seed=s)]))} for s in range(3)
    ]
    student = calibrated(teacher, batches, num_hidden_layers=2)
    assert student.initialization_report.blocks["feature_extractor.conv_layers"] == [0, 1, 2]
    assert student(**batches[0]).logits.isfinite().all()
