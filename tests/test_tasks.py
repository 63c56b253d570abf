"""One table of tasks: every row names classes that exist, and every module that needs to know a task reads its row."""

import importlib
import inspect

import pytest
import torch
import transformers

import hf_guide
from hf_guide.models.tiny_models import build_tiny_model, tiny_config
from hf_guide.tasks import (
    BASE_MAPPING,
    PROCESSOR_CLASSES,
    OutputKind,
    Task,
    _classes_of_other_tasks,
    mapping_names,
    output_kind,
    pipeline_tag,
    task_of,
    task_of_class_name,
)

HUB_PIPELINE_TAGS = {
    "audio-classification",
    "automatic-speech-recognition",
    "document-question-answering",
    "feature-extraction",
    "fill-mask",
    "image-classification",
    "image-feature-extraction",
    "image-segmentation",
    "image-text-to-text",
    "multiple-choice",
    "object-detection",
    "question-answering",
    "text-classification",
    "text-generation",
    "text2text-generation",
    "token-classification",
    "zero-shot-image-classification",
}
"""Those among the Hub's tags that a covered class has: a tag outside the Hub's list would be ignored there."""

CLASS_AXES = {"vocabulary", "labels", "characters", "positions", "choices", "pairs", "values", "features"}
ITEMS = {"token", "example", "boundary", "frame", "pixel", "query", "row", "patch"}


def classes_of(mapping: str) -> list[str]:
    entries = [(entry,) if isinstance(entry, str) else entry for entry in mapping_names(mapping).values()]
    return sorted({name for names in entries for name in names})


@pytest.mark.parametrize("task", Task)
def test_a_row_names_classes_that_exist(task: Task) -> None:
    row = task.row
    assert hasattr(transformers, row.auto_class) and hasattr(transformers, task.processor_class)
    tags = {*row.pipeline_tags.values(), *row.class_tags.values()}
    assert row.inputs in PROCESSOR_CLASSES and tags and tags <= HUB_PIPELINE_TAGS
    assert all(mapping_names(mapping) for mapping in row.pipeline_tags)
    assert all(hasattr(transformers, name) for name in row.class_tags)
    assert len(row.outputs) >= 1 and {output.classes for output in row.outputs} <= CLASS_AXES
    assert {output.items for output in row.outputs} <= ITEMS
    assert all(Task(other) is not task for other in row.teacher_tasks)
    assert Task(str(task)) is task


@pytest.mark.parametrize("task", Task)
def test_every_task_has_a_class_that_makes_a_student(task: Task) -> None:
    auto_student = getattr(hf_guide, task.auto_student_class)
    assert auto_student.model_class is getattr(transformers, task.row.auto_class)
    assert task.auto_student_class in hf_guide.__all__


@pytest.mark.parametrize("name", [name for name in hf_guide.__all__ if name.startswith("AutoStudent")])
def test_a_class_that_makes_a_student_is_named_as_the_auto_class_of_transformers(name: str) -> None:
    auto_student = getattr(hf_guide, name)
    assert auto_student.__name__ == name and auto_student.__module__ == "hf_guide.modeling_auto"
    assert auto_student.model_class is getattr(transformers, name.replace("AutoStudent", "AutoModel", 1))


