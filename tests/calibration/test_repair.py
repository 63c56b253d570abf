"""The pieces of a repair: ridge regression that knows when to leave a weight alone, and where a writer is heard again."""

import gc
import weakref
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from hf_guide import from_teacher
from hf_guide.calibration.least_squares import NormalEquations, ridge_update, select_ridge
from hf_guide.calibration.modules import find_modules
from hf_guide.calibration.reconstruction import BLOCK_OUTPUT, BlockReconstructor, fit_order
from hf_guide.calibration.sequential import SequentialBlocks, UnsupportedBlockStructure, calls_equal
from hf_guide.layouts.registry import registered_layouts, variant_for
from tests.tiny import KINDS


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sums(x: Tensor, y: Tensor) -> NormalEquations:
    found = NormalEquations.of(x.shape[1], y.shape[1])
    for rows in zip(x.split(7), y.split(7), strict=True):
        found.add(*rows)
    return found


@pytest.mark.parametrize("by_feature", [False, True])
def test_a_correction_is_ridge_regression(by_feature: bool) -> None:
    x, r = normal(50, 6), normal(50, 3, seed=1)
    total = sums(x, r)
    squares = x.square().sum(0)
    held = squares.diag() if by_feature else squares.mean() * torch.eye(6, dtype=torch.float64)
    expected = torch.linalg.solve(x.T @ x + 0.1 * held, x.T @ r).T
    torch.testing.assert_close(ridge_update(total.gram, total.cross, 0.1, by_feature=by_feature), expected)


def test_noise_is_not_fitted_but_what_holds_on_other_tokens_is() -> None:
    own, truth = normal(3, 30, seed=2), 0.1 * normal(3, 30, seed=3)
    for noise, changed in ((1.0, False), (1e-3, True)):
        halves = []
        for seed in (4, 5):
            x = normal(40, 30, seed=seed)
            r = noise * normal(40, 3, seed=seed + 10) + (x @ truth.T if changed else 0)
            halves.append(sums(x, r))
        grams, residuals = (halves[0].gram, halves[1].gram), (halves[0].cross, halves[1].cross)
        found, ridge = select_ridge(own, grams, residuals, None)
        if changed:
            assert (found - truth).norm() < 0.05 * truth.norm()
        else:
            assert ridge is None or ridge >= 1
            assert found.norm() < 0.3 * select_ridge(own, grams, residuals, 1e-3)[0].norm()


def test_loud_features_do_not_hold_the_quiet_ones() -> None:
    loudness = torch.ones(20, dtype=torch.float64)
    loudness[0] = 1e3
    x, truth = normal(400, 20) * loudness, normal(3, 20, seed=1)
    halves = [sums(rows, rows @ truth.T) for rows in x.split(200)]
    grams, residuals = (halves[0].gram, halves[1].gram), (halves[0].cross, halves[1].cross)
    found, _ = select_ridge(torch.zeros(3, 20, dtype=torch.float64), grams, residuals, None)
    held = ridge_update(grams[0] + grams[1], residuals[0] + residuals[1], 1e-3)  # by the mean of all, the loud one's
    errors = [((each - truth)[:, 1:].norm() / truth[:, 1:].norm()).item() for each in (found, held)]
    assert errors[0] < 0.1 < 0.9 < errors[1]


def stages_of(model: transformers.PreTrainedModel, inputs: dict[str, Tensor]) -> list[tuple[list[str], str | None]]:
    layout = variant_for(registered_layouts()[model.config.model_type], model.config)
    anatomy = find_modules(model, layout)
    (stack,) = anatomy.blocks
    replay = SequentialBlocks(model, anatomy.blocks[stack], [inputs], "the model")
    found = fit_order(replay, anatomy, stack, 0, {*anatomy.readers, *anatomy.writers}, [])
    return [([part.name.rpartition(".")[2] for part in stage.parts], stage.observed_at) for stage in found]


