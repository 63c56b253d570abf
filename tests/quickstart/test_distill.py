"""The loss is the formula, perplexity is the definition, and students trained together learn what they would alone."""

import copy
import math

import pytest
import torch
from transformers import LlamaForCausalLM

from hf_guide.quickstart.distill import Recipe, distill, distillation_loss, evaluate


def draw(rows: int, vocab: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    student, teacher = (3 * torch.randn(rows, vocab, dtype=dtype, generator=generator) for _ in range(2))
    return student, teacher, torch.randint(vocab, (rows,), generator=generator)


def reference(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, weight: float) -> torch.Tensor:
    """The mean over tokens of (1 - w) (-log p_S(label)) + w sum_v p_T(v) log(p_T(v) / p_S(v)), from its definition."""
    p_student = student.exp() / student.exp().sum(-1, keepdim=True)
    p_teacher = teacher.exp() / teacher.exp().sum(-1, keepdim=True)
    cross_entropy = -p_student[torch.arange(len(labels)), labels].log()
    divergence = (p_teacher * (p_teacher / p_student).log()).sum(-1)
    return ((1 - weight) * cross_entropy + weight * divergence).mean()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rows", [1, 16, 37])
def test_loss_and_gradient_are_those_of_the_definition(rows, weight, dtype, tolerance):
    student, teacher, labels = draw(rows, 101, dtype)
    exact = student.clone().double().requires_grad_()
    expected = reference(exact, teacher.double(), labels, weight)
    expected.backward()
    student.requires_grad_()
    losses = distillation_loss(student, teacher, labels, weight)
    (2 * losses.total).backward()
    assert losses.total.item() == pytest.approx(expected.item(), rel=tolerance, abs=tolerance)
    mixed = (1 - weight) * losses.cross_entropy + weight * losses.divergence
    assert mixed.item() == pytest.approx(losses.total.item(), rel=1e-6)
    torch.testing.assert_close(student.grad.double() / 2, exact.grad, rtol=0, atol=tolerance / rows)


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it():
    _, teacher, labels = draw(20, 301, torch.float32)
    student = teacher.clone().requires_grad_()
    losses = distillation_loss(student, teacher, labels, 1.0)
    losses.total.backward()
    assert losses.divergence.item() == 0.0
    assert student.grad.abs().max().item() == 0.0


def test_the_divergence_ignores_a_shift_of_the_logits():
    _, teacher, labels = draw(20, 301, torch.float64)
    assert distillation_loss(teacher + 5.0, teacher, labels, 1.0).total.item() == pytest.approx(0.0, abs=1e-14)


@pytest.fixture
def blocks():
    return torch.randint(400, (12, 17), generator=torch.Generator().manual_seed(1))


def model(config, seed):
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def test_perplexity_is_that_of_the_models_own_loss(config, blocks):
    made = model(config, 0).train()
    found = evaluate(made, blocks, 5, "test", show_progress=False)
    assert made.training
    with torch.no_grad():
        nats = [made.eval()(input_ids=block[None], labels=block[None]).loss.item() for block in blocks]
    assert found.perplexity == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-5)
    assert found.tokens_per_second > 0


def test_students_trained_in_step_end_where_each_would_alone(config, blocks):
    teacher, first, second = (model(config, seed) for seed in range(3))
    alone = copy.deepcopy(first)
    recipe = Recipe(steps=4, batch_size=2)
    distill(
        teacher,
        {"first": first, "second": second},
        blocks,
        {"first": 1e-3, "second": 1e-2},
        recipe,
        show_progress=False,
    )
    distill(teacher, {"alone": alone}, blocks, {"alone": 1e-3}, recipe, show_progress=False)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, alone.get_parameter(name)), name


def test_training_moves_a_student_towards_its_teacher_and_leaves_the_teacher(config, blocks):
    teacher, student = model(config, 0), model(config, 1)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(8.0)
    kept = copy.deepcopy(teacher.state_dict())

    def distance() -> float:
        with torch.no_grad():
            logits, goal = (each.eval()(input_ids=blocks[:, :-1]).logits.flatten(0, 1) for each in (student, teacher))
        return distillation_loss(logits, goal, blocks[:, 1:].flatten(), 1.0).divergence.item()

    before = distance()
    speeds = distill(
        teacher,
        {"student": student},
        blocks.repeat(10, 1),
        {"student": 1e-2},
        Recipe(steps=30, batch_size=4, kd_weight=1.0),
        show_progress=False,
    )
    assert distance() < 0.5 * before
    assert speeds["student"] > 0
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, kept[name]), name
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_learning_rate_rises_to_its_peak_and_falls():
    recipe = Recipe(steps=100, batch_size=1)
    rates = [recipe.rate(step) for step in range(100)]
    assert rates[9] == pytest.approx(1.0)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[0] == pytest.approx(0.1)
    assert rates[-1] == pytest.approx(recipe.final_rate, abs=0.01)


def test_too_little_text_is_refused(config, blocks):
    with pytest.raises(ValueError, match="7 steps of 2 need 14 blocks; there are 12"):
        distill(model(config, 0), {}, blocks, {}, Recipe(steps=7, batch_size=2), show_progress=False)
