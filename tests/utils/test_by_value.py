"""Results are kept by the values of configs, and never given for others."""

import copy
import functools
from typing import Any

import pytest
from transformers import CLIPConfig, LlamaConfig, PreTrainedConfig

from hf_guide.initialization.student_config import derive_student_config
from hf_guide.models.model_classes import meta_model
from hf_guide.models.module_signature import config_signature, module_signature
from hf_guide.utils.by_value import ByValue
from tests.tiny import KINDS


def test_a_result_is_kept_for_equal_configs_alone() -> None:
    calls: list[int] = []

    @functools.lru_cache(maxsize=4)
    def size(config: ByValue[PreTrainedConfig]) -> int:
        calls.append(config.value.hidden_size)
        return int(config.value.hidden_size)

    config = LlamaConfig(hidden_size=64, num_attention_heads=4)
    assert [size(ByValue.of(each)) for each in (config, copy.deepcopy(config))] == [64, 64]
    assert calls == [64]
    config.hidden_size = 32  # the same object
    assert size(ByValue.of(config)) == 32


@pytest.mark.parametrize(
    "change", [{"vision_config": {"image_size": 32}}, {"projection_dim": 8}, {"unknown": 1}], ids=str
)
def test_what_differs_anywhere_is_another_value(change: dict[str, Any]) -> None:
    assert ByValue.of(CLIPConfig(**change)) != ByValue.of(CLIPConfig())


def test_classes_of_one_name_are_other_values() -> None:
    def make() -> type:
        class Config(LlamaConfig):
            pass

        return Config

    first, second = make(), make()
    assert ByValue.of(first()) == ByValue.of(first())
    assert ByValue.of(first()) != ByValue.of(second())
    assert ByValue.of((first, 1)) != ByValue.of((second, 1))


@pytest.mark.parametrize("name", KINDS)
def test_what_is_kept_is_what_would_be_computed_again(name: str) -> None:
    """For the teacher's config and a student's, changed in between."""
    kind = KINDS[name]
    teacher = kind.teacher()
    student = derive_student_config(teacher.config, kind.smaller)
    for config in (teacher.config, student, teacher.config, student):
        assert config_signature(type(teacher), config) == module_signature(meta_model(type(teacher), config))
    assert derive_student_config(teacher.config, kind.smaller).to_dict() == student.to_dict()
