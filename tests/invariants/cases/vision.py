"""Vision."""

from typing import Any

from tests.invariants.case import STREAM_RESIDUAL, TOKENS, Case

SMALL = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4}
BIG = {"hidden_size": 48, "intermediate_size": 60, "num_hidden_layers": 4, "num_attention_heads": 8}
IMAGES = {"image_size": 12, "patch_size": 4, "layer_norm_eps": 1e-12, "num_labels": 5}
DINO_SMALL = {"hidden_size": 24, "mlp_ratio": 1, "num_hidden_layers": 2, "num_attention_heads": 4}
DINO_BIG = {"hidden_size": 48, "mlp_ratio": 2, "num_hidden_layers": 4, "num_attention_heads": 8}
TEXT = {
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
    return {"text_config": TEXT | text | {"projection_size": shape["hidden_size"]}, "vision_config": IMAGES | shape}


CASES: list[Case] = [
    Case("vit", "ViTForImageClassification", SMALL, BIG, IMAGES, inputs="images"),
    Case(
        "vit",
        "ViTModel",
        SMALL | {"pooler_output_size": 10},
        BIG | {"pooler_output_size": 10},
        IMAGES,
        "vit-pooled",
        inputs="images",
        output="pooler_output",
        residual=STREAM_RESIDUAL,
    ),
    Case("deit", "DeiTForImageClassificationWithTeacher", SMALL, BIG, IMAGES | {"qkv_bias": False}, inputs="images"),
    Case("dinov2", "Dinov2ForImageClassification", DINO_SMALL, DINO_BIG, IMAGES, inputs="images"),
    Case(
        "dinov2",
        "Dinov2ForImageClassification",
        DINO_SMALL,
        DINO_BIG,
        IMAGES | {"use_swiglu_ffn": True},
        "dinov2-swiglu",
        inputs="images",
    ),
    Case(
        "dinov2_with_registers",
        "Dinov2WithRegistersForImageClassification",
        DINO_SMALL,
        DINO_BIG,
        IMAGES,
        inputs="images",
    ),
    Case(
        "beit",
        "BeitForImageClassification",
        SMALL,
        BIG,
        IMAGES | {"use_relative_position_bias": True, "use_absolute_position_embeddings": True},
        inputs="images",
    ),
    Case(
        "beit",
        "BeitForImageClassification",
        SMALL,
        BIG,
        IMAGES | {"use_shared_relative_position_bias": True, "use_mean_pooling": False, "layer_scale_init_value": 0.0},
        "beit-first-token",
        inputs="images",
    ),
    Case(
        "clip_vision_model",
        "CLIPVisionModelWithProjection",
        SMALL | {"projection_dim": 10},
        BIG | {"projection_dim": 10},
        IMAGES,
        inputs="images",
        output="image_embeds",
        residual=STREAM_RESIDUAL,
    ),
    Case(
        "clip_vision_model",
        "CLIPVisionModel",
        SMALL,
        BIG,
        IMAGES,
        "clip_vision_model-stream",
        inputs="images",
        output="last_hidden_state gram",
        residual=STREAM_RESIDUAL,
    ),
    Case("siglip_vision_model", "SiglipVisionModel", SMALL, BIG, IMAGES, inputs="images", output="pooler_output gram"),
    Case(
        "siglip_vision_model",
        "SiglipVisionModel",
        SMALL,
        BIG,
        IMAGES | {"vision_use_head": False},
        "siglip_vision_model-headless",
        inputs="images",
        output="last_hidden_state gram",
        residual=STREAM_RESIDUAL,
    ),
    Case("vit_msn", "ViTMSNForImageClassification", SMALL, BIG, IMAGES, inputs="images"),
    Case("ijepa", "IJepaForImageClassification", SMALL, BIG, IMAGES, inputs="images"),
    Case(
        "clip_text_model",
        "CLIPTextModelWithProjection",
        SMALL | PROJECTED,
        BIG | PROJECTED,
        TEXT,
        output="text_embeds",
    ),
    Case(
        "siglip_text_model",
        "SiglipTextModel",
        SMALL | {"projection_size": 10},
        BIG | {"projection_size": 10},
        TEXT,
        output="pooler_output",
    ),
    Case(
        "clip",
        "CLIPModel",
        towers(SMALL),
        towers(BIG),
        PROJECTED,
        inputs="captions",
        output="logits_per_image",
        residual=STREAM_RESIDUAL,
    ),
    Case(
        "clip",
        "CLIPForImageClassification",
        towers(SMALL),
        towers(BIG),
        {"num_labels": 5},
        "clip-classifier",
        inputs="images",
        residual=STREAM_RESIDUAL,
    ),
    Case("siglip", "SiglipModel", towers(SMALL), towers(BIG), inputs="captions", output="logits_per_image"),
    Case(
        "siglip",
        "SiglipForImageClassification",
        towers(SMALL),
        towers(BIG),
        {"num_labels": 5},
        "siglip-classifier",
        inputs="images",
    ),
]
