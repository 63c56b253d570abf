"""A method is registered from outside and used everywhere; its options are checked; old names warn with the new ones."""

import dataclasses
import json
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from hf_guide import InitializationConfig, InitializationMethod, InitializationReport, OptionError, from_teacher
from hf_guide.calibration.config import CalibratedConfig
from hf_guide.cli import main as cli
from hf_guide.initialization import registry
from hf_guide.initialization.config import CONFIG_CLASSES, PlanOptions
from hf_guide.methods import GuideConfig, StudentSetup, UniformMethod, list_methods, register_method
from tests.tiny import KINDS, same_bits

LLAMA = KINDS["llama"]


@dataclass
class ReversedConfig(InitializationConfig):
    """Options of a method that this test registers."""

    method: str = "reversed_blocks"
    share: float = field(default=1.0, metadata={"help": "Share of the weights' length that is kept."})


class ReversedBlocks(UniformMethod):
    """Uniform selection of the last blocks, in reverse order, every weight scaled."""

    config: Any

    def plan_options(self) -> PlanOptions:
        return PlanOptions(layer_selection=[3, 2], seed=self.config.seed)

    def initialize(self, student: PreTrainedModel, setup: StudentSetup) -> InitializationReport:
        report = super().initialize(student, setup)
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.mul_(self.config.share)
        return report


@pytest.fixture
def registered() -> Iterator[None]:
    register_method("reversed_blocks", ReversedConfig, ReversedBlocks)
    yield
    del CONFIG_CLASSES["reversed_blocks"], registry._METHOD_CLASSES["reversed_blocks"]


@pytest.mark.extended
def test_the_built_in_methods_are_known_to_the_module_of_the_config_alone() -> None:
    code = (
        "from hf_guide.initialization.config import InitializationConfig; print(type(InitializationConfig('uniform')))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "uniform.UniformConfig" in process.stdout, process.stderr


@pytest.mark.usefixtures("registered")
def test_a_fifth_method_needs_no_edit_elsewhere(tmp_path: Path) -> None:
    teacher = LLAMA.teacher()

    def make(method: Any) -> PreTrainedModel:
        return from_teacher(teacher, method=method, show_progress=False, **LLAMA.smaller)

    plain, half = make("reversed_blocks"), make({"method": "reversed_blocks", "share": 0.5})
    assert same_bits(half, make(InitializationConfig(method="reversed_blocks", share=0.5)))
    for name, parameter in half.named_parameters():
        assert torch.equal(parameter, plain.get_parameter(name) * 0.5), name
    report = half.initialization_report
    assert report.blocks == {"layers": [3, 2]}
    assert report.options == {"method": "reversed_blocks", "seed": 0, "share": 0.5}

    teacher.save_pretrained(tmp_path / "teacher")
    sizes = [word for name, size in LLAMA.smaller.items() for word in ("--" + name.replace("_", "-"), str(size))]
    words = ["init", str(tmp_path / "teacher"), *sizes, "-o", str(tmp_path / "student"), "--no-progress"]
    assert cli.main([*words, "--method", "reversed_blocks", "--option", "share=0.5"]) == 0
    assert InitializationReport.load(tmp_path / "student").options == report.options
    assert [option.name for option in list_methods()["reversed_blocks"]] == ["seed", "share"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("guide", ReversedConfig, ReversedBlocks), ["must default to 'guide'", "'reversed_blocks'"]),
        (("guide", dataclasses.make_dataclass("Own", [("method", str, "guide")], bases=(InitializationConfig,)),
          ReversedBlocks), ["'guide' is registered already", "GuideConfig", "choose another name"]),
        (("my method", ReversedConfig, ReversedBlocks), ["identifier", "'my method'"]),
        (("reversed_blocks", dict, ReversedBlocks), ["must extend InitializationConfig"]),
        (("reversed_blocks", ReversedConfig, dict), ["must extend InitializationMethod"]),
        (("bare", dataclasses.make_dataclass("Bare", [("method", str, "bare"), ("depth", int, 3)],
          bases=(InitializationConfig,)), ReversedBlocks), ["Bare.depth must have a help text"]),
    ],
    ids=["other default", "name taken", "no identifier", "no config", "no method", "no help"],
)  # fmt: skip
def test_what_cannot_be_registered(arguments: tuple[Any, ...], expected: list[str]) -> None:
    before = list_methods()
    with pytest.raises(OptionError) as found:
        register_method(*arguments)
    assert all(word in str(found.value) for word in expected), found.value
    assert list_methods() == before


def test_registering_the_same_again_is_no_clash() -> None:
    register_method("guide", GuideConfig, registry._METHOD_CLASSES["guide"])
    with pytest.raises(TypeError, match="abstract"):
        InitializationMethod(GuideConfig())  # type: ignore[abstract]


def test_an_unregistered_config_is_an_error() -> None:
    with pytest.raises(OptionError, match="'reversed_blocks' is not known"):
        ReversedConfig()


