"""The student of a trainer: checked, initialized from its teacher where no model is passed, and wrapped with PEFT."""

import inspect
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from torch import nn
from torch._dynamo import OptimizedModule
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.trainer_utils import align_special_tokens

from hf_guide.data.sentence_collator import CollatedBatches
from hf_guide.errors import HfGuideError, OptionError, VocabularyError
from hf_guide.hub.metadata import RECORD_NAME, DistillationRecord, load_record
from hf_guide.hub.push import attach_report
from hf_guide.initialization.report import REPORT_NAME, InitializationReport, TrainingSummary
from hf_guide.models.adapters import has_adapter, parametrized_layers, validate_unwrapped, without_adapter
from hf_guide.models.token_rows import attached_tokenizer
from hf_guide.signal_cache.reader import Capture
from hf_guide.utils.public_names import is_local

logger = logging.getLogger(__name__)

_CALIBRATION_INPUTS = ("input_ids", "pixel_values", "input_features", "input_values")


def init_student_from_teacher(
    student: "PreTrainedConfig | Mapping[str, Any]",
    teacher: Any,
    init_kwargs: Mapping[str, Any] | None,
    train_dataset: Any = None,
    data_collator: Any = None,
) -> PreTrainedModel:
    """Return the student that `from_teacher` initializes with a config or with its own arguments.

    Args:
        student: A config, or arguments of `from_teacher`: method, hidden_size and so on; `teacher` among them names another
            teacher than the trainer's.
        teacher: The trainer's, or its signal cache.
        init_kwargs: Of `from_pretrained`; revision, token and trust_remote_code apply here too.
        train_dataset: The method calibrated uses it unless `calibration_dataset` is set: its token ids, or of other data the
            batches that `data_collator` makes.
        data_collator: The trainer's; None for its default one.

    Raises:
        OptionError: There is not exactly one teacher to initialize it from.
        TeacherError: The teacher has an adapter, or cannot be read.
    """
    # Only here: distillation works without initialization.
    from hf_guide.methods import InitializationConfig, make_method
    from hf_guide.modeling import from_teacher

    where = {
        name: value
        for name, value in (init_kwargs or {}).items()
        if name in ("revision", "token", "trust_remote_code")
    }
    chosen: dict[str, Any] = dict(student) if isinstance(student, Mapping) else {"config": student}
    source = chosen.pop("teacher", teacher)
    if isinstance(source, Capture):
        source = source.teacher_source()
    if not isinstance(source, (str, os.PathLike, nn.Module)):
        raise OptionError(
            "A student is initialized from one teacher, a Hub id, a folder or a model; found "
            f"{type(source).__name__}. Name it with 'teacher' among the student's arguments, or pass a model."
        )
    initializer = make_method(InitializationConfig.parse(chosen.get("method", "guide")))
    if initializer.requires_data and "calibration_dataset" not in chosen:
        if _takes_rows(train_dataset, data_collator):
            chosen["calibration_dataset"] = train_dataset
        elif data_collator is not None and train_dataset is not None:
            chosen["calibration_dataset"] = CollatedBatches(train_dataset, data_collator)
    made = from_teacher(source, **(where | chosen))  # type: ignore[arg-type]  # it raises for any other module
    if attached_tokenizer(made) is not None:
        raise OptionError(
            f"The student has a vocabulary of its own, {made.config.vocab_size} tokens, so the data, which are tokenized "
            "already, have other ids. Make the student first, student = from_teacher(...), save it, tokenize the data with "
            "the tokenizer of its folder, and pass both."
        )
    return made


def attach_saved_report(student: Any, *, token: str | bool | None = None) -> None:
    """Attach the initialization report of the folder or repository that a student was loaded from, if it has one.

    Without it, what is saved after training would not name the teacher that the student was initialized from. A model that is
    only built from the config of that folder, or has other shapes than the report, is left as it is.

    Args:
        student: Any model, with or without an adapter; None is a no-op.
        token: Access token of the Hub.
    """
    base = without_adapter(student)
    if not isinstance(base, PreTrainedModel) or getattr(base, "initialization_report", None) is not None:
        return
    report = _saved_file(base, REPORT_NAME, InitializationReport.load, token)
    shapes = {name: list(parameter.shape) for name, parameter in base.named_parameters()}
    if report is not None and all(shapes.get(each.name, each.shape) == each.shape for each in report.parameters):
        attach_report(base, report)


def find_earlier_trainings(student: Any, *, token: str | bool | None = None) -> list[TrainingSummary]:
    """Return the trainings that a student went through before, from its record or the one that was saved with it.

    Args:
        student: Any model, with or without an adapter; None has none.
        token: Access token of the Hub.
    """
    record = find_record(student, token=token)
    return record.trainings if record is not None else []


def find_record(student: Any, *, token: str | bool | None = None) -> DistillationRecord | None:
    """Return the record of a student's training, or the one of the folder or repository that it was loaded from."""
    base = without_adapter(student)
    record: Any = getattr(student, "distillation_record", None)
    if record is None and isinstance(base, PreTrainedModel):
        record = _saved_file(base, RECORD_NAME, load_record, token)
    return record if isinstance(record, DistillationRecord) else None


_Record = TypeVar("_Record", InitializationReport, DistillationRecord)