@pytest.mark.parametrize("task", Task)
def test_every_class_of_a_mapping_has_its_task_and_tag(task: Task) -> None:
    for mapping, tag in task.row.pipeline_tags.items():
        for name in classes_of(mapping):
            first = task_of_class_name(name)
            if first is None:
                assert mapping == BASE_MAPPING and name in _classes_of_other_tasks(), name
            elif name not in first.row.class_tags:
                assert first is task or list(Task).index(first) < list(Task).index(task), name
                tags = {t for m, t in first.row.pipeline_tags.items() if name in classes_of(m)}
                assert pipeline_tag(name) in tags and (first is not task or len(tags) > 1 or tags == {tag}), name


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("T5ForConditionalGeneration", "text2text-generation"),
        ("BartForConditionalGeneration", "text2text-generation"),
        ("MarianMTModel", "text2text-generation"),
        ("WhisperForConditionalGeneration", "automatic-speech-recognition"),
        ("Speech2TextForConditionalGeneration", "automatic-speech-recognition"),
        ("VoxtralForConditionalGeneration", "automatic-speech-recognition"),
        ("GPT2LMHeadModel", "text-generation"),
        ("LlamaForCausalLM", "text-generation"),
        ("ReformerModelWithLMHead", "text-generation"),
        ("BertForMaskedLM", "fill-mask"),
        ("DeiTForImageClassificationWithTeacher", "image-classification"),
        ("OwnForSequenceClassification", "text-classification"),
        ("LlamaModel", "feature-extraction"),
        ("ViTModel", "image-feature-extraction"),
        ("BertForQuestionAnswering", "question-answering"),
        ("LayoutLMForQuestionAnswering", "document-question-answering"),
        ("XLNetForQuestionAnswering", "question-answering"),
        ("BertForMultipleChoice", "multiple-choice"),
        ("Wav2Vec2ForCTC", "automatic-speech-recognition"),
        ("Wav2Vec2ForSequenceClassification", "audio-classification"),
        ("SegformerForSemanticSegmentation", "image-segmentation"),
        ("MaskFormerForInstanceSegmentation", "image-segmentation"),
        ("DetrForObjectDetection", "object-detection"),
        ("CLIPModel", "zero-shot-image-classification"),
        ("VisionTextDualEncoderModel", "zero-shot-image-classification"),
        ("Gemma3ForConditionalGeneration", "image-text-to-text"),
        ("GitForCausalLM", "image-text-to-text"),
        ("VisionEncoderDecoderModel", "image-text-to-text"),
        ("ViTMAEForPreTraining", "image-feature-extraction"),
        ("BertForNextSentencePrediction", None),
        ("TapasForQuestionAnswering", None),
        ("OwlViTForObjectDetection", None),
        ("BertForPreTraining", None),
        ("VitsModel", None),
    ],
)
def test_a_class_has_the_pipeline_tag_that_the_hub_expects(name: str, tag: str | None) -> None:
    assert pipeline_tag(name) == tag
    model_class = getattr(transformers, name, None)
    if model_class is not None:
        assert pipeline_tag(model_class) == tag
        assert pipeline_tag(type("Own", (model_class,), {})) == tag  # a subclass of the user's


CLASSES_OF_TASKS = {
    Task.SPEECH_SEQ2SEQ: ["WhisperForConditionalGeneration", "SpeechEncoderDecoderModel", "SpeechT5ForSpeechToText"],
    Task.IMAGE_TEXT_TO_TEXT: [
        "LlavaForConditionalGeneration",
        "VisionEncoderDecoderModel",
        "Gemma3ForConditionalGeneration",
    ],
    Task.AUDIO_CLASSIFICATION: ["Wav2Vec2ForSequenceClassification", "ASTForAudioClassification"],
    Task.CTC: ["Wav2Vec2ForCTC", "HubertForCTC"],
    Task.QUESTION_ANSWERING: [
        "BertForQuestionAnswering",
        "XLNetForQuestionAnswering",
        "XLNetForQuestionAnsweringSimple",
    ],
    Task.MULTIPLE_CHOICE: ["BertForMultipleChoice", "RobertaForMultipleChoice"],
    Task.SEMANTIC_SEGMENTATION: ["SegformerForSemanticSegmentation", "BeitForSemanticSegmentation"],
    Task.OBJECT_DETECTION: ["DetrForObjectDetection", "YolosForObjectDetection", "RTDetrForObjectDetection"],
    Task.INSTANCE_SEGMENTATION: [
        "MaskFormerForInstanceSegmentation",
        "Mask2FormerForUniversalSegmentation",
        "DetrForSegmentation",
    ],
    Task.ZERO_SHOT_IMAGE_CLASSIFICATION: ["CLIPModel", "SiglipModel", "VisionTextDualEncoderModel"],
    Task.MASKED_IMAGE_MODELING: ["ViTForMaskedImageModeling", "SwinForMaskedImageModeling"],
    Task.IMAGE_PRETRAINING: ["ViTMAEForPreTraining"],
    Task.FEATURE_EXTRACTION: ["BertModel", "ViTModel", "Wav2Vec2Model", "T5Model"],
}


