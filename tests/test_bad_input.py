"""Bad input ends in one clear error, before any work where that can be: what was found, what was expected, what to do."""

import json
import os
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BatchEncoding,
    BertConfig,
    BertForMaskedLM,
    FunnelConfig,
    FunnelForMaskedLM,
    GPT2Config,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedModel,
)

from hf_guide import (
    AutoStudentForCausalLM,
    AutoStudentForImageClassification,
    AutoStudentForSeq2SeqLM,
    DistillationArguments,
    DistillationTrainer,
    HfGuideError,
    InitializationConfig,
    LayoutError,
    OptionError,
    ShapeError,
    TeacherError,
    capture_teacher,
    find_shapes,
    fit_subclasses,
    from_teacher,
)
from hf_guide.cli import main as cli
from hf_guide.modeling import plan_student
from tests.distillation.small import model_for
from tests.tiny import KINDS, SIZES

LLAMA = KINDS["llama"]
CONFIG = {**SIZES, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def teacher() -> PreTrainedModel:
    return LLAMA.teacher()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    LLAMA.teacher().save_pretrained(tmp_path / "teacher", max_shard_size="30KB")
    return tmp_path / "teacher"


def error_of(error: type[HfGuideError], teacher: object, *words: str, **options: Any) -> str:
    """Assert that a student is rejected with an error that contains all of `words`; return the message."""
    with pytest.raises(error) as caught:
        from_teacher(teacher, show_progress=False, **options)
    message = str(caught.value)
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"
    assert isinstance(caught.value, HfGuideError) and type(caught.value) is error
    return message


# Datasets


def dataset_calls(teacher: PreTrainedModel, folder: Path) -> dict[str, Callable[[Any], object]]:
    """Return each public function that takes a dataset, as a function of that alone."""
    args = DistillationArguments(str(folder / "out"), use_cpu=True, report_to="none")
    classifier = model_for("sequence-classification", 0)

    def train(train_dataset: Any, eval_dataset: Any) -> DistillationTrainer:
        return DistillationTrainer(LLAMA.teacher(), args, None, train_dataset, eval_dataset, teacher=teacher)

    calibrated: dict[str, Any] = {"num_hidden_layers": 2, "method": "calibrated", "show_progress": False}
    return {
        "from_teacher": lambda data: from_teacher(teacher, calibration_dataset=data, **calibrated),
        "find_shapes": lambda data: find_shapes(teacher, num_parameters="50%", calibration_dataset=data),
        "capture_teacher": lambda data: capture_teacher(teacher, data, folder / "capture"),
        "fit_subclasses": lambda data: fit_subclasses(classifier, data, num_subclasses=2),
        "DistillationTrainer": lambda data: train(data, None),
        "eval_dataset": lambda data: train([{"input_ids": [1, 2]}], {"part": data}),
    }


ROWS = {"input_ids": [[1, 2, 3], [4, 5, 6]], "labels": [0, 1]}


@pytest.mark.parametrize(
    ("data", "advice"),
    [
        (pandas.DataFrame(ROWS), r"found a DataFrame\. Pass datasets\.Dataset\.from_pandas"),
        (ROWS, r"found a dict\. Pass datasets\.Dataset\.from_dict"),
        (BatchEncoding({"input_ids": torch.ones(2, 3)}), r"found a BatchEncoding\. Pass datasets\.Dataset\.from_dict"),
        (datasets.DatasetDict(train=datasets.Dataset.from_dict(ROWS)), r"found a DatasetDict\. Pass .* \['train'\]"),
    ],
)
@pytest.mark.parametrize(
    "call", ["from_teacher", "find_shapes", "capture_teacher", "fit_subclasses", "DistillationTrainer", "eval_dataset"]
)
def test_a_table_or_a_mapping_is_no_dataset(
    teacher: PreTrainedModel, call: str, data: Any, advice: str, tmp_path: Path
) -> None:
    """Each has a length and can be iterated, which yields the names of its columns or of its datasets."""
    with pytest.raises(OptionError, match=advice):
        dataset_calls(teacher, tmp_path)[call](data)


@pytest.mark.parametrize("call", ["capture_teacher", "fit_subclasses", "DistillationTrainer", "eval_dataset"])
@pytest.mark.parametrize("name", ["rows.jsonl", Path("rows.jsonl")])
def test_a_name_is_no_dataset(teacher: PreTrainedModel, call: str, name: Any, tmp_path: Path) -> None:
    """Its characters were taken for examples."""
    with pytest.raises(OptionError, match=r"processed examples; found the \w+ 'rows\.jsonl'\. Load it first"):
        dataset_calls(teacher, tmp_path)[call](name)


# Shapes


@pytest.mark.parametrize("method", ["guide", "uniform"])
@pytest.mark.parametrize(
    "changes,words",
    [
        ({"hidden_size": 64}, ["hidden size is 64", "teacher's 48", "at most 48"]),
        ({"intermediate_size": 65}, ["intermediate size is 65", "the teacher's 64", "choose 1 to 64"]),
        ({"head_dim": 16}, ["head size", "is 16", "the teacher's 12", "choose 1 to 12"]),
        ({"num_attention_heads": 8, "head_dim": 12}, ["query heads per key/value head is 4", "the teacher's 2"]),
        ({"num_key_value_heads": 4}, ["key/value heads is 4", "the teacher's 2", "choose 1 to 2"]),
        ({"num_hidden_layers": 5}, ["5 blocks", "teacher 4", "choose at most 4", "layer_selection=[...]"]),
        ({"vocab_size": 100}, ["100 rows", "the teacher's 96", "Leave vocab_size at 96"]),
    ],
)
def test_a_student_larger_than_its_teacher(
    teacher: PreTrainedModel, method: str, changes: dict[str, int], words: list[str]
) -> None:
    if changes.get("num_key_value_heads"):  # fewer heads a group, or the group would grow with them
        changes = {**changes, "num_attention_heads": 4}
    error_of(ShapeError, teacher, *words, method=method, **changes)
    config = LlamaConfig(**{**CONFIG, **changes})
    error_of(ShapeError, teacher, *words, config=config, method={"method": method})


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"hidden_size": 30}, ["hidden_size=30", "4"]),
        ({"num_attention_heads": 3}, ["num_attention_heads=3", "num_key_value_heads=2", "4 heads in 2"]),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, ["num_attention_heads=5", "48"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads=4", "num_key_value_heads=3", "multiple of 3"]),
        ({"hidden_size": 0}, ["hidden_size must be at least 1", "0"]),
        ({"intermediate_size": 0}, ["intermediate_size must be at least 1", "0"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers must be at least 1", "0"]),
        ({"num_attention_heads": -4}, ["num_attention_heads must be at least 1", "-4"]),
        ({"vocab_size": 0}, ["vocab_size must be at least 1"]),
        ({"head_dim": 5}, ["head_dim=5", "even"]),
        ({"hidden_act": "sliu"}, ["LlamaForCausalLM", "sliu"]),
    ],
)
def test_sizes_that_the_family_cannot_have(
    teacher: PreTrainedModel, changes: dict[str, Any], words: list[str]
) -> None:
    error_of(ShapeError, teacher, *words, **changes)


def test_heads_of_a_config_that_do_not_divide(teacher: PreTrainedModel) -> None:
    config = LlamaConfig(**CONFIG)
    config.num_key_value_heads = 3
    error_of(ShapeError, teacher, "num_attention_heads=4", "num_key_value_heads=3", config=config)
    gptj = {"n_embd": 48, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "vocab_size": 96, "n_positions": 32}
    model = GPTJForCausalLM(GPTJConfig(**gptj))
    wrong = GPTJConfig(**{**gptj, "n_embd": 24, "rotary_dim": 8})
    error_of(ShapeError, model, "rotary_dim=8", "head size 6", config=wrong)


def test_values_of_the_wrong_type(teacher: PreTrainedModel) -> None:
    error_of(OptionError, teacher, "hidden_size='24'", "expected int", "got str", hidden_size="24")
    error_of(OptionError, teacher, "float32", "'flaot32'", dtype="flaot32")
    for wrong in ("int8", torch.int32, torch.complex64, "float8_e4m3fn", 32):
        error_of(OptionError, teacher, "dtype must be 'float32'", repr(wrong), dtype=wrong)


# Configs and classes


@pytest.mark.parametrize(
    "config", [GPT2Config(), MistralConfig(**CONFIG), BertConfig()], ids=["gpt2", "mistral", "bert"]
)
def test_a_config_of_another_family(teacher: PreTrainedModel, config: Any) -> None:
    error_of(
        ShapeError, teacher, type(config).__name__, config.model_type, "'llama'", "Pass a LlamaConfig", config=config
    )


@pytest.mark.parametrize(
    "config,words",
    [
        ({"hidden_size": 24}, "a dict"),
        ("config.json", "a str"),
        (LlamaConfig, "the class LlamaConfig"),
        (LLAMA.teacher(), "a LlamaForCausalLM"),
    ],
    ids=["dict", "str", "class", "model"],
)
def test_a_config_that_is_none(teacher: PreTrainedModel, config: Any, words: str) -> None:
    error_of(OptionError, teacher, "config must be a LlamaConfig", "hidden_size=...", f"found {words}", config=config)


def test_a_config_together_with_overrides(teacher: PreTrainedModel) -> None:
    config = LlamaConfig(**CONFIG)
    error_of(OptionError, teacher, "'hidden_size'", "set them on the config", config=config, hidden_size=24)
    error_of(OptionError, teacher, "'revison'", "Did you mean 'revision'?", config=config, revison="main")


def test_a_task_that_the_family_does_not_have(teacher: PreTrainedModel) -> None:
    for door in (AutoStudentForImageClassification, AutoStudentForSeq2SeqLM):
        with pytest.raises(OptionError) as caught:
            door.from_teacher(teacher, show_progress=False)
        message = str(caught.value)
        assert f"no {door.__name__.replace('Student', 'Model')} for 'llama'" in message
        assert "AutoModelForCausalLM" in message and "AutoModelForSequenceClassification" in message


def test_classes_that_are_not_the_students(teacher: PreTrainedModel) -> None:
    words = ["BertForMaskedLM takes a BertConfig", "LlamaConfig", "such as LlamaForCausalLM"]
    error_of(OptionError, teacher, *words, model_class=BertForMaskedLM)
    for wrong in (int, "LlamaForCausalLM", torch.nn.Linear):
        error_of(OptionError, teacher, "a model class or an Auto class", repr(wrong), model_class=wrong)
    with pytest.raises(OptionError, match="AutoStudentForCausalLM.from_teacher has its model class already"):
        AutoStudentForCausalLM.from_teacher(teacher, model_class=LlamaForCausalLM)
    with pytest.raises(OSError, match=r"use AutoStudentForCausalLM\.from_teacher\(teacher, \.\.\.\)"):
        AutoStudentForCausalLM()


# Names


@pytest.mark.parametrize(
    "options,words",
    [
        ({"hiden_size": 24}, ["LlamaConfig has no 'hiden_size'", "'hidden_size'"]),
        ({"num_layer": 2}, ["'num_layer'", "Did you mean"]),
        ({"revison": "main"}, ["'revison'", "Did you mean 'revision'?"]),
        ({"metod": "uniform"}, ["'metod'", "Did you mean 'method'?"]),
        ({"trust_remote_cod": True}, ["'trust_remote_cod'", "'trust_remote_code'"]),
        ({"quantization_config": {}}, ["'quantization_config'", "load the teacher with quantization_config=..."]),
        ({"device_map": "auto"}, ["'device_map'", "an argument of from_pretrained", "pass the model"]),
        ({"attn_implementation": "eager"}, ["'attn_implementation'", "call set_attn_implementation of the student"]),
        (
            {"subsequent_layers": "uniform"},
            ["'subsequent_layers' is an option of the method", "'subsequent_layers': 'uniform'"],
        ),
        ({"method": "gide"}, ["method='gide'", "'uniform', 'random'", "Did you mean 'guide'?"]),
        (
            {"method": "calibratd"},
            ["method='calibratd'", "['guide', 'calibrated', 'uniform', 'random'", "Did you mean 'calibrated'"],
        ),
        ({"method": 3}, ["method must be one of", "found 3"]),
        (
            {"method": {"layrs": "first"}},
            ["'layrs' is not an option of method 'guide'", "Did you mean 'layer_selection'?"],
        ),
        ({"method": {"subsequent_layers": "projct"}}, ["subsequent_layers='projct'", "Did you mean 'project'?"]),
        ({"method": {"layer_selection": "frist"}}, ["layer_selection='frist'", "Did you mean 'first'?"]),
        (
            {"method": {"layer_selection": 3}},
            ["layer_selection must be a list", "one of ['uniform', 'first'", "found 3"],
        ),
        ({"method": {"layer_selection": ["a"]}}, ["layer_selection must be a list", "found ['a']"]),
        ({"method": {"layer_selection": [True, False]}}, ["layer_selection must be a list", "found [True, False]"]),
        ({"method": {"layer_selection": {"leyers": [0, 1]}}}, ["'leyers'", "Did you mean 'layers'?"]),
        ({"method": {"layer_selection": [0, 1, 2]}}, ["names 3 teacher blocks", "the student has 2"]),
        ({"method": {"layer_selection": [0, 4]}}, ["[4]", "0 to 3"]),
        ({"method": {"seed": "one"}}, ["seed", "'one'"]),
        ({"method": {"fold_norms": False}}, ["'fold_norms' was removed", "always folded"]),
        ({"method": {"method": "uniform", "centered": True}}, ["'centered' was removed", "leave it out"]),
        ({"method": {"method": "uniform", "basis": "auto"}}, ["not an option of method 'uniform'", "of 'calibrated'"]),
        (
            {"method": {"method": "random", "layer_selection": "first"}},
            ["not an option of method 'random'", "['seed']"],
        ),
        (
            {"method": {"method": "calibrated", "fit_logit_scale": "no"}},
            ["fit_logit_scale must be True or False", "'no'"],
        ),
        ({"method": {"layer_selection": "block_influence"}}, ["needs activations", "method='calibrated'"]),
        ({"calibration_dataset": [1]}, ["calibration_dataset", "method='guide' uses no data", "leave it out"]),
    ],
    ids=str,
)
def test_unknown_names_and_options(teacher: PreTrainedModel, options: dict[str, Any], words: list[str]) -> None:
    options = {"hidden_size": 24, "num_hidden_layers": 2, **options}
    error_of(OptionError, teacher, *words, **options)


def test_options_of_other_functions_are_named_as_such(teacher: PreTrainedModel) -> None:
    with pytest.raises(OptionError, match="'calibration_dataset' is an option of other functions.*leave it out"):
        plan_student(teacher, method="calibrated", calibration_dataset=["text"], num_hidden_layers=2)


def test_unknown_fields_of_the_options() -> None:
    with pytest.raises(OptionError, match="'later_block' is not an option.*Did you mean 'subsequent_layers'"):
        InitializationConfig(later_block="select")
    options = InitializationConfig()
    options.method = "gide"  # set later, and found all the same
    with pytest.raises(OptionError, match="Did you mean 'guide'"):
        from_teacher(LLAMA.teacher(), method=options)
    assert InitializationConfig.parse({"method": "uniform", "seed": 3}) == InitializationConfig("uniform", seed=3)


# Teachers


@pytest.mark.parametrize("damage", ["truncated", "header", "missing", "index"])
def test_a_broken_shard_is_named_before_any_work(folder: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    broken = shards[-1]
    content = broken.read_bytes()
    if damage == "truncated":
        broken.write_bytes(content[:-8])
    elif damage == "header":
        broken.write_bytes(b"\xff" * 64 + content[64:])
    elif damage == "missing":
        broken.unlink()
    else:
        broken = folder / "model.safetensors.index.json"
        broken.write_text(broken.read_text()[:-20])
    started: list[object] = []
    monkeypatch.setattr("hf_guide.initialization.registry.build_student", lambda *a, **k: started.append(a))
    message = error_of(TeacherError, folder, broken.name, "etch", hidden_size=24)
    assert str(folder) in message and not started


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.2.self_attn.q_proj.weight",
        "model.layers.2.mlp.down_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
@pytest.mark.parametrize("options", [{"hidden_size": 24}, {}, {"method": "uniform", "hidden_size": 24}], ids=str)
def test_weights_that_are_not_finite_are_named(value: float, name: str, options: dict[str, Any]) -> None:
    """The very tensor: a gain that is folded into others as well, and a row or neuron that the student leaves out."""
    model = LLAMA.teacher()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] = value
    place = [length - 1 for length in model.get_parameter(name).shape]
    error_of(TeacherError, model, f"'{name}'", "holds 1 NaN or infinite", str(place), "must be finite", **options)


def test_weights_that_are_not_finite_on_disk(folder: Path) -> None:
    (shard,) = (file for file in folder.glob("*.safetensors") if "model.norm.weight" in load_file(file))
    tensors = load_file(shard)
    tensors["model.norm.weight"][[3, 5]] = float("nan")
    save_file(tensors, shard, metadata={"format": "pt"})
    error_of(TeacherError, folder, "'model.norm.weight'", str(folder), "holds 2", "[3]", hidden_size=24)


def test_values_that_the_students_dtype_cannot_hold() -> None:
    model = LLAMA.teacher()
    with torch.no_grad():
        model.model.embed_tokens.weight[3] = 1e6
    words = ["model.embed_tokens.weight", "1e+06", "torch.float16 holds (6.55e+04)", "dtype='bfloat16'"]
    error_of(ShapeError, model, *words, dtype="float16")
    assert from_teacher(model, dtype="bfloat16", show_progress=False).dtype == torch.bfloat16


def test_what_is_no_teacher(tmp_path: Path, teacher: PreTrainedModel) -> None:
    for wrong in (None, 3, teacher.config, teacher.state_dict()):
        error_of(OptionError, wrong, "a Hub id, a folder or a PreTrainedModel", type(wrong).__name__)
    error_of(TeacherError, torch.nn.Linear(2, 2), "PreTrainedModel", "Linear")
    error_of(TeacherError, tmp_path / "nowhere", "nowhere", "no such folder")
    error_of(TeacherError, "./nowhere", "./nowhere", "no such folder")
    error_of(TeacherError, tmp_path, str(tmp_path), "config")
    error_of(TeacherError, tmp_path, "has no folder 'part'", subfolder="part")
    for name, advice in (("model.safetensors", "pass its folder."), ("q4.gguf", "with gguf_file='q4.gguf'")):
        (tmp_path / name).touch()
        error_of(TeacherError, tmp_path / name, f"{name} is a file", advice)
    error_of(TeacherError, "someone/unheard-of", "someone/unheard-of")
    with torch.device("meta"):
        offloaded = LlamaForCausalLM(LlamaConfig(**CONFIG))
    error_of(TeacherError, offloaded, "meta device", "Pass its folder or Hub id")


def test_a_quantised_teacher_that_cannot_be_dequantised(folder: Path) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    file.write_text(json.dumps(config))
    error_of(TeacherError, folder, str(folder), "quantised", hidden_size=24)
    packed = LLAMA.teacher()
    packed.model.norm.weight = torch.nn.Parameter(torch.ones(48, dtype=torch.int8), requires_grad=False)
    error_of(TeacherError, packed, "quantised", "dequantize()", hidden_size=24)


def test_remote_code_without_permission(folder: Path) -> None:
    witness = folder / "witness"
    code = f"""
        import pathlib
        from transformers import LlamaConfig, LlamaForCausalLM

        pathlib.Path({str(witness)!r}).touch()

        class OwnConfig(LlamaConfig):
            pass

        class OwnForCausalLM(LlamaForCausalLM):
            config_class = OwnConfig
    """
    (folder / "code.py").write_text(textwrap.dedent(code))
    file = folder / "config.json"
    auto = {"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.OwnForCausalLM"}
    changes = {"architectures": ["OwnForCausalLM"], "auto_map": auto}
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    error_of(TeacherError, folder, "Python code", "trust_remote_code=True", hidden_size=24)
    assert not witness.exists()
    student = from_teacher(folder, trust_remote_code=True, hidden_size=24, show_progress=False)
    assert witness.exists() and student.config.hidden_size == 24


def test_an_unknown_family_is_an_error_with_a_remedy() -> None:
    model = FunnelForMaskedLM(
        FunnelConfig(vocab_size=96, d_model=48, n_head=4, d_head=12, d_inner=64, block_sizes=[1])
    )
    words = ["must be the teacher's 48, found 24", "No layout is known for 'funnel'", "hf_guide.register_layout"]
    error_of(ShapeError, model, *words, d_model=24)
    assert from_teacher(model, d_model=24, method="random", show_progress=False).config.d_model == 24


# Nothing half-written


WRONG = {
    "wider": ["--hidden-size", "64"],
    "heads": ["--num-attention-heads", "3"],
    "override": ["--config", "hiden_size=24"],
    "method": ["--method", "gide"],
    "vocabulary": ["--config", "vocab_size=90"],
    "task": ["--task", "image-classification"],
}


@pytest.mark.parametrize("wrong", [*WRONG, "shard", "nan", "quantised", "remote code"])
def test_nothing_is_left_behind(folder: Path, wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    home = folder.parent
    if wrong == "shard":
        shard = max(folder.glob("*.safetensors"))
        shard.write_bytes(shard.read_bytes()[:-1])
    elif wrong == "nan":
        (shard,) = (file for file in folder.glob("*.safetensors") if "lm_head.weight" in load_file(file))
        save_file(load_file(shard) | {"lm_head.weight": torch.full((96, 48), torch.nan)}, shard, {"format": "pt"})
    elif wrong in ("quantised", "remote code"):
        config = json.loads((folder / "config.json").read_text())
        packed = {"quantization_config": {"quant_method": "awq"}}
        remote = {"model_type": "elsewhere", "auto_map": {"AutoConfig": "code.ElsewhereConfig"}}
        (folder / "config.json").write_text(json.dumps(config | (packed if wrong == "quantised" else remote)))
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    words = WRONG.get(wrong, ["--hidden-size", "24"])
    code = cli.main(["init", str(folder), "-o", str(home / "new" / "student"), "--no-progress", *words])
    error = capsys.readouterr().err
    assert code in (1, 2) and re.search(r"^hf-guide: error: \S", error, re.MULTILINE) and "Traceback" not in error
    assert os.listdir(home) == ["teacher"]
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_an_output_folder_that_is_not_empty(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = folder.parent / "student"
    output.mkdir()
    (output / "mine").write_text("mine")
    assert cli.main(["init", str(folder), "--hidden-size", "24", "--no-progress", "-o", str(output)]) == 1
    assert f"{output} is not empty; name a new one" in capsys.readouterr().err
    assert os.listdir(output) == ["mine"] and (output / "mine").read_text() == "mine"


def test_every_error_is_a_value_error() -> None:
    """So that a caller need not know this library's own."""
    for error in (OptionError, ShapeError, LayoutError, TeacherError):
        assert issubclass(error, HfGuideError) and issubclass(error, ValueError)
