"""Images and sounds that no processor has read are errors that name the processor."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from hf_guide.errors import OptionError
from tests.calibration.test_data import load
from tests.small_speech import spectrogram_classifier, whisper, whisper_processor
from tests.tiny import KINDS

ROW = np.random.default_rng(0).integers(0, 256, (3, 16, 16), dtype=np.uint8)


def vit() -> PreTrainedModel:
    return KINDS["vit"].teacher()


def spectrogram_model() -> PreTrainedModel:
    return spectrogram_classifier()[0]


def speech_model() -> PreTrainedModel:
    return whisper(whisper_processor())


@pytest.mark.parametrize(
    ("make", "dataset", "message"),
    [
        (vit, [{"pixel_values": ROW}], "pixel_values of torch.uint8.*Run the image processor on the images"),
        (vit, [{"pixel_values": ROW.tolist()}], "pixel_values of torch.int64"),
        (vit, [{"pixel_values": torch.from_numpy(ROW)[None]}], "pixel_values of torch.uint8"),
        (
            spectrogram_model,
            [{"input_values": np.zeros((8, 16), dtype=np.int16)}],
            "input_values of torch.int16.*Run the feature extractor on the sounds",
        ),
        (
            speech_model,
            [{"input_features": torch.zeros(1, 16, 100, dtype=torch.int16)}],
            "input_features of torch.int16",
        ),
    ],
)
def test_whole_numbers_are_not_taken_for_what_a_processor_returns(make: Any, dataset: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        load(make(), dataset)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rows_of_any_floating_dtype_are_read(dtype: torch.dtype) -> None:
    (batch,) = load(vit(), [{"pixel_values": torch.ones(3, 16, 16, dtype=dtype)}])
    assert torch.equal(batch["pixel_values"], torch.ones(1, 3, 16, 16))
