"""Images, queries and processors that student and teacher do not share: converted, or an error that states which differ."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hf_guide import DistillationTrainer, TaskError, TeacherError
from hf_guide.data.image_text import ImageTextCollator
from tests.distillation.test_vision import FAMILIES, SIDE, VISION, build, quiet_arguments, stack
from tests.small_image_text import FAMILIES as LANGUAGE_FAMILIES
from tests.small_image_text import rows

LLAVA = LANGUAGE_FAMILIES["llava"]


def train(student: Any, teacher: Any, data: Any, folder: Path, collate: Any = stack, **options: Any) -> dict[str, Any]:
    """Train for a step, and return what was logged."""
    losses = options.pop("losses", {"ce": 0.5, "kd": 0.5})
    args = quiet_arguments(folder / "out", losses=losses, max_steps=1)
    trainer = DistillationTrainer(
        student, teacher=teacher, args=args, train_dataset=data, data_collator=collate, **options
    )
    trainer.train()
    return trainer.state.log_history[0]


def test_a_teacher_of_another_image_size_is_an_error(tmp_path: Path) -> None:
    images = [{"pixel_values": torch.zeros(3, 32, 32), "labels": torch.tensor(number % 2)} for number in range(3)]
    student, teacher = (
        transformers.ViTForImageClassification(transformers.ViTConfig(**VISION | {"image_size": size}))
        for size in (32, 16)
    )
    message = "reads inputs of image_size=16, the student of image_size=32: they cannot be fed the same batch"
    with pytest.raises(TeacherError, match=message):
        train(student, teacher, images, tmp_path)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["segformer", "yolos", "mask2former"])
def test_a_script_chooses_the_size_of_images_whose_pixels_or_objects_are_found(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    family = FAMILIES[name]
    teacher, mine = build(family), family.processor()
    for each in (teacher, mine):
        each.save_pretrained(tmp_path / "teacher")
    teacher = type(teacher).from_pretrained(tmp_path / "teacher")
    chosen = {"do_resize": True, "size": {"height": 2 * SIDE, "width": 2 * SIDE}}
    larger = type(mine).from_pretrained(tmp_path / "teacher", **chosen)
    logs = train(build(family), teacher, family.data(larger), tmp_path, family.collate, processing_class=larger)
    assert logs["kd"] > 0
    assert "is fed images of another size: size is" in caplog.text
    smooth = type(mine).from_pretrained(tmp_path / "teacher", **chosen, resample=0)
    with pytest.raises(TeacherError, match="resample is 0 there and"):
        train(build(family), teacher, family.data(smooth), tmp_path, family.collate, processing_class=smooth)


def test_a_teacher_of_another_patch_size_classifies_the_same_images(tmp_path: Path) -> None:
    images = [{"pixel_values": torch.randn(3, 32, 32), "labels": torch.tensor(number % 2)} for number in range(3)]
    student, teacher = (
        transformers.ViTForImageClassification(transformers.ViTConfig(**VISION | {"patch_size": size}))
        for size in (8, 16)
    )
    assert train(student, teacher, images, tmp_path)["kd"] > 0


@pytest.mark.parametrize(("name", "queries"), [("yolos", "num_detection_tokens"), ("detr", "num_queries")])
def test_a_teacher_of_other_queries_is_an_error(name: str, queries: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    message = "The student has 4 queries and the teacher 3: 'kd' cannot compare them. Use .* or 'ce', .* alone"
    with pytest.raises(TaskError, match=message):
        train(build(family), build(family, **{queries: 3}), family.data(family.processor()), tmp_path, family.collate)


def test_pixels_are_converted_to_the_teachers_normalization(tmp_path: Path) -> None:
    family = FAMILIES["segformer"]
    student = build(family)
    other = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    student.save_pretrained(tmp_path / "teacher")
    transformers.SegformerImageProcessorPil(size={"height": 32, "width": 32}, **other).save_pretrained(
        tmp_path / "teacher"
    )
    processor = family.processor()
    logged = train(
        build(family), str(tmp_path / "teacher"), family.data(processor), tmp_path, processing_class=processor
    )
    same = train(build(family), student, family.data(processor), tmp_path)
    assert logged["kd"] > 0 and logged["kd"] != same["kd"]


@pytest.mark.parametrize("changed", ["image_mean", "vision_feature_select_strategy"])
def test_a_vision_language_teacher_of_another_processor_is_an_error(changed: str, tmp_path: Path) -> None:
    teacher, processor = LLAVA.build(1)
    if changed == "image_mean":
        processor.image_processor.image_mean = [0.1] * 3
    else:
        processor.vision_feature_select_strategy = "full"
    teacher.save_pretrained(tmp_path / "teacher")
    processor.save_pretrained(tmp_path / "teacher")
    student, own = LLAVA.build()
    with pytest.raises(TeacherError, match=f"which differs: {changed} is .* there and .* for the teacher"):
        train(student, str(tmp_path / "teacher"), rows(3), tmp_path, ImageTextCollator(own), processing_class=own)


def test_a_vision_language_teacher_of_other_image_tokens_is_an_error(tmp_path: Path) -> None:
    student, processor = LLAVA.build()
    teacher, _ = LLAVA.build(1, vision_config={"patch_size": 4})
    with pytest.raises(
        TeacherError, match="Image features and image tokens do not match.*number of tokens for an image"
    ):
        train(student, teacher, rows(3), tmp_path, ImageTextCollator(processor), processing_class=processor)


def test_a_batch_of_texts_alone_trains_a_vision_language_model(tmp_path: Path) -> None:
    student, processor = LLAVA.build()
    texts = [{"messages": [{"role": "user", "content": "Nobody"}, {"role": "assistant", "content": "the sea."}]}] * 3
    logged = train(
        student, LLAVA.build(1)[0], texts, tmp_path, ImageTextCollator(processor), processing_class=processor
    )
    assert logged["kd"] > 0


@pytest.mark.sampled(2)
@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of PaliGemma's own processor
@pytest.mark.parametrize("name", LANGUAGE_FAMILIES)
def test_a_shallower_vision_language_student_is_distilled_with_its_images(name: str, tmp_path: Path) -> None:
    LANGUAGE_FAMILIES[name].save(tmp_path / "teacher")
    processor = LANGUAGE_FAMILIES[name].build()[1]
    logged = train(
        {"text_config": {"num_hidden_layers": 2}},
        str(tmp_path / "teacher"),
        rows(3),
        tmp_path,
        ImageTextCollator(processor),
        losses={"ce": 0.5, "kd": 0.3, "hidden_states": 0.2},
        processing_class=processor,
    )
    assert logged["kd"] > 0 and logged["hidden_states"] > 0 and logged["ce"] > 0
