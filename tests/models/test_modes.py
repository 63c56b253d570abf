"""A model is evaluated and left as it was: modes, experts, random state; and hooks are removed."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from hf_guide.models.adapters import parametrized_layers
from hf_guide.models.hooks import StopForward, first_output, register_input_hook, removable_hooks
from hf_guide.models.model_classes import meta_model
from hf_guide.models.modes import eager_experts, eval_mode, eval_preserving_state
from tests.tiny import KINDS


def test_each_module_gets_its_own_mode_back_also_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()).eval())
    model[1].training = True  # a module in training mode that holds one in evaluation mode
    before = [module.training for module in model.modules()]
    with pytest.raises(ZeroDivisionError), eval_mode(model):
        assert not any(module.training for module in model.modules())
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == before


def test_the_random_state_is_restored() -> None:
    state = torch.get_rng_state()
    with eval_preserving_state(nn.Dropout(), torch.device("cpu")):
        torch.rand(3)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()


def test_models_that_are_only_looked_at_leave_the_random_state() -> None:
    """Wav2vec 2.0 draws its mask on the CPU also when the model is built on the meta device."""
    model = AutoModel.from_config(
        AutoConfig.for_model("wav2vec2", num_hidden_layers=1, hidden_size=32, num_attention_heads=2)
    )
    state = torch.get_rng_state()
    assert meta_model(type(model), model.config).feature_projection.projection.weight.is_meta
    assert parametrized_layers(model) == []
    assert torch.equal(torch.get_rng_state(), state)


def test_experts_are_run_eagerly_for_the_duration_of_the_block() -> None:
    model = KINDS["mixtral"].teacher()
    before = model.get_experts_implementation()
    with eager_experts(model):
        assert set(model.get_experts_implementation().values()) == {"eager"}
    assert model.get_experts_implementation() == before
    with eager_experts(KINDS["llama"].teacher()):
        pass


def test_hooks_are_removed_when_the_forward_is_stopped() -> None:
    layer, inputs = nn.Linear(2, 3), []

    def stop(tensor: torch.Tensor) -> None:
        inputs.append(tensor)
        raise StopForward

    with pytest.raises(StopForward), removable_hooks() as handles:
        handles.append(register_input_hook(layer, stop))
        layer(input=torch.ones(4, 2))
    assert inputs[0].shape == (4, 2) and not layer._forward_pre_hooks
    assert first_output((inputs[0], None)) is inputs[0]
