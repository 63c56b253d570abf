"""Image models with a depth for each stage: a student of fewer blocks is its teacher without the others."""

import copy
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from hf_guide import LayoutError, OptionError, ShapeError, from_teacher
from hf_guide.initialization.blocks.stages import match_by_signature

FOUR = {"hidden_sizes": [8, 16, 16, 24]}
HEADS = {"num_attention_heads": [1, 2, 2, 4]}
SWIN = {"embed_dim": 16, "num_heads": [2, 4, 8], "image_size": 64, "patch_size": 4, "window_size": 4}


@dataclass(frozen=True)
class Hierarchy:
    """A family with stages: its config, the entry that holds the depths, and a teacher's and a student's depths."""

    model_class: str
    config: dict[str, Any]
    teacher: tuple[int, ...]
    student: tuple[int, ...]
    entry: str = "depths"

    def build(self, depths: tuple[int, ...] = ()) -> PreTrainedModel:
        model_class = getattr(transformers, self.model_class)
        torch.manual_seed(0)
        config = model_class.config_class(**self.config, **{self.entry: list(depths or self.teacher)})
        model = model_class._from_config(config, dtype=torch.float64).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model


FAMILIES = {
    "swin": Hierarchy("SwinForImageClassification", SWIN, (2, 4, 6), (1, 2, 3)),
    "swinv2": Hierarchy("Swinv2ForImageClassification", SWIN, (2, 2, 4), (2, 2, 2)),
    "donut-swin": Hierarchy("DonutSwinForImageClassification", SWIN, (2, 4, 2), (2, 2, 1)),
    "convnext": Hierarchy("ConvNextForImageClassification", FOUR, (2, 2, 6, 3), (1, 2, 3, 2)),
    "convnextv2": Hierarchy("ConvNextV2ForImageClassification", FOUR, (2, 2, 4, 3), (1, 2, 3, 2)),
    "resnet": Hierarchy("ResNetForImageClassification", {**FOUR, "embedding_size": 8}, (2, 2, 4, 3), (1, 2, 3, 2)),
    "regnet": Hierarchy(
        "RegNetForImageClassification", {**FOUR, "embedding_size": 8, "groups_width": 4}, (2, 2, 4, 3), (1, 2, 3, 2)
    ),
    "bit": Hierarchy(
        "BitForImageClassification", {**FOUR, "embedding_size": 8, "num_groups": 4}, (2, 2, 4, 3), (1, 2, 2, 2)
    ),
    "segformer": Hierarchy(
        "SegformerForImageClassification", {**FOUR, **HEADS, "decoder_hidden_size": 16}, (2, 2, 4, 3), (1, 2, 2, 2)
    ),
    "segformer's maps": Hierarchy(
        "SegformerForSemanticSegmentation", {**FOUR, **HEADS, "decoder_hidden_size": 16}, (2, 2, 3, 2), (1, 2, 2, 1)
    ),
    "pvt": Hierarchy("PvtForImageClassification", {**FOUR, **HEADS, "image_size": 64}, (2, 2, 4, 3), (1, 2, 2, 2)),
    "pvt_v2": Hierarchy(
        "PvtV2ForImageClassification", {**FOUR, **HEADS, "image_size": 64}, (2, 2, 4, 3), (1, 2, 2, 2)
    ),
    "focalnet": Hierarchy(
        "FocalNetForImageClassification", {"embed_dim": 16, "image_size": 64}, (2, 2, 4, 3), (1, 2, 2, 2)
    ),
    "poolformer": Hierarchy("PoolFormerForImageClassification", FOUR, (2, 2, 4, 3), (1, 2, 2, 2)),
    "swiftformer": Hierarchy(
        "SwiftFormerForImageClassification", {"embed_dims": [8, 16, 16, 24]}, (2, 2, 4, 3), (1, 2, 2, 2)
    ),
    "cvt": Hierarchy(
        "CvtForImageClassification", {"embed_dim": [8, 16, 16], "num_heads": [1, 2, 2]}, (1, 2, 5), (1, 2, 3), "depth"
    ),
    "levit": Hierarchy(
        "LevitForImageClassification",
        {"hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 3, 4], "key_dim": [4, 4, 4], "image_size": 64},
        (2, 2, 4),
        (1, 2, 2),
    ),
    "hiera": Hierarchy(
        "HieraForImageClassification",
        {
            "embed_dim": 16,
            "num_heads": [1, 2, 4],
            "image_size": [64, 64],
            "query_stride": [2, 2],
            "masked_unit_size": [4, 4],
            "masked_unit_attention": [True, True, False],
            "num_query_pool": 2,
        },
        (2, 2, 4),
        (1, 2, 2),
    ),
    "mobilevitv2": Hierarchy(
        "MobileViTV2ForImageClassification", {"image_size": 64}, (2, 3, 3), (1, 2, 2), "n_attn_blocks"
    ),
}


def families(quick: Collection[str]) -> list[Any]:
    return [
        pytest.param(family, id=name, marks=() if name in quick else pytest.mark.slow)
        for name, family in FAMILIES.items()
    ]


def pixels() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(5), dtype=torch.float64)}


