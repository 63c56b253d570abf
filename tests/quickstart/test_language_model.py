"""The quickstart's measure and its training."""

import copy
import math

import pytest
import torch
from transformers import LlamaForCausalLM

from examples.common.language_model import TrainingRecipe, cache_teacher, evaluate, train


@pytest.fixture
def blocks():
    return torch.randint(400, (60, 17), generator=torch.Generator().manual_seed(1))


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


def test_training_moves_a_student_towards_its_teacher_and_leaves_the_teacher(config, blocks, tmp_path):
    teacher, student = model(config, 0), model(config, 1)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(8.0)
    kept = copy.deepcopy(teacher.state_dict())

    def distance() -> float:
        with torch.no_grad():
            each = [one.eval()(input_ids=blocks).logits.flatten(0, 1).log_softmax(-1) for one in (student, teacher)]
        return torch.nn.functional.kl_div(*each, log_target=True, reduction="batchmean").item()

    before, recipe = distance(), TrainingRecipe(steps=30, batch_size=2, kd_weight=1.0)
    cache = cache_teacher(teacher, blocks, tmp_path / "cache", recipe, show_progress=False)
    _, speed = train(student, cache, blocks, 1e-2, recipe, tmp_path, show_progress=False)
    assert distance() < 0.9 * before
    assert speed > 0
    assert all(torch.equal(value, kept[name]) for name, value in teacher.state_dict().items())
