"""Queries and keys of heads that get smaller: what is planted at random directions is found; no rotary one is turned."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_guide.methods.calibrated as calibrated
from hf_guide import from_teacher
from hf_guide.calibration.head_rotation import low_rank_product_factors
from hf_guide.layouts.grammar import axis_names, group_indices, solve_sizes
from hf_guide.layouts.registry import Layout, config_sizes
from tests.calibration.test_laws import data
from tests.invariants.case import build, logits_of, settle
from tests.invariants.cases import CASES
from tests.invariants.lifting import lift, shake, short
from tests.invariants.test_laws import layout_of, relative_error
from tests.tiny import KINDS

HEADS = {  # as many heads in both shapes, so that they get smaller with the width
    "gpt2": ["n_head"],
    "gpt_bigcode": ["n_head"],
    "bloom": ["n_head"],
    "opt": ["num_attention_heads"],
    "bert": ["num_attention_heads"],
    "vit": ["num_attention_heads"],
    "t5": [],
    "bart": ["encoder_attention_heads", "decoder_attention_heads"],
}


@contextlib.contextmanager
def rotation(on: bool) -> Iterator[None]:
    """Rotate queries and keys within the block, or leave them as they are."""
    with pytest.MonkeyPatch.context() as patch:
        if not on:
            patch.setattr(calibrated, "rotate_queries_keys", lambda *arguments: None)
        yield


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
def turn_heads(model: Any, layout: Layout, scale: float) -> None:
    """Turn each head's queries and keys by the same random rotation, and multiply the queries."""
    rotations: dict[tuple[str, int], Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        match = layout.find(short(name, model))
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
                    for places in group_indices(axis, heads, head, size, sizes).view(-1, sizes[size]):
                        rows = tensor.movedim(dim, 0)
                        turned = torch.tensordot(rotations[key], rows[places], 1)
                        rows[places] = turned * (scale if size.endswith("q_dim") else 1.0)


@pytest.mark.parametrize("name", list(HEADS))
def test_smaller_heads_are_found_wherever_they_were_turned(name: str) -> None:
    """A small model is lifted to bigger heads, whose queries and keys are then turned at random: it has to come back."""
    case = next(case for case in CASES if str(case) == name)
    changed = {"d_kv": (4, 8)} if name == "t5" else {heads: (2, 2) for heads in HEADS[name]}
    case = dataclasses.replace(
        case,
        small=case.small | {option: sizes[0] for option, sizes in changed.items()},
        big=case.big | {option: sizes[1] for option, sizes in changed.items()},
    )
    small, big = build(case, case.small), build(case, case.big)
    layout = layout_of(small)
    shake(small, layout, seed=2, stream_gains="constant", length=case.length)
    settle(small, case)
    lift(small, big, layout, seed=3)
    turn_heads(big, layout, 1.0 if name == "t5" else 2**0.5)  # the others divide by the root of the head's size
    expected = logits_of(small, case)
    assert relative_error(logits_of(big, case), expected) <= (case.lift or 0), "the teacher is not the small model"
    errors = {}
    for turned in (True, False):
        with rotation(turned):
            student = from_teacher(
                big,
                small.config,
                method={"method": "calibrated", "refit": "none"},
                calibration_dataset=data(case),
                show_progress=False,
            )
        errors[turned] = relative_error(logits_of(student, case), expected)
    assert errors[True] <= (case.lift or 0) < 1e-3 < errors[False]


def test_no_other_cut_of_this_rank_loses_less() -> None:
    """By Eckart and Young: of the products of all queries with all keys the singular values that are cut are lost."""
    queries, keys = normal(200, 6), normal(150, 6, seed=1) * torch.tensor([4.0, 3, 2, 1, 1, 0.0])
    products = queries @ keys.T
    for rank in (3, 5):
        of_query, of_key = low_rank_product_factors(queries.T @ queries, keys.T @ keys, rank)
        assert of_query.shape == of_key.shape == (6, rank)
        lost = (products - queries @ of_query @ of_key.T @ keys.T).square().sum().item()
        expected = torch.linalg.svdvals(products)[rank:].square().sum().item()
        assert lost == pytest.approx(expected, rel=1e-9, abs=1e-9 * products.square().sum().item())


@pytest.mark.parametrize(("name", "size"), [("llama", {"head_dim": 6}), ("gemma3", {"head_dim": 6})])
def test_what_is_rotated_or_normed_is_not_turned(name: str, size: dict[str, int]) -> None:
    students = []
    for turned in (True, False):
        with rotation(turned):
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
    said = [note for note in students[0].initialization_report.approximations if "queries and keys are chosen" in note]
    assert len(said) == 1 and ("rotary" in said[0] or "norm" in said[0])
