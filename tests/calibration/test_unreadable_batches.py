"""A batch that the teacher cannot run on is an error with the shapes of its inputs, and Transformers' or torch's reason."""

from typing import Any

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, PreTrainedModel

from hf_guide import TeacherError, from_teacher
from tests.small_speech import spectrogram_classifier, whisper, whisper_processor
from tests.tiny import KINDS

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
PIXELS = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def vit() -> PreTrainedModel:
    return KINDS["vit"].teacher()


def clip() -> PreTrainedModel:
    vision, text = {**SIZES, "image_size": 16, "patch_size": 8}, {**SIZES, "vocab_size": 96}
    return CLIPModel(CLIPConfig(vision_config=vision, text_config=text))


@pytest.mark.parametrize(
    ("make", "batches", "shapes", "sizes"),
    [
        (clip, [{"pixel_values": PIXELS}], "(4, 3, 16, 16)", {"text_config": {"num_hidden_layers": 1}}),
        (vit, [{"pixel_values": PIXELS[:, :1]}], "(4, 1, 16, 16)", {"num_hidden_layers": 1}),
        (
            vit,
            [{"pixel_values": PIXELS}, {"pixel_values": PIXELS.repeat(1, 1, 2, 2)}],
            "(4, 3, 32, 32)",
            {"num_hidden_layers": 1},
        ),
        (
            lambda: whisper(whisper_processor()),
            [{"input_features": torch.zeros(4, 9, 100), "labels": torch.ones(4, 5, dtype=torch.long)}],
            "(4, 9, 100)",
            {"decoder_layers": 1},
        ),
        (
            lambda: spectrogram_classifier()[0],
            [{"input_values": torch.zeros(4, 400)}],
            "400",
            {"num_hidden_layers": 1},
        ),
    ],
)
def test_the_error_names_the_shapes_of_the_inputs(make: Any, batches: Any, shapes: str, sizes: dict[str, Any]) -> None:
    method = {"method": "calibrated", "calibration_tokens": 10_000, "layer_selection": "uniform"}
    with pytest.raises(TeacherError, match="cannot read a batch of calibration_dataset") as error:
        from_teacher(make(), calibration_dataset=batches, method=method, show_progress=False, **sizes)
    assert shapes in str(error.value)
    assert error.value.__cause__ is not None
