"""The same data make the same batches in any form; empty rows are skipped."""

import dataclasses
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_guide.calibration.data import load_calibration_batches
from hf_guide.data.arguments import DataArguments
from hf_guide.data.preprocessing import preprocess
from hf_guide.errors import OptionError
from hf_guide.methods import InitializationConfig
from hf_guide.tasks import Task
from hf_guide.teachers.checkpoint import open_teacher
from tests.chat.small import CONVERSATIONS, PLAIN, TOOLS
from tests.chat.small import tokenizer as chat_tokenizer
from tests.tiny import KINDS

IDS = torch.randint(3, 96, (8, 9), generator=torch.Generator().manual_seed(3))
RAGGED = [row[:length].tolist() for row, length in zip(IDS, (9, 4, 7, 9, 1, 2, 9, 8), strict=True)]
PIXELS = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def load(teacher: PreTrainedModel, dataset: Any, num_tokens: int = 10**6, **options: Any) -> list[dict[str, Tensor]]:
    config = InitializationConfig("calibrated", calibration_batch_size=4, **options)
    return load_calibration_batches(dataset, teacher, open_teacher(teacher), config, num_tokens=num_tokens)


def are_equal(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> bool:
    return len(found) == len(expected) and all(
        one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        for one, other in zip(found, expected, strict=True)
    )


def table(column: str, values: Any, kind: str | None = None) -> datasets.Dataset:
    return datasets.Dataset.from_dict({column: values, "labels": [0] * len(values)}).with_format(kind)


@pytest.mark.parametrize("kind", [None, "torch", "numpy"])
def test_rows_of_ids_and_batches_of_them_are_one(kind: str | None) -> None:
    teacher = KINDS["llama"].teacher()
    rows = load(teacher, table("input_ids", RAGGED, kind))
    assert are_equal(load(teacher, table("input_ids", RAGGED, kind).iter(batch_size=4)), rows)
    unpadded = [row[mask.bool()].tolist() for batch in rows for row, mask in zip(*batch.values(), strict=True)]
    assert unpadded == RAGGED
    full = [{"input_ids": half} for half in IDS.split(4)]
    assert are_equal(load(teacher, table("input_ids", IDS.tolist(), kind)), full)
    assert are_equal(load(teacher, table("input_ids", IDS.tolist(), kind).iter(batch_size=4)), full)


def test_batches_of_arrays_are_batches() -> None:
    teacher = KINDS["llama"].teacher()
    tensors = load(teacher, [{"input_ids": half} for half in IDS.split(4)])
    assert are_equal(load(teacher, [{"input_ids": half.numpy()} for half in IDS.split(4)]), tensors)


@pytest.mark.parametrize(
    "dataset",
    [
        [{"pixel_values": image, "labels": 0} for image in PIXELS],
        [{"pixel_values": image.numpy()} for image in PIXELS],
        [{"pixel_values": half.numpy()} for half in PIXELS.split(4)],
        table("pixel_values", PIXELS.tolist()),
        table("pixel_values", PIXELS.tolist(), "torch"),
        table("pixel_values", PIXELS.tolist()).iter(batch_size=4),
    ],
    ids=["rows", "rows of arrays", "batches of arrays", "lists", "torch", "batches of lists"],
)
def test_images_in_any_shape(dataset: Any) -> None:
    expected = [{"pixel_values": half} for half in PIXELS.split(4)]
    assert are_equal(load(KINDS["vit"].teacher(), dataset), expected)


@pytest.mark.parametrize(
    ("num_tokens", "sizes"), [(1, [1]), (9, [1]), (10, [2]), (54, [6]), (55, [6, 1]), (999, [6, 6])]
)
def test_no_more_examples_than_the_tokens_take(num_tokens: int, sizes: list[int]) -> None:
    tokens = torch.arange(3, 57).reshape(6, 9)
    found = load(KINDS["llama"].teacher(), [{"input_ids": tokens}] * 2, num_tokens)
    assert [len(batch["input_ids"]) for batch in found] == sizes


def test_padding_and_what_is_no_example_are_not_counted_as_tokens() -> None:
    mask = torch.ones(4, 9, dtype=torch.long)
    mask[:2, 3:] = 0
    batch = {"input_ids": torch.randint(3, 96, (4, 9)), "attention_mask": mask}
    (found,) = load(KINDS["bert"].teacher(), [batch], num_tokens=7)
    assert len(found["input_ids"]) == len(found["attention_mask"]) == 3
    images = {"pixel_values": torch.randn(5, 3, 16, 16)}
    patches = (16 // KINDS["vit"].teacher().config.patch_size) ** 2
    (found,) = load(KINDS["vit"].teacher(), [images], num_tokens=2 * patches)
    assert len(found["pixel_values"]) == 2


def test_empty_rows_are_skipped() -> None:
    teacher = KINDS["llama"].teacher()
    rows: list[Any] = [{"input_ids": row} for row in RAGGED]
    assert are_equal(load(teacher, [{"input_ids": []}, *rows, {"input_ids": None}]), load(teacher, rows))
    batches = [{"input_ids": IDS[:4]}, {"input_ids": IDS[:0]}, {"input_ids": IDS[4:]}]
    assert are_equal(load(teacher, batches), load(teacher, [batches[0], batches[2]]))


@pytest.fixture(scope="module")
def text_teacher(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """A GPT-2, which has 32 positions, with a tokenizer in its folder."""
    folder: Path = tmp_path_factory.mktemp("teacher")
    core = Tokenizer(models.WordLevel({f"w{number}": number for number in range(96)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="w0").save_pretrained(folder)
    teacher = KINDS["gpt2"].teacher()
    teacher.config._name_or_path = str(folder)
    return teacher


TEXTS = [" ".join(f"w{(7 * i + j) % 95 + 1}" for j in range(20)) for i in range(20)]


def test_text_is_cut_where_positions_end(text_teacher: PreTrainedModel) -> None:
    assert [tuple(batch["input_ids"].shape) for batch in load(text_teacher, TEXTS)] == [(4, 32)] * 3 + [(1, 16)]
    assert load(text_teacher, TEXTS, calibration_seq_length=10)[0]["input_ids"].shape == (4, 10)


def test_missing_texts_are_skipped(text_teacher: PreTrainedModel) -> None:
    expected = load(text_teacher, TEXTS)
    holes = datasets.Dataset.from_dict({"text": [None, *TEXTS[:5], "", *TEXTS[5:], None], "label": [0] * 23})
    assert are_equal(load(text_teacher, holes), expected) and are_equal(
        load(text_teacher, holes.iter(batch_size=3)), expected
    )
    for empty in (["", ""], [{"text": None}]):
        with pytest.raises(OptionError, match="not one token"):
            load(text_teacher, empty)
    with pytest.raises(OptionError, match="a int where text must be"):
        load(text_teacher, [{"text": 3}])


def test_ids_are_checked_in_all_batches() -> None:
    with pytest.raises(OptionError, match=r"token id 96 in decoder_input_ids.*tokens 0 to 95"):
        load(KINDS["t5"].teacher(), [{"input_ids": IDS}, {"input_ids": IDS, "decoder_input_ids": IDS.clamp(min=96)}])


# Chat data


@pytest.fixture(scope="module")
def chat_teacher(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """A Llama with the tokenizer and the template of the tests of chat data in its folder."""
    folder: Path = tmp_path_factory.mktemp("chat_teacher")
    chat_tokenizer(PLAIN).save_pretrained(folder)
    KINDS["llama"].teacher().save_pretrained(folder)
    return type(KINDS["llama"].teacher()).from_pretrained(folder)


def unpadded(batches: list[dict[str, Tensor]]) -> list[list[int]]:
    return [
        row[batch["attention_mask"][index].bool() if "attention_mask" in batch else slice(None)].tolist()
        for batch in batches
        for index, row in enumerate(batch["input_ids"])
    ]


def trl_lengths(positions: list[int]) -> list[int]:
    """Return the lengths of the texts of a packed row, as TRL writes them."""
    starts = [index for index, position in enumerate(positions) if position == 0]
    return [end - start for start, end in zip(starts, [*starts[1:], len(positions)], strict=True)]


def test_conversations_are_the_tokens_that_are_trained_on(chat_teacher: PreTrainedModel) -> None:
    """In any form: one row of tokens for each conversation, as `preprocess` makes them."""
    rows = datasets.Dataset.from_dict({"messages": CONVERSATIONS, "tools": TOOLS})
    options = DataArguments(dataset_name="some/data", max_length=24)
    tokens: dict[bool, Any] = {}
    for packing in (False, True):
        packed = dataclasses.replace(options, packing=packing)
        tokens[packing] = preprocess(Task.CAUSAL_LM, rows, None, chat_tokenizer(PLAIN), packed).train
    expected = tokens[False]["input_ids"][:]
    assert len(expected) == len(CONVERSATIONS)
    forms = [
        rows,
        rows.to_iterable_dataset(),
        rows.iter(batch_size=2),
        [dict(row) for row in rows],
        tokens[False],
        tokens[True],
        tokens[True].map(lambda row: {"seq_lengths": trl_lengths(row["position_ids"])}, remove_columns="position_ids"),
    ]
    for form in forms:
        found = unpadded(load(chat_teacher, form, calibration_seq_length=24))
        assert sorted(found) == sorted(expected)
    pairs = datasets.Dataset.from_dict({"prompt": ["w1", "w2"], "completion": [" w3", " w4 w5"]})
    found = unpadded(load(chat_teacher, pairs))
    assert (
        found
        == preprocess(
            Task.CAUSAL_LM, pairs, None, chat_tokenizer(PLAIN), dataclasses.replace(options, packing=False)
        ).train["input_ids"][:]
    )


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([{"messages": []}], "empty conversation in row 0"),
        ([{"messages": CONVERSATIONS[0]}, {"messages": None}], "row 1 has None"),
        ([{"messages": CONVERSATIONS[0]}, {"messages": "w1"}], "row 1 has a value of type str"),
        ([{"messages": CONVERSATIONS[0], "prompt": "w1"}], "not those of one format"),
    ],
)
def test_conversations_of_another_form_are_an_error(chat_teacher: PreTrainedModel, rows: Any, text: str) -> None:
    with pytest.raises(OptionError, match=f"calibration_dataset.*{text}"):
        load(chat_teacher, rows)