def _saved_file(
    student: PreTrainedModel, file: str, load: Callable[[Path], _Record], token: str | bool | None
) -> _Record | None:
    """Return what a file of the folder or repository contains that a student was loaded from; None without one."""
    # A config names its folder too, but only `from_pretrained` marks the weights.
    is_loaded = any(getattr(parameter, "_is_hf_initialized", False) for parameter in student.parameters())
    name = student.name_or_path or ""
    if not is_loaded or not name:
        return None
    try:
        if is_local(name):
            path = Path(name).expanduser() / file
        else:
            revision = getattr(student.config, "_commit_hash", None)
            path = Path(hf_hub_download(name, file, revision=revision, token=token))
        return load(path) if path.is_file() else None
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled) as error:
        logger.info("%s of %s could not be downloaded: %s", file, name, error)
    except HfGuideError as error:
        logger.warning("How the student was made is not saved with it: %s", error)
    return None


def _takes_rows(dataset: Any, data_collator: Any) -> bool:
    """Whether a dataset's rows themselves are calibration data: with a collator only token ids, which it may mask."""
    first = None if dataset is None else next(iter(dataset), None)
    inputs = [name for name in _CALIBRATION_INPUTS if name in first] if isinstance(first, Mapping) else []
    return bool(inputs) and (data_collator is None or inputs == ["input_ids"])


def validate_student(model: Any) -> None:
    """Check that a student is a model that the trainer can wrap.

    Raises:
        OptionError: A name, which does not specify the student's task; or a model in a wrapper.
    """
    if isinstance(model, (str, os.PathLike)):
        raise OptionError(
            f"model must be a student, not its name; found {os.fspath(model)!r}. Load it with the AutoModelFor... "
            "class of its task, or pass a config, or the arguments of from_teacher, to initialize it from its "
            "teacher."
        )
    validate_unwrapped(model, "student")


def validate_trainable(student: nn.Module) -> None:
    """Check that a student can be trained, and saved as a model of its class.

    Raises:
        OptionError: All of its parameters are frozen; or `torch.compile` or `torch.nn.utils.parametrize` has renamed some,
            which its stock class does not know.
    """
    compiled = [name for name, module in student.named_modules() if isinstance(module, OptimizedModule)]
    if compiled:
        raise OptionError(
            f"{compiled[0]} of the student is compiled, and its weights would be saved under other names. Pass the model "
            "itself, and DistillationArguments(torch_compile=True)."
        )
    added = parametrized_layers(student)
    if added:
        raise OptionError(
            f"{len(added)} layers of the student are parametrized (weight_norm, spectral_norm, ...), such as {added[0]}: its "
            f"files would not load as a {type(without_adapter(student)).__name__}. Call "
            "torch.nn.utils.parametrize.remove_parametrizations on them first."
        )
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise OptionError(
            "No parameter of the student is trainable: all have requires_grad=False. Unfreeze some with requires_grad_(True), "
            "pass peft_config, or load a saved adapter with PeftModel.from_pretrained(..., is_trainable=True)."
        )


def validate_tokenizer(student: Any, processing_class: Any) -> None:
    """Check that the batches of a student with another vocabulary than its teacher's are made by its own tokenizer.

    Raises:
        VocabularyError: They are made by another one, such as its teacher's.
    """
    own, given = attached_tokenizer(student), getattr(processing_class, "tokenizer", processing_class)
    if own is None or not hasattr(given, "get_vocab") or own.get_vocab() == given.get_vocab():
        return
    raise VocabularyError(
        f"The student has a vocabulary of {len(own)} tokens, and processing_class {len(given)}: its ids mean other tokens "
        "to the student. Tokenize the data with the tokenizer that the student is saved with, "
        "AutoTokenizer.from_pretrained(folder of the student), and pass it as processing_class."
    )


def align_student_special_tokens(student: Any, processing_class: Any) -> None:
    """Set the special tokens of the tokenizer in a student's config, as `Trainer` does when training begins.

    Classifiers find the last token of a text by them: without this, an evaluation before training would read padding.
    """
    if isinstance(processing_class, (PreTrainedTokenizerBase, ProcessorMixin)) and hasattr(student, "config"):
        align_special_tokens(student, processing_class)


def wrap_with_peft(model: Any, model_init: Any, peft_config: Any) -> tuple[Any, Any]:
    """Return the model, or the function that makes it, with an adapter.

    Raises:
        OptionError: The model has an adapter already, or `peft_config` is not one of PEFT's.
    """
    from peft import PeftConfig, get_peft_model

    if not isinstance(peft_config, PeftConfig):
        raise OptionError(
            f"peft_config must be one of PEFT's configs, such as LoraConfig; found {type(peft_config).__name__}."
        )

    def with_adapter(student: Any) -> Any:
        if has_adapter(student):
            raise OptionError(
                "The student has an adapter already, so peft_config would add a second one. Leave peft_config out "
                "to train the existing adapter, or pass the base model."
            )
        return get_peft_model(student, peft_config)

    if model is not None:
        return with_adapter(model), None
    takes_trial = model_init is not None and len(inspect.signature(model_init).parameters) > 0
    if takes_trial:
        return None, lambda trial: with_adapter(model_init(trial))
    return None, lambda: with_adapter(model_init())
