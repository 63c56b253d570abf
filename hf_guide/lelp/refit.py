"""A linear head with one row a class, for a student whose head tells subclasses apart.

A linear layer cannot say all that a log-sum-exp does, so how often the two agree is measured on held-out examples.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_guide.distillation.subclass_logits import class_logits
from hf_guide.errors import OptionError, TaskError
from hf_guide.hub.metadata import SUBCLASS_HEAD_AGREEMENT, DistillationRecord
from hf_guide.initialization.subclass_head import get_num_subclasses
from hf_guide.lelp.modeling_subclass import SubclassConfig
from hf_guide.models.modes import eval_mode
from hf_guide.models.penultimate import find_classifier
from hf_guide.signal_cache.data import TeacherBatchCollator
from hf_guide.tasks import Task, task_of
from hf_guide.teachers.forward import forward_outputs
from hf_guide.utils.labels import config_class_names

_MAX_ITER = 200
_RIDGE = 1e-6


@dataclass(frozen=True)
class RefitResult:
    """A stock model with one row a class, and how near it is to the student that it was made of.

    Attributes:
        model: the model.
        agreement: the share of held-out examples on which both choose the same class.
        examples: how many these are.
    """

    model: PreTrainedModel
    agreement: float
    examples: int

    def __str__(self) -> str:
        return (
            f"A linear head chooses the class of the subclass head on {self.agreement:.2%} of {self.examples:,} examples "
            "that it was not fitted to."
        )


def check_subclass_student(student: PreTrainedModel) -> Task:
    """Return the task of a student with subclasses.

    Raises:
        OptionError: it has an adapter.
        TaskError: it has no subclasses.
    """
    if not isinstance(student, PreTrainedModel) and not hasattr(student, "get_base_model"):
        raise OptionError(f"A student was expected, a PreTrainedModel, not a {type(student).__name__}.")
    if hasattr(student, "get_base_model"):
        raise OptionError("The student has an adapter; pass what its merge_and_unload() returns.")
    if student.config.model_type == SubclassConfig.model_type:
        raise TaskError(
            f"{type(student).__name__} gives class logits already: save it with save_pretrained. The other ways out are of "
            "the student that it was made of."
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

    The rows are a logistic regression of the student's class probabilities on what its own head is fed.

    Args:
        student: left as it is.
        dataset: examples as for training; no labels are needed.
        eval_dataset: what the agreement is measured on; by default the share `held_out` of the dataset, which is not learned.
        processing_class, data_collator: make batches; by default the tokenizer pads, or tensors are stacked.
        seed: of what is held out.

    Raises:
        OptionError: a share that is none, or too few examples.
        TaskError: a student without subclasses, or whose head is no linear layer.
    """
    task = check_subclass_student(student)
    classifier = find_classifier(student, task)
    if not isinstance(classifier, nn.Linear):
        raise TaskError(
            f"The head of {type(student).__name__} is a {type(classifier).__name__}; a linear layer is refitted."
        )
    if not 0 < held_out < 1:
        raise OptionError(f"held_out is a share between 0 and 1; found {held_out!r}.")
    collate = TeacherBatchCollator(student, task, data_collator, processing_class, drop=True)
    features, exact = _collect_head_inputs(student, task, classifier, dataset, collate, batch_size, show_progress)
    if eval_dataset is not None:
        others, truth = _collect_head_inputs(
            student, task, classifier, eval_dataset, collate, batch_size, show_progress
        )
    else:
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
        count = max(1, round(held_out * len(order)))
        others, truth = features[order[:count]], exact[order[:count]]
        features, exact = features[order[count:]], exact[order[count:]]
    if len(features) < exact.shape[1] or not len(others):
        raise OptionError(f"{len(features)} examples are too few to fit {exact.shape[1]} classes to; give more.")
    weight, bias = _fit_class_head(features, exact, classifier, get_num_subclasses(student.config))
    model = _replace_head(student, classifier, weight, bias)
    # As it is saved, in the student's own dtype.
    head = find_classifier(model, task)
    chosen = others @ head.weight.detach().double().T.cpu() + (
        0.0 if head.bias is None else head.bias.detach().double().cpu()
    )
    agreement = (chosen.argmax(1) == truth.argmax(1)).double().mean().item()
    model.distillation_record = _refit_record(student, model, agreement)  # type: ignore[assignment]
    return RefitResult(model, agreement, len(others))


