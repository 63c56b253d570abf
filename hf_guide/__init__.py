"""hf_guide: small Transformers models made out of big ones."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "AutoStudent": "auto",
    "AutoStudentForCausalLM": "auto",
    "AutoStudentForImageClassification": "auto",
    "AutoStudentForMaskedLM": "auto",
    "AutoStudentForSeq2SeqLM": "auto",
    "AutoStudentForSequenceClassification": "auto",
    "AutoStudentForTokenClassification": "auto",
    "FromTeacherMixin": "auto",
    "from_teacher": "students",
    "CaptureError": "errors",
    "HfGuideError": "errors",
    "LayoutError": "errors",
    "MissingRankError": "errors",
    "NotFiniteError": "errors",
    "OptionError": "errors",
    "ShapeError": "errors",
    "SubclassError": "errors",
    "TaskError": "errors",
    "TeacherError": "errors",
    "VocabularyError": "errors",
    "Capture": "capture.reading",
    "CaptureConfig": "capture.options",
    "DistillationArguments": "distillation.arguments",
    "DistillationTrainer": "distillation.trainer",
    "capture_teacher": "capture.writing",
    "register_term": "distillation.objectives",
    "InitializationConfig": "initialization.options",
    "InitializationReport": "initialization.report",
    "register_layout": "initialization.layouts",
    "SubclassLabelCollator": "lelp.collator",
    "SubclassModelForImageClassification": "lelp.publishing",
    "SubclassModelForSequenceClassification": "lelp.publishing",
    "SubclassProjector": "lelp.projector",
    "capture_targets": "lelp.targets",
    "save_subclass_student": "lelp.publishing",
    "fit_subclasses": "lelp.fitting",
    "register_splitter": "lelp.splitters",
}

__all__ = [
    "AutoStudent",
    "AutoStudentForCausalLM",
    "AutoStudentForImageClassification",
    "AutoStudentForMaskedLM",
    "AutoStudentForSeq2SeqLM",
    "AutoStudentForSequenceClassification",
    "AutoStudentForTokenClassification",
    "FromTeacherMixin",
    "Capture",
    "CaptureConfig",
    "CaptureError",
    "DistillationArguments",
    "DistillationTrainer",
    "HfGuideError",
    "InitializationConfig",
    "InitializationReport",
    "LayoutError",
    "MissingRankError",
    "NotFiniteError",
    "OptionError",
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
    "fit_subclasses",
    "from_teacher",
    "register_layout",
    "register_splitter",
    "register_term",
    "save_subclass_student",
    "__version__",
]

if TYPE_CHECKING:
    from hf_guide.auto import (
        AutoStudent,
        AutoStudentForCausalLM,
        AutoStudentForImageClassification,
        AutoStudentForMaskedLM,
        AutoStudentForSeq2SeqLM,
        AutoStudentForSequenceClassification,
        AutoStudentForTokenClassification,
        FromTeacherMixin,
    )
    from hf_guide.capture.options import CaptureConfig
    from hf_guide.capture.reading import Capture
    from hf_guide.capture.writing import capture_teacher
    from hf_guide.distillation.arguments import DistillationArguments
    from hf_guide.distillation.objectives import register_term
    from hf_guide.distillation.trainer import DistillationTrainer
    from hf_guide.errors import (
        CaptureError,
        HfGuideError,
        LayoutError,
        MissingRankError,
        NotFiniteError,
        OptionError,
        ShapeError,
        SubclassError,
        TaskError,
        TeacherError,
        VocabularyError,
    )
    from hf_guide.initialization.layouts import register_layout
    from hf_guide.initialization.options import InitializationConfig
    from hf_guide.initialization.report import InitializationReport
    from hf_guide.lelp.collator import SubclassLabelCollator
    from hf_guide.lelp.fitting import fit_subclasses
    from hf_guide.lelp.projector import SubclassProjector
    from hf_guide.lelp.publishing import (
        SubclassModelForImageClassification,
        SubclassModelForSequenceClassification,
        save_subclass_student,
    )
    from hf_guide.lelp.splitters import register_splitter
    from hf_guide.lelp.targets import capture_targets
    from hf_guide.students import from_teacher


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that `hf-guide --help` need not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'hf_guide' has no attribute {name!r}")
    return getattr(importlib.import_module(f"hf_guide.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
