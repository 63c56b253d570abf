"""Modules are compared by what they compute, their weights, indices and dropout apart."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_guide.models.model_classes import meta_model
from hf_guide.models.module_signature import describe_difference, module_signature, stack_modules


class Block(nn.Module):
    """A block with an index, a depth, a window, an epsilon and dropout."""

    def __init__(
        self, index: int = 0, *, depth: int = 2, window: int = 4, eps: float = 1e-6, bias: bool = True
    ) -> None:
        super().__init__()
        self.layer_idx, self.num_layers, self.window, self.eps = index, depth, window, eps
        self.drop_path = nn.Dropout(0.1 * index) if index else nn.Identity()
        self.experts = nn.ModuleList(nn.Linear(3, 2, bias=bias) for _ in range(2))
        self.register_buffer("mask", torch.ones(window))


def test_blocks_of_other_indices_and_drop_path_rates_are_the_same() -> None:
    assert module_signature(Block(0)) == module_signature(Block(3))


@pytest.mark.parametrize("change", [{"depth": 3}, {"window": 8}, {"eps": 1e-5}, {"bias": False}], ids=str)
def test_another_setting_is_another_model(change: dict) -> None:
    assert module_signature(Block()) != module_signature(Block(**change))


def test_the_depth_is_not_part_of_a_blocks_kind() -> None:
    assert module_signature(Block(depth=3)).of_block() == module_signature(Block()).of_block()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"window": 8}, "has mask=(4,), the student's (8,)"),
        ({"bias": False}, "has experts.*.bias, which the student's block lacks"),
    ],
)
def test_a_difference_is_described(change: dict, text: str) -> None:
    teacher, student = (module_signature(block).of_block() for block in (Block(), Block(**change)))
    assert describe_difference(teacher, student, widths=True) == text
    if "window" in change:
        assert describe_difference(teacher, student, widths=False) == ""


def test_a_student_with_another_module_than_the_teacher_is_described() -> None:
    teacher, student = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2), nn.GELU())
    signatures = [module_signature(module) for module in (teacher, student)]
    assert describe_difference(*signatures, widths=True) == "has nothing at 1, the student's a GELU"


def test_the_modules_of_a_stack_are_found_from_either_root() -> None:
    model = meta_model(LlamaForCausalLM, LlamaConfig(num_hidden_layers=3))
    for stack in ("layers", "layers.{block}", "model.layers"):
        assert stack_modules(model, stack) == list(model.model.layers)
    assert stack_modules(model, "blocks.{block}") == []
