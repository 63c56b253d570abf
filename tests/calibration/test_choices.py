"""A multiple choice model is calibrated on texts, and on the choices that it is trained on."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertForMultipleChoice

from hf_guide import InitializationConfig, from_teacher


def text(start: int) -> list[int]:
    return [(start + 7 * position) % 50 for position in range(12)]


@pytest.mark.parametrize(
    "rows",
    [[text(row) for row in range(48)], [[text(row + each) for each in range(4)] for row in range(12)]],
    ids=["texts", "choices"],
)
def test_choices_are_calibrated(rows: list[Any]) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    teacher = BertForMultipleChoice(BertConfig(vocab_size=50, max_position_embeddings=16, **sizes)).eval()
    student = from_teacher(
        teacher,
        method=InitializationConfig("calibrated", calibration_tokens=512),
        calibration_dataset=Dataset.from_dict({"input_ids": rows}),
        show_progress=False,
        hidden_size=16,
        num_hidden_layers=1,
        intermediate_size=32,
    )
    assert type(student) is BertForMultipleChoice and not student.initialization_report.randomly_initialized
    with torch.no_grad():
        assert student(torch.tensor([[text(0), text(1), text(2)]])).logits.shape == (1, 3)
