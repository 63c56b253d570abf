"""With nothing changed a student is its teacher, for every class of the Auto mappings."""

import copy
import functools
import tempfile
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto import modeling_auto

from hf_guide import from_teacher
from hf_guide.initialization.trial_forward import check_forward
from hf_guide.layouts.registry import registered_layouts
from hf_guide.models.tiny_models import MODEL_ERRORS, tiny_config

MAPPINGS = {
    "CAUSAL_LM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    "MASKED_LM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING,
    "SEQ_TO_SEQ_CAUSAL_LM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    "SEQUENCE_CLASSIFICATION": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "TOKEN_CLASSIFICATION": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    "IMAGE_CLASSIFICATION": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    "QUESTION_ANSWERING": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    "MULTIPLE_CHOICE": modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING,
    "AUDIO_CLASSIFICATION": modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING,
    "CTC": modeling_auto.MODEL_FOR_CTC_MAPPING,
    "SPEECH_SEQ_2_SEQ": modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
    "SEMANTIC_SEGMENTATION": modeling_auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING,
    "INSTANCE_SEGMENTATION": modeling_auto.MODEL_FOR_INSTANCE_SEGMENTATION_MAPPING,
    "UNIVERSAL_SEGMENTATION": modeling_auto.MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING,
    "OBJECT_DETECTION": modeling_auto.MODEL_FOR_OBJECT_DETECTION_MAPPING,
    "MASKED_IMAGE_MODELING": modeling_auto.MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING,
    "ZERO_SHOT_IMAGE_CLASSIFICATION": modeling_auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING,
    "IMAGE_TEXT_TO_TEXT": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    "PRETRAINING": modeling_auto.MODEL_FOR_PRETRAINING_MAPPING,
    "BASE": modeling_auto.MODEL_MAPPING,
}
LARGEST = 60_000_000
QUICK = {
    *(
        "ConvNextForImageClassification",
        "SwiftFormerForImageClassification",
        "GitForCausalLM",
        "ArceeForTokenClassification",
    ),
    *(
        "BigBirdForSequenceClassification",
        "XLMRobertaForMaskedLM",
        "CamembertForMaskedLM",
        "Qwen3NextForTokenClassification",
    ),
    *(
        "T5ForConditionalGeneration",
        "SwinModel",
        "Gemma4AudioModel",
        "LlamaForSequenceClassification",
        "MambaForCausalLM",
    ),
    *("ViTForMaskedImageModeling", "ViTMAEForPreTraining", "YolosForObjectDetection", "DetrForObjectDetection"),
    *(
        "SegformerForSemanticSegmentation",
        "SiglipModel",
        "LlavaForConditionalGeneration",
        "SmolVLMForConditionalGeneration",
    ),
    *("BigBirdForQuestionAnswering", "BertForMultipleChoice", "Wav2Vec2ForCTC", "Qwen2_5_VLForConditionalGeneration"),
}


@functools.cache
def classes() -> list[Any]:
    """Return one test parameter for each class that a mapping names, slow but for QUICK."""
    found: dict[str, Any] = {}
    for task, names in ((task, mapping._model_mapping) for task, mapping in MAPPINGS.items()):
        for model_type, name in names.items():
            for each in name if isinstance(name, tuple) else (name,):
                found.setdefault(each, (task, model_type))
    return [
        pytest.param(name, *where, id=name, marks=() if name in QUICK else pytest.mark.slow)
        for name, where in found.items()
    ]


def teacher_of(name: str, task: str, model_type: str, **changes: Any) -> PreTrainedModel:
    """Return a small seeded model; skip where its class cannot be built here, or not small."""
    mapping = MAPPINGS[task]
    config_class = CONFIG_MAPPING[model_type]
    reason = ""
    for small in (True, False):
        try:
            model_class = mapping[config_class]
            if isinstance(model_class, tuple):
                model_class = next(each for each in model_class if each.__name__ == name)
            config = tiny_config(config_class()) if small else config_class()
            for key, value in changes.items():
                setattr(config, key, value)
            with torch.device("meta"):
                size = model_class._from_config(copy.deepcopy(config)).num_parameters()
            if size > LARGEST:
                reason = f"{size:.0e} parameters"
                continue
            torch.manual_seed(0)
            return model_class._from_config(config, dtype=torch.float32).eval()
        except MODEL_ERRORS as error:
            reason = f"{type(error).__name__}: {error}"
    pytest.skip(f"{name} has no small model here: {reason[:200]}")


@pytest.mark.sampled(6)
@pytest.mark.parametrize(("name", "task", "model_type"), classes())
def test_with_nothing_changed_a_student_is_its_teacher(name: str, task: str, model_type: str) -> None:
    teacher = teacher_of(name, task, model_type)
    student = from_teacher(teacher, show_progress=False)
    expected, found = teacher.state_dict(), student.state_dict()
    assert expected.keys() == found.keys()
    assert [key for key, value in expected.items() if not torch.equal(value, found[key])] == []
    buffers = dict(student.named_buffers())
    assert [key for key, value in teacher.named_buffers() if not torch.equal(value, buffers[key])] == []
    assert student.initialization_report.randomly_initialized == []
    assert student.config.to_dict() == {**teacher.config.to_dict(), "_name_or_path": student.config._name_or_path}
    assert all("not tried" in note for note in check_forward(student, teacher.config, filled=True))


def language_models() -> list[Any]:
    """Return each registered family's masked and causal language model, slow but for the families of BERT's kind."""
    found = {}
    for task in ("MASKED_LM", "CAUSAL_LM"):
        for model_type, name in MAPPINGS[task]._model_mapping.items():
            if model_type in registered_layouts() and isinstance(name, str):
                found.setdefault(name, (task, model_type))
    quick = {
        "XLMRobertaForMaskedLM",
        "CamembertForMaskedLM",
        "RobertaForMaskedLM",
        "BertForMaskedLM",
        "GPT2LMHeadModel",
    }
    return [
        pytest.param(name, *where, id=name, marks=() if name in quick else pytest.mark.slow)
        for name, where in found.items()
    ]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("name", "task", "model_type"), language_models())
def test_every_language_model_gets_narrower_from_memory_and_from_a_folder(
    name: str, task: str, model_type: str, tied: bool
) -> None:
    teacher = teacher_of(name, task, model_type, tie_word_embeddings=tied)
    width = next(key for key in ("hidden_size", "d_model") if isinstance(getattr(teacher.config, key, None), int))
    overrides = {width: getattr(teacher.config, width) // 2}
    if getattr(teacher.config, "embedding_size", None) == getattr(teacher.config, width):
        overrides["embedding_size"] = overrides[width]  # ELECTRA: equal in the teacher, so equal in the student
    student = from_teacher(teacher, show_progress=False, **overrides)
    head, table = student.get_output_embeddings(), student.get_input_embeddings()
    assert (
        table.weight.shape[-1] in overrides.values()
        or table.weight.shape == teacher.get_input_embeddings().weight.shape
    )
    if head is not None and teacher.get_output_embeddings().weight is teacher.get_input_embeddings().weight:
        assert head.weight is table.weight
    assert student.initialization_report.variance_explained, "no axis was projected"
    with tempfile.TemporaryDirectory() as folder:
        teacher.save_pretrained(folder)
        again = from_teacher(folder, show_progress=False, **overrides)
    differing = [key for key, value in student.state_dict().items() if not torch.equal(value, again.state_dict()[key])]
    assert differing == []
