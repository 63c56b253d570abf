"""Teachers, losses and batches that do not fit a task are errors that state what was found and what works."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from hf_guide import (
    CaptureError,
    DistillationTrainer,
    HfGuideError,
    TaskError,
    TeacherError,
    VocabularyError,
    capture_teacher,
)
from hf_guide.tasks import OutputKind, Task, output_kind
from tests.distillation.small import CLASSES, llama
from tests.distillation.task_cases import CASES, IMAGE, clip, collate_plain, described_images, images, plain_texts
from tests.distillation.test_trainer import arguments


def other(name: str, **changes: Any) -> Callable[[], PreTrainedModel]:
    """Return a function that makes the model of a case with another config."""

    def make() -> PreTrainedModel:
        model = CASES[name].build(2, 16)
        config = copy.deepcopy(model.config)
        for key, value in changes.items():
            setattr(config, key, value)
        return type(model)(config)

    return make


REFUSED = [
    ("object-detection", other("object-detection", num_detection_tokens=7), "kd", "5 queries and the teacher 7.*'ce'"),
    ("object-detection", other("object-detection", num_labels=3), "kd", "5 against 3"),
    ("object-detection", other("object-detection"), "features", "not fed one vector per query"),
    ("object-detection", other("object-detection"), "dkd", "'dkd' is for sequence-classification"),
    ("ctc", other("ctc", pad_token_id=3), "kd", "blank .* is 0 and the teacher's 3"),
    ("ctc", other("ctc", vocab_size=14), "kd", "12 classes and the teacher's 14"),
    ("semantic-segmentation", other("semantic-segmentation", num_labels=3), "kd", "5 against 3"),
    ("semantic-segmentation", other("semantic-segmentation", num_labels=1), "kd", "categorical .*bernoulli"),
    ("semantic-segmentation", other("semantic-segmentation"), "boxes", "'boxes' is for object-detection"),
    ("siglip", lambda: clip(16), "kd", "bernoulli .*the teacher's categorical"),
    ("siglip", other("siglip"), "features", "not fed one vector per row"),
    ("masked-image-modeling", other("masked-image-modeling", patch_size=8, encoder_stride=8), "kd", "patch_size is 4 .* 8"),
    ("masked-image-modeling", other("masked-image-modeling", image_size=32), "kd", "image_size=32.*image_size=16"),
    ("image-pretraining", other("image-pretraining", mask_ratio=0.25), "kd", "mask_ratio is 0.5 and the teacher's 0.25"),
    ("feature-extraction", other("feature-extraction"), "kd", "are vectors, which 'kd' cannot compare"),
    ("feature-extraction", other("feature-extraction"), "ce", "no loss of its own"),
    ("question-answering", other("question-answering"), "features", "not fed one vector per boundary"),
    ("multiple-choice", other("multiple-choice"), "features", "'features' is not for multiple-choice"),
    ("image-text-to-text", lambda: llama(1, width=16), "kd", "for causal-lm; the student is for image-text-to-text"),
    ("audio-classification", other("ctc"), "kd", "for ctc; the student is for audio-classification"),
    ("speech-seq2seq", other("speech-seq2seq", num_mel_bins=8), "kd", "num_mel_bins=8.*num_mel_bins=4"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "teacher", "loss", "message"), REFUSED)
def test_a_teacher_or_a_loss_that_does_not_fit_is_an_error(
    name: str, teacher: Callable[[], PreTrainedModel], loss: str, message: str, tmp_path: Path
) -> None:
    case = CASES[name]
    with pytest.raises((TaskError, TeacherError, VocabularyError), match=message):
        DistillationTrainer(case.build(1, 16), arguments(tmp_path, losses=loss), case.collate, teacher=teacher())


def at_first_batch(
    name: str, examples: Any, collate: Any, losses: Any, folder: Path, teacher: PreTrainedModel | None = None
) -> HfGuideError:
    case = CASES[name]
    teacher = case.build(2, 16) if teacher is None else teacher
    args = arguments(folder, losses=losses, remove_unused_columns=False)
    trainer = DistillationTrainer(case.build(1, 16), args, collate, examples, teacher=teacher)
    with pytest.raises(HfGuideError) as caught:
        trainer.train()
    return caught.value


def test_a_batch_that_lacks_what_the_task_needs_is_an_error(tmp_path: Path) -> None:
    stack = CASES["masked-image-modeling"].collate
    assert "bool_masked_pos" in str(at_first_batch("masked-image-modeling", images(8), stack, "kd", tmp_path))
    beam = "beam-search-question-answering"
    assert "start_positions" in str(at_first_batch(beam, plain_texts(8), collate_plain, "kd", tmp_path))
    losses = {"ce": 0.5, "kd": 0.5}
    error = at_first_batch("question-answering", plain_texts(8), collate_plain, losses, tmp_path)
    assert "no start_positions or end_positions" in str(error)

    def collate_starts(rows: Any) -> dict[str, Any]:
        return collate_plain(rows) | {"start_positions": torch.zeros(len(rows), dtype=torch.long)}

    error = at_first_batch("question-answering", plain_texts(8), collate_starts, losses, tmp_path)
    assert "no end_positions; it has ['attention_mask', 'input_ids', 'start_positions']" in str(error)
    written = [each | {"labels": list(each["input_ids"])} for each in described_images(8)]
    error = at_first_batch("image-text-to-text", written, CASES["image-text-to-text"].collate, losses, tmp_path)
    assert "stands for an image" in str(error)
    ctc = CASES["ctc"]
    other_frames = other("ctc", conv_stride=(4, 4))()
    error = at_first_batch("ctc", ctc.examples(8), ctc.collate, "kd", tmp_path, other_frames)
    assert "one a frame" in str(error)


def test_hidden_states_of_images_and_texts_are_an_error(tmp_path: Path) -> None:
    case = CASES["siglip"]
    error = at_first_batch("siglip", case.examples(8), case.collate, "hidden_states", tmp_path)
    assert "no hidden states that could be compared" in str(error)


def test_what_a_cache_cannot_store_is_an_error(tmp_path: Path) -> None:
    for name, options, message in [
        ("feature-extraction", {}, "has no logits: set save_penultimate"),
        ("question-answering", {"save_penultimate": True}, "save_penultimate is not for question-answering"),
        ("multiple-choice", {"hidden_layers": [1]}, "for each choice"),
    ]:
        case = CASES[name]
        with pytest.raises(CaptureError, match=message):
            capture_teacher(
                case.build(1, 16), case.examples(4), tmp_path / name, data_collator=case.collate, config=options,
                show_progress=False,
            )  # fmt: skip


# Detectors


def detr(queries: int) -> PreTrainedModel:
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    sizes = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    config = transformers.DetrConfig(
        use_timm_backbone=False, backbone_config=backbone, num_queries=queries, d_model=16, encoder_ffn_dim=16,
        decoder_ffn_dim=16, num_labels=CLASSES, dropout=0.0, **sizes,
    )  # fmt: skip
    return transformers.DetrForObjectDetection(config)


def rt_detr() -> PreTrainedModel:
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.RTDetrConfig(
        backbone_config=backbone, encoder_hidden_dim=16, encoder_in_channels=[8] * 3, d_model=16, num_queries=6,
        decoder_in_channels=[16] * 3, decoder_ffn_dim=16, encoder_ffn_dim=16, decoder_layers=2, decoder_attention_heads=2,
        encoder_attention_heads=2, num_labels=CLASSES, num_denoising=4,
    )  # fmt: skip
    return transformers.RTDetrForObjectDetection(config)


def large_images(count: int) -> list[dict[str, Any]]:
    examples = CASES["object-detection"].examples(count)
    grow = torch.nn.functional.interpolate
    return [each | {"pixel_values": grow(each["pixel_values"][None], size=4 * IMAGE)[0]} for each in examples]


def test_queries_that_each_image_selects_are_not_compared(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="selects its queries among the proposals"):
        DistillationTrainer(rt_detr(), arguments(tmp_path, losses="kd"), teacher=rt_detr())


@pytest.mark.parametrize(
    ("student", "teacher", "losses"),
    [
        (lambda: detr(5), lambda: detr(5), ("ce", "kd", "boxes", "hidden_states")),
        (lambda: detr(5), lambda: detr(7), ("ce", "hidden_states")),
        (rt_detr, rt_detr, ("ce", "hidden_states")),
    ],
)
def test_detectors_learn_what_they_have_in_common(
    student: Any, teacher: Any, losses: tuple[str, ...], tmp_path: Path
) -> None:
    trainer = DistillationTrainer(
        student(),
        arguments(tmp_path, losses=dict.fromkeys(losses, 1.0), learning_rate=1e-3, remove_unused_columns=False),
        CASES["object-detection"].collate,
        large_images(8),
        eval_dataset=large_images(3),
        teacher=teacher(),
    )
    trainer.train()
    logs = trainer.state.log_history[0]
    assert all(logs[loss] > 0 for loss in losses)
    assert ("eval_teacher_agreement" in trainer.evaluate()) is ("kd" in losses)


@pytest.mark.parametrize("make", [lambda: detr(5), rt_detr, lambda: CASES["object-detection"].build(0, 16)])
def test_a_detectors_kind_is_that_of_its_last_class(make: Callable[[], PreTrainedModel]) -> None:
    """A class for "no object" makes the classes exclude each other; without it each has a sigmoid."""
    model = make().eval()
    side = 16 if model.config.model_type == "yolos" else 64
    with torch.no_grad():
        classes = model(pixel_values=torch.zeros(1, 3, side, side)).logits.shape[-1]
    is_categorical = output_kind(Task.OBJECT_DETECTION, model.config) is OutputKind.CATEGORICAL
    assert classes == CLASSES + is_categorical
