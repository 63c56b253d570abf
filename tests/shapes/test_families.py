"""Shapes of a budget, for every family: each one builds as it was counted, and all fields that have a size take part."""

import pytest

from hf_guide import find_shapes, from_teacher
from hf_guide.errors import LayoutError, ShapeError
from hf_guide.shapes.fields import ModelProbe, SizeRole, find_size_fields
from hf_guide.teachers.checkpoint import open_teacher
from tests.invariants.case import Case, build
from tests.invariants.cases import CASES

REFUSED = {
    "clip": "is made of several models",
    "siglip": "is made of several models",
    "segformer": "stages of several widths",
}
COARSE = ("layoutlm", "bart", "plbart", "mvp", "blenderbot-small", "bloom-normed-residual")
"""Families of which these small shapes have sizes too far apart for 40 %."""

QUICK = (
    "bart",
    "stablelm-tied-qk-norm-parallel",
    "mt5",
    "whisper-classifier",
    "qwen2_moe",
    "deepseek_v3",
    "olmo2",
    "modernbert",
    "vit",
)
"""Others are slow: two seconds each."""


def marked(case: Case) -> object:
    return pytest.param(case, id=str(case), marks=[] if str(case) in QUICK else pytest.mark.slow)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("case", [marked(case) for case in CASES])
def test_each_shape_of_a_budget_builds_as_it_was_counted(case: Case) -> None:
    teacher = build(case, case.big).float()
    reason = REFUSED.get(case.family) or REFUSED.get(str(case))
    if reason is not None:
        with pytest.raises(LayoutError, match=reason):
            find_shapes(teacher, num_parameters="40%", show_progress=False)
        return
    try:
        shapes = find_shapes(teacher, num_parameters="40%", limit=2, show_progress=False)
    except ShapeError as error:
        assert "too far apart" in str(error) and str(case).startswith(COARSE)
        return
    for shape in shapes:
        student = from_teacher(teacher, method="random", show_progress=False, **shape.overrides)
        assert student.num_parameters() == shape.parameters
        assert abs(shape.parameters - 0.4 * teacher.num_parameters()) <= 0.008 * teacher.num_parameters()


def test_the_encoder_and_the_decoder_have_sizes_of_their_own() -> None:
    """Both have an MLP by the same axis; a number of heads belongs to the stack that its name states."""
    case = next(each for each in CASES if str(each) == "bart")
    teacher = open_teacher(build(case, case.big))
    roles = {each.name: each.role for each in find_size_fields(ModelProbe(teacher, teacher.model_class)).fields}
    assert roles == {
        "d_model": SizeRole.WIDTH,
        **dict.fromkeys(("encoder_layers", "decoder_layers"), SizeRole.DEPTH),
        **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), SizeRole.MLP),
        **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), SizeRole.HEADS),
    }
