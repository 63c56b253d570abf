"""Vision models as Transformers' example scripts train them: real processors, their collators, and a student that loads stock.

Families are distilled for two steps; all students are then loaded by the snippets of their cards in one fresh process.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from PIL import Image
from transformers import DetrConfig, PreTrainedModel, SwinConfig

from hf_guide import DistillationArguments, DistillationTrainer
from tests.examples.local import tokenizer
from tests.tiny import run_python

SIDE = 32
SIZE = {"height": SIDE, "width": SIDE}
LABELS = {"id2label": {0: "none", 1: "one", 2: "two"}, "label2id": {"none": 0, "one": 1, "two": 2}}
BODY = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
VISION = BODY | {"image_size": SIDE, "patch_size": 8}
STAGES = ["stage1", "stage2", "stage3", "stage4"]
SWIN = SwinConfig(
    out_features=STAGES, image_size=SIDE, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4
)
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]}
RESNET |= {"out_features": ["stage2"]}
DECODER = {"d_model": 32, "decoder_layers": 3, "decoder_ffn_dim": 24, "decoder_attention_heads": 2, "num_queries": 4}
DETR = DECODER | {"encoder_layers": 2, "encoder_ffn_dim": 24, "encoder_attention_heads": 2}


def pictures(count: int = 6) -> list[tuple[Image.Image, np.ndarray]]:
    """Return images, each with a rectangle of one of two classes, and their maps of classes."""
    draw = np.random.default_rng(0)
    found = []
    for number in range(count):
        classes = np.zeros((40, 48), dtype=np.uint8)
        top, left = draw.integers(0, 20, 2)
        classes[top : top + 16, left : left + 20] = 1 + number % 2
        pixels = draw.integers(0, 80, (40, 48, 3)) + 80 * classes[..., None]
        found.append((Image.fromarray(pixels.astype(np.uint8)), classes))
    return found


def box_of(classes: np.ndarray) -> list[int]:
    """Return the left, top, width and height of what is not background."""
    rows, columns = np.nonzero(classes.any(1))[0], np.nonzero(classes.any(0))[0]
    return [int(columns[0]), int(rows[0]), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1]


def segmentation(processor: Any) -> list[dict[str, Any]]:
    images, maps = zip(*pictures(), strict=True)
    encoded = processor(list(images), segmentation_maps=list(maps), return_tensors="pt")
    return [dict(zip(("pixel_values", "labels"), row, strict=True)) for row in zip(*encoded.values(), strict=True)]


def detection(processor: Any) -> list[dict[str, Any]]:
    rows = []
    for number, (image, classes) in enumerate(pictures()):
        box = box_of(classes)
        thing = {"bbox": box, "category_id": int(classes.max()), "area": box[2] * box[3], "iscrowd": 0}
        encoded = processor(image, annotations={"image_id": number, "annotations": [thing]}, return_tensors="pt")
        rows.append({"pixel_values": encoded["pixel_values"][0], "labels": encoded["labels"][0]})
    return rows


def instances(processor: Any) -> list[dict[str, Any]]:
    rows = []
    for image, classes in pictures():
        encoded = processor(image, segmentation_maps=classes, return_tensors="pt")
        rows.append({name: value[0] for name, value in encoded.items()})
    return rows


def captions(processor: Any) -> list[dict[str, Any]]:
    images = [image for image, _ in pictures()]
    texts = ["Nobody loves the sea.", "A student mocks long books."] * 3
    encoded = processor(text=texts, images=images, padding="max_length", max_length=24, return_tensors="pt")
    return [dict(zip(encoded, row, strict=True)) for row in zip(*encoded.values(), strict=True)]


def plain(processor: Any) -> list[dict[str, Any]]:
    return [
        {"pixel_values": each} for each in processor([i for i, _ in pictures()], return_tensors="pt")["pixel_values"]
    ]


def masked(processor: Any) -> list[dict[str, Any]]:
    mask = torch.arange(16) % 2 == 0
    return [each | {"bool_masked_pos": mask} for each in plain(processor)]


def stack(examples: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: torch.stack([torch.as_tensor(each[name]) for each in examples]) for name in examples[0]}


def collate_pairs(examples: list[dict[str, Any]]) -> dict[str, Any]:
    return stack(examples) | {"return_loss": True}


def collate_objects(examples: list[dict[str, Any]]) -> dict[str, Any]:
    pixels = torch.stack([each["pixel_values"] for each in examples])
    return {"pixel_values": pixels, "labels": [dict(each["labels"]) for each in examples]}


def collate_instances(examples: list[dict[str, Any]]) -> dict[str, Any]:
    batch = stack([{name: each[name] for name in ("pixel_values", "pixel_mask")} for each in examples])
    return batch | {name: [each[name] for each in examples] for name in ("mask_labels", "class_labels")}


@dataclass(frozen=True)
class Family:
    """A teacher's class and config, its processor, what its student overrides, and its data."""

    model_class: str
    config: dict[str, Any]
    processor: Callable[[], Any]
    smaller: dict[str, Any]
    data: Callable[[Any], list[dict[str, Any]]]
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]] = stack
    losses: dict[str, float] = field(default_factory=lambda: {"ce": 0.5, "kd": 0.5})
    tag: str = "image-segmentation"


