"""Values, queries and keys are rotated before smaller heads truncate them, with least error, in every family's layout."""

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_guide import from_teacher
from hf_guide.calibration import head_rotation
from hf_guide.calibration.head_rotation import low_rank_factors, low_rank_product_factors
from hf_guide.layouts.grammar import axis_names, group_indices, solve_sizes
from hf_guide.layouts.registry import Layout, config_sizes
from hf_guide.methods import calibrated
from tests.calibration.small_students import case_batches, token_batches
from tests.invariants.case import Case, build, logits_of, settle
from tests.invariants.cases import CASES
from tests.invariants.embed_small_in_large import embed_small_in_large, randomize, relative_name
from tests.invariants.test_laws import layout_of, relative_error
from tests.tiny import KINDS, logits

SMALLER_HEADS = {  # what makes each family's heads smaller, and leaves their number
    "llama": {"head_dim": 4},
    "llama-tied-biased": {"head_dim": 4},
    "gemma2": {"head_dim": 4},
    "phi3": {"hidden_size": 24},
    "gpt2": {"n_embd": 24},
    "bloom": {"hidden_size": 24},
    "falcon": {"hidden_size": 32},
    "opt": {"hidden_size": 24},
    "bert": {"hidden_size": 24},
    "vit": {"hidden_size": 24},
    "dinov2": {"hidden_size": 24},
    "t5": {"d_kv": 3},
    "bart": {"d_model": 24},
}
FAMILIES = [case for case in CASES if str(case) in SMALLER_HEADS]


@contextlib.contextmanager
def rotated_queries_keys(on: bool) -> Iterator[None]:
    """Rotate queries and keys within the block, or leave them as they are."""
    with pytest.MonkeyPatch.context() as patch:
        if not on:
            patch.setattr(calibrated, "rotate_queries_keys", lambda *arguments: None)
        yield


