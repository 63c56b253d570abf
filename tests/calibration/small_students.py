"""Calibration data and calibrated students that several tests make."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_guide import from_teacher
from tests.invariants.case import INPUTS, Case
from tests.tiny import Kind, inputs

BART = Kind(
    "BartForConditionalGeneration",
    "AutoModelForSeq2SeqLM",
    {
        "vocab_size": 96,
        "d_model": 48,
        "max_position_embeddings": 32,
        "encoder_layers": 3,
        "decoder_layers": 3,
        **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
        **{f"{side}_ffn_dim": 64 for side in ("encoder", "decoder")},
    },
    {"d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40},
    "pairs",
)

SMALLER = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "head_dim": 12}


def token_batches(count: int = 8, rows: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(3, 96, (rows, 9), generator=generator)} for _ in range(count)]


SHALLOWER = {"intermediate_size": 40, "num_hidden_layers": 2}
"""A Llama's student of the teacher's width, for which sets of blocks are compared."""


def make_student(
    teacher: Any, dataset: Any = None, folder: Any = None, shape: Mapping[str, int] = SMALLER, **method: Any
) -> Any:
    return from_teacher(
        teacher,
        method={"method": "calibrated", **method},
        calibration_dataset=token_batches() if dataset is None else dataset,
        calibration_cache_dir=folder,
        show_progress=False,
        **shape,
    )


def kind_batches(kind: Kind) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(9)
    return [
        {
            name: torch.randn(value.shape, generator=generator)
            if value.is_floating_point()
            else torch.randint(3, 96, value.shape, generator=generator)
            for name, value in inputs(kind).items()
        }
        for _ in range(5)
    ]


def case_batches(case: Case, batches: int = 6) -> list[dict[str, Tensor]]:
    """Return batches like the one on which the laws are checked, none of them that one."""
    generator = torch.Generator().manual_seed(11)
    batches_of_case = []
    for _ in range(batches):
        batches_of_case.append(
            {
                name: torch.randint(3, 60, (4, *value.shape[1:]), generator=generator)
                if value.dtype == torch.long
                else torch.randn(4, *value.shape[1:], generator=generator, dtype=value.dtype)
                for name, value in INPUTS[case.inputs]().items()
            }
        )
    return batches_of_case
