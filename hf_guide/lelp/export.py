"""Three formats to save a student with subclasses in, each exact about what it is.

- "remote_code": the class logits that the student was trained and evaluated with, by a class whose code is saved next to the
  weights.
- "subclass_head": the stock model, whose labels are the subclasses ("positive/3").
- "refit_head": the stock model with one row a class, refitted on the inputs of the student's own head. A linear layer cannot
  compute a log-sum-exp, so the share of held-out examples on which the two agree is measured and recorded.
"""

import copy
import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from hf_guide.distillation.mixin import DistillationMixin
from hf_guide.distillation.student_init import attach_saved_report, find_record
from hf_guide.distillation.subclass_logits import class_logits
from hf_guide.distillation.training_record import build_training_record
from hf_guide.errors import OptionError, TaskError
from hf_guide.hub.metadata import SUBCLASS_HEAD_AGREEMENT, DistillationRecord
from hf_guide.hub.model_card import write_model_card
from hf_guide.hub.push import attach_record, save_student
from hf_guide.hub.saved_model import is_saved_in, saved_weights_fingerprint
from hf_guide.initialization.subclass_head import get_num_subclasses
from hf_guide.lelp import modeling_subclass
from hf_guide.lelp.modeling_subclass import (
    SubclassConfig,
    SubclassModel,
    SubclassModelForImageClassification,
    SubclassModelForSequenceClassification,
    wrap_student,
)
from hf_guide.models.code_references import clean_saved_folder
from hf_guide.models.modes import eval_mode
from hf_guide.models.penultimate import find_classifier
from hf_guide.signal_cache.data import TeacherBatchCollator
from hf_guide.tasks import Task, task_of
from hf_guide.teachers.forward import forward_outputs
from hf_guide.utils.deprecation import RenamedOptions, with_renamed_parameters
from hf_guide.utils.files import staged_update
from hf_guide.utils.labels import config_class_names
from hf_guide.validation import StringEnum, check_choice, check_is_dataset, check_number

__all__ = [
    "ExportFormat",
    "RefitResult",
    "SubclassConfig",
    "SubclassModelForImageClassification",
    "SubclassModelForSequenceClassification",
    "refit_class_head",
    "save_subclass_student",
    "with_class_logits",
]

_MAX_ITER = 200
_RIDGE = 1e-6

_CLASSES: dict[Task, tuple[type[SubclassModel], Any]] = {
    Task.SEQUENCE_CLASSIFICATION: (SubclassModelForSequenceClassification, AutoModelForSequenceClassification),
    Task.IMAGE_CLASSIFICATION: (SubclassModelForImageClassification, AutoModelForImageClassification),
}

# With hf_guide imported they load without trust_remote_code; saved, their code is saved as well.
AutoConfig.register(SubclassConfig.model_type, SubclassConfig, exist_ok=True)
SubclassConfig.register_for_auto_class()
for _model_class, _auto in _CLASSES.values():
    _auto.register(SubclassConfig, _model_class, exist_ok=True)
    _model_class.register_for_auto_class(_auto.__name__)


class ExportFormat(StringEnum):
    """How a student with subclasses is saved."""

    REMOTE_CODE = "remote_code"
    SUBCLASS_HEAD = "subclass_head"
    REFIT_HEAD = "refit_head"


_RENAMED = RenamedOptions(names={"way": "export_format"})
_RENAMED_FORMATS = RenamedOptions(
    values={
        "export_format": {
            "code": ExportFormat.REMOTE_CODE.value,
            "subclasses": ExportFormat.SUBCLASS_HEAD.value,
            "classes": ExportFormat.REFIT_HEAD.value,
        }
    }
)


