"""The losses of similarities and margins: their formulas in float64, value and gradient, and what they refuse."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_guide import DistillationArguments
from hf_guide.distillation.losses.registry import get_loss
from hf_guide.distillation.losses.similarity import SimilarityConfig, margin_mse_loss, similarity_loss
from hf_guide.errors import OptionError
from hf_guide.teachers.signals import DenseTarget

GENERATOR = torch.Generator().manual_seed(0)
STUDENT = torch.randn(5, 3, generator=GENERATOR, dtype=torch.float64)
TEACHER = torch.randn(5, 7, generator=GENERATOR, dtype=torch.float64)
CONFIGS = [
    SimilarityConfig(distance=distance, similarity=each) for distance in ("mse", "kl") for each in ("cosine", "dot")
]


def similarity(first: Tensor, second: Tensor, config: SimilarityConfig) -> Tensor:
    """Return how similar two vectors are."""
    product = (first * second).sum()
    return product if config.similarity == "dot" else product / (first.norm() * second.norm())


def reference(student: Tensor, teacher: Tensor, config: SimilarityConfig) -> Tensor:
    """Return the loss of each example by its definition, one pair after the other."""
    values = []
    for row in range(len(student)):
        others = [other for other in range(len(student)) if other != row]
        mine, theirs = (
            torch.stack([similarity(each[row], each[other], config) for other in others])
            for each in (student, teacher)
        )
        if config.distance == "mse":
            values.append(sum((a - b) ** 2 for a, b in zip(mine, theirs, strict=True)) / len(others))
        else:
            p, q = (torch.exp(config.scale * each) / torch.exp(config.scale * each).sum() for each in (theirs, mine))
            values.append((p * (p / q).log()).sum())
    return torch.stack(values)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.distance} {config.similarity}")
def test_similarity_is_its_formula_with_its_gradient(config: SimilarityConfig) -> None:
    results = []
    for function in (similarity_loss, reference):
        student = (STUDENT / 10).requires_grad_()
        values = function(student, TEACHER / 10, config)
        (gradient,) = torch.autograd.grad((values * torch.arange(1.0, 6.0)).sum(), student)
        results.append((values, gradient))
    torch.testing.assert_close(*results, atol=1e-10, rtol=1e-8)
    assert results[0][0].shape == (5,)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.distance} {config.similarity}")
def test_a_rotated_copy_has_loss_and_gradient_zero(config: SimilarityConfig) -> None:
    rotation = torch.linalg.qr(torch.randn(7, 7, generator=GENERATOR, dtype=torch.float64))[0]
    student = TEACHER.clone().requires_grad_()
    values = similarity_loss(student, TEACHER @ rotation, config)
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert values.abs().max() < 1e-12 and gradient.abs().max() < 1e-9


def test_an_example_that_is_alone_has_loss_and_gradient_zero() -> None:
    student = STUDENT[:1].clone().requires_grad_()
    values = similarity_loss(student, TEACHER[:1], SimilarityConfig())
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert values.tolist() == [0.0] and not gradient.any()


def test_half_precision_is_compared_in_float32() -> None:
    values = similarity_loss(STUDENT.bfloat16(), TEACHER.bfloat16(), SimilarityConfig(distance="kl"))
    assert values.dtype == torch.float32


def test_margins_of_consecutive_rows_are_compared() -> None:
    student = torch.tensor([[3.0], [1.0], [0.5], [2.0]], requires_grad=True)
    teacher = DenseTarget(torch.tensor([[10.0], [7.0], [1.0], [1.0]]))
    values = margin_mse_loss(
        student, teacher, None, get_loss("margin_mse").build_config({}, DistillationArguments("out"))
    )
    assert values.tolist() == [1.0, 1.0, 2.25, 2.25]  # ((3 - 1) - (10 - 7))^2, ((0.5 - 2) - 0)^2
    values.sum().backward()
    assert student.grad is not None and student.grad.flatten().tolist() == [-4.0, 4.0, -6.0, 6.0]


def test_an_odd_number_of_rows_has_no_pairs() -> None:
    config: Any = None
    with pytest.raises(OptionError, match="rows 2i and 2i \\+ 1 of a batch, and this one has 3 .* SentenceCollator"):
        margin_mse_loss(torch.zeros(3, 1), DenseTarget(torch.zeros(3, 1)), None, config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distance": "cosine"}, "distance='cosine' is not known; expected one of .*mse.*kl"),
        ({"similarity": "euclid"}, "similarity='euclid' is not known"),
        ({"scale": 0}, "scale must be a number above 0"),
        ({"temperature": 0.1}, "set once for all losses"),
        ({"distanc": "kl"}, "Did you mean 'distance'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        DistillationArguments("out", losses="similarity", loss_options={"similarity": options})