@torch.no_grad()
def _collect_head_inputs(
    student: PreTrainedModel,
    task: Task,
    classifier: nn.Module,
    dataset: Any,
    collate: TeacherBatchCollator,
    batch_size: int,
    show_progress: bool,
) -> tuple[Tensor, Tensor]:
    """Return what the head is fed, (N, width), and the class logits, (N, C), in float64."""
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=batch_size, collate_fn=collate)
    fed: list[Tensor] = []
    logits: list[Tensor] = []
    with eval_mode(student):
        for batch in tqdm(loader, desc="Listening to the student", disable=not show_progress):
            inputs = {name: value.to(student.device) for name, value in batch.items() if name != "labels"}
            outputs = forward_outputs(student, task, inputs, features=True)
            every_example = torch.ones(len(outputs.logits), dtype=torch.bool, device=outputs.logits.device)
            fed.append(outputs.item_features(task, every_example, student.config).double().cpu())
            logits.append(class_logits(outputs.logits.double(), get_num_subclasses(student.config)).cpu())
    if not fed:
        raise OptionError("The dataset is empty; the head is refitted to what the student says of its examples.")
    return torch.cat(fed), torch.cat(logits)


def _fit_class_head(
    features: Tensor, exact: Tensor, classifier: nn.Linear, num_subclasses: int
) -> tuple[Tensor, Tensor]:
    """Return rows (C, width) and biases (C,) whose softmax is nearest to that of `exact` (Newton-like steps, float64)."""
    with torch.no_grad():
        wide = (classifier.weight.detach().double().cpu() @ features.T).T
        own = torch.zeros(wide.shape[1], dtype=torch.float64)
        own = own if classifier.bias is None else classifier.bias.detach().double().cpu()
        shares = (wide + own).unflatten(1, (-1, num_subclasses)).softmax(-1).mean(0)  # (C, S)
        # The tangent to the log-sum-exp at the average shares.
        start = (classifier.weight.detach().double().cpu().unflatten(0, shares.shape) * shares[..., None]).sum(1)
        entropy = torch.special.entr(shares).sum(1)
        bias = (own.view(shares.shape) * shares).sum(1) + entropy
    centre, scale = features.mean(0), features.std(0).clamp(min=1e-8)
    if classifier.bias is None:
        centre = torch.zeros_like(centre)
    inputs, target = (features - centre) / scale, exact.softmax(1)
    rows = (start * scale).requires_grad_()
    offsets = (bias + start @ centre).requires_grad_()
    free = [rows] if classifier.bias is None else [rows, offsets]
    optimizer = torch.optim.LBFGS(free, max_iter=_MAX_ITER, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = inputs @ rows.T + (offsets if classifier.bias is not None else 0.0)
        loss = nn.functional.cross_entropy(logits, target) + _RIDGE * rows.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    weight = rows.detach() / scale
    return weight, offsets.detach() - weight @ centre


def _replace_head(student: PreTrainedModel, classifier: nn.Linear, weight: Tensor, bias: Tensor) -> PreTrainedModel:
    home = next(name for name, module in student.named_modules() if module is classifier)
    names = config_class_names(student.config)
    model = copy.deepcopy(student)
    like = classifier.weight
    head = nn.Linear(weight.shape[1], len(weight), classifier.bias is not None, device=like.device, dtype=like.dtype)
    with torch.no_grad():
        head.weight.copy_(weight)
        if head.bias is not None:
            head.bias.copy_(bias)
    parent, _, last = home.rpartition(".")
    setattr(model.get_submodule(parent), last, head)
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: number for number, name in enumerate(names)}
    del model.config.num_subclasses
    for module in model.modules():
        if isinstance(getattr(module, "num_labels", None), int):
            module.num_labels = len(names)  # type: ignore[assignment]
    return model


def _refit_record(student: PreTrainedModel, model: PreTrainedModel, agreement: float) -> DistillationRecord:
    known = getattr(student, "distillation_record", None)
    record = copy.deepcopy(known) if known is not None else DistillationRecord()
    record.student_class, record.student_parameters = type(model).__name__, model.num_parameters()
    record.metrics = {SUBCLASS_HEAD_AGREEMENT: agreement, **record.metrics}
    return record
