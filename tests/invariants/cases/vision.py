"""Image encoders."""

from typing import Any

from transformers import PreTrainedModel

from tests.invariants.case import STREAM_RESIDUAL, Case
from tests.invariants.shapes import IMAGE_BIG, IMAGE_SMALL, IMAGES

DINO_SMALL = {"hidden_size": 24, "mlp_ratio": 1, "num_hidden_layers": 2, "num_attention_heads": 4}
DINO_BIG = {"hidden_size": 48, "mlp_ratio": 2, "num_hidden_layers": 4, "num_attention_heads": 8}
MAE_SMALL = {"decoder_hidden_size": 12, "decoder_intermediate_size": 10, "decoder_num_attention_heads": 2}
MAE_SMALL |= {"decoder_num_hidden_layers": 1}
MAE_BIG = {"decoder_hidden_size": 24, "decoder_intermediate_size": 20, "decoder_num_attention_heads": 4}
MAE_BIG |= {"decoder_num_hidden_layers": 3}


def settle_batch_norm(model: PreTrainedModel) -> None:
    """Make the variance of the decoder's batch norm positive."""
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.abs_().add_(0.5)


def segformers() -> list[Case]:
    """Return cases with and without reductions; where there is one, a norm over selected channels is in no wider model."""
    small = {"hidden_sizes": [8, 12, 16, 24], "num_attention_heads": [2, 2, 4, 4], "decoder_hidden_size": 10}
    big = {"hidden_sizes": [16, 24, 32, 48], "num_attention_heads": [4, 4, 8, 8], "decoder_hidden_size": 20}
    both = {"depths": [1, 1, 1, 1], "mlp_ratios": [2, 2, 2, 2], "num_labels": 5}
    inexact: dict[str, Any] = {"inputs": "large images", "residual": STREAM_RESIDUAL, "settle": settle_batch_norm}
    segmentation, classification = "SegformerForSemanticSegmentation", "SegformerForImageClassification"
    plain, other = both | {"sr_ratios": [1, 1, 1, 1]}, both | {"sr_ratios": [1, 4, 1, 2]}
    return [
        # Its norms' epsilon is fixed, and weighs more in a narrow model.
        Case("segformer", segmentation, small, big, plain, "segformer-unreduced", lift=1e-3, **inexact),
        Case("segformer", segmentation, small, big, both, lift=None, **inexact),
        Case("segformer", classification, small, big, other, "segformer-classifier", lift=None, **inexact),
    ]


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
    Case(
        "vit",
        "ViTForMaskedImageModeling",
        IMAGE_SMALL,
        IMAGE_BIG,
        IMAGES,
        "vit-masked",
        inputs="images",
        output="reconstruction",
    ),
    Case(
        "yolos",
        "YolosForObjectDetection",
        IMAGE_SMALL,
        IMAGE_BIG,
        IMAGES | {"image_size": [12, 12], "num_detection_tokens": 3, "use_mid_position_embeddings": False},
        inputs="images",
    ),
    # What is added between two blocks is in no wider, deeper model of the same function.
    Case(
        "yolos",
        "YolosForObjectDetection",
        IMAGE_SMALL,
        IMAGE_BIG,
        IMAGES | {"image_size": [12, 12], "num_detection_tokens": 3},
        "yolos-mid-positions",
        inputs="images",
        output="pred_boxes",
        lift=None,
    ),
    Case(
        "vit_mae",
        "ViTMAEForPreTraining",
        IMAGE_SMALL | MAE_SMALL,
        IMAGE_BIG | MAE_BIG,
        IMAGES,
        inputs="images with noise",
    ),
    *segformers(),
]