def without_other_blocks(teacher: PreTrainedModel, selected: dict[str, list[int]]) -> PreTrainedModel:
    """Return a copy with only the selected blocks in its stages, which share the teacher's modules."""
    model = copy.deepcopy(teacher)
    for name, blocks in selected.items():
        home, _, last = f"{model.base_model_prefix}.{name}".rpartition(".")
        parent = model.get_submodule(home)
        modules = parent.get_submodule(last)
        chosen = [modules[block] for block in blocks]
        setattr(parent, last, nn.Sequential(*chosen) if isinstance(modules, nn.Sequential) else nn.ModuleList(chosen))
    return model


def stages_of(student: PreTrainedModel) -> dict[str, list[int]]:
    blocks = student.initialization_report.blocks
    return {name: selected for name, selected in blocks.items() if any(part.isdigit() for part in name.split("."))}


@pytest.mark.parametrize("method", ["guide", pytest.param("uniform", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", families(quick={"swin", "convnext", "resnet", "levit", "hiera", "pvt"}))
@torch.no_grad()
def test_a_student_of_fewer_blocks_in_each_stage_is_its_teacher_without_the_others(
    family: Hierarchy, method: str
) -> None:
    teacher = family.build()
    student = from_teacher(teacher, method=method, show_progress=False, **{family.entry: list(family.student)})
    selected = stages_of(student)
    assert getattr(student.config, family.entry) == list(family.student)
    assert student.num_parameters() < teacher.num_parameters()
    expected = without_other_blocks(teacher, selected)(**pixels()).logits
    assert torch.allclose(student(**pixels()).logits, expected, rtol=1e-9, atol=1e-9 * expected.abs().max())


@pytest.mark.parametrize("family", families(quick={"convnext"}))
@torch.no_grad()
def test_a_student_of_its_teachers_shape_is_its_teacher(family: Hierarchy) -> None:
    teacher = family.build()
    student = from_teacher(teacher, show_progress=False)
    assert torch.equal(student(**pixels()).logits, teacher(**pixels()).logits)


@torch.no_grad()
def test_the_users_own_blocks_of_a_stage_are_kept_or_raise() -> None:
    family = FAMILIES["swin"]
    teacher = family.build()
    name = "encoder.layers.2.blocks"

    def student_with(blocks: list[int]) -> PreTrainedModel:
        return from_teacher(teacher, depths=[2, 4, 2], method={"layer_selection": {name: blocks}}, show_progress=False)

    student = student_with([2, 5])
    assert student.initialization_report.blocks[name] == [2, 5]
    expected = without_other_blocks(teacher, stages_of(student))(**pixels()).logits
    assert torch.allclose(student(**pixels()).logits, expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(OptionError, match="blocks of another kind.*teacher's are ABABAB, the student's AB"):
        student_with([1, 2])
    with pytest.raises(OptionError, match=r"teacher blocks \[6\]"):
        student_with([0, 6])
    with pytest.raises(OptionError, match="names the stack 'encoder.layers.7.blocks'.*Did you mean"):
        from_teacher(teacher, method={"layer_selection": {"encoder.layers.7.blocks": [0]}}, show_progress=False)


@pytest.mark.parametrize("depths", [[2, 2, 2], [2, 4, 6]], ids=str)
def test_calibration_of_stages_is_an_error_before_data_is_read(depths: list[int]) -> None:
    with pytest.raises(LayoutError, match="follows one residual stream.*'encoder.layers' of 'swin'.*method='guide'"):
        from_teacher(
            FAMILIES["swin"].build(),
            depths=depths,
            method="calibrated",
            calibration_dataset=[pixels()],
            show_progress=False,
        )


def test_invalid_stages_are_an_error_with_the_reason() -> None:
    teacher = FAMILIES["swin"].build()
    for depths, reason in (
        ([2, 4], "must list 3 numbers, one for each stage"),
        ([2, 4, 7], "7 blocks in 'encoder.layers.2.blocks', its teacher 6"),
        ([2, 4, 700], r"depths\[2\] is 700, its teacher's 6"),
        ([2, 0, 6], r"depths\[1\] must be at least 1, not 0"),
        ([2, 4, 1.5], r"depths\[2\]=1.5 must be a whole number"),
        (3, "must list 3 numbers"),
    ):
        with pytest.raises((ShapeError, OptionError), match=reason):
            from_teacher(teacher, depths=depths, show_progress=False)
    config = copy.deepcopy(teacher.config)
    config.depths, config.num_heads = [2, 4], [2, 4]
    with pytest.raises(ShapeError):
        from_teacher(teacher, config, show_progress=False)


def test_blocks_are_selected_by_kind_in_their_order_and_near_the_ideal() -> None:
    assert match_by_signature("ABABAB", "AB", [0, 5]) == [0, 5]
    assert match_by_signature("ABABAB", "ABA", [0, 1, 5]) == [0, 1, 4]
    assert match_by_signature("ABABAB", "AA", [0, 5]) == [0, 4]
    assert match_by_signature("ABB", "BA", [0, 1]) is None
    assert match_by_signature("AAAA", "AAAA", [0, 1, 2, 3]) == [0, 1, 2, 3]