def plan_of(teacher: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """Make a calibrated student whose heads are smaller; return its plan."""
    plans: list[Any] = []

    def record(transfer: Any, moments: Any) -> None:
        head_rotation.rotate_values(transfer, moments)
        plans.append(transfer.plan)

    monkeypatch.setattr(calibrated, "rotate_values", record)
    with rotated_queries_keys(False):
        from_teacher(teacher, show_progress=False, **options)
    return plans[0]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_rotated_values_are_rotated_back_by_their_output_projection(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values E^T v with W_o D compute what values D E^T v with W_o compute: no other weight is changed."""
    teacher = build(case, case.big)
    randomize(teacher, layout_of(teacher), seed=1)
    settle(teacher, case)
    plan = plan_of(
        teacher,
        monkeypatch,
        method={"method": "calibrated", "refit": "none"},
        calibration_dataset=case_batches(case),
        **SMALLER_HEADS[str(case)],
    )
    assert plan.tensor_transforms, "nothing is rotated"
    once, twice = copy.deepcopy(teacher), copy.deepcopy(teacher)
    tensors = [dict(model.state_dict(keep_vars=True)) for model in (once, twice)]
    decoders: dict[str, torch.Tensor] = {}
    projections = {each.source for each in plan.parameters.values() if head_rotation.is_output_projection(plan, each)}
    for source, rotation in plan.tensor_transforms.items():
        if source in projections:
            decoders[source.rsplit(".", 2)[0]] = rotation.matrices
    with torch.no_grad():
        for source, rotation in plan.tensor_transforms.items():
            parameters = [each[plan.teacher_names[source]] for each in tensors]
            parameters[0].copy_(rotation(parameters[0]))
            if source in projections:
                continue
            nearest = max(decoders, key=lambda name: len(_common(name, source)))
            members = len(decoders[nearest]) // len(rotation.matrices)
            back = torch.einsum("gir,gjr->gij", rotation.matrices, decoders[nearest][::members])
            assert not torch.allclose(back, torch.eye(back.shape[1]).to(back), atol=0.1), "something is truncated"
            parameters[1].copy_(
                head_rotation.HeadRotation(rotation.dim_name, rotation.dim, rotation.indices, back)(parameters[1])
            )
    expected = logits_of(twice, case)
    assert relative_error(logits_of(once, case), expected) <= max(case.identity, 1e-6)
    assert relative_error(logits_of(teacher, case), expected) > 1e-4


def _common(first: str, second: str) -> list[str]:
    pairs = list(zip(first.split("."), second.split("."), strict=False))
    return [one for number, (one, _) in enumerate(pairs) if all(a == b for a, b in pairs[: number + 1])]


def test_values_that_span_half_of_their_heads_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the directions of that half; queries are zero, because they and keys are selected."""
    teacher = KINDS["llama"].teacher().double()
    size, groups = teacher.config.head_dim, teacher.config.num_key_value_heads
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for block in teacher.model.layers:
            block.self_attn.q_proj.weight.zero_()
            rows = block.self_attn.v_proj.weight.view(groups, size, -1)
            for group in rows:
                basis = torch.linalg.qr(torch.randn(size, size // 2, generator=generator, dtype=torch.float64))[0]
                group.copy_(basis @ basis.T @ group)
    expected, errors = logits(teacher, KINDS["llama"]), {}
    for is_rotated in (True, False):
        method = {"method": "calibrated", "refit": "none", "fit_logit_scale": False}
        if not is_rotated:
            monkeypatch.setattr(calibrated, "rotate_values", lambda *_: None)
        student = from_teacher(
            teacher, method=method, calibration_dataset=token_batches(), show_progress=False, head_dim=size // 2
        )
        errors[is_rotated] = relative_error(logits(student, KINDS["llama"]), expected)
    assert errors[True] < 1e-9 < 1e-3 < errors[False]
    selected = student.initialization_report.calibration["selected"]
    assert not any("head_dim" in units for units in selected.values())


def test_no_other_truncation_of_this_rank_has_less_error() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, weight = (torch.randn(200, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    inputs = inputs * torch.tensor([4.0, 3, 2, 1, 1, 0.0])
    moment, output_weight = inputs.T @ inputs, weight.T @ weight

    def error(encoder: torch.Tensor, decoder: torch.Tensor) -> float:
        return ((inputs - inputs @ encoder @ decoder.T) @ weight.T).square().sum().item()

    encoder, decoder = low_rank_factors(moment, output_weight, 3)
    torch.testing.assert_close(encoder.T @ encoder, torch.eye(3, dtype=torch.float64))
    best = error(encoder, decoder)
    product = inputs @ weight.T
    smallest = torch.linalg.svdvals(product)[3:].square().sum().item()  # Eckart and Young
    assert best == pytest.approx(smallest, rel=1e-9)
    exact = low_rank_factors(moment, output_weight, 5)
    assert error(*exact) < 1e-9 * best, "the sixth direction is zero"


# Queries and keys

HEAD_COUNTS = {  # as many heads in both shapes, so that their size shrinks with the width
    "gpt2": ["n_head"],
    "gpt_bigcode": ["n_head"],
    "bloom": ["n_head"],
    "opt": ["num_attention_heads"],
    "bert": ["num_attention_heads"],
    "vit": ["num_attention_heads"],
    "t5": [],
    "bart": ["encoder_attention_heads", "decoder_attention_heads"],
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
def rotate_heads(model: Any, layout: Layout, scale: float) -> None:
    """Rotate each head's queries and keys by the same random rotation, and multiply the queries."""
    rotations: dict[tuple[str, int], Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        match = layout.find(relative_name(name, model))
        if match is None or not match.axes:
            continue
        sizes = solve_sizes(match.axes, tensor.shape, config_sizes(layout, model.config), name)
        for dim, axis in enumerate(match.axes):
            for size in {each for each in axis_names(axis) if each.endswith(("q_dim", "k_dim"))}:
                heads = next(each for each in axis_names(axis) if each.endswith("heads"))
                for head in range(sizes[heads]):
                    key = (name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[0], head)
                    if key not in rotations:
                        rotations[key] = torch.linalg.qr(normal(sizes[size], sizes[size], seed=len(rotations)))[0]
                    for indices in group_indices(axis, heads, head, size, sizes).view(-1, sizes[size]):
                        rows = tensor.movedim(dim, 0)
                        rotated = torch.tensordot(rotations[key], rows[indices], 1)
                        rows[indices] = rotated * (scale if size.endswith("q_dim") else 1.0)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", list(HEAD_COUNTS))
def test_smaller_heads_are_recovered_from_rotated_ones(name: str) -> None:
    """A small model is lifted to bigger heads with randomly rotated queries and keys: the student is the small model."""
    case = next(case for case in CASES if str(case) == name)
    changed = {"d_kv": (4, 8)} if name == "t5" else {heads: (2, 2) for heads in HEAD_COUNTS[name]}
    case = dataclasses.replace(
        case,
        small=case.small | {option: sizes[0] for option, sizes in changed.items()},
        big=case.big | {option: sizes[1] for option, sizes in changed.items()},
    )
    small, big = build(case, case.small), build(case, case.big)
    layout = layout_of(small)
    randomize(small, layout, seed=2, stream_gains="constant", length=case.length)
    settle(small, case)
    embed_small_in_large(small, big, layout, seed=3)
    rotate_heads(big, layout, 1.0 if name == "t5" else 2**0.5)  # the others divide by the root of the head's size
    expected = logits_of(small, case)
    assert relative_error(logits_of(big, case), expected) <= (case.lift or 0), "the teacher is not the small model"
    errors = {}
    for is_rotated in (True, False):
        with rotated_queries_keys(is_rotated):
            student = from_teacher(
                big,
                small.config,
                method={"method": "calibrated", "refit": "none"},
                calibration_dataset=case_batches(case),
                show_progress=False,
            )
        errors[is_rotated] = relative_error(logits_of(student, case), expected)
    assert errors[True] <= (case.lift or 0) < 1e-3 < errors[False]


def test_no_other_product_of_this_rank_has_less_error() -> None:
    """By Eckart and Young, the error is the sum of the squared singular values that are truncated."""
    queries, keys = normal(200, 6), normal(150, 6, seed=1) * torch.tensor([4.0, 3, 2, 1, 1, 0.0])
    products = queries @ keys.T
    for rank in (3, 5):
        of_query, of_key = low_rank_product_factors(queries.T @ queries, keys.T @ keys, rank)
        assert of_query.shape == of_key.shape == (6, rank)
        error = (products - queries @ of_query @ of_key.T @ keys.T).square().sum().item()
        expected = torch.linalg.svdvals(products)[rank:].square().sum().item()
        assert error == pytest.approx(expected, rel=1e-9, abs=1e-9 * products.square().sum().item())


@pytest.mark.parametrize(("name", "size"), [("llama", {"head_dim": 6}), ("gemma3", {"head_dim": 6})])
def test_rotary_and_normed_queries_are_not_rotated(name: str, size: dict[str, int]) -> None:
    students = []
    for is_rotated in (True, False):
        with rotated_queries_keys(is_rotated):
            students.append(
                from_teacher(
                    KINDS[name].teacher(),
                    method={"method": "calibrated", "refit": "none"},
                    calibration_dataset=[{"input_ids": torch.arange(3, 30)[None]}],
                    show_progress=False,
                    **size,
                )
            )
    assert all(map(torch.equal, students[0].parameters(), students[1].parameters()))
    notes = [
        note
        for note in students[0].initialization_report.approximations
        if "queries and keys are selected evenly" in note
    ]
    assert len(notes) == 1 and ("rotary" in notes[0] or "norm" in notes[0])


@pytest.mark.parametrize(
    ("name", "smaller", "depth"),
    [("llama", {"head_dim": 6}, "num_hidden_layers"), ("gpt2", {"n_embd": 24}, "n_layer")],
)
def test_a_teachers_block_that_feeds_several_of_the_students_is_rotated_once(
    name: str, smaller: dict[str, int], depth: str
) -> None:
    repeated, single = (
        dict(
            from_teacher(
                KINDS[name].teacher(),
                method={"method": "calibrated", "refit": "none", "fit_logit_scale": False, "layer_selection": layers},
                calibration_dataset=token_batches(),
                show_progress=False,
                **smaller,
                **{depth: len(layers)},
            ).named_parameters()
        )
        for layers in ([0, 0, 1, 1], [0, 1])
    )
    weights = [key for key in repeated if ".0." in key]
    assert weights
    for key in weights:
        assert torch.equal(repeated[key], single[key]), key
        assert torch.equal(repeated[key.replace(".0.", ".1.")], single[key]), key
