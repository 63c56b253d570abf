"""Blocks of rows, products in bfloat16 and sums in float32 give what whole tensors in float64 give, to rounding."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from hf_guide.initialization import basis, plan, transfer
from hf_guide.initialization.basis import fit_basis, second_moment
from hf_guide.modeling import from_teacher

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "vocab_size": 301,
}
STUDENT = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 3, "num_hidden_layers": 2}

MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(num_key_value_heads=3, tie_word_embeddings=False, **SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=3, n_head=6, vocab_size=301, n_positions=32)),
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(num_key_value_heads=3, num_local_experts=4, **SIZES)),
}


def teacher(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.5 if parameter.ndim == 1 else 0.0, 0.1)
    return model


def overrides(name: str) -> dict[str, int]:
    if name == "gpt2":
        return {"n_embd": 24, "n_head": 3, "n_layer": 2}
    return STUDENT | ({"num_key_value_heads": 3, "head_dim": 8} if name in ("llama", "mixtral") else {})


@pytest.mark.sampled(3)
@pytest.mark.parametrize("method", ["guide", "uniform"])
@pytest.mark.parametrize("name", MODELS)
def test_a_student_made_in_blocks_of_rows_is_the_one_made_of_whole_tensors(name, method, tmp_path, monkeypatch):
    teacher(name).save_pretrained(tmp_path)
    whole = from_teacher(tmp_path, method=method, show_progress=False, **overrides(name))
    monkeypatch.setattr(plan, "READ_BYTES", 1500)
    monkeypatch.setattr(transfer, "READ_BYTES", 1500)
    blocks = from_teacher(tmp_path, method=method, show_progress=False, **overrides(name))
    for key, tensor in whole.state_dict().items():
        torch.testing.assert_close(blocks.state_dict()[key], tensor, rtol=1e-5, atol=1e-6, msg=key)
    first, second = (each.initialization_report for each in (whole, blocks))
    assert first.parameters == second.parameters and first.approximations == second.approximations


def test_bfloat16_products_add_no_more_than_the_rounding_of_the_weights(monkeypatch):
    model = teacher("llama").bfloat16()
    exact = from_teacher(model, dtype="float64", show_progress=False, **overrides("llama")).state_dict()
    students = {}
    for products, smallest in (("float32", 1e18), ("bfloat16", 0)):
        monkeypatch.setattr(transfer, "MIN_BFLOAT16_PRODUCTS", smallest)
        monkeypatch.setattr(transfer, "multiplies_in", lambda dtype: True)
        students[products] = from_teacher(model, show_progress=False, **overrides("llama")).state_dict()
    differs = False
    for name, reference in exact.items():
        errors = [(each[name].double() - reference).norm() / reference.norm() for each in students.values()]
        assert errors[1] <= 1.6 * errors[0] + 1e-6, f"{name}: {errors}"
        differs = differs or not torch.equal(*(each[name] for each in students.values()))
    assert differs, "no product was in bfloat16"


def large_table(rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(9000, rank, generator=generator) * 0.9 ** torch.arange(rank)
    return rows @ torch.randn(rank, 64, generator=generator) + 0.5


def test_products_in_float32_are_summed_in_float64():
    table = large_table(64)
    exact, fast = second_moment([table], 64), second_moment([table], 64, dtype=torch.float32)
    scale = exact.diagonal().sqrt()
    assert fast.dtype == torch.float64 and torch.equal(fast, fast.T)
    assert 0 < ((fast - exact) / torch.outer(scale, scale)).abs().max() < 1e-6
    bases = [fit_basis(moment, 32) for moment in (exact, fast)]
    assert bases[1].explained == pytest.approx(bases[0].explained, abs=1e-7)
    kept = [(basis.matrix * (exact @ basis.matrix)).sum() for basis in bases]
    assert kept[1] / kept[0] == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("rank", [64, 8])
def test_directions_within_the_rounding_of_float32_are_computed_in_float64(rank, monkeypatch):
    table = large_table(rank)
    model = LlamaForCausalLM(LlamaConfig(**SIZES | {"hidden_size": 64, "vocab_size": 9000, "num_attention_heads": 8}))
    model.model.embed_tokens.weight.data.copy_(table)
    sizes = {"hidden_size": 32, "head_dim": 8, "show_progress": False}
    exact = from_teacher(model, **sizes)
    monkeypatch.setattr(basis, "MAX_FLOAT64_PRODUCTS", 0)
    fast = from_teacher(model, **sizes)
    for name, tensor in exact.state_dict().items():
        torch.testing.assert_close(fast.state_dict()[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
        assert torch.equal(fast.state_dict()[name], tensor) or rank == 64, f"{name} was not computed in float64"
