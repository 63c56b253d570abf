"""Products in half precision that a processor without instructions for it computes in float32."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from hf_guide.utils import half_precision
from hf_guide.utils.half_precision import fast_half_products, multiplies_in

HALF = (torch.bfloat16, torch.float16)


class Products(nn.Module):
    """All kinds of products that a Transformers model takes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.plain, self.one = nn.Linear(48, 300), nn.Linear(300, 48, bias=False), nn.Linear(48, 1)
        self.convolution = nn.Conv1d(48, 48, 3, padding=1, groups=3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        heads = x.unflatten(-1, (4, 12)).transpose(1, 2)
        attend = nn.functional.scaled_dot_product_attention
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        added = torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype).masked_fill(~mask, torch.finfo(x.dtype).min)
        return {
            "linear": self.linear(x),
            "linear without a bias": self.plain(self.linear(x)),
            "one output": self.one(x),
            "Conv1D": torch.addmm(self.linear.bias, x.flatten(0, 1), self.linear.weight.T),
            "batched": heads @ heads.mT,
            "added": torch.baddbmm(heads[0], heads[0] @ heads[0].mT, heads[0]),
            "einsum": torch.einsum("bhtd,bhsd->bhts", heads, heads),
            "convolution": self.convolution(x.mT),
            "causal attention": attend(heads, heads, heads, is_causal=True),
            "masked attention": attend(heads, heads, heads, attn_mask=mask),
            "attention with an added mask": attend(heads, heads, heads, attn_mask=added),
        }


@pytest.fixture(params=HALF, ids=str)
def model(request: pytest.FixtureRequest) -> Products:
    torch.manual_seed(0)
    return Products().to(request.param)


def run(model: Products, dtype: torch.dtype) -> dict[str, Tensor]:
    inputs = torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        return model(inputs)


@pytest.mark.parametrize("chunk_bytes", [1, 4 * 48 * 32, 1 << 30])
def test_products_are_those_of_float32_rounded_once(model, monkeypatch, chunk_bytes):
    monkeypatch.setattr(half_precision, "multiplies_in", lambda dtype: False)
    monkeypatch.setattr(half_precision, "CHUNK_BYTES", chunk_bytes)
    dtype = model.linear.weight.dtype
    with fast_half_products(model):
        found = run(model, dtype)
    exact = run(model.double(), torch.float64)
    for name, value in found.items():
        assert value.dtype == dtype, name
        scale = exact[name].abs().max().item()
        torch.testing.assert_close(
            value.double(),
            exact[name],
            rtol=0,
            atol=4 * torch.finfo(dtype).eps * max(1.0, scale),
            msg=lambda m, n=name: n + m,
        )


def count_float32_products(monkeypatch) -> list[torch.dtype]:
    seen = []
    to_float32 = half_precision._to_float32

    def spy(value):
        seen.append(value.dtype if isinstance(value, Tensor) else None)
        return to_float32(value)

    monkeypatch.setattr(half_precision, "_to_float32", spy)
    return seen


@pytest.mark.parametrize("native", [True, False])
def test_only_where_the_processor_has_no_instructions(model, monkeypatch, native):
    seen = count_float32_products(monkeypatch)
    monkeypatch.setattr(half_precision, "multiplies_in", lambda dtype: native)
    dtype = model.linear.weight.dtype
    with fast_half_products(model):
        run(model, dtype)
    assert (dtype in seen) == (not native)


def test_models_in_float32_run_as_they_did(monkeypatch):
    torch.manual_seed(0)
    model = Products()
    monkeypatch.setattr(half_precision, "multiplies_in", lambda dtype: False)
    expected = run(model, torch.float32)
    with fast_half_products(model):
        found = run(model, torch.float32)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_products_of_another_dtype_are_not_touched(monkeypatch):
    monkeypatch.setattr(half_precision, "multiplies_in", lambda dtype: dtype == torch.float16)
    seen = count_float32_products(monkeypatch)
    rows = torch.ones(2, 2, dtype=torch.float64)
    with fast_half_products(nn.Linear(2, 2, dtype=torch.bfloat16)):
        assert torch.equal(rows @ rows, 2 * rows)
        assert (rows.half() @ rows.half()).dtype == torch.float16
    assert not seen


def test_the_processor_is_asked_once_and_knows_both_dtypes():
    assert all(multiplies_in(dtype) in (True, False) for dtype in HALF)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx2": True, "avx512_f": True}, (False, False)), ({"amx_bf16": True, "avx512_fp16": False}, (True, False))],
)
def test_the_instructions_of_a_processor_are_its_capabilities(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert tuple(multiplies_in.__wrapped__(dtype) for dtype in HALF) == expected


def test_models_on_other_devices_and_models_within_each_other_add_no_mode(monkeypatch):
    """A mode is asked about every operation, also on a GPU, where that costs more than small operations."""
    monkeypatch.setattr(half_precision, "multiplies_in", lambda dtype: False)
    with fast_half_products(nn.Linear(2, 2, dtype=torch.bfloat16, device="meta")):
        assert _get_current_dispatch_mode() is None
    with fast_half_products(nn.Linear(2, 2, dtype=torch.bfloat16)):
        outer = _get_current_dispatch_mode()
        with fast_half_products(nn.Linear(2, 2, dtype=torch.bfloat16)):
            assert _get_current_dispatch_mode() is outer
        with fast_half_products(nn.Linear(2, 2, dtype=torch.float16)):
            assert _get_current_dispatch_mode() is not outer
    assert _get_current_dispatch_mode() is None


def test_gradients_pass(monkeypatch):
    monkeypatch.setattr(half_precision, "multiplies_in", lambda dtype: False)
    linear = nn.Linear(4, 3, dtype=torch.bfloat16)
    with fast_half_products(linear):
        linear(torch.ones(2, 4, dtype=torch.bfloat16)).sum().backward()
    assert torch.equal(linear.weight.grad, torch.full((3, 4), 2, dtype=torch.bfloat16))