@pytest.mark.parametrize("task", CLASSES_OF_TASKS)
def test_the_task_of_a_class_is_what_its_head_is_for(task: Task) -> None:
    for name in CLASSES_OF_TASKS[task]:
        model_class = getattr(transformers, name)
        assert task_of(model_class) is task_of_class_name(name) is task, name
        assert task_of(type("Own", (model_class,), {})) is task, name


REAL_CLASSES = {
    Task.SEQ2SEQ_LM: ["T5ForConditionalGeneration", "BartForConditionalGeneration"],
    Task.CAUSAL_LM: ["LlamaForCausalLM", "GPT2LMHeadModel"],
    Task.MASKED_LM: ["BertForMaskedLM", "ModernBertForMaskedLM"],
    Task.SEQUENCE_CLASSIFICATION: ["BertForSequenceClassification", "LlamaForSequenceClassification"],
    Task.TOKEN_CLASSIFICATION: ["BertForTokenClassification", "Qwen2ForTokenClassification"],
    Task.IMAGE_CLASSIFICATION: ["ViTForImageClassification", "Dinov2ForImageClassification"],
}


@pytest.mark.parametrize("task", REAL_CLASSES)
def test_the_logits_of_real_models_have_the_axes_of_their_row(task: Task) -> None:
    (output,) = task.row.outputs
    for name in REAL_CLASSES[task]:
        model_class = getattr(transformers, name)
        config = tiny_config(model_class.config_class())
        config.decoder_start_token_id = config.pad_token_id = 0
        if output.classes == "labels":
            config.num_labels = 3
        model = build_tiny_model(model_class, config).float()
        assert task_of(model) is task
        tokens = torch.arange(1, 11).view(2, 5)
        size = getattr(config, "image_size", None)
        inputs = (
            {"input_ids": tokens} if task.row.inputs == "text" else {"pixel_values": torch.zeros(2, 3, size, size)}
        )
        if task.row.targets_in_decoder:
            inputs["decoder_input_ids"] = tokens
        logits = getattr(model(**inputs), output.name)
        classes = 3 if output.classes == "labels" else model.get_output_embeddings().weight.shape[0]
        assert logits.shape == ((2, 5, classes) if output.items == "token" else (2, classes)), name


def test_the_kind_of_a_classifiers_output_follows_from_its_config() -> None:
    config = transformers.BertConfig(num_labels=3)
    task = Task.SEQUENCE_CLASSIFICATION
    assert output_kind(task, config) is OutputKind.CATEGORICAL
    config.problem_type = "multi_label_classification"
    assert output_kind(task, config) is OutputKind.BERNOULLI
    config.problem_type = "regression"
    assert output_kind(task, config) is OutputKind.REAL
    assert output_kind(task, transformers.BertConfig(num_labels=1)) is OutputKind.REAL
    assert output_kind(Task.CAUSAL_LM, config) is OutputKind.CATEGORICAL


def test_no_other_module_has_a_table_of_tasks() -> None:
    """A mapping from tasks, or a list of the Hub's tags, outside the table would be a second home."""
    for path in ("cli.init", "hub.model_card", "teachers.loading", "distillation.training_record", "scripts.distill"):
        source = inspect.getsource(importlib.import_module(f"hf_guide.{path}"))
        assert "Task.CAUSAL_LM:" not in source and "AutoModelForCausalLM" not in source, path
        assert not any(f'"{tag}"' in source for tag in HUB_PIPELINE_TAGS), path
