"""What chooses ridges depends on the examples, not on how they are batched."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_guide import from_teacher
from hf_guide.calibration.forward import drop_padding, held_out_examples, held_out_rows
from tests.calibration.small_students import BART, kind_batches
from tests.tiny import KINDS, Kind

ALL_KINDS = {**KINDS, "bart": BART}


def rebatched(rows: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    """Return the rows as batches of so many."""
    parts = {name: value.split(size) for name, value in rows.items()}
    return [dict(zip(parts, each, strict=True)) for each in zip(*parts.values(), strict=True)]


def calibrated(kind: Kind, dataset: list[dict[str, Tensor]], **method: Any) -> Any:
    return from_teacher(
        kind.teacher().double(),  # in float32 some of these random models amplify rounding to 1 %
        method={"method": "calibrated", "layer_selection": "block_influence", **method},
        calibration_dataset=dataset,
        show_progress=False,
        dtype=torch.float64,
        **kind.smaller,
    )


def distance(one: Any, other: Any) -> float:
    """Return how far the weights of two models are from each other, relative to the first's."""
    first, second = (torch.cat([p.detach().flatten() for p in model.parameters()]) for model in (one, other))
    return ((first - second).norm() / first.norm()).item()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ALL_KINDS)
def test_the_student_does_not_depend_on_how_examples_are_batched(name: str) -> None:
    """And one batch of all examples is enough to choose ridges."""
    kind = ALL_KINDS[name]
    batches = kind_batches(kind)
    rows = {each: torch.cat([batch[each] for batch in batches]) for each in batches[0]}
    count = len(next(iter(rows.values())))
    assert count >= 8
    at_once, other = (calibrated(kind, rebatched(rows, size)) for size in (count, 3))
    assert distance(at_once, other) < 1e-6
    steps = " ".join(step for each in at_once.initialization_report.parameters for step in each.steps)
    assert len(set(re.findall(r"ridge (\S+)", steps))) > 1


@pytest.mark.parametrize("sizes", [(13,), (1,) * 13, (8, 5), (2, 3, 8), (5, 0, 8)])
def test_every_fourth_example_is_held_out(sizes: tuple[int, ...]) -> None:
    masks = held_out_examples([{"input_ids": torch.zeros(size, 4)} for size in sizes])
    joined = torch.cat([mask for mask in masks if mask is not None])
    assert joined.nonzero().flatten().tolist() == [3, 7, 11]


@pytest.mark.parametrize("shape", [(4, 5, 8), (20, 8), (4, 2, 5, 8), (8, 5, 8), (4, 8)])
def test_rows_are_held_out_with_their_example(shape: tuple[int, ...]) -> None:
    """(batch, length), (batch * length), (batch, height, width), windows of an example, and pooled examples."""
    per_example = torch.Size(shape[:-1]).numel() // 4
    held_out = held_out_rows(torch.zeros(shape), {}, None, torch.tensor([False, True, False, False]))
    assert held_out.nonzero().flatten().tolist() == list(range(per_example, 2 * per_example))


def test_padding_is_left_out_of_both() -> None:
    mask = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 1, 1], [1, 0, 0]])
    batch = {"input_ids": torch.arange(12).reshape(4, 3), "attention_mask": mask}
    tokens = batch["input_ids"][..., None].float()
    (examples,) = held_out_examples([batch])
    held_out = held_out_rows(tokens, batch, None, examples)
    assert drop_padding(tokens, batch, None).flatten()[held_out].tolist() == [9]


@pytest.mark.parametrize("batches", [[{"input_ids": torch.zeros(1, 16)}], [{"input_ids": torch.zeros(1, 16)}] * 3])
def test_of_few_examples_a_part_of_each_batch_is_held_out(batches: list[dict[str, Tensor]]) -> None:
    masks = held_out_examples(batches)
    assert masks == [None] * len(batches)
    held_out = held_out_rows(torch.zeros(1, 16, 8), batches[0], None, masks[0])
    assert held_out.nonzero().flatten().tolist() == [12, 13, 14, 15]


def test_rows_that_are_not_examples_are_split_too() -> None:
    """As where the patches of all images of a batch come one after another."""
    batches = [{"input_ids": torch.zeros(6, 9), "pixel_values": torch.zeros(40, 12)}, {"input_ids": torch.zeros(6, 9)}]
    masks = held_out_examples(batches)
    assert masks[0] is None and masks[1] is not None
    assert held_out_rows(torch.zeros(40, 8), batches[0], None, masks[0]).sum() == 10


def test_one_long_example_chooses_ridges() -> None:
    kind = KINDS["llama"]
    rows = {"input_ids": torch.randint(3, 96, (1, 30), generator=torch.Generator().manual_seed(0))}
    assert distance(calibrated(kind, [rows]), calibrated(kind, [rows], ridge=0.1)) > 1e-2
