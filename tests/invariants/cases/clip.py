"""CLIP and SigLIP: an image tower and a text tower."""

from typing import Any

from tests.invariants.case import STREAM_RESIDUAL, TOKENS, Case
from tests.invariants.shapes import IMAGE_BIG, IMAGE_SMALL, IMAGES

CLIP_TEXT = {
    "vocab_size": TOKENS,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "layer_norm_eps": 1e-12,
}
PROJECTED = {"projection_dim": 10}


def towers(shape: dict[str, Any]) -> dict[str, Any]:
    """Return the config of two towers; that of texts is narrower and shallower than that of images."""
    text = shape | {"hidden_size": 2 * shape["hidden_size"] // 3, "num_hidden_layers": shape["num_hidden_layers"] // 2}
    return {
        "text_config": CLIP_TEXT | text | {"projection_size": shape["hidden_size"]},
        "vision_config": IMAGES | shape,
    }


CASES: list[Case] = [
    Case(
        "clip_vision_model",
        "CLIPVisionModelWithProjection",
        IMAGE_SMALL | {"projection_dim": 10},
        IMAGE_BIG | {"projection_dim": 10},
        IMAGES,
        inputs="images",
        output="image_embeds",
        residual=STREAM_RESIDUAL,
    ),
    Case(
        "clip_vision_model",
        "CLIPVisionModel",
        IMAGE_SMALL,
        IMAGE_BIG,
        IMAGES,
        "clip_vision_model-stream",
        inputs="images",
        output="last_hidden_state gram",
        residual=STREAM_RESIDUAL,
    ),
    Case(
        "siglip_vision_model",
        "SiglipVisionModel",
        IMAGE_SMALL,
        IMAGE_BIG,
        IMAGES,
        inputs="images",
        output="pooler_output gram",
    ),
    Case(
        "siglip_vision_model",
        "SiglipVisionModel",
        IMAGE_SMALL,
        IMAGE_BIG,
        IMAGES | {"vision_use_head": False},
        "siglip_vision_model-headless",
        inputs="images",
        output="last_hidden_state gram",
        residual=STREAM_RESIDUAL,
    ),
    Case(
        "clip_text_model",
        "CLIPTextModelWithProjection",
        IMAGE_SMALL | PROJECTED,
        IMAGE_BIG | PROJECTED,
        CLIP_TEXT,
        output="text_embeds",
    ),
    Case(
        "siglip_text_model",
        "SiglipTextModel",
        IMAGE_SMALL | {"projection_size": 10},
        IMAGE_BIG | {"projection_size": 10},
        CLIP_TEXT,
        output="pooler_output",
    ),
    Case(
        "clip",
        "CLIPModel",
        towers(IMAGE_SMALL),
        towers(IMAGE_BIG),
        PROJECTED,
        inputs="captions",
        output="logits_per_image",
        residual=STREAM_RESIDUAL,
    ),
    Case(
        "clip",
        "CLIPForImageClassification",
        towers(IMAGE_SMALL),
        towers(IMAGE_BIG),
        {"num_labels": 5},
        "clip-classifier",
        inputs="images",
        residual=STREAM_RESIDUAL,
    ),
    Case(
        "siglip", "SiglipModel", towers(IMAGE_SMALL), towers(IMAGE_BIG), inputs="captions", output="logits_per_image"
    ),
    Case(
        "siglip",
        "SiglipForImageClassification",
        towers(IMAGE_SMALL),
        towers(IMAGE_BIG),
        {"num_labels": 5},
        "siglip-classifier",
        inputs="images",
    ),
]
