"""Whether a family keeps the texts of packed rows apart is found by running it, and one that does not is an error."""

import logging
from typing import Any

import pytest
import torch
import transformers
from transformers.utils import logging as transformers_logging

from hf_guide.errors import OptionError
from hf_guide.models.packed_rows import check_keeps_packed_texts_apart, check_packed_rows, packed_padding_mask
from tests.tiny import KINDS

APART = ["Llama", "GPT2", "GPTNeoX", "Mixtral"]
MIXING = {"Bloom": "takes no position_ids", "Mamba": "takes no position_ids", "OPT": "depends on those before it"}


@pytest.mark.parametrize("family", [*APART, *MIXING])
def test_families_that_mix_texts_are_an_error(family: str) -> None:
    config = getattr(transformers, f"{family}Config")()
    if family in APART:
        check_keeps_packed_texts_apart(config, "student")
        return
    with pytest.raises(OptionError, match=f"given to the student, of type .*{MIXING[family]}.*packing to false"):
        check_keeps_packed_texts_apart(config, "student")


def batch(**more: Any) -> dict[str, Any]:
    return {
        "input_ids": torch.full((2, 5), 9),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]),
    } | more


def test_what_fills_rows_up_is_padding() -> None:
    expected = [[True] * 5, [True, True, False, False, False]]
    mask = packed_padding_mask(batch())
    assert mask is not None and mask.tolist() == expected
    assert packed_padding_mask(batch(attention_mask=torch.ones(2, 5))) is None
    assert packed_padding_mask({"input_ids": torch.ones(2, 5)}) is None


def test_packed_batches_are_checked_for_the_model_that_reads_them(caplog: pytest.LogCaptureFixture) -> None:
    teacher = KINDS["llama"].teacher()
    teacher.config.use_cache = True
    check_packed_rows(teacher, batch(), "teacher")  # its forward is called without a cache
    with pytest.raises(OptionError, match="use_cache=True"):
        check_packed_rows(teacher, batch(), "student")
    check_packed_rows(teacher, {"input_ids": torch.ones(2, 5)}, "student")
    check_packed_rows(teacher, {"position_ids": torch.arange(5).expand(2, 5)}, "student")
    teacher.config._attn_implementation = "flash_attention_2"
    with pytest.raises(OptionError, match="batches of one row only; the batch has 2"):
        check_packed_rows(same_attention(teacher), batch(), "teacher")
    check_packed_rows(same_attention(teacher), {name: value[:1] for name, value in batch().items()}, "teacher")


def same_attention(model: Any) -> Any:
    other = KINDS["llama"].teacher()
    other.config._attn_implementation = model.config._attn_implementation
    return other


def test_a_mask_that_lets_texts_mix_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    teacher = KINDS["llama"].teacher()
    transformers_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            check_packed_rows(
                teacher, batch(attention_mask=torch.tensor([[0] * 3 + [1] * 2, [1, 1, 0, 0, 0]])), "student"
            )
            assert not caplog.records  # each has one text
            for _ in range(2):
                check_packed_rows(teacher, batch(attention_mask=torch.ones(2, 5)), "student")
    finally:
        transformers_logging.disable_propagation()
    assert [record.message for record in caplog.records if "attend to those before it" in record.message] != []
    assert len(caplog.records) == 1
