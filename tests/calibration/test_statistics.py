"""Sums over batches equal direct sums, however the data are batched."""

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from hf_guide.calibration.modules import find_modules
from hf_guide.calibration.statistics import ActivationStatistics, collect_statistics
from hf_guide.layouts.registry import registered_layouts
from tests.tiny import KINDS

LAYOUT = registered_layouts()["llama"]


@pytest.fixture(scope="module")
def teacher() -> LlamaForCausalLM:
    return KINDS["llama"].teacher().double()


def ids(rows: int = 6) -> Tensor:
    return torch.randint(3, 96, (rows, 9), generator=torch.Generator().manual_seed(4))


def collect(teacher: LlamaForCausalLM, batches: list[dict[str, Tensor]]) -> ActivationStatistics:
    return collect_statistics(teacher, find_modules(teacher, LAYOUT), LAYOUT, batches)


@torch.no_grad()
def residual_streams(teacher: LlamaForCausalLM) -> list[list[Tensor]]:
    """Return the residual stream before each norm, by block; before the final norm in a list of its own."""
    x = teacher.model.embed_tokens(ids())
    rotary = teacher.model.rotary_emb(x, torch.arange(9)[None])
    mask = torch.full((9, 9), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    found = []
    for block in teacher.model.layers:
        found.append([x])
        x = x + block.self_attn(block.input_layernorm(x), position_embeddings=rotary, attention_mask=mask)[0]
        found[-1].append(x)
        x = x + block.mlp(block.post_attention_layernorm(x))
    return [*found, [x]]


def test_the_moment_is_that_of_the_streams(teacher: LlamaForCausalLM) -> None:
    expected = torch.zeros(48, 48, dtype=torch.float64)
    for of_block in residual_streams(teacher):
        for stream in of_block:
            rows = stream.flatten(0, 1)
            rows = rows / rows.norm(dim=1, keepdim=True)
            expected += rows.T @ rows
    found = collect(teacher, [{"input_ids": ids()}]).residual_second_moments["embed"]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_influence_is_one_minus_the_cosine_of_input_and_output(teacher: LlamaForCausalLM) -> None:
    at = [of_block[0].flatten(0, 1) for of_block in residual_streams(teacher)]
    expected = [1 - torch.cosine_similarity(one, other).mean() for one, other in zip(at, at[1:], strict=False)]
    found = collect(teacher, [{"input_ids": ids()}]).block_influence["layers.{block}"]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-6, atol=1e-8)


def test_batches_may_be_cut_anyhow(teacher: LlamaForCausalLM) -> None:
    whole = collect(teacher, [{"input_ids": ids()}])
    cut = collect(teacher, [{"input_ids": rows} for rows in ids().split([1, 3, 2])])
    assert whole.num_tokens == cut.num_tokens == 54
    for one, other in (
        (whole.residual_second_moments, cut.residual_second_moments),
        (whole.block_influence, cut.block_influence),
        (whole.input_second_moments, cut.input_second_moments),
    ):
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-9, atol=1e-12)


def test_padding_is_excluded(teacher: LlamaForCausalLM) -> None:
    mask = torch.ones(6, 12, dtype=torch.long)
    mask[:, 9:] = 0
    padded = torch.cat([ids(), torch.full((6, 3), 7)], 1)
    found = collect(teacher, [{"input_ids": padded, "attention_mask": mask}])
    whole = collect(teacher, [{"input_ids": ids()}])
    assert found.num_tokens == 54
    torch.testing.assert_close(
        found.residual_second_moments["embed"], whole.residual_second_moments["embed"], rtol=1e-6, atol=1e-8
    )


def test_no_hook_stays_and_modes_are_restored(teacher: LlamaForCausalLM) -> None:
    teacher.train()
    frozen = teacher.model.layers[1].eval()
    collect(teacher, [{"input_ids": ids()}])
    assert teacher.training and teacher.model.layers[0].mlp.training
    assert not any(module.training for module in frozen.modules())
    teacher.eval()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in teacher.modules())


def test_a_language_head_is_not_run(teacher: LlamaForCausalLM) -> None:
    run: list[object] = []
    handle = teacher.lm_head.register_forward_hook(lambda module, args, output: run.append(module))
    assert collect(teacher, [{"input_ids": ids()}]).num_tokens == ids().numel() and run == []
    handle.remove()
