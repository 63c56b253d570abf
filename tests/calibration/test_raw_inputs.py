"""Images and sounds that no processor has read are errors that name the processor."""

from typing import Any

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel

from hf_guide.errors import OptionError
from tests.calibration.test_data import load, table
from tests.small_speech import spectrogram_classifier, whisper, whisper_processor
from tests.tiny import KINDS

ROW = np.random.default_rng(0).integers(0, 256, (3, 16, 16), dtype=np.uint8)
PICTURE = PIL.Image.fromarray(ROW.transpose(1, 2, 0))
SOUND = {"array": np.zeros(320), "sampling_rate": 16_000}


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


LAST = torch.ones(16, 16, 3)
OF_IMAGES = "The teacher reads pixel_values: run its image processor on the images"
OF_SOUNDS = "The teacher reads input_features: run its feature extractor on the sounds"


@pytest.mark.parametrize("dataset", [[{"pixel_values": LAST}], [{"pixel_values": LAST[None]}]])
def test_channels_must_be_first(dataset: Any) -> None:
    with pytest.raises(OptionError, match=r"\(1, 16, 16, 3\), with channels last.*Run the teacher's image processor"):
        load(vit(), dataset)


@pytest.mark.parametrize(
    ("make", "dataset", "found"),
    [
        (vit, [{"pixel_values": PICTURE}], "a Image in pixel_values"),
        (vit, [{"pixel_values": [PICTURE, PICTURE.resize((8, 8))]}], "a Image in pixel_values"),
        (vit, table("pixel_values", [PICTURE]).iter(batch_size=1), "in pixel_values, which must be numbers"),
        (vit, [{"image": PICTURE, "label": 0}], r"the columns \['image', 'label'\], none of them"),
        (vit, [{"image": LAST, "label": 0}], r"has \['image', 'label'\], of which .* takes no tensor"),
        (vit, [PICTURE], "yields a Image"),
        (vit, [ROW], "yields a ndarray"),
        (vit, [{"text": "a red square"}], r"the columns \['text'\].*does not read text"),
        (speech_model, [{"input_features": SOUND}], "a dict in input_features"),
        (speech_model, [{"audio": SOUND, "text": "low"}], r"\['audio', 'text'\].*does not read text"),
        (speech_model, [{"audio": SOUND, "labels": [1]}], r"the columns \['audio', 'labels'\], none of them"),
        (speech_model, ["low"], "yields texts, and the teacher does not read text"),
    ],
)
def test_what_no_processor_has_read_is_an_error_that_names_it(make: Any, dataset: Any, found: str) -> None:
    with pytest.raises(OptionError, match=f"{found}.*{OF_IMAGES if make is vit else OF_SOUNDS}"):
        load(make(), dataset)


def test_a_text_where_ids_must_be_is_not_an_empty_row() -> None:
    with pytest.raises(OptionError, match="a str in input_ids, which must be numbers"):
        load(KINDS["llama"].teacher(), [{"input_ids": "a text"}])


def llava() -> PreTrainedModel:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "model_type": "clip_vision_model", "image_size": 16, "patch_size": 8}
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config={**sizes, "model_type": "llama", "vocab_size": 96})
    )


IMAGES = datasets.Dataset.from_list([{"image": PICTURE, "text": "a sea"}]).cast_column("image", datasets.Image())


@pytest.mark.parametrize(
    "dataset",
    [
        IMAGES,
        IMAGES.cast_column("image", datasets.Image(decode=False)),
        [{"image": [PICTURE, PICTURE], "messages": [{"role": "user", "content": "a sea"}]}],
        [{"image": SOUND, "text": "a sea"}],
    ],
    ids=["decoded", "not decoded", "messages", "sound"],
)
def test_the_images_of_text_are_not_left_out_in_silence(dataset: Any) -> None:
    with pytest.raises(
        OptionError, match=f"in image in addition to text, and only the text would be read. {OF_IMAGES}"
    ):
        load(llava(), dataset)


def test_a_teacher_of_text_reads_the_text_of_images() -> None:
    with pytest.raises(OptionError, match="has no tokenizer that loads"):  # what is read next
        load(KINDS["llama"].teacher(), IMAGES)
