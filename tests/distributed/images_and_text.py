"""A teacher whose blocks of text differ with images and without, and batches of both; a script for torchrun as well."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from hf_guide import from_teacher


def image_teacher() -> PreTrainedModel:
    """Return a Qwen3-VL, which adds features of images to the hidden states between its first blocks of text."""
    text = {
        "vocab_size": 96,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 64,
        "rope_scaling": {"rope_type": "default", "mrope_section": [2, 2, 2], "mrope_interleaved": True},
    }
    vision = {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 48,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1, 2],
    }
    tokens = {"image_token_id": 4, "video_token_id": 3, "vision_start_token_id": 2, "vision_end_token_id": 1}
    torch.manual_seed(0)
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **tokens)
    model = Qwen3VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_((0.5 if "deepstack_merger" in name else 0.1) * torch.randn_like(parameter))
    return model


def image_batches(count: int) -> list[dict[str, Tensor]]:
    """Return so many batches, the first of text alone, the others with an image in each row."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for index in range(count):
        ids = torch.randint(5, 90, (2, 20), generator=generator)
        images = {}
        if index:
            ids[:, 3], ids[:, 4:8] = 2, 4
            images = {"pixel_values": torch.randn(32, 96, generator=generator)}
            images["image_grid_thw"] = torch.tensor([[1, 4, 4]] * 2)
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), **images})
        batches[-1]["mm_token_type_ids"] = (ids == 4).int()
    return batches


def text_influence(batches: list[dict[str, Tensor]], layer_selection: str = "block_influence") -> list[float]:
    """Return the influence of the teacher's blocks of text on batches, as the report of a student states it."""
    student = from_teacher(
        image_teacher(),
        method={"method": "calibrated", "layer_selection": layer_selection},
        calibration_dataset=batches,
        show_progress=False,
        text_config={"num_hidden_layers": 4},
    )
    return student.initialization_report.calibration["block_influence"]["language_model.layers"]


if __name__ == "__main__":
    dist.init_process_group("gloo")
    arguments = json.loads(sys.argv[1])
    influence = text_influence(image_batches(arguments["batches"]), arguments["layer_selection"])
    if dist.get_rank() == 0:
        Path(arguments["output"]).write_text(json.dumps({"world_size": dist.get_world_size(), "influence": influence}))
    dist.destroy_process_group()
