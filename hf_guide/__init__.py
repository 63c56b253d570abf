"""hf_guide: small Transformers models made out of big ones."""

import importlib
from typing import TYPE_CHECKING, Any

from hf_guide.version import __version__

_HOMES = {
    "AutoStudent": "modeling_auto",
    "AutoStudentForAudioClassification": "modeling_auto",
    "AutoStudentForCTC": "modeling_auto",
    "AutoStudentForCausalLM": "modeling_auto",
    "AutoStudentForImageClassification": "modeling_auto",
    "AutoStudentForImageTextToText": "modeling_auto",
    "AutoStudentForInstanceSegmentation": "modeling_auto",
    "AutoStudentForMaskedImageModeling": "modeling_auto",
    "AutoStudentForMaskedLM": "modeling_auto",
    "AutoStudentForMultipleChoice": "modeling_auto",
    "AutoStudentForObjectDetection": "modeling_auto",
    "AutoStudentForPreTraining": "modeling_auto",
    "AutoStudentForQuestionAnswering": "modeling_auto",
    "AutoStudentForSemanticSegmentation": "modeling_auto",
    "AutoStudentForSeq2SeqLM": "modeling_auto",
    "AutoStudentForSequenceClassification": "modeling_auto",
    "AutoStudentForSpeechSeq2Seq": "modeling_auto",
    "AutoStudentForTokenClassification": "modeling_auto",
    "AutoStudentForUniversalSegmentation": "modeling_auto",
    "AutoStudentForZeroShotImageClassification": "modeling_auto",
    "FromTeacherMixin": "modeling_auto",
    "from_teacher": "modeling",
    "ShapeCandidate": "shapes.candidates",
    "find_shapes": "shapes.search",
    "CaptureError": "errors",
    "HfGuideError": "errors",
    "LayoutError": "errors",
    "MissingRankError": "errors",
    "NotFiniteError": "errors",
    "OptionError": "errors",
    "ResourceError": "errors",
    "ShapeError": "errors",
    "SubclassError": "errors",
    "TaskError": "errors",
    "TeacherError": "errors",
    "VocabularyError": "errors",
    "Capture": "signal_cache.reader",
    "CaptureConfig": "signal_cache.config",
    "DistillationArguments": "distillation.arguments",
    "DistillationMixin": "distillation.mixin",
    "DistillationTrainer": "distillation.trainer",
    "Seq2SeqDistillationArguments": "distillation.arguments",
    "Seq2SeqDistillationTrainer": "distillation.trainer",
    "capture_teacher": "signal_cache.writer",
    "SentenceCollator": "data.sentence_collator",
    "LossConfig": "distillation.losses.registry",
    "register_loss": "distillation.losses.registry",
    "register_term": "distillation.losses.registry",
    "InitializationConfig": "methods",
    "InitializationMethod": "methods",
    "register_method": "methods",
    "InitializationReport": "initialization.report",
    "register_layout": "layouts.registry",
    "SubclassLabelCollator": "lelp.collator",
    "SubclassModelForImageClassification": "lelp.export",
    "SubclassModelForSequenceClassification": "lelp.export",
    "SubclassProjector": "lelp.projector",
    "capture_targets": "lelp.targets",
    "save_subclass_student": "lelp.export",
    "fit_subclasses": "lelp.fitting",
    "probe_subclasses": "lelp.analysis.probe_subclasses",
    "register_splitter": "lelp.splitters.registry",
}