def test_the_order_of_a_block_and_where_its_writers_are_heard() -> None:
    tokens = {"input_ids": torch.arange(3, 12)[None]}
    assert stages_of(KINDS["llama"].teacher(), tokens) == [
        (["q_proj", "k_proj", "v_proj"], None),
        (["o_proj"], "layers.0.post_attention_layernorm"),
        (["gate_proj", "up_proj"], None),
        (["down_proj"], BLOCK_OUTPUT),
    ]
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    for parallel in (True, False):  # beside each other, neither branch's norm sees what the other wrote
        config = transformers.GPTNeoXConfig(vocab_size=96, use_parallel_residual=parallel, **sizes)
        torch.manual_seed(0)
        points = [
            point
            for _, point in stages_of(transformers.GPTNeoXForCausalLM(config).eval(), tokens)
            if point is not None
        ]
        assert points == [BLOCK_OUTPUT if parallel else "layers.0.post_attention_layernorm", BLOCK_OUTPUT]


def test_blocks_that_run_more_than_once_are_not_replayed() -> None:
    model = KINDS["llama"].teacher()
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(UnsupportedBlockStructure, match="order"):
        SequentialBlocks(model, list(model.model.layers), [{"input_ids": torch.arange(3, 12)[None]}], "the model")


def test_what_blocks_are_called_with_is_heard_without_running_them_again() -> None:
    """On batches with and without padding, of blocks whose masks differ, and none that is left changed."""
    config = transformers.Gemma3TextConfig(
        vocab_size=96,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForCausalLM(config).eval()
    ids = torch.randint(3, 90, (3, 2, 12))
    masks = torch.ones_like(ids)
    masks[1, 0, 8:] = masks[2, 1, :3] = 0
    batches = [{"input_ids": row, "attention_mask": mask} for row, mask in zip(ids, masks, strict=True)]
    blocks, run = list(model.model.layers), []
    for block in blocks:
        block.mlp.register_forward_pre_hook(lambda module, args: run.append(module))
    replay = SequentialBlocks(model, blocks, batches, "the model")
    assert len(run) == 2 * len(blocks)  # the first batch, and the first again a block at a time
    assert not any("forward" in vars(block) for block in blocks)
    while replay.next < len(blocks):
        replay.step()
    for batch, stream in zip(batches, replay.hidden_states, strict=True):
        expected = model(**batch, output_hidden_states=True).hidden_states[-1]
        assert torch.allclose(model.model.norm(stream), expected, atol=1e-6)


def test_what_depends_on_what_blocks_do_is_heard_of_every_batch() -> None:
    """T5's first block hands its places on to the others."""
    model = KINDS["t5"].teacher()
    run: list[object] = []
    for block in model.encoder.block:
        block.layer[1].register_forward_pre_hook(lambda module, args: run.append(module))
    batches = [{"input_ids": row[None], "decoder_input_ids": row[None]} for row in torch.randint(3, 90, (3, 9))]
    replay = SequentialBlocks(model, list(model.encoder.block), batches, "the model")
    assert len(run) == (len(batches) + 1) * len(model.encoder.block)
    assert len(replay.hidden_states) == len(batches)


def test_calls_are_alike_only_to_the_last_bit() -> None:
    one = ((torch.ones(2), None), {"mask": torch.zeros(3), "use_cache": False, "names": ["a"]}, "hidden_states")
    assert calls_equal(
        one, ((torch.ones(2), None), {"mask": torch.zeros(3), "use_cache": False, "names": ["a"]}, one[2])
    )
    for other in (torch.full((3,), 1e-7), torch.zeros(3).double(), torch.zeros(2), None):
        assert not calls_equal(one, (one[0], one[1] | {"mask": other}, one[2]))
    assert not calls_equal({"a": object()}, {"a": object()})


def test_what_a_block_was_fitted_to_is_let_go_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref[Tensor]] = []
    left: list[int] = []
    tap = BlockReconstructor._tap

    def counting(self: BlockReconstructor, *given: Any) -> dict[str, list[Tensor]]:
        gc.collect()
        left.append(sum(reference() is not None for reference in held))
        taps = tap(self, *given)
        held[:] = [weakref.ref(tensor) for tensors in taps.values() for tensor in tensors]
        return taps

    monkeypatch.setattr(BlockReconstructor, "_tap", counting)
    tokens = [{"input_ids": torch.arange(3 + start, 35 + start)[None]} for start in (0, 32)]
    for repair, taps in (("all", 3), ("writing", 1)):  # what attention and MLP read, and the stream between them
        held.clear()
        from_teacher(
            KINDS["llama"].teacher(),
            method={"method": "calibrated", "refit": repair},
            calibration_dataset=tokens,
            hidden_size=24,
            show_progress=False,
        )
        assert len(held) == taps * len(tokens)
    assert left == [0] * 8
