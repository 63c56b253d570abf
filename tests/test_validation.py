"""Every option that is a number is finite and in range."""

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
from transformers import TrainingArguments

from hf_guide.data.arguments import DataArguments
from hf_guide.distillation.arguments import DistillationArguments
from hf_guide.distillation.losses.registry import registered_losses
from hf_guide.errors import OptionError
from hf_guide.initialization.config import InitializationConfig
from hf_guide.initialization.registry import list_methods
from hf_guide.signal_cache.config import CaptureConfig

INVALID: list[Any] = [math.nan, math.inf, -math.inf, -1, -1e-9, "many", "2", True, [1.0], {}]
REALS = [
    "temperature",
    "beta",
    "validation_split_percentage",
    "mlm_probability",
    "min_duration_in_seconds",
    "max_duration_in_seconds",
]
WHOLE = [
    "loss_chunk_size",
    "max_length",
    "max_target_length",
    "max_train_samples",
    "max_eval_samples",
    "preprocessing_num_workers",
    "validation_split_seed",
    "top_k",
    "vocabulary_size",
    "batch_size",
    "shard_size",
]
INVALID_VALUES: dict[str, list[Any]] = {name: [*INVALID, 1e200] for name in REALS} | {
    name: [*INVALID, 1.5, 1e200] for name in WHOLE
}
for _name in REALS[:2]:
    INVALID_VALUES[_name] += [0, None]


def _numbers(options: type, known: set[str]) -> set[str]:
    """Return the names of the fields of a dataclass that are numbers."""
    kinds = {field.name: str(field.type) for field in dataclasses.fields(options) if field.name not in known}
    return {
        name
        for name, kind in kinds.items()
        if kind in ("int", "float", "int | None", "float | None", "<class 'int'>", "<class 'float'>")
    }


def make(name: str, value: Any) -> Any:
    for options in (DistillationArguments, CaptureConfig, DataArguments):
        if name in {field.name for field in dataclasses.fields(options)}:
            always = {"dataset_name": "some/data"} if options is DataArguments else {}
            always |= {"report_to": [], "use_cpu": True} if options is DistillationArguments else {}
            return options(**always, **{name: value})
    raise AssertionError(name)


def test_no_number_is_left_out():
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    found = (
        _numbers(DistillationArguments, inherited) | _numbers(CaptureConfig, set()) | _numbers(DataArguments, set())
    )
    assert found == {*REALS, *WHOLE}


@pytest.mark.parametrize("name", [*REALS, *WHOLE])
def test_a_number_out_of_range_is_an_error_when_the_options_are_created(name: str):
    for value in INVALID_VALUES[name]:
        with pytest.raises(OptionError, match=f"{name}.* must be a"):
            make(name, value)


def test_numbers_of_numpy_are_numbers():
    assert make("temperature", np.float32(2.0)).temperature == 2.0 and make("top_k", np.int64(4)).top_k == 4
    assert type(make("temperature", 2).temperature) is float and type(make("top_k", np.int64(4)).top_k) is int


@pytest.mark.parametrize("value", [*INVALID, 1e200, 0, None])
def test_captured_temperatures_are_in_range(value: Any):
    with pytest.raises(OptionError, match="temperatures must be a number from 0.001 to 1000"):
        CaptureConfig(temperatures=[value])


@pytest.mark.parametrize("value", [*INVALID, 1e200])
def test_weights_are_in_range(value: Any):
    for options in ({"losses": {"kd": value}}, {"teacher_weights": [1.0, value]}):
        with pytest.raises(OptionError, match="must be a number from 0 to 1e\\+06; found"):
            DistillationArguments(report_to=[], use_cpu=True, **options)


@pytest.mark.parametrize("layers", [{"1": 1.5}, {-1: 2}, {"a": 1}, {1: None}, {True: 1}, [1, 2], "7"])
def test_layers_must_be_whole_numbers(layers: Any):
    with pytest.raises(OptionError, match="layer_mapping"):
        DistillationArguments(report_to=[], use_cpu=True, layer_mapping=layers)
    mapping = json.dumps({"1": "2", "3": 4})
    assert DistillationArguments(report_to=[], use_cpu=True, layer_mapping=mapping).layer_mapping == {1: 2, 3: 4}


def _loss_numbers() -> list[tuple[str, str]]:
    """Return the numbers among the options that losses declare for themselves, as (loss, option)."""
    return [
        (term.name, field.name)
        for term in registered_losses().values()
        if term.config.__module__.startswith("hf_guide.")
        for field in dataclasses.fields(term.config)
        if "float" in str(field.type) or "int" in str(field.type)
        if "argument" not in field.metadata
    ]


@pytest.mark.parametrize("loss,option", _loss_numbers())
@pytest.mark.parametrize("value", [*INVALID, 1e200, 0, None], ids=repr)
def test_a_losss_own_number_out_of_range_is_an_error(loss: str, option: str, value: Any):
    with pytest.raises(OptionError, match=f"{option}.* must be a"):
        DistillationArguments(report_to=[], use_cpu=True, losses=loss, loss_options={loss: {option: value}})


def test_the_numbers_of_the_losses_are_known():
    assert _loss_numbers() == [("dkd", "alpha"), ("dkd", "beta"), ("similarity", "scale")]


@pytest.mark.parametrize(
    "method,option", [(method, option.name) for method, options in list_methods().items() for option in options]
)
def test_an_option_of_a_method_out_of_range_is_an_error(method: str, option: str):
    for value in (math.nan, math.inf, -1, "many"):
        with pytest.raises(OptionError, match=option):
            InitializationConfig(method=method, **{option: value})
