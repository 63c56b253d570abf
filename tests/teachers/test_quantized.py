"""Quantised teachers, and experts stored one by one: read tensor by tensor, with the bits that Transformers loads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    BitsAndBytesConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    TorchAoConfig,
)

from hf_guide import TeacherError, from_teacher
from hf_guide.teachers.checkpoint import open_teacher
from hf_guide.teachers.quantized import QuantizedTensors, dequantize_on_load
from hf_guide.teachers.shards import ConvertedTensor
from hf_guide.teachers.tensor_source import SafetensorsTensors
from tests.tiny import same_bits

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "dtype": "bfloat16",
}
EXPERTS = 4
BLOCK = 32


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def seeded(model_class: Any, config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = model_class._from_config(config)
    return model


def rewrite(folder: Path, change: Callable[[str, torch.Tensor], dict[str, torch.Tensor]]) -> None:
    file = folder / "model.safetensors"
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(file).items():
        stored |= change(name, tensor)
    save_file(stored, file, metadata={"format": "pt"})


def eight_bits(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    if tensor.ndim != 2 or "proj" not in name and ".experts." not in name:
        return {name: tensor}
    blocks = tensor.float().reshape(tensor.shape[0] // BLOCK, BLOCK, tensor.shape[1] // BLOCK, BLOCK)
    scale = blocks.abs().amax((1, 3)) / 448
    packed = (blocks / scale[:, None, :, None]).reshape(tensor.shape).to(torch.float8_e4m3fn)
    return {name: packed, f"{name}_scale_inv": scale}


def write_fp8(folder: Path) -> None:
    seeded(LlamaForCausalLM, LlamaConfig(**SIZES)).save_pretrained(folder)
    rewrite(folder, eight_bits)
    edit_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]})


def write_fp8_experts(folder: Path) -> None:
    write_experts(folder)
    rewrite(folder, eight_bits)
    edit_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]})


def write_experts(folder: Path) -> None:
    seeded(MixtralForCausalLM, MixtralConfig(**SIZES, num_local_experts=EXPERTS)).save_pretrained(folder)


def write_mxfp4(folder: Path) -> None:
    seeded(GptOssForCausalLM, GptOssConfig(**SIZES, head_dim=16, num_local_experts=EXPERTS)).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def four_bits(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            return {name: tensor}
        experts, width, out = tensor.shape
        shape = (experts, out, width // 32)
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        return {f"{name}_blocks": blocks, f"{name}_scales": torch.randint(118, 122, shape, dtype=torch.uint8)}

    rewrite(folder, four_bits)
    edit_config(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})


def write_quantised(folder: Path, config: Any) -> None:
    whole = folder / "whole"
    seeded(LlamaForCausalLM, LlamaConfig(**SIZES)).save_pretrained(whole)
    LlamaForCausalLM.from_pretrained(whole, quantization_config=config, dtype="auto").save_pretrained(folder)


def write_bitsandbytes_4bit(folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    write_quantised(folder, BitsAndBytesConfig(load_in_4bit=True, **options))


def write_bitsandbytes_8bit(folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    write_quantised(folder, BitsAndBytesConfig(load_in_8bit=True))


def write_torchao(folder: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="pip install --constraint constraints.txt torchao")
    write_quantised(folder, TorchAoConfig(torchao.Int8WeightOnlyConfig()))


def write_compressed_tensors(folder: Path) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.compressors import ModelCompressor

    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": BLOCK}
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    model = seeded(LlamaForCausalLM, LlamaConfig(**SIZES))
    scheme = quantization.QuantizationConfig.model_validate(config)
    quantization.apply_quantization_config(model, scheme)
    for name, scale in model.named_parameters():
        if name.endswith("weight_scale"):
            weight = model.get_submodule(name.rpartition(".")[0]).weight
            scale.data.copy_(weight.detach().reshape(weight.shape[0], -1, BLOCK).abs().amax(-1) / 7)
    ModelCompressor(quantization_config=scheme).compress_model(model)
    model.save_pretrained(folder)
    edit_config(folder, quantization_config=config)


FORMATS: dict[str, Callable[[Path], None]] = {
    "experts one by one": write_experts,
    "fp8": write_fp8,
    "fp8 experts": write_fp8_experts,
    "mxfp4": write_mxfp4,
    "bitsandbytes 4 bit": write_bitsandbytes_4bit,
    "bitsandbytes 8 bit": write_bitsandbytes_8bit,
    "torchao": write_torchao,
    "compressed-tensors": write_compressed_tensors,
}
LOADED_PACKED = ("bitsandbytes 4 bit", "bitsandbytes 8 bit", "torchao")
pytestmark = pytest.mark.filterwarnings("ignore:.*MatMul8bitLt:UserWarning")


def load_whole(folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return the model as Transformers loads it, and its tensors, dequantised."""
    config = AutoConfig.from_pretrained(folder)
    model_class = {"llama": LlamaForCausalLM, "mixtral": MixtralForCausalLM, "gpt_oss": GptOssForCausalLM}
    options = {"config": dequantize_on_load(config), "dtype": "auto"}
    model = model_class[config.model_type].from_pretrained(folder, **options)
    stock = model
    if getattr(config, "quantization_config", {}).get("quant_method") == "bitsandbytes":
        stock = model_class[config.model_type].from_pretrained(folder, **options).dequantize()
    tensors = stock.state_dict()
    return model, {
        name: tensor if type(tensor) is torch.Tensor else tensor.dequantize() for name, tensor in tensors.items()
    }


