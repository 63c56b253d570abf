"""No cache of keys and values is kept while a teacher runs on calibration data, whatever its configs and its signature are."""

import copy

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from hf_guide import from_teacher
from hf_guide.calibration.forward import forward_without_cache
from hf_guide.models.modes import without_cache
from tests.small_image_text import FAMILIES, TEXT, VISION
from tests.tiny import same_bits

IDS = torch.randint(5, 60, (32, 20), generator=torch.Generator().manual_seed(2))


def internvl() -> PreTrainedModel:
    """Return a model whose forward pass takes `use_cache` among its keywords alone, as Qwen3-VL's."""
    config = transformers.InternVLConfig(
        text_config={**TEXT, "model_type": "qwen2", "vocab_size": 64},
        vision_config={**VISION, "image_size": [16, 16], "patch_size": [4, 4]},
        image_token_id=62,
    )
    torch.manual_seed(0)
    return transformers.InternVLForConditionalGeneration(config).eval()


TEACHERS = {**{name: lambda name=name: FAMILIES[name].build()[0] for name in FAMILIES}, "internvl": internvl}


def padded() -> "dict[str, Tensor]":
    mask = torch.ones_like(IDS)
    mask[::2, 12:] = 0
    return {"input_ids": IDS, "attention_mask": mask}


@pytest.mark.parametrize("name", TEACHERS)
def test_padded_text_makes_the_same_student_with_a_cache_in_the_config_and_without(name: str) -> None:
    teacher = TEACHERS[name]()
    students = []
    for use_cache in (True, False):
        model = copy.deepcopy(teacher)
        model.config.text_config.use_cache = use_cache
        method = {"method": "calibrated", "calibration_tokens": 400}
        students.append(
            from_teacher(model, method=method, calibration_dataset=[padded()], text_config={"num_hidden_layers": 2})
        )
        assert model.config.text_config.use_cache is use_cache
    assert same_bits(*students)
    assert len({str(student.initialization_report.blocks) for student in students}) == 1


@pytest.mark.parametrize("name", TEACHERS)
def test_a_calibration_pass_returns_no_cache(name: str) -> None:
    teacher = TEACHERS[name]()
    with torch.no_grad():
        assert teacher(**padded()).past_key_values is not None
        assert forward_without_cache(teacher, padded()).past_key_values is None


def test_configs_are_restored_after_an_error() -> None:
    teacher = internvl()
    with pytest.raises(ZeroDivisionError), without_cache(teacher):
        assert not teacher.config.text_config.use_cache
        raise ZeroDivisionError
    assert teacher.config.text_config.use_cache
