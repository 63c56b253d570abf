"""Vision."""

from tests.invariants.case import STREAM_RESIDUAL, Case

SMALL = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4}
BIG = {"hidden_size": 48, "intermediate_size": 60, "num_hidden_layers": 4, "num_attention_heads": 8}
IMAGES = {"image_size": 12, "patch_size": 4, "layer_norm_eps": 1e-12, "num_labels": 5}
DINO_SMALL = {"hidden_size": 24, "mlp_ratio": 1, "num_hidden_layers": 2, "num_attention_heads": 4}
DINO_BIG = {"hidden_size": 48, "mlp_ratio": 2, "num_hidden_layers": 4, "num_attention_heads": 8}

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
]
