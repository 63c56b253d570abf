"""Heads that get smaller: values are turned and cut where least is lost, in every way that families lay them out."""

import copy
from typing import Any

import pytest
import torch

from hf_guide import from_teacher
from hf_guide.calibration import head_rotation as values
from hf_guide.methods import calibrated as run
from tests.calibration.test_calibrated import data as token_batches
from tests.calibration.test_laws import data
from tests.invariants.case import Case, build, logits_of, settle
from tests.invariants.cases import CASES
from tests.invariants.lifting import shake
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


def turns_of(teacher: Any, monkeypatch: pytest.MonkeyPatch, **given: Any) -> Any:
    """Make a calibrated student whose heads are smaller; return its plan."""
    kept: list[Any] = []

    def watched(transfer: Any, inner: Any) -> None:
        values.rotate_values(transfer, inner)
        kept.append(transfer.plan)

    monkeypatch.setattr(run, "rotate_values", watched)
    from_teacher(teacher, show_progress=False, **given)
    return kept[0]


@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_what_is_turned_and_cut_is_turned_back_by_what_reads_it(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values E^T v read by W_o D make the function that values D E^T v read by W_o make: no other weight is touched."""
    teacher = build(case, case.big)
    shake(teacher, layout_of(teacher), seed=1)
    settle(teacher, case)
    monkeypatch.setattr(run, "rotate_queries_keys", lambda *arguments: None)
    plan = turns_of(
        teacher,
        monkeypatch,
        method={"method": "calibrated", "refit": "none"},
        calibration_dataset=data(case),
        **SMALLER_HEADS[str(case)],
    )
    assert plan.turns, "nothing was turned"
    once, twice = copy.deepcopy(teacher), copy.deepcopy(teacher)
    tensors = [dict(model.state_dict(keep_vars=True)) for model in (once, twice)]
    decoders: dict[str, torch.Tensor] = {}
    writers = {site.source: site for site in plan.parameters.values() if values.is_output_projection(plan, site)}
    for source, turn in plan.turns.items():
        if source in writers:
            decoders[source.rsplit(".", 2)[0]] = turn.matrices
    with torch.no_grad():
        for source, turn in plan.turns.items():
            parameters = [found[plan.teacher_names[source]] for found in tensors]
            parameters[0].copy_(turn(parameters[0]))
            if source in writers:
                continue
            near = max(decoders, key=lambda place: len(_common(place, source)))
            members = len(decoders[near]) // len(turn.matrices)
            back = torch.einsum("gir,gjr->gij", turn.matrices, decoders[near][::members])
            assert not torch.allclose(back, torch.eye(back.shape[1]).to(back), atol=0.1), "something is cut"
            parameters[1].copy_(values.HeadRotation(turn.dim, turn.places, back)(parameters[1]))
    found, expected = logits_of(once, case), logits_of(twice, case)
    assert relative_error(found, expected) <= max(case.identity, 1e-6)
    assert relative_error(logits_of(teacher, case), expected) > 1e-4


def _common(first: str, second: str) -> list[str]:
    pairs = list(zip(first.split("."), second.split("."), strict=False))
    return [one for number, (one, _) in enumerate(pairs) if all(a == b for a, b in pairs[: number + 1])]


def test_values_that_fill_half_of_their_heads_lose_nothing() -> None:
    """Whatever direction the live half has; queries are zero, for they and keys are selected."""
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
    for turned in (True, False):
        method = {"method": "calibrated", "refit": "none", "fit_logit_scale": False, "rotate_values": turned}
        student = from_teacher(
            teacher, method=method, calibration_dataset=token_batches(), show_progress=False, head_dim=size // 2
        )
        errors[turned] = relative_error(logits(student, KINDS["llama"]), expected)
    assert errors[True] < 1e-9 < 1e-3 < errors[False]
    said = student.initialization_report
    assert not any("head_dim" in units for units in said.calibration["selected"].values())


def test_no_other_cut_of_this_rank_loses_less() -> None:
    generator = torch.Generator().manual_seed(0)
    heard, weight = (torch.randn(200, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    heard = heard * torch.tensor([4.0, 3, 2, 1, 1, 0.0])
    moment, read = heard.T @ heard, weight.T @ weight

    def lost(encoder: torch.Tensor, decoder: torch.Tensor) -> float:
        return ((heard - heard @ encoder @ decoder.T) @ weight.T).square().sum().item()

    encoder, decoder = values.low_rank_factors(moment, read, 3)
    torch.testing.assert_close(encoder.T @ encoder, torch.eye(3, dtype=torch.float64))
    best = lost(encoder, decoder)
    product = heard @ weight.T
    smallest = torch.linalg.svdvals(product)[3:].square().sum().item()  # Eckart and Young
    assert best == pytest.approx(smallest, rel=1e-9)
    exact = values.low_rank_factors(moment, read, 5)
    assert lost(*exact) < 1e-9 * best, "the sixth direction is silent"
