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
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_guide.distillation.divergences import Dense, TopK, divergence
from hf_guide.distillation.divergences import dkd as decoupled_divergence
from hf_guide.distillation.tasks import NO_CLASSES, Task
from hf_guide.errors import OptionError, TaskError, did_you_mean
from hf_guide.validation import check_weight

if TYPE_CHECKING:
    from hf_guide.distillation.arguments import DistillationArguments

TASK_LOSS = "ce"


class Needs(str, Enum):
    """What of student and teacher a term looks at."""

    LABELS = "labels"
    LOGITS = "logits"
    HIDDEN_STATES = "hidden_states"
    EMBEDDING = "embedding"
    SUBCLASSES = "subclasses"


@dataclass(frozen=True)
class Term:
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
    needs: Needs
    help: str
    task_only: tuple[str, ...] = field(default=())


_TERMS: dict[str, Term] = {}

_ROOMS = {"lelp": "hf_guide.lelp.objective"}
"""Terms of ours that stand in other rooms, which are entered when they are first named."""


def register_term(
    name: str, *, needs: str | Needs, help: str = "", task_only: tuple[str, ...] = ()
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Make a function a term that `objective` can name. See `Term` for what it is called with.

    Raises:
        OptionError: the name is taken, or `needs` is not known.
    """
    if name in _TERMS:
        raise OptionError(f"There is a term {name!r} already; give yours another name.")
    known = [each.value for each in Needs if each is not Needs.LABELS or name == TASK_LOSS]
    try:
        needed = Needs(needs)
    except ValueError:
        raise OptionError(f"needs={needs!r} is not known; expected one of {known}.") from None
    if needed is Needs.LABELS and name != TASK_LOSS:
        raise OptionError(
            f"needs='labels' is for the task loss alone; the term {name!r} must need one of {known}. One that needs 'logits' "
            "is given the labels too; for another task loss pass compute_loss_func to the trainer."
        )

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        _TERMS[name] = Term(name, function, needed, help or (function.__doc__ or "").partition("\n")[0], task_only)
        return function

    return register


def registered_terms() -> dict[str, Term]:
    """Return all terms by name."""
    return dict(_TERMS)


def parse_objective(objective: "str | Mapping[str, float] | None") -> dict[str, float]:
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
        if name not in _TERMS and name in _ROOMS:
            importlib.import_module(_ROOMS[name])
        if name not in _TERMS:
            known = sorted({*_TERMS, *_ROOMS})
            raise OptionError(
                f"objective has no term {name!r}; expected some of {known}.{did_you_mean(str(name), known)}"
            )
        check_weight(f"The weight of {name!r} in objective", weight)
    kept = {str(name): float(weight) for name, weight in weights.items() if weight}
    if not kept:
        raise OptionError(f"The weights of objective {dict(weights)} sum to nothing; give at least one term a weight.")
    return kept


def compares_vectors(weights: Mapping[str, float]) -> bool:
    """Return whether an objective looks at hidden states or embeddings, whatever its outputs are."""
    terms = registered_terms()
    return any(terms[name].needs in (Needs.HIDDEN_STATES, Needs.EMBEDDING, Needs.SUBCLASSES) for name in weights)


def check_objective(weights: Mapping[str, float], task: str, config: Any) -> None:
    """Refuse terms that are not for a student's task, or compare a distribution over classes that its logits are not.

    Args:
        weights: by term.
        task: the student's.
        config: the student's.

    Raises:
        TaskError: names the terms and what they are for.
    """
    for name in weights:
        only = _TERMS[name].task_only
        if only and task not in only:
            raise TaskError(
                f"The term {name!r} is for {' and '.join(only)}, not for {task}. Leave it out of objective."
            )
    check_classes(weights, task, config, "student")
    classes = config.num_labels // (getattr(config, "num_subclasses", None) or 1)
    if "dkd" in weights and classes < 3:
        raise TaskError(f"The term 'dkd' is about the classes beside the label; the student has {classes}. Use 'kd'.")


def terms_of_classes(weights: Mapping[str, float]) -> list[str]:
    """Return the terms that compare distributions over classes that exclude each other."""
    return [name for name in weights if _TERMS[name].needs in (Needs.LOGITS, Needs.SUBCLASSES)]


def check_classes(weights: Mapping[str, float], task: str, config: Any, whose: str) -> None:
    """Check that a classifier's logits are a distribution over two classes or more, where terms compare such.

    Args:
        weights: by term.
        task: the model's.
        config: the model's.
        whose: "student" or "teacher", for the error.

    Raises:
        TaskError: a regression, one output, or several labels at once.
    """
    names = terms_of_classes(weights)
    if not names or Task(task).is_language_model:
        return
    kind = getattr(config, "problem_type", None)
    outputs = config.num_labels // (getattr(config, "num_subclasses", None) or 1)
    if kind in NO_CLASSES:
        found = f"The {whose}'s problem_type is {kind}"
    elif outputs < 2:
        found = f"The {whose} has one output (num_labels=1), which Transformers takes for a regression"
    else:
        return
    raise TaskError(
        f"{found}: its logits are no distribution over classes, which {' and '.join(map(repr, names))} compare. Learn from "
        "the teacher by 'embedding' or 'hidden'."
    )


@register_term(TASK_LOSS, needs=Needs.LABELS, help="the model's own task loss on the labels")
def task_loss(student: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy with the labels, (items,); the trainer calls it where it works in chunks of logits."""
    return torch.nn.functional.cross_entropy(student, labels, reduction="none")


@register_term(
    "kd", needs=Needs.LOGITS, help="a divergence between teacher and student (Hinton et al., arXiv 1503.02531)"
)
def kd(student: Tensor, teacher: Dense | TopK, labels: Tensor | None, args: "DistillationArguments") -> Tensor:
    """Return the divergence that `args` names, times temperature squared, (items,)."""
    return divergence(student, teacher, kind=args.divergence, beta=args.jsd_beta, temperature=args.temperature)


@register_term(
    "dkd",
    needs=Needs.LOGITS,
    help="decoupled distillation: the target class apart from the others (arXiv 2203.08679)",
    task_only=("sequence-classification", "token-classification", "image-classification"),
)
def dkd(student: Tensor, teacher: Dense | TopK, labels: Tensor | None, args: "DistillationArguments") -> Tensor:
    """Return the decoupled divergence, (items,)."""
    if labels is None:
        raise TaskError("The term 'dkd' needs labels; the batch has none.")
    if not isinstance(teacher, Dense):
        raise TaskError("The term 'dkd' needs all of the teacher's logits, not its largest few.")
    return decoupled_divergence(
        student, teacher.logits, labels, alpha=args.dkd_alpha, beta=args.dkd_beta, temperature=args.temperature
    )


@register_term("hidden", needs=Needs.HIDDEN_STATES, help="hidden states, layer by layer")
def hidden(student: Tensor, teacher: Tensor, args: "DistillationArguments") -> Tensor:
    """Return the distance of hidden states, (..., width) to (...)."""
    return distance(student, teacher, args.hidden_distance)


@register_term("embedding", needs=Needs.EMBEDDING, help="what the classifier or the language head is fed")
def embedding(student: Tensor, teacher: Tensor, args: "DistillationArguments") -> Tensor:
    """Return the distance of embeddings, (items, width) to (items,)."""
    return distance(student, teacher, args.hidden_distance)


def distance(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    """Return the mean squared difference, or 1 - cosine, over the last axis, in float32 or better."""
    student, teacher = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in (student, teacher))
    if kind == "cosine":
        return 1 - torch.nn.functional.cosine_similarity(student, teacher, dim=-1)
    return (student - teacher).square().mean(-1)
