"""The exactness laws: identity, lift, and rotation. float64, on small seeded models moved away from their defaults."""

import math

import pytest
import torch
from transformers import PreTrainedModel

from hf_guide.initialization.build import build_student
from hf_guide.initialization.config import PlanOptions
from hf_guide.initialization.planning import merge_tied_axes
from hf_guide.initialization.transfer import transfer_weights
from hf_guide.layouts.registry import Layout, registered_layouts, variant_for
from hf_guide.modeling import from_teacher
from hf_guide.teachers.checkpoint import open_teacher
from tests.invariants.case import Case, build, logits_of, settle
from tests.invariants.cases import CASES
from tests.invariants.embed_small_in_large import embed_small_in_large, random_orthonormal, randomize, relative_name


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def layout_of(model: PreTrainedModel) -> Layout:
    layout = variant_for(registered_layouts()[model.config.model_type], model.config)
    return merge_tied_axes(layout, [relative_name(name, model) for name in model.state_dict()])


@pytest.mark.sampled(20)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_identity(case: Case) -> None:
    teacher = build(case, case.big)
    randomize(teacher, layout_of(teacher), seed=1)
    settle(teacher, case)
    student = from_teacher(teacher, show_progress=False)
    assert relative_error(logits_of(student, case), logits_of(teacher, case)) <= case.identity


@pytest.mark.sampled(24)
@pytest.mark.parametrize("case", [case for case in CASES if case.lift is not None], ids=str)
def test_lift(case: Case) -> None:
    small, big = build(case, case.small), build(case, case.big)
    layout = layout_of(small)
    randomize(small, layout, seed=2, stream_gains="constant", length=case.length)
    settle(small, case)
    embed_small_in_large(small, big, layout, seed=3)
    expected = logits_of(small, case)
    assert relative_error(logits_of(big, case), expected) <= case.lift, (
        "the lifted teacher is not the small model: the layout is wrong"
    )
    student = from_teacher(big, small.config, show_progress=False)
    assert relative_error(logits_of(student, case), expected) <= case.lift


@pytest.mark.sampled(25)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rotation(case: Case) -> None:
    """With random gains and no axis cut, only rotated: the remaining error is that of gains that cannot be folded."""
    teacher = build(case, case.big)
    layout = layout_of(teacher)
    randomize(teacher, layout, seed=4)
    settle(teacher, case)
    assert math.isfinite(error := rotation_residual(teacher, layout, case)) and error <= case.residual


def rotation_residual(teacher: PreTrainedModel, layout: Layout, case: Case) -> float:
    """Return the relative error of a student as wide as its teacher whose residual stream is rotated by a random Q."""
    widths: dict[str, int] = {}
    for name, tensor in teacher.state_dict().items():
        match = layout.find(relative_name(name, teacher))
        assert match is not None, f"the layout has no row for {name}"
        lengths = {str(axis): length for axis, length in zip(match.axes, tensor.shape, strict=True)}
        widths |= {axis: lengths[axis] for axis in layout.projected_axes() if axis in lengths}
    bases = {
        axis: random_orthonormal(width, width, seed=6, keep_mean=layout.norm == "layer")
        for axis, width in widths.items()
    }
    options = PlanOptions("first_last", projects=True)
    student = build_student(type(teacher), teacher.config, torch.float64)
    transfer_weights(student, open_teacher(teacher), layout, options, bases=bases)
    return relative_error(logits_of(student.eval(), case), logits_of(teacher, case))