def test_every_option_is_listed_with_its_default_and_help() -> None:
    listed = list_methods()
    assert list(listed)[:4] == ["guide", "calibrated", "uniform", "random"]
    for name, options in listed.items():
        config = InitializationConfig(method=name)
        assert {option.name: option.default for option in options} == {
            key: value for key, value in dataclasses.asdict(config).items() if key != "method"
        }
        assert all(option.help.endswith(".") and option.type for option in options)
    refit = next(option for option in listed["calibrated"] if option.name == "refit")
    assert refit.choices == ("all", "output_projections", "none")


def test_a_config_is_that_of_its_method() -> None:
    assert type(InitializationConfig()) is GuideConfig
    config = InitializationConfig("calibrated", ridge=0.5)
    assert type(config) is CalibratedConfig and pickle.loads(pickle.dumps(config)) == config
    assert dataclasses.replace(config, ridge=None) == CalibratedConfig()


RENAMED = [
    ("guide", {"layers": "ends"}, {"layer_selection": "first_last"}),
    ("guide", {"layers": "auto"}, {"layer_selection": "first_last"}),
    ("guide", {"layers": "even"}, {"layer_selection": "uniform"}),
    ("uniform", {"layers": "auto"}, {"layer_selection": "uniform"}),
    ("calibrated", {"layers": "influence"}, {"layer_selection": "block_influence"}),
    ("guide", {"later_blocks": "select"}, {"subsequent_layers": "uniform"}),
    ("guide", {"logit_gain": 0.3}, {"logit_scale": 0.3}),
    ("calibrated", {"basis": "places"}, {"basis": "channels"}),
    ("calibrated", {"repair": "writing"}, {"refit": "output_projections"}),
    ("calibrated", {"calibration_length": 64}, {"calibration_seq_length": 64}),
]


@pytest.mark.parametrize(("method", "old", "new"), RENAMED, ids=str)
def test_old_names_and_values_warn_with_the_new_ones(method: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = InitializationConfig(method=method, **old)
    assert found == InitializationConfig(method=method, **new)
    (old_name, old_value), (name, value) = *old.items(), *new.items()
    texts = [str(each.message) for each in caught]
    assert texts and all(issubclass(each.category, FutureWarning) for each in caught)
    assert old_name == name or any(repr(old_name) in text and repr(name) in text for text in texts)
    assert old_value == value or any(repr(old_value) in text and repr(value) in text for text in texts)


@pytest.mark.parametrize(
    "name",
    [
        *("centered", "token_weights", "energy_correction", "fold_norms", "restore_logit_scale"),
        *("pooling", "repair_inputs", "absorb_blocks", "turn_queries"),
        *("heads", "neurons", "experts", "fit_table", "fit_gain", "turn_values"),
    ],
)
@pytest.mark.parametrize("method", ["guide", "calibrated"])
def test_a_removed_option_is_an_error_with_the_reason(name: str, method: str) -> None:
    with pytest.raises(OptionError, match=f"'{name}' was removed: .*leave it out"):
        InitializationConfig(method=method, **{name: True})


def test_old_parameters_of_from_teacher_warn_with_the_new_ones(tmp_path: Path) -> None:
    with pytest.warns(FutureWarning, match="use 'calibration_cache_dir'"), pytest.raises(OptionError, match="no data"):
        from_teacher("teacher", calibration_dir=tmp_path)
    with pytest.warns(FutureWarning, match="use 'self_generated'"), pytest.raises(OptionError, match="no data"):
        from_teacher("teacher", calibration_dataset="teacher")


def test_a_report_of_an_earlier_version_loads(tmp_path: Path) -> None:
    student = from_teacher(LLAMA.teacher(), show_progress=False, **LLAMA.smaller)
    report = student.initialization_report
    report.calibration = {
        "tokens": 3,
        "residual_error": {},
        "self_generated": True,
        "selected": {},
        "block_influence": {},
    }
    content = json.loads(report.save(tmp_path).read_text())
    content["kept"], content["widths"] = content.pop("variance_explained"), content.pop("sizes")
    calibration = content["calibration"]
    for new, old in (
        ("residual_error", "lost"),
        ("self_generated", "own_text"),
        ("selected", "units"),
        ("block_influence", "influence"),
    ):
        calibration[old] = calibration.pop(new)
    (tmp_path / "old.json").write_text(json.dumps(content))
    loaded = InitializationReport.load(tmp_path / "old.json")
    assert loaded == InitializationReport.load(tmp_path)
    with pytest.warns(FutureWarning, match="use 'variance_explained'"):
        assert loaded.kept == loaded.variance_explained


def test_a_config_that_extends_another_takes_its_old_names() -> None:
    @dataclass
    class OwnGuideConfig(GuideConfig):
        method: str = "own_guide"

    register_method("own_guide", OwnGuideConfig, registry._METHOD_CLASSES["guide"])
    try:
        with pytest.warns(FutureWarning, match="use 'layer_selection'"):
            assert InitializationConfig("own_guide", layers=[0, 3]).layer_selection == [0, 3]
    finally:
        del CONFIG_CLASSES["own_guide"], registry._METHOD_CLASSES["own_guide"]