__all__ = [
    "AutoStudent",
    "AutoStudentForAudioClassification",
    "AutoStudentForCTC",
    "AutoStudentForCausalLM",
    "AutoStudentForImageClassification",
    "AutoStudentForImageTextToText",
    "AutoStudentForInstanceSegmentation",
    "AutoStudentForMaskedImageModeling",
    "AutoStudentForMaskedLM",
    "AutoStudentForMultipleChoice",
    "AutoStudentForObjectDetection",
    "AutoStudentForPreTraining",
    "AutoStudentForQuestionAnswering",
    "AutoStudentForSemanticSegmentation",
    "AutoStudentForSeq2SeqLM",
    "AutoStudentForSequenceClassification",
    "AutoStudentForSpeechSeq2Seq",
    "AutoStudentForTokenClassification",
    "AutoStudentForUniversalSegmentation",
    "AutoStudentForZeroShotImageClassification",
    "FromTeacherMixin",
    "Capture",
    "CaptureConfig",
    "CaptureError",
    "DistillationArguments",
    "DistillationMixin",
    "DistillationTrainer",
    "HfGuideError",
    "InitializationConfig",
    "InitializationMethod",
    "InitializationReport",
    "LayoutError",
    "LossConfig",
    "MissingRankError",
    "NotFiniteError",
    "OptionError",
    "SentenceCollator",
    "Seq2SeqDistillationArguments",
    "Seq2SeqDistillationTrainer",
    "ResourceError",
    "ShapeCandidate",
    "ShapeError",
    "SubclassError",
    "SubclassLabelCollator",
    "SubclassModelForImageClassification",
    "SubclassModelForSequenceClassification",
    "SubclassProjector",
    "TaskError",
    "TeacherError",
    "VocabularyError",
    "capture_targets",
    "capture_teacher",
    "find_shapes",
    "fit_subclasses",
    "from_teacher",
    "probe_subclasses",
    "register_layout",
    "register_method",
    "register_splitter",
    "register_loss",
    "register_term",
    "save_subclass_student",
    "__version__",
]

if TYPE_CHECKING:
    from hf_guide.data.sentence_collator import SentenceCollator
    from hf_guide.distillation.arguments import DistillationArguments, Seq2SeqDistillationArguments
    from hf_guide.distillation.losses.registry import LossConfig, register_loss, register_term
    from hf_guide.distillation.mixin import DistillationMixin
    from hf_guide.distillation.trainer import DistillationTrainer, Seq2SeqDistillationTrainer
    from hf_guide.errors import (
        CaptureError,
        HfGuideError,
        LayoutError,
        MissingRankError,
        NotFiniteError,
        OptionError,
        ResourceError,
        ShapeError,
        SubclassError,
        TaskError,
        TeacherError,
        VocabularyError,
    )
    from hf_guide.initialization.report import InitializationReport
    from hf_guide.layouts.registry import register_layout
    from hf_guide.lelp.analysis.probe_subclasses import probe_subclasses
    from hf_guide.lelp.collator import SubclassLabelCollator
    from hf_guide.lelp.export import save_subclass_student
    from hf_guide.lelp.fitting import fit_subclasses
    from hf_guide.lelp.modeling_subclass import (
        SubclassModelForImageClassification,
        SubclassModelForSequenceClassification,
    )
    from hf_guide.lelp.projector import SubclassProjector
    from hf_guide.lelp.splitters.registry import register_splitter
    from hf_guide.lelp.targets import capture_targets
    from hf_guide.methods import InitializationConfig, InitializationMethod, register_method
    from hf_guide.modeling import from_teacher
    from hf_guide.modeling_auto import (
        AutoStudent,
        AutoStudentForAudioClassification,
        AutoStudentForCausalLM,
        AutoStudentForCTC,
        AutoStudentForImageClassification,
        AutoStudentForImageTextToText,
        AutoStudentForInstanceSegmentation,
        AutoStudentForMaskedImageModeling,
        AutoStudentForMaskedLM,
        AutoStudentForMultipleChoice,
        AutoStudentForObjectDetection,
        AutoStudentForPreTraining,
        AutoStudentForQuestionAnswering,
        AutoStudentForSemanticSegmentation,
        AutoStudentForSeq2SeqLM,
        AutoStudentForSequenceClassification,
        AutoStudentForSpeechSeq2Seq,
        AutoStudentForTokenClassification,
        AutoStudentForUniversalSegmentation,
        AutoStudentForZeroShotImageClassification,
        FromTeacherMixin,
    )
    from hf_guide.signal_cache.config import CaptureConfig
    from hf_guide.signal_cache.reader import Capture
    from hf_guide.signal_cache.writer import capture_teacher


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that `hf-guide --help` need not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'hf_guide' has no attribute {name!r}")
    return getattr(importlib.import_module(f"hf_guide.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