def _images(**options: Any) -> Any:
    return transformers.ViTImageProcessorPil(size=SIZE, **options)


def _pairs(images: Any, processor_class: Any) -> Any:
    return processor_class(images, tokenizer())


FAMILIES = {
    "segformer": Family(
        "SegformerForSemanticSegmentation",
        {"hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 1, 2, 2], "decoder_hidden_size": 16} | LABELS,
        lambda: transformers.SegformerImageProcessorPil(size=SIZE),
        {"hidden_sizes": [4, 4, 8, 8], "depths": [1, 1, 1, 1]},
        segmentation,
    ),
    "yolos": Family(
        "YolosForObjectDetection",
        VISION | LABELS | {"image_size": [SIDE, SIDE], "num_detection_tokens": 4},
        lambda: transformers.YolosImageProcessorPil(size=SIZE, do_pad=False),
        {"hidden_size": 8, "num_hidden_layers": 2},
        detection,
        collate_objects,
        {"ce": 0.5, "kd": 0.3, "boxes": 0.2},
        "object-detection",
    ),
    "detr": Family(
        "DetrForObjectDetection",
        DETR | LABELS | {"backbone_config": RESNET},
        lambda: transformers.DetrImageProcessorPil(size=SIZE, do_pad=False),
        {"decoder_layers": 2},
        detection,
        collate_objects,
        {"ce": 0.5, "kd": 0.3, "boxes": 0.2},
        "object-detection",
    ),
    "maskformer": Family(
        "MaskFormerForInstanceSegmentation",
        {"backbone_config": SWIN, "decoder_config": DetrConfig(**DECODER), "fpn_feature_size": 32}
        | LABELS
        | {"mask_feature_size": 32},
        lambda: transformers.MaskFormerImageProcessorPil(size=SIZE, num_labels=3),
        {"decoder_config": {"decoder_layers": 2}},
        instances,
        collate_instances,
    ),
    "mask2former": Family(
        "Mask2FormerForUniversalSegmentation",
        {"backbone_config": SWIN, "feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_layers": 1}
        | {"decoder_layers": 4, "num_attention_heads": 2, "num_queries": 4, "dim_feedforward": 24}
        | LABELS,
        lambda: transformers.Mask2FormerImageProcessorPil(size=SIZE, num_labels=3),
        {"decoder_layers": 3},
        instances,
        collate_instances,
    ),
    "clip": Family(
        "CLIPModel",
        {"text_config": BODY | {"vocab_size": 200, "eos_token_id": 2}, "vision_config": VISION, "projection_dim": 8},
        lambda: _pairs(transformers.CLIPImageProcessorPil(size=SIZE, crop_size=SIZE), transformers.CLIPProcessor),
        {"vision_config": {"num_hidden_layers": 2}, "text_config": {"hidden_size": 8}},
        captions,
        collate_pairs,
        tag="zero-shot-image-classification",
    ),
    "siglip": Family(
        "SiglipModel",
        {"text_config": BODY | {"vocab_size": 200, "projection_size": 16}, "vision_config": VISION},
        lambda: _pairs(transformers.SiglipImageProcessorPil(size=SIZE), transformers.SiglipProcessor),
        {"vision_config": {"num_hidden_layers": 2}},
        captions,
        collate_pairs,
        tag="zero-shot-image-classification",
    ),
    "vit_mae": Family(
        "ViTMAEForPreTraining",
        VISION | {"decoder_hidden_size": 8, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2},
        _images,
        {"hidden_size": 8, "num_hidden_layers": 2},
        plain,
        tag="image-feature-extraction",
    ),
    "masked images": Family(
        "ViTForMaskedImageModeling",
        VISION | {"encoder_stride": 8},
        _images,
        {"hidden_size": 8, "num_hidden_layers": 2},
        masked,
        tag="image-feature-extraction",
    ),
}


def build(family: Family, **changes: Any) -> PreTrainedModel:
    """Return a tiny model of a family."""
    model_class = getattr(transformers, family.model_class)
    return model_class(model_class.config_class(**{**family.config, **changes}))


def quiet_arguments(output: Path, **options: Any) -> DistillationArguments:
    """Return arguments of a run on the CPU that logs every step, and saves and reports nothing."""
    return DistillationArguments(
        str(output),
        per_device_train_batch_size=3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        **options,
    )


@pytest.fixture(scope="module")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return what gives the folder of a family's student after two steps; each is made once."""
    root = tmp_path_factory.mktemp("vision")

    @functools.cache
    def folder(name: str) -> Path:
        distil(FAMILIES[name], root / f"{name} teacher", root / name)
        return root / name

    return folder


def distil(family: Family, teacher: Path, output: Path) -> None:
    """Distil a family's tiny teacher for two steps; save both, the student's card and what was logged."""
    torch.manual_seed(0)
    build(family).save_pretrained(teacher)
    processor = family.processor()
    processor.save_pretrained(teacher)
    data = family.data(processor)
    trainer = DistillationTrainer(
        {**family.smaller},
        teacher=str(teacher),
        args=quiet_arguments(output, losses=family.losses, max_steps=2, per_device_eval_batch_size=3),
        train_dataset=data,
        eval_dataset=data[:3],
        processing_class=processor,
        data_collator=family.collate,
    )
    trainer.train()
    measured = trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card()
    (output / "measured.json").write_text(json.dumps({"eval": measured, "log": trainer.state.log_history}))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_losses_are_logged_and_finite(name: str, student_folder: Callable[[str], Path]) -> None:
    saved = json.loads((student_folder(name) / "measured.json").read_text())
    logged = [entry for entry in saved["log"] if "loss" in entry]
    assert len(logged) == 2
    for loss in FAMILIES[name].losses:
        assert all(np.isfinite(entry[loss]) and entry[loss] >= 0 for entry in logged), loss
        assert np.isfinite(saved["eval"][f"eval_{loss}"])
    assert logged[0]["kd"] > 0, "a smaller student's outputs are not its teacher's"


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_card_has_the_pipeline_tag_and_the_processor_is_saved(
    name: str, student_folder: Callable[[str], Path]
) -> None:
    student = student_folder(name)
    card = ModelCard.load(student / "README.md")
    assert card.data.pipeline_tag == FAMILIES[name].tag
    assert "Processor.from_pretrained(" in card.text
    teacher = student.parent / f"{name} teacher"
    saved = {path.name for path in teacher.iterdir()} - {"config.json", "model.safetensors", "generation_config.json"}
    assert saved <= {path.name for path in student.iterdir()}


LOAD = """
    import sys
    from pathlib import Path

    from huggingface_hub import ModelCard

    for folder in sys.argv[1:]:
        snippet = ModelCard.load(f"{folder}/README.md").text.split("```python\\n")[1].split("```")[0]
        names = {}
        exec(snippet.replace(repr(Path(folder).name), repr(folder)).replace(f'"{Path(folder).name}"', repr(folder)), names)
        model, processor = names["model"], names["processor"]
        assert "hf_guide" not in sys.modules, "a stock folder needs no hf_guide"
        print(Path(folder).name, type(model).__name__, type(processor).__name__, model.num_parameters())
"""


@pytest.mark.extended
def test_every_student_loads_by_its_cards_snippet_in_a_fresh_process(student_folder: Callable[[str], Path]) -> None:
    printed = run_python(LOAD, *map(student_folder, FAMILIES)).splitlines()
    assert len(printed) == len(FAMILIES)
    for line, (name, family) in zip(printed, FAMILIES.items(), strict=True):
        assert line.startswith(f"{name} {family.model_class} "), line


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["yolos", "clip", "vit_mae"])
def test_a_student_is_calibrated_on_the_batches_of_its_training(name: str, tmp_path: Path) -> None:
    family, processor = FAMILIES[name], FAMILIES[name].processor()
    build(family).save_pretrained(tmp_path / "teacher")
    trainer = DistillationTrainer(
        {**family.smaller, "method": {"method": "calibrated", "calibration_tokens": 60}},
        teacher=str(tmp_path / "teacher"),
        args=DistillationArguments(
            str(tmp_path / "out"), losses=family.losses, report_to="none", use_cpu=True, remove_unused_columns=False
        ),
        train_dataset=family.data(processor),
        data_collator=family.collate,
    )
    assert trainer.model.initialization_report.calibration["tokens"] >= 40