def reads_of(teacher: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which the number of stored tensors that a read takes, and their bytes, are added."""
    sizes: list[int] = []
    for located in teacher.weights._tensors.values():
        assert not isinstance(located, torch.Tensor)
    assemble = ConvertedTensor.assemble

    def counting(self: ConvertedTensor, tensors: Any, rows: Any) -> torch.Tensor:
        sizes.append(sum(tensor.nbytes for tensor in tensors))
        return assemble(self, tensors, rows)

    monkeypatch.setattr(ConvertedTensor, "assemble", counting)
    return sizes


@pytest.mark.parametrize("name", FORMATS)
def test_each_tensor_is_read_by_itself_with_the_bits_that_transformers_loads(name: str, tmp_path: Path) -> None:
    FORMATS[name](tmp_path)
    teacher = open_teacher(tmp_path)
    model, expected = load_whole(tmp_path)
    assert isinstance(teacher.weights, SafetensorsTensors)
    assert any(isinstance(located, ConvertedTensor) for located in teacher.weights._tensors.values())
    assert not hasattr(teacher.config, "quantization_config") and teacher.dtype == torch.bfloat16
    assert {*teacher.weights.keys(), *teacher.tied} == set(expected)
    sources = [teacher]
    if name in LOADED_PACKED:
        sources.append(open_teacher(model))
        assert isinstance(sources[-1].weights, QuantizedTensors)
    for source in sources:
        for key in source.weights.keys():
            tensor = source.weights.get(key)
            assert type(tensor) is torch.Tensor and torch.equal(tensor, expected[key]), key
            assert tensor.dtype == source.weights.dtype(key) == expected[key].dtype
            assert tensor.shape == source.weights.shape(key)
            assert torch.equal(source.weights.rows(key, 1, 3), tensor[1:3]), key


@pytest.mark.parametrize("name", ["experts one by one", "fp8 experts", "mxfp4"])
def test_of_a_tensor_of_experts_only_those_that_are_needed_are_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FORMATS[name](tmp_path)
    teacher = open_teacher(tmp_path)
    sizes = reads_of(teacher, monkeypatch)
    experts = [key for key in teacher.weights.keys() if len(teacher.weights.shape(key)) == 3]
    assert len(experts) == 2 * SIZES["num_hidden_layers"]
    for key in experts:
        whole = teacher.weights.get(key)
        for expert in range(EXPERTS):
            assert torch.equal(teacher.weights.rows(key, expert, expert + 1)[0], whole[expert])
    per_tensor = [sizes[start : start + 1 + EXPERTS] for start in range(0, len(sizes), 1 + EXPERTS)]
    assert all(whole == EXPERTS * one for whole, *ones in per_tensor for one in ones)


QUICK = [("fp8 experts", "calibrated"), ("fp8 experts", "guide"), ("torchao", "guide"), ("mxfp4", "uniform")]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(name, method, marks=() if (name, method) in QUICK else pytest.mark.slow)
        for name in FORMATS
        for method in ("guide", "uniform", "random", "calibrated")
    ],
)
def test_the_student_is_that_of_the_dequantised_checkpoint(name: str, method: str, tmp_path: Path) -> None:
    FORMATS[name](tmp_path)
    model, tensors = load_whole(tmp_path)
    whole = type(model)._from_config(open_teacher(tmp_path).config)
    whole.load_state_dict(tensors)
    rows = torch.randint(3, SIZES["vocab_size"], (4, 4, 12), generator=torch.Generator().manual_seed(0))
    data = {"calibration_dataset": [{"input_ids": each} for each in rows]} if method == "calibrated" else {}
    made = [
        from_teacher(teacher, method=method, hidden_size=32, num_hidden_layers=2, show_progress=False, **data)
        for teacher in (whole, tmp_path, *([model] if name in LOADED_PACKED else []))
    ]
    assert all(same_bits(made[0], student) for student in made[1:])
    assert not hasattr(made[-1].config, "quantization_config")


def test_a_quantised_tensor_without_its_scale_is_an_error_that_names_it(tmp_path: Path) -> None:
    write_fp8(tmp_path)
    rewrite(
        tmp_path, lambda name, tensor: {} if name.endswith("layers.1.mlp.up_proj.weight_scale_inv") else {name: tensor}
    )
    teacher = open_teacher(tmp_path)
    with pytest.raises(TeacherError, match=r"layers\.1\.mlp\.up_proj\.weight cannot be made of 1 tensors.*float8"):
        teacher.weights.get("model.layers.1.mlp.up_proj.weight")


def test_a_missing_expert_is_an_error_that_names_both_shapes(tmp_path: Path) -> None:
    write_experts(tmp_path)
    rewrite(tmp_path, lambda name, tensor: {} if ".layers.1." in name and ".experts.2." in name else {name: tensor})
    with pytest.raises(TeacherError, match=r"\(3, 256, 64\).*\(4, 256, 64\)"):
        open_teacher(tmp_path)
