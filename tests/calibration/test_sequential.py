"""Blocks run one at a time compute what the model computes, or are not supported."""

import pytest
import torch
import transformers

from hf_guide.calibration.sequential import SequentialBlocks, UnsupportedBlockStructure, calls_equal, find_probes
from tests.distributed.images_and_text import image_batches, image_teacher, text_influence
from tests.tiny import KINDS


def test_blocks_that_run_more_than_once_are_not_supported() -> None:
    model = KINDS["llama"].teacher()
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(UnsupportedBlockStructure, match="order"):
        SequentialBlocks(model, list(model.model.layers), [{"input_ids": torch.arange(3, 12)[None]}], is_teacher=True)


def test_other_arguments_are_recorded_without_running_the_blocks_again() -> None:
    """With and without padding, for blocks whose masks differ; the blocks are restored."""
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
    sequential = SequentialBlocks(model, blocks, batches, is_teacher=True)
    assert len(run) == 2 * len(blocks)  # the first batch, and the first again a block at a time
    assert not any("forward" in vars(block) for block in blocks)
    while sequential.next < len(blocks):
        sequential.advance()
    for batch, stream in zip(batches, sequential.hidden_states, strict=True):
        expected = model(**batch, output_hidden_states=True).hidden_states[-1]
        assert torch.allclose(model.model.norm(stream), expected, atol=1e-6)


def test_arguments_that_depend_on_the_blocks_are_recorded_on_every_batch() -> None:
    """T5's first block passes its position bias on to the others."""
    model = KINDS["t5"].teacher()
    run: list[object] = []
    for block in model.encoder.block:
        block.layer[1].register_forward_pre_hook(lambda module, args: run.append(module))
    batches = [{"input_ids": row[None], "decoder_input_ids": row[None]} for row in torch.randint(3, 90, (3, 9))]
    sequential = SequentialBlocks(model, list(model.encoder.block), batches, is_teacher=True)
    assert len(run) == (len(batches) + 2) * len(model.encoder.block)
    assert len(sequential.hidden_states) == len(batches)


def test_blocks_must_run_alone_on_every_kind_of_batch() -> None:
    """Features of images are added between blocks of text; which batch comes first makes no difference."""
    text, *images = image_batches(4)
    model = image_teacher()
    blocks = list(model.model.language_model.layers)
    SequentialBlocks(model, blocks, [text], is_teacher=True)
    for batches in ([text, *images], [*images, text]):
        with pytest.raises(UnsupportedBlockStructure, match="block 0 takes more"):
            SequentialBlocks(model, blocks, batches, is_teacher=True)
    assert text_influence([text, *images]) == pytest.approx(text_influence([*images, text]), rel=1e-5)


def test_probes_are_of_the_same_kinds_in_all_processes() -> None:
    batches = image_batches(4)
    for own in (batches[:1], batches[1:], batches[::2]):
        probes = find_probes(own, batches)
        assert [probe.batch.keys() for probe in probes] == [batches[1].keys(), batches[0].keys()]
        assert all(probe.index is None or probe.batch is own[probe.index] for probe in probes)
        assert sum(probe.index is None for probe in probes) == 2 - len({len(batch) for batch in own})


def test_calls_are_equal_only_bit_by_bit() -> None:
    one = ((torch.ones(2), None), {"mask": torch.zeros(3), "use_cache": False, "names": ["a"]}, "hidden_states")
    assert calls_equal(
        one, ((torch.ones(2), None), {"mask": torch.zeros(3), "use_cache": False, "names": ["a"]}, one[2])
    )
    for other in (torch.full((3,), 1e-7), torch.zeros(3).double(), torch.zeros(2), None):
        assert not calls_equal(one, (one[0], one[1] | {"mask": other}, one[2]))
    assert not calls_equal({"a": object()}, {"a": object()})
