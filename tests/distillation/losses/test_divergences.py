"""Divergences against the same formulas written out naively in float64."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from hf_guide.distillation.losses.divergences import DivergenceKind, divergence, dkd
from hf_guide.errors import HfGuideError, OptionError, VocabularyError
from hf_guide.teachers.signals import DenseTarget, TopKTarget

KINDS = [kind.value for kind in DivergenceKind]
SHAPES = [(7, 2), (5, 11), (64, 1000), (3, 49152)]


def pair(items: int, classes: int, dtype: torch.dtype = torch.float32, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(items * classes)
    student, teacher = (spread * torch.randn(items, classes, generator=generator) for _ in range(2))
    return student.to(dtype), teacher.to(dtype)


def naive(student: Tensor, teacher: Tensor, kind: str, beta: float, temperature: float) -> Tensor:
    """The definitions, on log-probabilities of float64 logits."""
    log_q, log_p = (student.double() / temperature).log_softmax(-1), (teacher.double() / temperature).log_softmax(-1)
    return naive_of_log_probs(log_q, log_p, kind, beta) * temperature**2


def naive_of_log_probs(log_q: Tensor, log_p: Tensor, kind: str, beta: float) -> Tensor:
    def kl(one: Tensor, other: Tensor) -> Tensor:
        return (one.exp() * (one - other)).sum(-1)

    if kind == "forward_kl":
        return kl(log_p, log_q)
    if kind == "reverse_kl":
        return kl(log_q, log_p)
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def top_k(teacher: Tensor, k: int, temperature: float) -> TopKTarget:
    log_probs = teacher.double().log_softmax(-1)
    kept = log_probs.topk(k)
    return TopKTarget(kept.indices, kept.values, torch.logsumexp(log_probs / temperature, -1))


def coarse(logits: Tensor, indices: Tensor) -> Tensor:
    """Log-probabilities, float64, of the classes at `indices` and of all others together."""
    p = logits.double().softmax(-1)
    top = p.gather(-1, indices)
    return torch.cat([top, p.scatter(-1, indices, 0.0).sum(-1, keepdim=True)], -1).log()


def error(found: Tensor, expected: Tensor) -> float:
    """Of each row by its length, the largest."""
    found, expected = found.double().reshape(len(found), -1), expected.double().reshape(len(expected), -1)
    return ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()


def value_and_slope(values: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.linspace(0.5, 2.0, len(values), dtype=values.dtype)
    (slope,) = torch.autograd.grad(values, logits, weights)
    return values.detach(), slope


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_a_naive_float64_reference(kind, temperature, shape):
    student, teacher = pair(*shape)
    exact = student.double().requires_grad_()
    expected = value_and_slope(naive(exact, teacher, kind, 0.3, temperature), exact)
    student.requires_grad_()
    found = value_and_slope(
        divergence(student, DenseTarget(teacher), kind=kind, beta=0.3, temperature=temperature), student
    )
    assert found[0].dtype == found[1].dtype == torch.float32
    assert error(found[0], expected[0]) < 1e-6
    assert error(found[1], expected[1]) < 1e-6


@pytest.mark.parametrize("k", [1, 5, 40])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", KINDS)
def test_a_top_k_is_compared_with_its_tail_as_one_more_outcome(kind, temperature, k):
    student, teacher = pair(33, 200)
    target = top_k(teacher, k, temperature)
    exact = student.double().requires_grad_()
    log_q, log_p = coarse(exact / temperature, target.indices), coarse(teacher.double() / temperature, target.indices)
    expected = value_and_slope(naive_of_log_probs(log_q, log_p, kind, 0.3) * temperature**2, exact)
    student.requires_grad_()
    found = value_and_slope(divergence(student, target, kind=kind, beta=0.3, temperature=temperature), student)
    assert error(found[0], expected[0]) < 1e-6
    assert error(found[1], expected[1]) < 1e-6


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_top_k_divergence_is_at_most_the_full_one_and_equal_where_k_is_all(kind, temperature):
    student, teacher = pair(40, 30, torch.float64, spread=1.0)
    whole = divergence(student, DenseTarget(teacher), kind=kind, temperature=temperature)
    parts = [
        divergence(student, top_k(teacher, k, temperature), kind=kind, temperature=temperature) for k in range(1, 31)
    ]
    for fewer, more in zip(parts, parts[1:], strict=False):
        assert (fewer <= more + 1e-10).all()
    assert (parts[0] < whole - 1e-4).all()
    torch.testing.assert_close(parts[-1], whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_top_k_of_all_classes_has_the_gradient_of_the_full_divergence(kind):
    student, teacher = pair(9, 30, torch.float64)
    student.requires_grad_()
    of_whole = value_and_slope(divergence(student, DenseTarget(teacher), kind=kind, temperature=2.0), student)
    of_all = value_and_slope(divergence(student, top_k(teacher, 30, 2.0), kind=kind, temperature=2.0), student)
    torch.testing.assert_close(of_all, of_whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_masked_classes_add_nothing_and_get_no_gradient(kind, temperature):
    student, teacher = pair(6, 12)
    masked_student, masked_teacher = student.clone(), teacher.clone()
    masked_student[:, [0, 3, 7]] = -math.inf
    masked_teacher[:, [0, 3, 7]] = -math.inf
    kept = [1, 2, 4, 5, 6, 8, 9, 10, 11]
    smaller = student[:, kept].requires_grad_()
    expected = value_and_slope(
        divergence(smaller, DenseTarget(teacher[:, kept]), kind=kind, temperature=temperature), smaller
    )
    masked_student.requires_grad_()
    for target in (DenseTarget(masked_teacher), top_k(masked_teacher, len(kept), temperature)):
        found = value_and_slope(divergence(masked_student, target, kind=kind, temperature=temperature), masked_student)
        torch.testing.assert_close(found[0], expected[0], rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(found[1][:, kept], expected[1], rtol=2e-5, atol=2e-6)
        assert not found[1][:, [0, 3, 7]].any()


@pytest.mark.parametrize(("kind", "infinite"), [("forward_kl", "student"), ("reverse_kl", "teacher")])
def test_a_class_that_only_one_of_them_excludes_is_infinitely_far_where_the_definition_is(kind, infinite):
    student, teacher = pair(2, 5)
    (student if infinite == "student" else teacher)[0, 2] = -math.inf
    values = divergence(student, DenseTarget(teacher), kind=kind)
    assert values[0] == math.inf
    assert values[1].isfinite()
    assert divergence(student, DenseTarget(teacher), kind="jsd").isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["student", "teacher"])
def test_not_a_number_is_not_hidden(kind, where):
    student, teacher = pair(3, 5)
    (student if where == "student" else teacher)[1, 4] = math.nan
    assert divergence(student, DenseTarget(teacher), kind=kind).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("classes", [3, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(kind, classes):
    student, _ = pair(20, classes)
    student.requires_grad_()
    values, slope = value_and_slope(
        divergence(student, DenseTarget(student.detach()), kind=kind, temperature=2.0), student
    )
    assert values.abs().max() < 1e-7
    assert slope.abs().max() < 1e-7
    if kind == "forward_kl":
        assert not values.any()
        assert not slope.any()


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_is_all_that_is_wrong_with_a_divergence_of_nearly_equals(kind):
    student, teacher = pair(200, 3000)
    near = student + 1e-4 * teacher
    expected = naive(student, near, kind, 0.5, 1.0)
    found = divergence(student, DenseTarget(near), kind=kind)
    assert (found > -3e-7).all()
    torch.testing.assert_close(found.double(), expected, rtol=0.0, atol=3e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_logits_are_compared_in_single_precision(kind, dtype):
    student, teacher = pair(8, 500, dtype)
    found = divergence(student.requires_grad_(), DenseTarget(teacher), kind=kind)
    assert found.dtype == torch.float32
    assert error(found.detach(), naive(student.detach(), teacher, kind, 0.5, 1.0)) < 1e-6
    (slope,) = torch.autograd.grad(found.sum(), student)
    assert slope.dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind):
    student, teacher = pair(3, 6, torch.float64)
    student.requires_grad_()
    for target in (DenseTarget(teacher), top_k(teacher, 2, 1.5)):
        assert torch.autograd.gradcheck(partial(divergence, target=target, kind=kind, temperature=1.5), student)


def test_jsd_tends_to_both_kls_at_its_ends():
    student, teacher = pair(10, 8, torch.float64)
    small = 1e-6
    for beta, kind in ((small, "forward_kl"), (1 - small, "reverse_kl")):
        scaled = divergence(student, DenseTarget(teacher), kind="jsd", beta=beta) / small
        torch.testing.assert_close(scaled, divergence(student, DenseTarget(teacher), kind=kind), rtol=1e-3, atol=0)


def test_a_teacher_of_rounded_log_probabilities_gives_no_negative_tail():
    student, teacher = pair(50, 100, spread=8.0)
    exact = top_k(teacher, 99, 1.0)
    rounded = TopKTarget(exact.indices, exact.log_probs.half(), exact.log_normalizer)
    for kind in KINDS:
        values, slope = value_and_slope(divergence(student.requires_grad_(), rounded, kind=kind), student)
        assert values.isfinite().all() and slope.isfinite().all()
    narrow = TopKTarget(exact.indices.int(), exact.log_probs.half(), exact.log_normalizer)
    forward = divergence(student, rounded).detach()
    assert torch.equal(divergence(student, narrow).detach(), forward)
    torch.testing.assert_close(forward, divergence(student, exact).detach(), rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_decoupled_distillation_is_its_definition(temperature):
    student, teacher = pair(12, 7)
    labels = torch.arange(12) % 7
    exact = student.double().requires_grad_()
    p, q = (teacher.double() / temperature).softmax(-1), (exact / temperature).softmax(-1)
    expected = torch.zeros(12, dtype=torch.float64)
    for item, label in enumerate(labels.tolist()):
        others = [c for c in range(7) if c != label]
        b_p, b_q = (torch.stack([each[item, label], each[item, others].sum()]) for each in (p, q))
        p_hat, q_hat = (each[item, others] / each[item, others].sum() for each in (p, q))
        of_label, of_others = (b_p * (b_p / b_q).log()).sum(), (p_hat * (p_hat / q_hat).log()).sum()
        expected[item] = (1.5 * of_label + 8.0 * of_others) * temperature**2
    expected_pair = value_and_slope(expected, exact)
    student.requires_grad_()
    found = value_and_slope(dkd(student, teacher, labels, alpha=1.5, beta=8.0, temperature=temperature), student)
    assert error(found[0], expected_pair[0]) < 1e-6
    assert error(found[1], expected_pair[1]) < 1e-6


def test_decoupled_distillation_weighed_by_the_others_share_is_forward_kl():
    student, teacher = pair(12, 7, torch.float64)
    labels = torch.arange(12) % 7
    share = 1 - teacher.softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    of_label = dkd(student, teacher, labels, alpha=1.0, beta=0.0, temperature=1.0)
    of_others = dkd(student, teacher, labels, alpha=0.0, beta=1.0, temperature=1.0)
    torch.testing.assert_close(of_label + share * of_others, divergence(student, DenseTarget(teacher)))


def test_nothing_of_no_items():
    student = torch.zeros(0, 5, requires_grad=True)
    values = divergence(student, DenseTarget(torch.zeros(0, 5)))
    values.sum().backward()
    assert values.shape == (0,)
    assert student.grad.shape == (0, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "foward_kl"}, "forward_kl"),
        ({"kind": "jsd", "beta": 0.0}, "forward_kl"),
        ({"kind": "jsd", "beta": 1.0}, "reverse_kl"),
        ({"temperature": 0.0}, "temperature must be a positive number; found 0.0"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
    ],
)
def test_invalid_options_are_errors(options, message):
    student, teacher = pair(2, 4)
    with pytest.raises(OptionError, match=message):
        divergence(student, DenseTarget(teacher), **options)


def test_distributions_of_other_shapes_are_errors():
    student, teacher = pair(2, 4)
    with pytest.raises(VocabularyError, match="student has 4 classes and the teacher 3"):
        divergence(student, DenseTarget(teacher[:, :3]))
    with pytest.raises(HfGuideError, match=r"student \(2, 4\) and teacher \(1, 4\)"):
        divergence(student, DenseTarget(teacher[:1]))
    target = top_k(teacher, 2, 1.0)
    with pytest.raises(HfGuideError, match=r"log_normalizer \(2,\)"):
        divergence(student, TopKTarget(target.indices, target.log_probs[:, :1], target.log_normalizer))
    with pytest.raises(VocabularyError, match="top 4 cannot be among the student's 3"):
        divergence(student[:, :3], top_k(teacher, 4, 1.0))
    with pytest.raises(OptionError, match="at least 3 classes; found 2"):
        dkd(student[:, :2], teacher[:, :2], torch.zeros(2, dtype=torch.long), alpha=1.0, beta=1.0, temperature=1.0)
    with pytest.raises(HfGuideError, match="from 0 to 3"):
        dkd(student, teacher, torch.tensor([0, -100]), alpha=1.0, beta=1.0, temperature=1.0)