@with_renamed_parameters(_RENAMED)
def save_subclass_student(
    student: "PreTrainedModel | DistillationMixin",
    save_directory: str | os.PathLike[str],
    export_format: str | ExportFormat = "remote_code",
    *,
    dataset: Any = None,
    eval_dataset: Any = None,
    processing_class: Any = None,
    data_collator: Callable[[Any], Mapping[str, Any]] | None = None,
    batch_size: int = 32,
    show_progress: bool = True,
) -> PreTrainedModel:
    """Save a student with subclasses, its records, model card and tokenizer; return the model that was saved.

    Args:
        student: A model whose config has `num_subclasses`; or the `DistillationTrainer` that trained it, whose run is then
            described in the record and the card, and whose tokenizer or image processor is saved where none is passed.
        save_directory: A folder.
        export_format: "remote_code", "subclass_head" or "refit_head", as this module's docstring describes.
        dataset, eval_dataset, data_collator, batch_size: For "refit_head", see `refit_class_head`.
        processing_class: The tokenizer or image processor, saved next to the weights.
        show_progress: Show progress, and print the agreement of a refitted head.

    Raises:
        OptionError: An unknown format, "refit_head" without a dataset, or a student with an adapter.
        TaskError: A student without subclasses.

    Example:
        >>> from hf_guide import from_teacher
        >>> student = from_teacher(
        ...     "distilbert/distilbert-base-uncased-finetuned-sst-2-english",
        ...     num_subclasses=4,
        ...     num_hidden_layers=1,
        ...     show_progress=False,
        ... )
        >>> model = save_subclass_student(student, "student", "remote_code")
        >>> type(model).__name__, model.config.id2label
        ('SubclassModelForSequenceClassification', {0: 'LABEL_0', 1: 'LABEL_1'})
    """
    export_format = ExportFormat(_check_export_format(export_format))
    if isinstance(student, DistillationMixin):
        processing_class = processing_class or student.processing_class
        student = _student_with_record(student)
    check_subclass_student(student)
    _attach_saved_records(student)
    model: PreTrainedModel = student
    if export_format is ExportFormat.REMOTE_CODE:
        model = with_class_logits(student)
    elif export_format is ExportFormat.REFIT_HEAD:
        if dataset is None:
            raise OptionError(
                'export_format="refit_head" fits the head to a dataset: pass dataset=; it needs no labels.'
            )
        result = refit_class_head(
            student,
            dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=data_collator,
            batch_size=batch_size,
            show_progress=show_progress,
        )
        model = result.model
        if show_progress:
            print(result)
    _save_with_records(student, model, Path(save_directory), processing_class)
    return model


def _check_export_format(export_format: str | ExportFormat) -> str:
    translated = _RENAMED_FORMATS.translate({"export_format": export_format}, "save_subclass_student", stacklevel=5)
    return check_choice("export_format", translated["export_format"], ExportFormat)


def _student_with_record(trainer: DistillationMixin) -> PreTrainedModel:
    """Return the student of a trainer, with the record of its run."""
    student: PreTrainedModel = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    attach_record(student, trainer.present_record() or build_training_record(trainer))
    return student


def _attach_saved_records(student: PreTrainedModel) -> None:
    """Attach the report and the record of the folder that a student was loaded from, if it has none.

    The record's metrics are left out where they are not of the weights that the student has in memory.
    """
    attach_saved_report(student)
    record = find_record(student)
    if record is None or getattr(student, "distillation_record", None) is not None:
        return
    folder = Path(student.name_or_path or "").expanduser()
    is_same = is_saved_in(student, folder) and record.weights in (None, saved_weights_fingerprint(folder))
    attach_record(student, record if is_same else dataclasses.replace(record, metrics={}))


def with_class_logits(student: PreTrainedModel) -> SubclassModel:
    """Return a model whose logits are exactly the student's class logits, and whose labels are the classes.

    It contains the student itself, not a copy. `save_pretrained` saves its code as well:
    `AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)` (or `...ForImageClassification`) loads
    it anywhere; where this class has been imported from hf_guide, it needs no trust_remote_code.
    """
    task = check_subclass_student(student)
    return wrap_student(student, _CLASSES[task][0], config_class_names(student.config))


def _save_with_records(student: PreTrainedModel, model: PreTrainedModel, folder: Path, processing_class: Any) -> None:
    records = ("initialization_report", "distillation_record")
    for name in records:
        record = getattr(student, name, None)
        if record is not None and getattr(model, name, None) is None:
            setattr(model, name, record)
    training: Any = getattr(model, "distillation_record", None)
    if model is not student and training is not None:
        # Its tensors have other names than the student's, whose fingerprint is not theirs.
        attach_record(model, dataclasses.replace(training, weights=None))
    with staged_update(folder) as staged:
        save_student(model, type(model).save_pretrained, staged)
        if processing_class is not None:
            processing_class.save_pretrained(staged)
            clean_saved_folder(staged)
    if not isinstance(model, SubclassModel):
        _remove_code_of_earlier_export(folder)
    if any(getattr(model, name, None) is not None for name in records):
        write_model_card(folder, getattr(model, "initialization_report", None))


def _remove_code_of_earlier_export(folder: Path) -> None:
    """Remove the code that an export as "remote_code" has left in a folder, unless someone has changed it."""
    ours = Path(modeling_subclass.__file__)
    left = folder / ours.name
    if left.is_file() and left.read_bytes() == ours.read_bytes():
        left.unlink()


