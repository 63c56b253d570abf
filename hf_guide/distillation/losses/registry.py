"""What a student can be asked to learn: named terms, each one number an item, and the registry they stand in.

Adding one takes a function and a decorator:

    @register_term("margin", needs="logits", help="the teacher's margin, squared error")
    def margin(student: Tensor, teacher: Dense, labels: Tensor | None, args: DistillationArguments) -> Tensor:
        return (top_two(student) - top_two(teacher.logits)).square()
"""

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_guide.distillation.losses.divergences import divergence
from hf_guide.distillation.losses.divergences import dkd as decoupled_divergence
from hf_guide.errors import OptionError, TaskError
from hf_guide.tasks import NON_CATEGORICAL_PROBLEM_TYPES, Task
from hf_guide.teachers.signals import DenseTarget, TeacherSignal, TopKTarget
from hf_guide.validation import check_weight, did_you_mean

if TYPE_CHECKING:
    from hf_guide.distillation.arguments import DistillationArguments

TASK_LOSS = "ce"


@dataclass(frozen=True)
class LossTerm:
    """One thing to learn.

    Attributes:
        function: `logits` terms take (student's logits (items, classes), the teacher's `Dense` or `TopK`, labels or None,
            arguments); `hidden_states` and `embedding` terms take (student's, teacher's, arguments), each (items, width),
            once for each pair of layers; `subclasses` terms (student's subclass logits (items, S * C), the batch's subclass
            probabilities (items, S * C), arguments). All return one number an item, (items,), which is checked.
        needs: what it looks at.
        help: one line for people.
        task_only: the values of `Task` it is for; empty for all.
    """

    name: str
    function: Callable[..., Tensor]
    needs: TeacherSignal
    help: str
    task_only: tuple[str, ...] = field(default=())


_LOSSES: dict[str, LossTerm] = {}

_LAZY_LOSS_MODULES = {"lelp": "hf_guide.lelp.loss"}
"""Terms of ours that stand in other rooms, which are entered when they are first named."""


