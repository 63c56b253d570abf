"""Where no shape can be searched, the error names fields that the teacher's config has."""

import ast
import re

import pytest
from transformers import (
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    ConvNextForImageClassification,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SegformerConfig,
    SegformerForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from hf_guide import find_shapes, from_teacher
from hf_guide.errors import LayoutError
from tests.small_speech import CONVOLUTIONS

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION, TEXT = {**SIZES, "image_size": 16, "patch_size": 8}, {**SIZES, "vocab_size": 96}
SEGFORMER = {"hidden_sizes": [8, 16, 24, 32], "depths": [2, 1, 1, 1], "decoder_hidden_size": 16}
SWIN = {"embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2], "image_size": 32, "window_size": 2}
CONVNEXT = {"hidden_sizes": [8, 16], "depths": [2, 1], "num_stages": 2}
CLIP = {"vision_config": VISION, "text_config": TEXT}
LLAVA = {
    "vision_config": {**VISION, "model_type": "clip_vision_model"},
    "text_config": {**TEXT, "num_hidden_layers": 4, "model_type": "llama"},
}


@pytest.mark.parametrize(
    ("model_class", "config", "field", "reason"),
    [
        (SegformerForImageClassification, SegformerConfig(**SEGFORMER), "depths", "has stages of several widths"),
        (SwinForImageClassification, SwinConfig(**SWIN), "depths", "only its blocks can be chosen"),
        (ConvNextForImageClassification, ConvNextConfig(**CONVNEXT), "depths", "only its blocks can be chosen"),
        (CLIPModel, CLIPConfig(**CLIP), "text_config", "is made of several models"),
        (LlavaForConditionalGeneration, LlavaConfig(**LLAVA), "text_config", "only its blocks can be chosen"),
        (
            Wav2Vec2ForCTC,
            Wav2Vec2Config(**SIZES, **CONVOLUTIONS),
            "num_hidden_layers",
            "only its blocks can be chosen",
        ),
    ],
)
def test_what_to_pass_instead_of_a_budget_makes_a_smaller_student(model_class, config, field, reason):
    teacher = model_class(config)
    with pytest.raises(LayoutError, match=f"No shape can be searched for a budget.*{reason}") as error:
        find_shapes(teacher, num_parameters="50%", show_progress=False)
    name, value = re.search(r"Leave out the budget, .* such as (\w+)=(.*)\.$", str(error.value)).groups()
    assert name == field
    student = from_teacher(teacher, show_progress=False, **{name: ast.literal_eval(value)})
    assert student.num_parameters() < teacher.num_parameters()
