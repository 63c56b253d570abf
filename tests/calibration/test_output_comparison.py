"""Shapes of every task are scored on calibration data by what its outputs are, or refused with the reason."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.nn.functional import cosine_similarity

from hf_guide import find_shapes
from hf_guide.calibration.output_comparison import OutputComparison, divergence, similarity_differences
from hf_guide.errors import HfGuideError, LayoutError, OptionError
from hf_guide.tasks import Task
from hf_guide.teachers.checkpoint import open_teacher
from tests.tiny import SIZES

VIT = {name: SIZES[name] for name in SIZES if name not in ("vocab_size", "max_position_embeddings")}
VIT |= {"image_size": 16, "patch_size": 4}
T5 = {"vocab_size": 96, "d_model": 48, "d_kv": 12, "d_ff": 64, "num_layers": 4, "num_heads": 4}
SOUND = {
    name: SIZES[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
}
SOUND |= {
    "vocab_size": 32,
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
}
SOUND |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 16}
WHISPER = {"vocab_size": 96, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
WHISPER |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 8}
WHISPER |= {"max_source_positions": 16, "max_target_positions": 32, "pad_token_id": 0, "decoder_start_token_id": 1}
SPECTROGRAM = {name: SIZES[name] for name in SIZES if name not in ("vocab_size", "max_position_embeddings")}
SPECTROGRAM |= {"num_mel_bins": 8, "max_length": 16, "patch_size": 4, "frequency_stride": 4, "time_stride": 4}
SPECTROGRAM |= {"num_labels": 3}
MULTI_LABEL = {"num_labels": 3, "problem_type": "multi_label_classification"}


def ids(**more):
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(3, 96, (4, 16), generator=generator), **more} for _ in range(4)]


def images(**more):
    generator = torch.Generator().manual_seed(1)
    return [{"pixel_values": torch.randn(4, 3, 16, 16, generator=generator), **more} for _ in range(4)]


def choices():
    return [{"input_ids": batch["input_ids"].view(2, 2, 16)} for batch in ids()]


def speech():
    features = torch.randn(4, 8, 32, generator=torch.Generator().manual_seed(1))
    return [{"input_features": features, "decoder_input_ids": batch["input_ids"]} for batch in ids()]


def spectrograms():
    return [
        {"input_values": torch.randn(4, 16, 8, generator=torch.Generator().manual_seed(seed))} for seed in range(4)
    ]


def sounds():
    return [{"input_values": torch.randn(4, 400, generator=torch.Generator().manual_seed(seed))} for seed in range(4)]


MASKED = torch.arange(16).repeat(4, 1) % 2 == 0
SCORED = {
    "causal-lm": ("LlamaForCausalLM", SIZES, ids),
    "masked-lm": ("BertForMaskedLM", SIZES, ids),
    "sequence-classification": ("BertForSequenceClassification", {**SIZES, **MULTI_LABEL}, ids),
    "sequence-classification, regression": ("BertForSequenceClassification", {**SIZES, "num_labels": 1}, ids),
    "token-classification": ("BertForTokenClassification", {**SIZES, "num_labels": 3}, ids),
    "question-answering": ("BertForQuestionAnswering", SIZES, ids),
    "multiple-choice": ("BertForMultipleChoice", SIZES, choices),
    "seq2seq-lm": ("T5ForConditionalGeneration", T5, lambda: ids(decoder_input_ids=ids()[1]["input_ids"])),
    "feature-extraction": ("BertModel", SIZES, ids),
    "feature-extraction, image": ("ViTModel", VIT, images),
    "image-classification": ("ViTForImageClassification", VIT, images),
    "masked-image-modeling": (
        "ViTForMaskedImageModeling",
        {**VIT, "encoder_stride": 4},
        lambda: images(bool_masked_pos=MASKED),
    ),
    "semantic-segmentation": (
        "DPTForSemanticSegmentation",
        {
            **VIT,
            "num_labels": 3,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [8] * 4,
            "fusion_hidden_size": 8,
        },
        images,
    ),
    "object-detection": (
        "YolosForObjectDetection",
        {
            **VIT,
            "image_size": [16, 16],
            "num_detection_tokens": 3,
            "use_mid_position_embeddings": False,
            "num_labels": 2,
        },
        images,
    ),
    "speech-seq2seq": ("WhisperForConditionalGeneration", WHISPER, speech),
    "ctc": ("Wav2Vec2ForCTC", SOUND, sounds),
    "audio-classification": ("ASTForAudioClassification", SPECTROGRAM, spectrograms),
}
"""By task, and what its outputs are: a teacher's class and config, and its calibration data."""