@dataclass(frozen=True)
class RefitResult:
    """A stock model with one row a class, and how often it agrees with the student that it was refitted from.

    Attributes:
        model: The model.
        agreement: The share of held-out examples for which both predict the same class.
        examples: The number of held-out examples.
    """

    model: PreTrainedModel
    agreement: float
    examples: int

    def __str__(self) -> str:
        return (
            f"The refitted linear head predicts the class of the subclass head on {self.agreement:.2%} of {self.examples:,} "
            "examples that it was not fitted to."
        )


def check_subclass_student(student: PreTrainedModel) -> Task:
    """Return the task of a student with subclasses.

    Raises:
        OptionError: Not a model, or a model with an adapter.
        TaskError: It has no subclasses.
    """
    if not isinstance(student, PreTrainedModel) and not hasattr(student, "get_base_model"):
        raise OptionError(f"A student must be a PreTrainedModel; found a {type(student).__name__}.")
    if hasattr(student, "get_base_model"):
        raise OptionError("The student has an adapter; pass what its merge_and_unload() returns.")
    if student.config.model_type == SubclassConfig.model_type:
        raise TaskError(
            f"{type(student).__name__} outputs class logits already: save it with save_pretrained. For another format pass "
            "the student that it contains."
        )
    if get_num_subclasses(student.config) == 1:
        raise TaskError(
            f"{type(student).__name__} has no subclasses: its config's num_subclasses is 1 or missing. Save it with "
            "save_pretrained."
        )
    return task_of(student)


def refit_class_head(
    student: PreTrainedModel,
    dataset: Any,
    *,
    eval_dataset: Any = None,
    held_out: float = 0.2,
    processing_class: Any = None,
    data_collator: Callable[[Any], Mapping[str, Any]] | None = None,
    batch_size: int = 32,
    seed: int = 0,
    show_progress: bool = True,
) -> RefitResult:
    """Return a stock model with one row a class, and how often it agrees with the student.

    The rows are a logistic regression of the student's class probabilities on the inputs of its own head.

    Args:
        student: Not modified.
        dataset: Examples as for training; it needs no labels.
        eval_dataset: Examples to measure the agreement on; None holds out the share `held_out` of the dataset.
        processing_class, data_collator: Make batches; by default the tokenizer pads, or tensors are stacked.
        seed: Of the examples that are held out.

    Raises:
        OptionError: `held_out` is not between 0 and 1, or too few examples.
        TaskError: A student without subclasses, or whose head is not a linear layer.
    """
    task = check_subclass_student(student)
    classifier = find_classifier(student, task)
    if not isinstance(classifier, nn.Linear):
        raise TaskError(
            f"The head of {type(student).__name__} is a {type(classifier).__name__}; only a linear layer can be refitted."
        )
    check_number("held_out", held_out, 0, 1, includes_low=False, includes_high=False)
    collate = TeacherBatchCollator(student, task, data_collator, processing_class, drop=True)
    features, exact = _collect_head_inputs(student, task, dataset, collate, batch_size, show_progress)
    if eval_dataset is not None:
        held_features, held_exact = _collect_head_inputs(
            student, task, eval_dataset, collate, batch_size, show_progress
        )
    else:
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
        count = max(1, round(held_out * len(order)))
        held_features, held_exact = features[order[:count]], exact[order[:count]]
        features, exact = features[order[count:]], exact[order[count:]]
    if len(features) < exact.shape[1] or not len(held_features):
        raise OptionError(f"{len(features)} examples are too few to fit {exact.shape[1]} classes to; give more.")
    weight, bias = _fit_class_head(features, exact, classifier, get_num_subclasses(student.config))
    model = _replace_head(student, classifier, weight, bias)
    # Measured with the head as it is saved, in the student's own dtype.
    head = find_classifier(model, task)
    logits = held_features @ head.weight.detach().double().T.cpu() + (
        0.0 if head.bias is None else head.bias.detach().double().cpu()
    )
    agreement = (logits.argmax(1) == held_exact.argmax(1)).double().mean().item()
    measured_on = (
        f"held-out {held_out:.0%} of the refit's dataset" if eval_dataset is None else "the refit's eval_dataset"
    )
    model.distillation_record = _refit_record(  # type: ignore[assignment]
        student, model, agreement, f"{measured_on} ({len(held_features):,} examples)"
    )
    return RefitResult(model, agreement, len(held_features))


