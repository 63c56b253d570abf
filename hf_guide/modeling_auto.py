"""`from_teacher` as a classmethod: of your own model class, and of an Auto class for each of Transformers' tasks."""

import os
from collections.abc import Mapping
from typing import Any

from transformers import (
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForCTC,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForInstanceSegmentation,
    AutoModelForMaskedImageModeling,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForObjectDetection,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSemanticSegmentation,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    AutoModelForTokenClassification,
    AutoModelForUniversalSegmentation,
    AutoModelForZeroShotImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from hf_guide.errors import OptionError
from hf_guide.hub.push import save_student
from hf_guide.initialization.report import InitializationReport
from hf_guide.methods import InitializationConfig
from hf_guide.modeling import from_teacher


class _FromTeacherBase:
    """Provide `from_teacher` as a classmethod, for one model class or task."""

    @classmethod
    def _student_class(cls) -> type[Any]:
        return cls

    @classmethod
    def from_teacher(
        cls,
        teacher: "str | os.PathLike[str] | PreTrainedModel",
        config: PreTrainedConfig | None = None,
        *,
        method: "str | InitializationConfig | Mapping[str, Any]" = "guide",
        calibration_dataset: Any = None,
        **options: Any,
    ) -> Any:
        """Call `hf_guide.from_teacher` with the model class of this class or task."""
        if "model_class" in options:
            raise OptionError(
                f"{cls.__name__}.from_teacher has its model class already; call hf_guide.from_teacher to choose another."
            )
        return from_teacher(
            teacher,
            config,
            method=method,
            calibration_dataset=calibration_dataset,
            model_class=cls._student_class(),
            **options,
        )


class FromTeacherMixin(_FromTeacherBase):
    """Add `from_teacher` to a model class of your own.

    The saved config names the stock class, so the folder loads where hf_guide is not installed.

    Example:
        >>> from transformers import LlamaForCausalLM
        >>> class MyStudent(FromTeacherMixin, LlamaForCausalLM):
        ...     pass
        >>> sizes = {"hidden_size": 240, "num_attention_heads": 6, "num_key_value_heads": 2}
        >>> student = MyStudent.from_teacher("HuggingFaceTB/SmolLM2-135M", **sizes, show_progress=False)
        >>> student.save_pretrained("student")
        >>> LlamaForCausalLM.from_pretrained("student").config.hidden_size
        240
    """

    initialization_report: InitializationReport | None = None

    def save_pretrained(self, save_directory: "str | os.PathLike[str]", *args: Any, **kwargs: Any) -> None:
        """Save a folder that the stock class loads, with `initialization_report.json` next to the weights."""
        save = super().save_pretrained.__func__  # type: ignore[misc]
        save_student(self, save, save_directory, *args, architecture=_stock_class(self).__name__, **kwargs)  # type: ignore[arg-type]


def _stock_class(student: Any) -> type:
    """Return the class that loads this student's folder where its own class is not known."""
    bases = [base for base in type(student).__mro__ if issubclass(base, PreTrainedModel)]
    stock = (base for base in bases if base.__module__.startswith(("transformers.models.", "transformers_modules.")))
    return next(stock, type(student))


class AutoStudent(_FromTeacherBase):
    """Initialize a base model, without a head, from a teacher; the other Auto classes derive from this one.

    Example:
        >>> from hf_guide import AutoStudent
        >>> student = AutoStudent.from_teacher("HuggingFaceTB/SmolLM2-135M", num_parameters="25%", show_progress=False)
        >>> type(student).__name__
        'LlamaModel'
    """

    model_class: type[Any] = AutoModel

    def __init__(self) -> None:
        name = type(self).__name__
        raise OSError(f"{name} is not instantiated; use {name}.from_teacher(teacher, ...).")

    @classmethod
    def _student_class(cls) -> type[Any]:
        return cls.model_class


_EXAMPLE = """Initialize {what} from a teacher{note}.

    Example:
        >>> from hf_guide import {name}
        >>> student = {name}.from_teacher(
        ...     "{teacher}", {overrides}, show_progress=False
        ... )
        >>> type(student).__name__
        '{student}'
    """


def auto_student_class(
    auto_class: type[Any], what: str, teacher: str, overrides: str, student: str, note: str = ""
) -> type[AutoStudent]:
    """Return the class that makes students of the classes of an Auto class of Transformers.

    Its name is that of the Auto class with `AutoStudent` for `AutoModel`.

    Args:
        auto_class: Of Transformers, such as `AutoModelForCausalLM`.
        what: What it makes, as its docstring names it.
        teacher, overrides, student: Of the docstring's example: a model on the Hub, what the student changes, and the
            student's class.
        note: What else the docstring mentions.

    Example:
        >>> from transformers import AutoModelForDepthEstimation
        >>> auto_student_class(AutoModelForDepthEstimation, "a depth estimator", "Intel/dpt-large", "", "").__name__
        'AutoStudentForDepthEstimation'
    """
    name = auto_class.__name__.replace("AutoModel", "AutoStudent", 1)
    values = {"what": what, "note": note, "name": name, "teacher": teacher, "overrides": overrides, "student": student}
    return type(
        name, (AutoStudent,), {"__doc__": _EXAMPLE.format(**values), "__module__": __name__, "model_class": auto_class}
    )


_HEAD_NOTE = "; its head too where the labels agree"

AutoStudentForCausalLM = auto_student_class(
    AutoModelForCausalLM,
    "a causal language model",
    "HuggingFaceTB/SmolLM2-135M",
    'num_parameters="25%"',
    "LlamaForCausalLM",
)
AutoStudentForMaskedLM = auto_student_class(
    AutoModelForMaskedLM,
    "a masked language model",
    "distilbert/distilbert-base-uncased",
    "dim=384, n_heads=6, hidden_dim=1536",
    "DistilBertForMaskedLM",
)
AutoStudentForSeq2SeqLM = auto_student_class(
    AutoModelForSeq2SeqLM,
    "an encoder-decoder language model",
    "google-t5/t5-small",
    "d_model=256, num_heads=4, d_ff=1024",
    "T5ForConditionalGeneration",
)
AutoStudentForSequenceClassification = auto_student_class(
    AutoModelForSequenceClassification,
    "a sequence classifier, or a regression model or reranker of one output,",
    "distilbert/distilbert-base-uncased-finetuned-sst-2-english",
    "dim=384, n_heads=6, hidden_dim=1536",
    "DistilBertForSequenceClassification",
    _HEAD_NOTE,
)
AutoStudentForTokenClassification = auto_student_class(
    AutoModelForTokenClassification,
    "a token classifier",
    "dslim/bert-base-NER",
    "hidden_size=384, num_attention_heads=6, intermediate_size=1536",
    "BertForTokenClassification",
    _HEAD_NOTE,
)
AutoStudentForQuestionAnswering = auto_student_class(
    AutoModelForQuestionAnswering,
    "an extractive question answering model",
    "distilbert/distilbert-base-cased-distilled-squad",
    "n_layers=2",
    "DistilBertForQuestionAnswering",
)
AutoStudentForMultipleChoice = auto_student_class(
    AutoModelForMultipleChoice,
    "a multiple choice model",
    "google-bert/bert-base-uncased",
    "num_hidden_layers=1",
    "BertForMultipleChoice",
)
AutoStudentForImageClassification = auto_student_class(
    AutoModelForImageClassification,
    "an image classifier",
    "google/vit-base-patch16-224",
    "hidden_size=384, num_attention_heads=6, intermediate_size=1536",
    "ViTForImageClassification",
    _HEAD_NOTE,
)
AutoStudentForMaskedImageModeling = auto_student_class(
    AutoModelForMaskedImageModeling,
    "a model that predicts the pixels of masked patches",
    "google/vit-base-patch16-224",
    "num_hidden_layers=1",
    "ViTForMaskedImageModeling",
)
AutoStudentForPreTraining = auto_student_class(
    AutoModelForPreTraining,
    "a model with the heads of its pretraining, such as a masked autoencoder,",
    "facebook/vit-mae-base",
    "num_hidden_layers=1, decoder_num_hidden_layers=1",
    "ViTMAEForPreTraining",
)
AutoStudentForSemanticSegmentation = auto_student_class(
    AutoModelForSemanticSegmentation,
    "a semantic segmentation model",
    "nvidia/segformer-b0-finetuned-ade-512-512",
    "depths=[1, 1, 1, 1]",
    "SegformerForSemanticSegmentation",
    _HEAD_NOTE,
)
AutoStudentForInstanceSegmentation = auto_student_class(
    AutoModelForInstanceSegmentation,
    "an instance segmentation model",
    "facebook/maskformer-swin-tiny-ade",
    'decoder_config={"decoder_layers": 2}',
    "MaskFormerForInstanceSegmentation",
)
AutoStudentForUniversalSegmentation = auto_student_class(
    AutoModelForUniversalSegmentation,
    "a model for semantic, instance and panoptic segmentation",
    "facebook/mask2former-swin-tiny-coco-instance",
    "decoder_layers=2",
    "Mask2FormerForUniversalSegmentation",
)
AutoStudentForObjectDetection = auto_student_class(
    AutoModelForObjectDetection,
    "an object detector",
    "facebook/detr-resnet-50",
    "decoder_layers=2",
    "DetrForObjectDetection",
    _HEAD_NOTE,
)
AutoStudentForZeroShotImageClassification = auto_student_class(
    AutoModelForZeroShotImageClassification,
    "a model that compares images with texts, such as CLIP,",
    "openai/clip-vit-base-patch32",
    'vision_config={"num_hidden_layers": 1}',
    "CLIPModel",
)
AutoStudentForImageTextToText = auto_student_class(
    AutoModelForImageTextToText,
    "a vision-language model",
    "HuggingFaceTB/SmolVLM-256M-Instruct",
    'text_config={"num_hidden_layers": 1}',
    "Idefics3ForConditionalGeneration",
)
AutoStudentForAudioClassification = auto_student_class(
    AutoModelForAudioClassification,
    "an audio classifier",
    "superb/wav2vec2-base-superb-ks",
    "num_hidden_layers=1",
    "Wav2Vec2ForSequenceClassification",
    _HEAD_NOTE,
)
AutoStudentForCTC = auto_student_class(
    AutoModelForCTC,
    "a speech recognizer trained with connectionist temporal classification",
    "facebook/wav2vec2-base-960h",
    "num_hidden_layers=1",
    "Wav2Vec2ForCTC",
)
AutoStudentForSpeechSeq2Seq = auto_student_class(
    AutoModelForSpeechSeq2Seq,
    "an encoder-decoder speech recognizer",
    "openai/whisper-tiny",
    "decoder_layers=1",
    "WhisperForConditionalGeneration",
)