REFUSED = {
    "image-text-to-text": "made of several models",
    "zero-shot-image-classification": "made of several models",
    "instance-segmentation": "made of several models",
    "image-pretraining": "several widths",
}
"""Tasks none of whose families has shapes that can be enumerated, and why."""


def teacher_of(name):
    model_class, config, data = SCORED[name]
    return build(getattr(transformers, model_class), config, seed=0), data()


def build(model_class, config, seed):
    torch.manual_seed(seed)
    model = model_class(model_class.config_class(**config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def test_every_task_is_in_the_table():
    assert {str(task) for task in Task} == {name.partition(",")[0] for name in SCORED} | REFUSED.keys()


@pytest.mark.parametrize("name", SCORED)
def test_a_teacher_differs_from_another_model_and_not_from_itself(name):
    teacher, data = teacher_of(name)
    other = build(type(teacher), SCORED[name][1], seed=1)
    setup = SimpleNamespace(
        model_class=type(teacher), config=teacher.config, source=teacher, teacher=open_teacher(teacher), hub={}
    )
    comparison = OutputComparison(setup, what="Shapes", advice="")
    with torch.no_grad():
        target, found = (comparison.outputs(model, data[0]) for model in (teacher, other))
    assert target.ndim == 2 and torch.isfinite(comparison.differences(found, target)).all()
    assert comparison.differences(target, target).abs().max() < 1e-5 < comparison.differences(found, target).mean()


UNKNOWN_AXES = ("semantic-segmentation", "ctc")
"""Of families that are known by their blocks alone."""

FAST = ("sequence-classification, regression", "feature-extraction")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in SCORED]
)
def test_shapes_of_a_task_are_scored_and_distilled(name):
    teacher, data = teacher_of(name)
    method = {"method": "calibrated", "calibration_tokens": 256}
    options = {"method": method, "limit": 1, "search_steps": 3, "show_progress": False}
    if name in UNKNOWN_AXES:
        with pytest.raises(LayoutError, match="axes of .* are not known"):
            find_shapes(teacher, num_parameters="60%", calibration_dataset=data, **options)
        return
    (best,) = find_shapes(teacher, num_parameters="60%", calibration_dataset=data, **options)
    assert 0 <= best.distilled_loss != best.loss >= 0


def test_one_choice_an_example_and_pairs_are_refused():
    teacher, _ = teacher_of("multiple-choice")
    setup = SimpleNamespace(model_class=type(teacher), config=teacher.config)
    with pytest.raises(OptionError, match="batches whose input_ids are"):
        OutputComparison(setup, what="Shapes", advice="").outputs(teacher, ids()[0])
    with pytest.raises(HfGuideError, match="made of several models"):
        find_shapes(transformers.CLIPModel(tiny_clip()), num_parameters="60%", show_progress=False)


def tiny_clip():
    part = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**part, "image_size": 16, "patch_size": 8}
    return transformers.CLIPConfig(text_config={**part, "vocab_size": 96}, vision_config=vision, projection_dim=8)


def test_impossible_classes_do_not_count():
    student, teacher = torch.tensor([[1.0, 2.0, -torch.inf]]), torch.tensor([[2.0, 1.0, -torch.inf]])
    expected = divergence(student[:, :2], teacher[:, :2])
    student.requires_grad_(True)
    found = divergence(student, teacher)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert torch.isfinite(student.grad).all()


def test_similarities_are_compared_pair_by_pair():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(3, 4, generator=generator), torch.randn(3, 7, generator=generator)
    expected = [
        sum(
            float(cosine_similarity(student[i], student[j], 0) - cosine_similarity(teacher[i], teacher[j], 0)) ** 2
            for j in range(3)
            if j != i
        )
        / 2
        for i in range(3)
    ]
    assert similarity_differences(student, teacher).tolist() == pytest.approx(expected, rel=1e-4)
