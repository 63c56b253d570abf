"""The arms of `initialization_comparison.py`: how each of them makes a smaller Llama out of a teacher."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blockwise_distillation import distill_blockwise, projection_matrix
from published_methods import pruned_as_minitron, subcloned, with_blocks
from small_teacher import BATCH
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_guide import AutoStudentForCausalLM, register_method
from hf_guide.initialization.transfer import Transfer
from hf_guide.methods import CalibratedConfig, CalibratedMethod, StudentSetup

SHAPES: dict[str, dict[str, int]] = {
    "half width": {"hidden_size": 2, "intermediate_size": 2, "num_attention_heads": 2, "num_key_value_heads": 2},
    "half width, half depth": {
        "hidden_size": 2,
        "intermediate_size": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
    },
}


def sizes_of(shape: str, teacher: LlamaConfig) -> dict[str, int]:
    """Return what a shape changes of a teacher's config."""
    return {name: getattr(teacher, name) // part for name, part in SHAPES[shape].items()}


@dataclass(frozen=True)
class ArmInputs:
    """What every arm is made of: the teacher and its folder, the student's sizes, a seed, and text, (blocks, LENGTH).

    `sizes` is what the student's config changes; `text` may be used for calibration; `spent` is the share of the budget of
    tokens that the initialization itself trains on.
    """

    folder: Path
    teacher: LlamaForCausalLM
    sizes: dict[str, int]
    seed: int
    text: Tensor
    spent: Tensor

    @property
    def batches(self) -> list[Tensor]:
        """The text in batches."""
        return list(self.text.split(BATCH))

    @property
    def config(self) -> LlamaConfig:
        """The student's config."""
        return LlamaConfig.from_dict(self.teacher.config.to_dict() | self.sizes)


def by(method: dict[str, Any], self_generated: bool = False) -> Callable[[ArmInputs], PreTrainedModel]:
    """Return the arm of a method of hf_guide; `calibrated` uses the text, or text that the teacher generates."""

    def make(inputs: ArmInputs) -> PreTrainedModel:
        more: dict[str, Any] = {}
        if method["method"] == "calibrated":
            batches = [{"input_ids": batch} for batch in inputs.text.split(8)]
            more["calibration_dataset"] = "self_generated" if self_generated else batches
        return AutoStudentForCausalLM.from_teacher(
            inputs.teacher if inputs.teacher.device.type == "cuda" else inputs.folder,
            method=method | {"seed": inputs.seed},
            dtype=torch.float32,
            show_progress=False,
            **more,
            **inputs.sizes,
        )

    return make


def dropped(first: bool) -> Callable[[ArmInputs], PreTrainedModel]:
    """Return the arm of blocks dropped at full width: as many as match the student's number of parameters, or all but one."""

    def make(inputs: ArmInputs) -> PreTrainedModel:
        target_size = LlamaForCausalLM(inputs.config).num_parameters()
        each = sum(parameter.numel() for parameter in inputs.teacher.model.layers[0].parameters())
        rest = inputs.teacher.num_parameters() - each * inputs.teacher.config.num_hidden_layers
        num_blocks = inputs.teacher.config.num_hidden_layers
        count = min(max(1, round((target_size - rest) / each)), num_blocks - 1)
        return with_blocks(
            inputs.teacher,
            list(range(count)) if first else [round(position) for position in _spaced(num_blocks, count)],
        )

    return make


def _spaced(num_blocks: int, count: int) -> list[float]:
    return torch.linspace(0, num_blocks - 1, count).tolist()


NOTHING_FITTED = {"refit": "none", "fit_logit_scale": False}


@dataclass
class BasisOnlyConfig(CalibratedConfig):
    """Options of an ablation of calibrated."""

    method: str = "calibrated_basis_only"


class BasisOnly(CalibratedMethod):
    """calibrated, in which heads, neurons and experts are selected evenly, and heads are truncated without a rotation."""

    def _select_units(self, transfer: Transfer, setup: StudentSetup) -> None:
        pass


register_method("calibrated_basis_only", BasisOnlyConfig, BasisOnly)


def blockwise(inputs: ArmInputs) -> PreTrainedModel:
    """Return the arm of a calibrated student whose blocks are then regressed on the teacher's hidden states."""
    projected = by({"method": "calibrated", "refit": "none"})(inputs)
    student = by({"method": "calibrated"})(inputs)
    layers = student.initialization_report.blocks["layers"]
    matrix = projection_matrix(inputs.teacher, projected)
    distill_blockwise(student, inputs.teacher, matrix, layers, list(inputs.spent.split(BATCH)))
    return student


ARMS: dict[str, Callable[[ArmInputs], PreTrainedModel]] = {
    "random": by({"method": "random"}),
    "uniform": by({"method": "uniform", "layer_selection": "uniform"}),
    "subcloning": lambda inputs: subcloned(inputs.teacher, inputs.config, inputs.batches),
    "minitron": lambda inputs: pruned_as_minitron(inputs.teacher, inputs.config, inputs.batches),
    "first blocks, full width": dropped(first=True),
    "uniform blocks, full width": dropped(first=False),
    "activation PCA": by({"method": "calibrated_basis_only", "layer_selection": "uniform"} | NOTHING_FITTED),
    "calibrated, no fitting": by({"method": "calibrated"} | NOTHING_FITTED),
    "guide": by({"method": "guide", "layer_selection": "uniform"}),
    "guide, subsequent layers uniform": by(
        {"method": "guide", "layer_selection": "uniform", "subsequent_layers": "uniform"}
    ),
    "guide, subsequent layers random": by(
        {"method": "guide", "layer_selection": "uniform", "subsequent_layers": "random"}
    ),
    "calibrated": by({"method": "calibrated", "calibration_tokens": 16384}),
    "calibrated, 8,192 tokens": by({"method": "calibrated", "calibration_tokens": 8192}),
    "calibrated, 4,096 tokens": by({"method": "calibrated", "calibration_tokens": 4096}),
    "calibrated, 2,048 tokens": by({"method": "calibrated", "calibration_tokens": 2048}),
    "calibrated, self-generated text": by(
        {
            "method": "calibrated",
            "calibration_tokens": 8192,
            "calibration_seq_length": 128,
            "calibration_batch_size": 16,
        },
        self_generated=True,
    ),
    "calibrated, uniform blocks": by(
        {"method": "calibrated", "calibration_tokens": 16384, "layer_selection": "uniform"}
    ),
    "guide, first and last blocks": by({"method": "guide", "layer_selection": "first_last"}),
    "guide, first and last blocks, logit_scale 0.36": by(
        {"method": "guide", "layer_selection": "first_last", "logit_scale": 0.358797}
    ),
    "uniform, first and last blocks": by({"method": "uniform", "layer_selection": "first_last"}),
    "blockwise distillation": blockwise,
}
SPENT = {"blockwise distillation": 0.1}  # of the budget of tokens