def register_term(
    name: str, *, needs: str | TeacherSignal, help: str = "", task_only: tuple[str, ...] = ()
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Make a function a term that `objective` can name. See `Term` for what it is called with.

    Raises:
        OptionError: the name is taken, or `needs` is not known.
    """
    if name in _LOSSES:
        raise OptionError(f"There is a term {name!r} already; give yours another name.")
    known = [each.value for each in TeacherSignal if each is not TeacherSignal.LABELS or name == TASK_LOSS]
    try:
        needed = TeacherSignal(needs)
    except ValueError:
        raise OptionError(f"needs={needs!r} is not known; expected one of {known}.") from None
    if needed is TeacherSignal.LABELS and name != TASK_LOSS:
        raise OptionError(
            f"needs='labels' is for the task loss alone; the term {name!r} must need one of {known}. One that needs 'logits' "
            "is given the labels too; for another task loss pass compute_loss_func to the trainer."
        )

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        _LOSSES[name] = LossTerm(
            name, function, needed, help or (function.__doc__ or "").partition("\n")[0], task_only
        )
        return function

    return register


def registered_losses() -> dict[str, LossTerm]:
    """Return all terms by name."""
    return dict(_LOSSES)


def parse_losses(objective: "str | Mapping[str, float] | None") -> dict[str, float]:
    """Return weights by term for one term's name, a mapping, or such a mapping as JSON. Terms of weight 0 are left out.

    Raises:
        OptionError: an unknown term (with the nearest name), a weight that is not a finite number of at least 0, or
            weights that sum to nothing.
    """
    if isinstance(objective, str) and objective.lstrip().startswith("{"):
        try:
            objective = json.loads(objective)
        except json.JSONDecodeError as error:
            raise OptionError(f'objective is not JSON ({error}); write it as \'{{"ce": 0.5, "kd": 0.5}}\'.') from error
    weights: Any = {objective: 1.0} if isinstance(objective, str) else objective
    if not isinstance(weights, Mapping):
        raise OptionError(f"objective is a term's name or a mapping of names to weights; found {objective!r}.")
    for name, weight in weights.items():
        if name not in _LOSSES and name in _LAZY_LOSS_MODULES:
            importlib.import_module(_LAZY_LOSS_MODULES[name])
        if name not in _LOSSES:
            known = sorted({*_LOSSES, *_LAZY_LOSS_MODULES})
            raise OptionError(
                f"objective has no term {name!r}; expected some of {known}.{did_you_mean(str(name), known)}"
            )
        check_weight(f"The weight of {name!r} in objective", weight)
    kept = {str(name): float(weight) for name, weight in weights.items() if weight}
    if not kept:
        raise OptionError(f"The weights of objective {dict(weights)} sum to nothing; give at least one term a weight.")
    return kept


def compares_features(weights: Mapping[str, float]) -> bool:
    """Return whether an objective looks at hidden states or embeddings, whatever its outputs are."""
    terms = registered_losses()
    return any(
        terms[name].needs in (TeacherSignal.HIDDEN_STATES, TeacherSignal.FEATURES, TeacherSignal.SUBCLASSES)
        for name in weights
    )


def check_losses_fit_task(weights: Mapping[str, float], task: str, config: Any) -> None:
    """Refuse terms that are not for a student's task, or compare a distribution over classes that its logits are not.

    Args:
        weights: by term.
        task: the student's.
        config: the student's.

    Raises:
        TaskError: names the terms and what they are for.
    """
    for name in weights:
        only = _LOSSES[name].task_only
        if only and task not in only:
            raise TaskError(
                f"The term {name!r} is for {' and '.join(only)}, not for {task}. Leave it out of objective."
            )
    check_class_distribution(weights, task, config, "student")
    classes = config.num_labels // (getattr(config, "num_subclasses", None) or 1)
    if "dkd" in weights and classes < 3:
        raise TaskError(f"The term 'dkd' is about the classes beside the label; the student has {classes}. Use 'kd'.")


def categorical_terms(weights: Mapping[str, float]) -> list[str]:
    """Return the terms that compare distributions over classes that exclude each other."""
    return [name for name in weights if _LOSSES[name].needs in (TeacherSignal.LOGITS, TeacherSignal.SUBCLASSES)]


def check_class_distribution(weights: Mapping[str, float], task: str, config: Any, whose: str) -> None:
    """Check that a classifier's logits are a distribution over two classes or more, where terms compare such.

    Args:
        weights: by term.
        task: the model's.
        config: the model's.
        whose: "student" or "teacher", for the error.

    Raises:
        TaskError: a regression, one output, or several labels at once.
    """
    names = categorical_terms(weights)
    if not names or Task(task).is_language_model:
        return
    kind = getattr(config, "problem_type", None)
    outputs = config.num_labels // (getattr(config, "num_subclasses", None) or 1)
    if kind in NON_CATEGORICAL_PROBLEM_TYPES:
        found = f"The {whose}'s problem_type is {kind}"
    elif outputs < 2:
        found = f"The {whose} has one output (num_labels=1), which Transformers takes for a regression"
    else:
        return
    raise TaskError(
        f"{found}: its logits are no distribution over classes, which {' and '.join(map(repr, names))} compare. Learn from "
        "the teacher by 'embedding' or 'hidden'."
    )


@register_term(TASK_LOSS, needs=TeacherSignal.LABELS, help="the model's own task loss on the labels")
def task_loss(student: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy with the labels, (items,); the trainer calls it where it works in chunks of logits."""
    return torch.nn.functional.cross_entropy(student, labels, reduction="none")


@register_term(
    "kd", needs=TeacherSignal.LOGITS, help="a divergence between teacher and student (Hinton et al., arXiv 1503.02531)"
)
def kd(
    student: Tensor, teacher: DenseTarget | TopKTarget, labels: Tensor | None, args: "DistillationArguments"
) -> Tensor:
    """Return the divergence that `args` names, times temperature squared, (items,)."""
    return divergence(student, teacher, kind=args.divergence, beta=args.jsd_beta, temperature=args.temperature)


@register_term(
    "dkd",
    needs=TeacherSignal.LOGITS,
    help="decoupled distillation: the target class apart from the others (arXiv 2203.08679)",
    task_only=("sequence-classification", "token-classification", "image-classification"),
)
def dkd(
    student: Tensor, teacher: DenseTarget | TopKTarget, labels: Tensor | None, args: "DistillationArguments"
) -> Tensor:
    """Return the decoupled divergence, (items,)."""
    if labels is None:
        raise TaskError("The term 'dkd' needs labels; the batch has none.")
    if not isinstance(teacher, DenseTarget):
        raise TaskError("The term 'dkd' needs all of the teacher's logits, not its largest few.")
    return decoupled_divergence(
        student, teacher.logits, labels, alpha=args.dkd_alpha, beta=args.dkd_beta, temperature=args.temperature
    )


@register_term("hidden", needs=TeacherSignal.HIDDEN_STATES, help="hidden states, layer by layer")
def hidden_states_loss(student: Tensor, teacher: Tensor, args: "DistillationArguments") -> Tensor:
    """Return the distance of hidden states, (..., width) to (...)."""
    return feature_distance(student, teacher, args.hidden_distance)


@register_term("embedding", needs=TeacherSignal.FEATURES, help="what the classifier or the language head is fed")
def features_loss(student: Tensor, teacher: Tensor, args: "DistillationArguments") -> Tensor:
    """Return the distance of embeddings, (items, width) to (items,)."""
    return feature_distance(student, teacher, args.hidden_distance)


def feature_distance(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    """Return the mean squared difference, or 1 - cosine, over the last axis, in float32 or better."""
    student, teacher = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in (student, teacher))
    if kind == "cosine":
        return 1 - torch.nn.functional.cosine_similarity(student, teacher, dim=-1)
    return (student - teacher).square().mean(-1)
