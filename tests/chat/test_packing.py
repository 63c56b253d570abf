"""Packed rows hold every example whole, once, and a model computes for each what it computes for it alone."""

import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_guide.chat.packing import PackedCollator, assign_rows, pack_rows, split_packed
from tests.chat.small import VOCABULARY


def draw_lengths(seed: int, size: int, count: int = 60) -> list[int]:
    draw = random.Random(seed)
    return [draw.randint(1, size) for _ in range(count)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [1, 7, 64])
def test_every_example_is_in_one_row_that_is_not_too_long(seed: int, size: int) -> None:
    lengths = draw_lengths(seed, size)
    rows = assign_rows(lengths, size)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= size for row in rows)
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    assert len(rows) <= 11 / 9 * sum(lengths) / size + 2 or size == 1  # of best-fit decreasing, at uniform lengths


def examples(seed: int = 0, size: int = 12) -> dict[str, list[list[int]]]:
    draw = random.Random(seed)
    ids = [[draw.randrange(8, VOCABULARY) for _ in range(length)] for length in draw_lengths(seed, size, 20)]
    labels = [[token if draw.random() < 0.6 else -100 for token in row] for row in ids]
    return {"input_ids": ids, "labels": labels}


def test_rows_split_into_their_examples() -> None:
    whole = examples()
    packed = pack_rows(whole, 16)
    rows = [dict(zip(packed, values, strict=True)) for values in zip(*packed.values(), strict=True)]
    found = [(each["input_ids"], each["labels"][1:]) for row in rows for each in split_packed(row)]
    assert sorted(found) == sorted((ids, labels[1:]) for ids, labels in zip(*whole.values(), strict=True))
    assert all(each["labels"][0] == -100 for row in rows for each in split_packed(row))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_loss_and_its_gradient_are_those_of_the_examples_alone(implementation: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation=implementation).double()
    whole = examples()
    items = sum(label != -100 for labels in whole["labels"] for label in labels[1:])

    def total(batches: list[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        loss = torch.stack([model(**batch, use_cache=False, num_items_in_batch=items).loss for batch in batches]).sum()
        loss.backward()
        return loss.detach(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    alone = [
        {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}
        for ids, labels in zip(*whole.values(), strict=True)
        if any(label != -100 for label in labels[1:])
    ]
    packed = pack_rows(whole, 16)
    rows = [dict(zip(packed, values, strict=True)) for values in zip(*packed.values(), strict=True)]
    assert any(len(row["input_ids"]) < 16 for row in rows)
    expected = total(alone)
    for size in (1, 3):
        batches = [PackedCollator()(rows[start : start + size]) for start in range(0, len(rows), size)]
        for found, value in zip(total(batches), expected, strict=True):
            torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-7)
