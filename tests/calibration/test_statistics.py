"""What is streamed is what direct sums give, however the data are cut."""

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


def heard(teacher: LlamaForCausalLM, batches: list[dict[str, Tensor]]) -> ActivationStatistics:
    return collect_statistics(teacher, find_modules(teacher, LAYOUT), LAYOUT, batches)


@torch.no_grad()
def streams(teacher: LlamaForCausalLM) -> list[list[Tensor]]:
    """The stream before each norm that reads it, by block, the last norm's in a list of its own; computed by hand."""
    x = teacher.model.embed_tokens(ids())
    turn = teacher.model.rotary_emb(x, torch.arange(9)[None])
    mask = torch.full((9, 9), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    found = []
    for block in teacher.model.layers:
        found.append([x])
        x = x + block.self_attn(block.input_layernorm(x), position_embeddings=turn, attention_mask=mask)[0]
        found[-1].append(x)
        x = x + block.mlp(block.post_attention_layernorm(x))
    return [*found, [x]]


def test_the_moment_is_that_of_the_streams(teacher: LlamaForCausalLM) -> None:
    expected = torch.zeros(48, 48, dtype=torch.float64)
    for of_block in streams(teacher):
        for stream in of_block:
            rows = stream.flatten(0, 1)
            rows = rows / rows.norm(dim=1, keepdim=True)
            expected += rows.T @ rows
    found = heard(teacher, [{"input_ids": ids()}]).moments["embed"]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_influence_is_one_minus_the_cosine_of_input_and_output(teacher: LlamaForCausalLM) -> None:
    at = [of_block[0].flatten(0, 1) for of_block in streams(teacher)]
    expected = [1 - torch.cosine_similarity(one, other).mean() for one, other in zip(at, at[1:], strict=False)]
    found = heard(teacher, [{"input_ids": ids()}]).block_influence["layers.{block}"]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-6, atol=1e-8)


def test_batches_may_be_cut_anyhow(teacher: LlamaForCausalLM) -> None:
    whole = heard(teacher, [{"input_ids": ids()}])
    cut = heard(teacher, [{"input_ids": rows} for rows in ids().split([1, 3, 2])])
    assert whole.tokens == cut.tokens == 54
    for one, other in (
        (whole.moments, cut.moments),
        (whole.block_influence, cut.block_influence),
        (whole.inner, cut.inner),
    ):
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-9, atol=1e-12)


def test_padding_is_not_heard(teacher: LlamaForCausalLM) -> None:
    mask = torch.ones(6, 12, dtype=torch.long)
    mask[:, 9:] = 0
    padded = torch.cat([ids(), torch.full((6, 3), 7)], 1)
    found = heard(teacher, [{"input_ids": padded, "attention_mask": mask}])
    whole = heard(teacher, [{"input_ids": ids()}])
    assert found.tokens == 54
    torch.testing.assert_close(found.moments["embed"], whole.moments["embed"], rtol=1e-6, atol=1e-8)


def test_nothing_stays_on_the_teacher(teacher: LlamaForCausalLM) -> None:
    teacher.train()
    frozen = teacher.model.layers[1].eval()
    heard(teacher, [{"input_ids": ids()}])
    assert teacher.training and teacher.model.layers[0].mlp.training
    assert not any(module.training for module in frozen.modules())
    teacher.eval()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in teacher.modules())


def test_a_language_head_is_not_run(teacher: LlamaForCausalLM) -> None:
    run: list[object] = []
    handle = teacher.lm_head.register_forward_hook(lambda module, args, output: run.append(module))
    assert heard(teacher, [{"input_ids": ids()}]).tokens == ids().numel() and run == []
    handle.remove()
