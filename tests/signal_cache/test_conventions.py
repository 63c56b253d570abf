"""A teacher that is captured is fed what it expects, and what cannot be read is not taken for a full disk."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from transformers import (
    BertConfig,
    BertForNextSentencePrediction,
    DataCollatorWithPadding,
    ViTImageProcessor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    default_data_collator,
)

from hf_guide.data.arguments import DataArguments
from hf_guide.data.preprocessing import preprocess
from hf_guide.errors import CaptureError, OptionError, TaskError, TeacherError
from hf_guide.signal_cache.writer import capture_teacher
from hf_guide.tasks import Task, task_of
from hf_guide.teachers.processors import check_processors
from tests.distillation.small import model_for
from tests.teachers.test_inputs import END, STUDENTS_OWN, examples, model, saved, tokenizer


def captured(teacher: str, data: Any, collate: Any, processor: Any, folder: Path) -> torch.Tensor:
    """Return the captured logits, in the data's order."""
    capture = capture_teacher(
        teacher, data, folder, processing_class=processor, data_collator=collate, show_progress=False
    )
    keys = [key for example in data for key in capture.keys(collate([dict(example)]))]
    return torch.stack([example.named()["teacher_logits"] for example in capture.lookup(keys)])


def test_captured_pixels_are_normalised_as_the_teacher_expects(tmp_path: Path) -> None:
    original = model_for("image-classification", 0).eval()
    own = ViTImageProcessor(**STUDENTS_OWN | {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]})
    mine = ViTImageProcessor(**STUDENTS_OWN)
    teacher = saved(original, tmp_path / "teacher", own)
    images = [np.random.default_rng(n).integers(0, 256, (8, 8, 3), dtype=np.uint8) for n in range(4)]
    data = [{"pixel_values": mine(each, return_tensors="pt")["pixel_values"][0], "labels": 1} for each in images]
    with torch.no_grad():
        truth = original(**own(images, return_tensors="pt")).logits
    assert torch.allclose(captured(teacher, data, default_data_collator, mine, tmp_path / "capture"), truth, atol=1e-5)
    with pytest.raises(TeacherError, match="resample is 2 there and 0 for the teacher"):
        other = saved(original, tmp_path / "other", ViTImageProcessor(**STUDENTS_OWN | {"resample": 0}))
        captured(other, data, default_data_collator, mine, tmp_path / "refused")


@pytest.mark.parametrize("pad", ["<pad>", "<new>"])
def test_captured_classifiers_find_the_last_token_before_the_batches_padding(pad: str, tmp_path: Path) -> None:
    kind = "LlamaForSequenceClassification"
    original, tok = model(kind), tokenizer(pad)
    teacher = saved(original, tmp_path / "teacher", tokenizer())
    data = examples(kind, tok)
    with torch.no_grad():
        truth = torch.cat([original(input_ids=torch.tensor([each["input_ids"]])).logits for each in data])
    assert all(each["input_ids"][-1] == END for each in data)
    assert torch.allclose(captured(teacher, data, DataCollatorWithPadding(tok), tok, tmp_path / "c"), truth, atol=1e-5)


def test_a_capture_of_other_tokens_is_an_error(tmp_path: Path) -> None:
    kind, tok = "LlamaForCausalLM", tokenizer()
    teacher = saved(model(kind), tmp_path / "teacher", tokenizer(lower=False))
    with pytest.raises(TeacherError, match="make other tokens of the same text"):
        capture_teacher(teacher, examples(kind, tok), tmp_path / "capture", processing_class=tok)


@pytest.mark.parametrize("prepared", [True, False])
def test_a_broken_image_is_no_full_disk(prepared: bool, tmp_path: Path) -> None:
    processor = ViTImageProcessor(**STUDENTS_OWN)
    teacher = saved(model_for("image-classification", 0), tmp_path / "teacher", processor)
    for name in ("a", "b", "c"):
        PIL.Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "c.png").write_bytes(b"no image")
    columns = {"image": [str(tmp_path / f"{name}.png") for name in "abc"], "label": [0, 1, 2]}
    data = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    if prepared:
        data = preprocess(Task.IMAGE_CLASSIFICATION, data, None, processor, DataArguments(dataset_name="x")).train
        error, message = OptionError, r"the image c\.png in row 2"
    else:
        data = data.with_transform(
            lambda rows: {"pixel_values": [processor(each)["pixel_values"][0] for each in rows["image"]]}
        )
        error, message = CaptureError, "The dataset's examples 0 to 2 cannot be read: .*c.png"
    with pytest.raises(error, match=message) as caught:
        capture_teacher(
            teacher, data, tmp_path / "capture", processing_class=processor, config={"remove_unused_columns": False}
        )
    assert "Make room" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"sampling_rate": 8000}, "sampling_rate is 16000 there and 8000 for the teacher"),
        ({"hop_length": 80}, "hop_length is 160 there and 80 for the teacher"),
        ({"feature_size": 40}, "feature_size is 80 there and 40 for the teacher"),
    ],
)
def test_sound_that_is_processed_otherwise_is_an_error(
    changes: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 20}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "pad_token_id": 0}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    original = WhisperForConditionalGeneration(WhisperConfig(**sizes, **ids))
    folder = saved(original, tmp_path, WhisperFeatureExtractor(chunk_length=1, **changes))
    teacher = WhisperForConditionalGeneration.from_pretrained(folder)
    mine = WhisperFeatureExtractor(chunk_length=1)
    if message is None:
        check_processors(teacher, Task.SPEECH_SEQ2SEQ, "teacher", mine)
    else:
        with pytest.raises(TeacherError, match=message):
            check_processors(teacher, Task.SPEECH_SEQ2SEQ, "teacher", mine)


def test_advice_is_not_what_the_user_did_already() -> None:
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    with pytest.raises(
        TaskError, match="BertForNextSentencePrediction is for a task that cannot be distilled; expected"
    ):
        task_of(BertForNextSentencePrediction(config))
