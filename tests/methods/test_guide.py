"""guide and uniform equal the papers' equations, computed by hand; each option changes only what it names."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from hf_guide import from_teacher
from hf_guide.initialization.build import build_student
from hf_guide.initialization.config import PlanOptions
from hf_guide.initialization.infer_layout import layout_for
from hf_guide.initialization.transfer import transfer_weights
from hf_guide.layouts.registry import registered_layouts
from hf_guide.teachers.checkpoint import open_teacher
from tests.invariants.case import build, logits_of
from tests.invariants.cases import CASES
from tests.invariants.embed_small_in_large import randomize
from tests.tiny import KINDS, everything, logits, same_bits

SMALLER = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
}
OUTER, SPREAD = [0, 3], [0, 2]  # the blocks that guide keeps, and uniform
HEADS, KV_HEADS = [0, 1, 4, 5], [0, 2]
ROTARY, EVEN = [0, 2, 4, 6], [0, 2, 4, 6]  # of 8, in pairs (i, i + 4); without pairs they are the same
NEURONS = [round(i * 63 / 39) for i in range(40)]
CHANNELS = list(range(0, 48, 2))


@pytest.fixture(scope="module")
def teacher() -> LlamaForCausalLM:
    changes = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    return KINDS["llama"].teacher(**changes).double()


def student_of(teacher: PreTrainedModel, method: object = "guide", **changes) -> PreTrainedModel:
    return from_teacher(teacher, method=method, show_progress=False, **{**SMALLER, **changes})


def rows(heads: list[int], dims: list[int]) -> list[int]:
    return [8 * head + dim for head in heads for dim in dims]


QUERIES, KEYS, VALUES = rows(HEADS, ROTARY), rows(KV_HEADS, ROTARY), rows(KV_HEADS, EVEN)
SIDES = {
    "self_attn.q_proj": (QUERIES, "input_layernorm"),
    "self_attn.k_proj": (KEYS, "input_layernorm"),
    "self_attn.v_proj": (VALUES, "input_layernorm"),
    "mlp.gate_proj": (NEURONS, "post_attention_layernorm"),
    "mlp.up_proj": (NEURONS, "post_attention_layernorm"),
}
WRITERS = {"self_attn.o_proj": rows(HEADS, EVEN), "mlp.down_proj": NEURONS}


def directions(table: Tensor, size: int) -> Tensor:
    """The top right singular vectors (d, size), the largest entry of each positive."""
    vectors = torch.linalg.svd(table, full_matrices=False).Vh[:size].T
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * largest.sign()


def by_hand(teacher: LlamaForCausalLM, basis: Tensor, *, norm_correction: bool = True) -> dict[str, Tensor]:
    """GUIDE's student: every axis on the stream contracted with the basis, gains folded, all other axes selected.

    The root mean square of a folded gain stays in the norm, times sqrt(d_T / d_S) and the norm correction.
    """
    weights = teacher.state_dict()
    table = weights["model.embed_tokens.weight"]
    scale = math.sqrt(48 / 24) * ((table @ basis).norm() / table.norm() if norm_correction else 1.0)

    def rms(norm: str) -> Tensor:  # the rms of a gain, which stays in the norm
        return weights[f"{norm}.weight"].square().mean().sqrt()

    expected = {
        "model.embed_tokens.weight": table @ basis,
        "model.norm.weight": scale * rms("model.norm") * torch.ones(24, dtype=torch.float64),
        "lm_head.weight": (weights["lm_head.weight"] * weights["model.norm.weight"]) @ basis / rms("model.norm"),
    }
    for number, block in enumerate(OUTER):
        target, source = f"model.layers.{number}.", f"model.layers.{block}."
        for name, (indices, norm) in SIDES.items():
            folded = weights[f"{source}{name}.weight"][indices] * weights[f"{source}{norm}.weight"]
            expected[f"{target}{name}.weight"] = folded @ basis / rms(source + norm)
            expected[f"{target}{norm}.weight"] = scale * rms(source + norm) * torch.ones(24, dtype=torch.float64)
        # a head of 4 and not 8 dimensions: q k / sqrt(l) grows by sqrt(8 / 4) again
        expected[f"{target}self_attn.q_proj.weight"] *= math.sqrt(8 / 4)
        for name, indices in WRITERS.items():
            expected[f"{target}{name}.weight"] = basis.T @ weights[f"{source}{name}.weight"][:, indices]
    return expected


def selected_by_hand(teacher: LlamaForCausalLM, blocks: list[int]) -> dict[str, Tensor]:
    """Weight selection's student: every axis selected, nothing else."""
    weights = teacher.state_dict()
    expected = {name: weights[name][:, CHANNELS] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    expected["model.norm.weight"] = weights["model.norm.weight"][CHANNELS]
    for number, block in enumerate(blocks):
        target, source = f"model.layers.{number}.", f"model.layers.{block}."
        for name, (indices, norm) in SIDES.items():
            expected[f"{target}{name}.weight"] = weights[f"{source}{name}.weight"][indices][:, CHANNELS]
            expected[f"{target}{norm}.weight"] = weights[f"{source}{norm}.weight"][CHANNELS]
        for name, indices in WRITERS.items():
            expected[f"{target}{name}.weight"] = weights[f"{source}{name}.weight"][CHANNELS][:, indices]
    return expected


def assert_is(student: PreTrainedModel, expected: dict[str, Tensor], *, exactly: bool = False) -> None:
    parameters = dict(student.named_parameters())
    assert parameters.keys() == expected.keys()
    for name, parameter in parameters.items():
        if exactly:
            assert torch.equal(parameter, expected[name]), name
        else:
            torch.testing.assert_close(parameter.detach(), expected[name].double(), rtol=1e-9, atol=1e-9)


def changed(first: PreTrainedModel, second: PreTrainedModel) -> set[str]:
    one, other = everything(first), everything(second)
    return {name for name in one if not torch.equal(one[name], other[name])}


def test_uniform_is_weight_selection(teacher: LlamaForCausalLM) -> None:
    assert_is(student_of(teacher, "uniform"), selected_by_hand(teacher, SPREAD), exactly=True)


def test_guide_is_the_projection_on_the_tables_directions(teacher: LlamaForCausalLM) -> None:
    basis = directions(teacher.model.embed_tokens.weight.detach(), 24)
    student = student_of(teacher)
    assert_is(student, by_hand(teacher, basis))
    report = student.initialization_report
    spectrum = torch.linalg.svdvals(teacher.model.embed_tokens.weight.detach()).square().cumsum(0)
    torch.testing.assert_close(torch.tensor(report.explained_variance["embed"]).double(), spectrum / spectrum[-1])
    assert report.variance_explained["embed"] == pytest.approx((spectrum[23] / spectrum[-1]).item())


def test_guide_at_full_width_selects_and_changes_nothing_else(teacher: LlamaForCausalLM) -> None:
    student = student_of(teacher, hidden_size=48, head_dim=8)
    assert same_bits(
        student,
        student_of(teacher, {"method": "uniform", "layer_selection": "first_last"}, hidden_size=48, head_dim=8),
    )


def planned_student(teacher: LlamaForCausalLM, **options: Any) -> PreTrainedModel:
    """Return guide's student by a plan with other options, of which no method makes one of its own."""
    student = build_student(type(teacher), student_of(teacher).config, teacher.dtype)
    plan_options = PlanOptions("first_last", projects=True, **options)
    layout = layout_for(teacher.config, type(teacher))
    student.initialization_report = transfer_weights(student, open_teacher(teacher), layout, plan_options)
    return student.eval()


def test_without_norm_correction_norms_keep_their_length(teacher: LlamaForCausalLM) -> None:
    basis = directions(teacher.model.embed_tokens.weight.detach(), 24)
    student = planned_student(teacher, norm_correction=False)
    assert_is(student, by_hand(teacher, basis, norm_correction=False))
    norms = {f"model.layers.{i}.{norm}.weight" for i in (0, 1) for _, norm in SIDES.values()} | {"model.norm.weight"}
    assert changed(student, student_of(teacher)) == norms


def test_unfolded_gains_become_diagonals(teacher: LlamaForCausalLM) -> None:
    table = teacher.model.embed_tokens.weight.detach()
    basis = directions(table, 24)
    scale = math.sqrt(48 / 24) * ((table @ basis).norm() / table.norm())
    student = planned_student(teacher, fold_norms=False)
    expected, had = by_hand(teacher, basis), teacher.state_dict()
    expected["lm_head.weight"] = had["lm_head.weight"] @ basis
    expected["model.norm.weight"] = scale * (basis.T @ torch.diag(had["model.norm.weight"]) @ basis).diagonal()
    for number, block in enumerate(OUTER):
        for name, (places, norm) in SIDES.items():
            weight, gain = (had[f"model.layers.{block}.{part}.weight"] for part in (name, norm))
            restored = math.sqrt(2) if name.endswith("q_proj") else 1.0
            expected[f"model.layers.{number}.{name}.weight"] = restored * weight[places] @ basis
            diagonal = (basis.T @ torch.diag(gain) @ basis).diagonal()
            expected[f"model.layers.{number}.{norm}.weight"] = scale * diagonal
    assert_is(student, expected)
    assert student.initialization_report.approximations


def test_subsequent_layers_can_be_selected(teacher: LlamaForCausalLM) -> None:
    student, whole = student_of(teacher, {"subsequent_layers": "uniform"}), student_of(teacher)
    later = {name for name in everything(student) if name.startswith("model.layers.1.")}
    assert changed(student, whole) == later
    selected = selected_by_hand(teacher, OUTER)
    for name in later - {"model.layers.1.self_attn.q_proj.weight"}:
        assert torch.equal(student.get_parameter(name), selected[name]), name
    queries = selected["model.layers.1.self_attn.q_proj.weight"] * math.sqrt(2)
    torch.testing.assert_close(student.model.layers[1].self_attn.q_proj.weight.detach(), queries)


def test_subsequent_layers_can_be_random(teacher: LlamaForCausalLM) -> None:
    student, whole = student_of(teacher, {"subsequent_layers": "random"}), student_of(teacher)
    later = {name for name in everything(student) if name.startswith("model.layers.1.")}
    assert changed(student, whole) == later
    assert set(student.initialization_report.randomly_initialized) == later
    for name in later:
        parameter = student.get_parameter(name)
        if "norm" in name:
            assert torch.equal(parameter, torch.ones(24).double())
        else:
            deviation = student.config.initializer_range
            assert parameter.std().item() == pytest.approx(deviation, rel=0.15)
            assert abs(parameter.mean().item()) < deviation / 5


@pytest.mark.parametrize(
    "layers,count,expected",
    [
        ("uniform", 2, [0, 2]),
        ("uniform", 3, [0, 2, 3]),  # linspace(0, 3, 3) is 0, 1.5, 3; halves go to the even number
        ("first", 3, [0, 1, 2]),
        ([3, 1], 2, [3, 1]),
        ({"layers": [3, 1]}, 2, [3, 1]),
        ([0, 0, 1, 2, 3, 3], 6, [0, 0, 1, 2, 3, 3]),
    ],
)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_every_block_comes_from_the_selected_one(name: str, layers: object, count: int, expected: list[int]) -> None:
    teacher = KINDS[name].teacher()
    if name == "gemma3":
        teacher.config.layer_types = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    student = from_teacher(teacher, num_hidden_layers=count, method={"layer_selection": layers}, show_progress=False)
    assert list(student.initialization_report.blocks.values()) == [expected]
    for block, chosen in zip(student.model.layers, expected, strict=True):
        fed = teacher.model.layers[chosen].state_dict()
        assert all(torch.equal(tensor, fed[key]) for key, tensor in block.state_dict().items())
    kinds = getattr(teacher.config, "layer_types", None)
    if kinds:
        assert student.config.layer_types == [kinds[chosen] for chosen in expected]


def test_each_stack_has_its_own_blocks() -> None:
    kind = KINDS["t5"]
    teacher = kind.teacher()
    layers = {"encoder.block": [3, 1, 0], "decoder.block": [2, 0]}
    student = from_teacher(
        teacher, num_layers=3, num_decoder_layers=2, method={"layer_selection": layers}, show_progress=False
    )
    assert student.initialization_report.blocks == layers
    for stack, chosen in layers.items():
        part = stack.partition(".")[0]
        for number, block in enumerate(chosen):
            found = student.get_submodule(f"{part}.block.{number}.layer.0.SelfAttention.q").weight
            assert torch.equal(found, teacher.get_submodule(f"{part}.block.{block}.layer.0.SelfAttention.q").weight)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("width", ["reduced", "full"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "gpt2-untied", "gemma"])
def test_logit_scale_multiplies_only_the_logits(family: str, width: str) -> None:
    case = next(case for case in CASES if str(case).startswith(family))
    teacher = build(case, case.big)
    randomize(teacher, registered_layouts()[case.family], seed=1)
    shape = build(case, case.small).config if width == "reduced" else None
    plain, humble = (
        from_teacher(teacher, shape, method={"logit_scale": gain}, show_progress=False) for gain in (1, 0.3)
    )
    assert torch.allclose(logits_of(humble, case), 0.3 * logits_of(plain, case), rtol=1e-6, atol=1e-9)
    assert len(changed(humble, plain)) <= 2


@pytest.mark.parametrize("name", ["llama", "llama tied", "gpt2", "bert", "t5"])
def test_logit_scale_applies_to_the_bias_of_a_tied_head(name: str) -> None:
    kind = KINDS[name]
    teacher = kind.teacher().double()
    plain, humble = (
        from_teacher(teacher, method={"logit_scale": gain}, show_progress=False, **kind.smaller) for gain in (1, 0.3)
    )
    assert torch.allclose(logits(humble, kind), 0.3 * logits(plain, kind), rtol=1e-6, atol=1e-9)


def test_the_report_notes_a_logit_scale_without_effect() -> None:
    case = next(case for case in CASES if case.family == "bart" and case.model_class == "BartForConditionalGeneration")
    teacher = build(case, case.big)
    student = from_teacher(teacher, build(case, case.small).config, method={"logit_scale": 0.3}, show_progress=False)
    assert any("logit_scale" in note for note in student.initialization_report.approximations)


def test_first_last_leaves_out_the_middle(teacher: LlamaForCausalLM) -> None:
    """Weight subcloning's choice, arXiv 2312.09299: the first half, and the last."""
    ends = {"method": "uniform", "layer_selection": "first_last"}
    assert student_of(teacher, ends).initialization_report.blocks == {"layers": OUTER}
    deeper = student_of(teacher, ends, num_hidden_layers=3)
    assert deeper.initialization_report.blocks == {"layers": [0, 1, 3]}


@pytest.mark.parametrize(("method", "blocks"), [("guide", OUTER), ("uniform", SPREAD)])
def test_the_default_layer_selection_of_each_method(teacher: LlamaForCausalLM, method: str, blocks: list[int]) -> None:
    assert student_of(teacher, method).initialization_report.blocks == {"layers": blocks}
    assert student_of(teacher, {"method": method, "layer_selection": "uniform"}).initialization_report.blocks == {
        "layers": SPREAD
    }
