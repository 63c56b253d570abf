"""Image encoders."""

from tests.invariants.case import STREAM_RESIDUAL, Case
from tests.invariants.shapes import IMAGE_BIG, IMAGE_SMALL, IMAGES

DINO_SMALL = {"hidden_size": 24, "mlp_ratio": 1, "num_hidden_layers": 2, "num_attention_heads": 4}
DINO_BIG = {"hidden_size": 48, "mlp_ratio": 2, "num_hidden_layers": 4, "num_attention_heads": 8}
CASES: list[Case] = [
    Case("vit", "ViTForImageClassification", IMAGE_SMALL, IMAGE_BIG, IMAGES, inputs="images"),
    Case(
        "vit",
        "ViTModel",
        IMAGE_SMALL | {"pooler_output_size": 10},
        IMAGE_BIG | {"pooler_output_size": 10},
        IMAGES,
        "vit-pooled",
        inputs="images",
        output="pooler_output",
        residual=STREAM_RESIDUAL,
    ),
    Case("vit_msn", "ViTMSNForImageClassification", IMAGE_SMALL, IMAGE_BIG, IMAGES, inputs="images"),
    Case("ijepa", "IJepaForImageClassification", IMAGE_SMALL, IMAGE_BIG, IMAGES, inputs="images"),
    Case(
        "deit",
        "DeiTForImageClassificationWithTeacher",
        IMAGE_SMALL,
        IMAGE_BIG,
        IMAGES | {"qkv_bias": False},
        inputs="images",
    ),
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
        IMAGE_SMALL,
        IMAGE_BIG,
        IMAGES | {"use_relative_position_bias": True, "use_absolute_position_embeddings": True},
        inputs="images",
    ),
    Case(
        "beit",
        "BeitForImageClassification",
        IMAGE_SMALL,
        IMAGE_BIG,
        IMAGES | {"use_shared_relative_position_bias": True, "use_mean_pooling": False, "layer_scale_init_value": 0.0},
        "beit-first-token",
        inputs="images",
    ),
]
