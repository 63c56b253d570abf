"""The two exactness laws: identity, and lift. float64, on small seeded models moved away from their defaults."""

import pytest
import torch

from hf_guide.initialization.derive import layout_for
from hf_guide.initialization.plan import resolve_alike
from hf_guide.students import from_teacher
from tests.invariants.case import Case, build, logits_of
from tests.invariants.cases import CASES
from tests.invariants.lifting import lift, shake, short


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_identity(case: Case) -> None:
    teacher = build(case, case.big)
    layout = layout_for(teacher.config)
    shake(teacher, layout, seed=1)
    student = from_teacher(teacher, show_progress=False)
    assert relative_error(logits_of(student, case), logits_of(teacher, case)) <= case.identity


@pytest.mark.parametrize("case", CASES, ids=str)
def test_lift(case: Case) -> None:
    small, big = build(case, case.small), build(case, case.big)
    layout = resolve_alike(layout_for(big.config), [short(name, small) for name in small.state_dict()])
    shake(small, layout, seed=2, stream_gains="constant")
    lift(small, big, layout, seed=3)
    expected = logits_of(small, case)
    assert relative_error(logits_of(big, case), expected) <= case.lift, "the lifted teacher is not the small model: the layout is wrong"
    student = from_teacher(big, small.config, show_progress=False, method={"energy_correction": True})
    assert relative_error(logits_of(student, case), expected) <= case.lift
