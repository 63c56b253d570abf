"""Teachers of bfloat16 and float16 are calibrated like their float32 copies, and what overflows is an error."""

import copy
from typing import Any

import pytest
import torch
import transformers

from hf_guide import InitializationReport, ShapeError, from_teacher
from hf_guide.calibration.head_fitting import count_token_ids
from hf_guide.calibration.refit import assign_checked
from hf_guide.utils import half_precision
from tests.calibration.small_students import make_student, token_batches
from tests.tiny import KINDS, same_bits

HALF = [torch.bfloat16, torch.float16]


def refitted(report: InitializationReport) -> set[str]:
    """Return the names of the parameters that were refitted."""
    return {each.name for each in report.parameters if any("refitted" in step for step in each.steps)}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("has_instructions", [True, False], ids=["with instructions", "without"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_half_precision_teacher_has_the_same_weights_fitted_as_its_float32_copy(
    name: str, dtype: torch.dtype, has_instructions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(half_precision, "multiplies_in", lambda dtype: has_instructions)
    kind = KINDS[name]
    half = kind.teacher().to(dtype)
    options: dict[str, Any] = {"method": "calibrated", "calibration_dataset": token_batches(), "show_progress": False}
    reports = [
        from_teacher(teacher, **options, **kind.smaller).initialization_report
        for teacher in (half, copy.deepcopy(half).float())
    ]
    assert refitted(reports[0]) == refitted(reports[1]) and refitted(reports[0])
    assert not any("was not refitted" in note for note in reports[0].approximations)
    errors = [report.calibration["residual_error"] for report in reports]
    assert errors[0].keys() == errors[1].keys()
    for stack, shares in errors[1].items():
        assert errors[0][stack] == pytest.approx(shares, rel=0.05)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", ["llama", "llama tied", "gpt2"])
def test_where_a_half_precision_teacher_loses_nothing_nothing_changes(name: str, dtype: torch.dtype) -> None:
    teacher = KINDS[name].teacher().to(dtype)
    options: dict[str, Any] = {"calibration_dataset": token_batches(), "show_progress": False}
    carried = {"method": "calibrated", "refit": "none", "fit_logit_scale": False}
    student = from_teacher(teacher, method="calibrated", **options)
    assert same_bits(student, from_teacher(teacher, method=carried, **options))
    assert student.initialization_report.calibration["logit_scale"] == 1.0


@pytest.mark.sampled(1)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    ("family", "factor"),
    [("Granite", {"logits_scaling": 6.0, "residual_multiplier": 0.22}), ("Cohere", {"logit_scale": 0.8333})],
)
def test_the_logits_scale_is_fitted_where_half_precision_logits_are_multiplied(
    family: str, factor: dict[str, float], dtype: torch.dtype
) -> None:
    sizes = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    config = getattr(transformers, family + "Config")(**sizes, num_attention_heads=4, initializer_range=0.15, **factor)
    torch.manual_seed(1)
    half = getattr(transformers, family + "ForCausalLM")(config).eval().to(dtype)
    # Without a refit: whether a fit exceeds rounding decides how far from 1 the scale is.
    method = {"method": "calibrated", "refit": "none"}
    found = []
    for teacher in (half, copy.deepcopy(half).float()):
        report = from_teacher(
            teacher, method=method, calibration_dataset=token_batches(), show_progress=False, hidden_size=24
        ).initialization_report
        assert not any("not fitted" in note for note in report.approximations)
        found.append(report.calibration["logit_scale"])
    assert found[0] == pytest.approx(found[1], rel=0.02) and 0.4 < found[0] < 0.7


def test_squares_that_float16_does_not_hold_are_taken_in_float32() -> None:
    teacher = KINDS["llama tied"].teacher()
    with torch.no_grad():
        teacher.model.embed_tokens.weight[:, 5] += 300
    student = make_student(teacher.half())
    assert all(parameter.isfinite().all() for parameter in student.parameters())
    calibration = student.initialization_report.calibration
    assert 0 < calibration["logit_scale"] < 10
    assert all(0 <= error < 10 for error in calibration["residual_error"]["layers"])


def test_a_fitted_value_that_cannot_be_stored_is_an_error() -> None:
    parameter = torch.zeros(3, dtype=torch.float16)
    with pytest.raises(ShapeError, match=r"norm\.weight has values up to 1e\+05, more than torch\.float16"):
        assign_checked(parameter, torch.tensor([0.0, 1e5, 1.0]), "norm.weight")
    with pytest.raises(ShapeError, match=r"fitted for norm\.weight is not finite.*dtype='bfloat16'"):
        assign_checked(parameter, torch.tensor([0.0, torch.nan, 1.0]), "norm.weight")
    for dtype in (torch.bfloat16, torch.float32):
        with pytest.raises(ShapeError, match=r"overflow in torch.*extreme values, or pass refit='none'\.$"):
            assign_checked(parameter.to(dtype), torch.tensor([0.0, torch.nan, 1.0]), "norm.weight")
    with pytest.raises(
        ShapeError, match=r"than torch\.bfloat16 holds .*Check the teacher's weights for extreme values\.$"
    ):
        assign_checked(parameter.bfloat16(), torch.tensor([0.0, 3.4e38, 1.0]), "norm.weight")


@pytest.mark.parametrize(
    ("dtype", "factor", "advice"),
    [
        (torch.float16, 2e4, r"Load the teacher and make the student with dtype='bfloat16' or 'float32'\.$"),
        (torch.float32, 1e38, r"extreme values, or pass fit_logit_scale=False\.$"),
    ],
)
def test_a_scale_of_logits_that_are_not_finite_is_an_error(dtype: torch.dtype, factor: float, advice: str) -> None:
    teacher = KINDS["llama"].teacher()
    with torch.no_grad():
        teacher.lm_head.weight.mul_(factor)  # the dtype holds it, and not what it makes
        teacher.model.norm.weight.mul_(1 if dtype == torch.float16 else 1e3)
    with pytest.raises(ShapeError, match=rf"logits in {dtype}.*not finite.*{advice}"):
        make_student(teacher.to(dtype))


def test_padding_is_not_counted() -> None:
    tokens = torch.tensor([[3, 4, 0, 0], [3, 0, 5, 4]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    counted = count_token_ids([{"input_ids": tokens, "attention_mask": mask}], 6)
    assert counted.tolist() == [1, 0, 0, 2, 2, 1]
    assert count_token_ids([{"input_ids": tokens}], 6).tolist() == [3, 0, 0, 2, 2, 1]