@torch.no_grad()
def _collect_head_inputs(
    student: PreTrainedModel,
    task: Task,
    dataset: Any,
    collate: TeacherBatchCollator,
    batch_size: int,
    show_progress: bool,
) -> tuple[Tensor, Tensor]:
    """Return the inputs of the head, (N, width), and the class logits, (N, C), in float64."""
    check_is_dataset(dataset, "dataset")
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=batch_size, collate_fn=collate)
    head_inputs: list[Tensor] = []
    logits: list[Tensor] = []
    with eval_mode(student):
        for batch in tqdm(loader, desc="Running the student", disable=not show_progress):
            inputs = {name: value.to(student.device) for name, value in batch.items() if name != "labels"}
            outputs = forward_outputs(student, task, inputs, features=True)
            every_example = torch.ones(len(outputs.logits), dtype=torch.bool, device=outputs.logits.device)
            head_inputs.append(outputs.item_features(task, every_example, student.config).double().cpu())
            logits.append(class_logits(outputs.logits.double(), get_num_subclasses(student.config)).cpu())
    if not head_inputs:
        raise OptionError("The dataset is empty; the head is refitted to the student's outputs for its examples.")
    return torch.cat(head_inputs), torch.cat(logits)


def _fit_class_head(
    features: Tensor, exact: Tensor, classifier: nn.Linear, num_subclasses: int
) -> tuple[Tensor, Tensor]:
    """Return rows (C, width) and biases (C,) whose softmax is closest to that of `exact` (cross-entropy, L-BFGS, float64)."""
    with torch.no_grad():
        subclass_outputs = (classifier.weight.detach().double().cpu() @ features.T).T
        bias_per_subclass = torch.zeros(subclass_outputs.shape[1], dtype=torch.float64)
        if classifier.bias is not None:
            bias_per_subclass = classifier.bias.detach().double().cpu()
        shares = (
            (subclass_outputs + bias_per_subclass).unflatten(1, (-1, num_subclasses)).softmax(-1).mean(0)
        )  # (C, S)
        # The tangent to the log-sum-exp at the average shares.
        start = (classifier.weight.detach().double().cpu().unflatten(0, shares.shape) * shares[..., None]).sum(1)
        entropy = torch.special.entr(shares).sum(1)
        bias = (bias_per_subclass.view(shares.shape) * shares).sum(1) + entropy
    center, scale = features.mean(0), features.std(0).clamp(min=1e-8)
    if classifier.bias is None:
        center = torch.zeros_like(center)
    inputs, target = (features - center) / scale, exact.softmax(1)
    rows = (start * scale).requires_grad_()
    offsets = (bias + start @ center).requires_grad_()
    parameters = [rows] if classifier.bias is None else [rows, offsets]
    optimizer = torch.optim.LBFGS(parameters, max_iter=_MAX_ITER, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = inputs @ rows.T + (offsets if classifier.bias is not None else 0.0)
        loss = nn.functional.cross_entropy(logits, target) + _RIDGE * rows.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    weight = rows.detach() / scale
    return weight, offsets.detach() - weight @ center


def _replace_head(student: PreTrainedModel, classifier: nn.Linear, weight: Tensor, bias: Tensor) -> PreTrainedModel:
    """Return a copy of the student whose classifier has these rows, one a class."""
    module_name = next(name for name, module in student.named_modules() if module is classifier)
    names = config_class_names(student.config)
    model = copy.deepcopy(student)
    old = classifier.weight
    head = nn.Linear(weight.shape[1], len(weight), classifier.bias is not None, device=old.device, dtype=old.dtype)
    with torch.no_grad():
        head.weight.copy_(weight)
        if head.bias is not None:
            head.bias.copy_(bias)
    parent, _, attribute = module_name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, head)
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: number for number, name in enumerate(names)}
    del model.config.num_subclasses
    for module in model.modules():
        if isinstance(getattr(module, "num_labels", None), int):
            module.num_labels = len(names)  # type: ignore[assignment]
    return model


def _refit_record(
    student: PreTrainedModel, model: PreTrainedModel, agreement: float, measured_on: str
) -> DistillationRecord:
    """Return the record of a student's training, with the agreement as its only metric: the others are of another head."""
    training_record = getattr(student, "distillation_record", None)
    record = copy.deepcopy(training_record) if training_record is not None else DistillationRecord()
    record.student_class, record.student_parameters = type(model).__name__, model.num_parameters()
    record.metrics, record.evaluated_on = {SUBCLASS_HEAD_AGREEMENT: agreement}, measured_on
    record.teacher_metrics, record.random_metrics = {}, {}
    record.weights = None
    return record
