"""Classes that users make of `DistillationMixin` and another trainer: the order of their bases, and calls of methods.

A class in front of `DistillationMixin` in the method resolution order overrides its methods, and one that does not call
`super()` there would train a student without its teacher. Where the order of the bases alone is the reason, the class comes
after the mixin instead, which then adds the teacher to its loss. Whatever else its code shows is an error when the trainer is
created, and what it does not show is one at the first step or evaluation.
"""

import inspect
import sys
from abc import ABCMeta
from collections.abc import Collection, Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any

from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

from hf_guide.errors import OptionError
from hf_guide.validation import did_you_mean

# For each method that must be called, the names that an override may call to get there.
_SUPER_CALLS: dict[str, tuple[str, ...]] = {
    "compute_loss": ("super", "compute_loss"),
    "training_step": ("super", "training_step", "compute_loss"),
    "_get_num_items_in_batch": ("super", "_get_num_items_in_batch"),
    "prediction_step": ("super", "prediction_step", "compute_loss"),
    "evaluation_loop": ("super", "evaluation_loop"),
    "train": ("super", "train", "_inner_training_loop", "training_step", "compute_loss"),
    "_inner_training_loop": ("super", "_inner_training_loop", "training_step", "compute_loss"),
}

# The callers of a method, which may have left it out.
_CALLERS = {
    "compute_loss": ("training_step", "prediction_step"),
    "_get_num_items_in_batch": ("get_batch_samples",),
    "evaluation_loop": (),
    "prediction_step": ("evaluation_loop",),
}

_CONSEQUENCES = {
    "compute_loss": "the student would be trained without its teacher",
    "training_step": "the student would be trained without its teacher",
    "_get_num_items_in_batch": "the losses would be divided by another number of items",
    "prediction_step": "evaluation would not measure the objective",
    "evaluation_loop": "evaluation would not report the objective",
    "train": "the student would be trained without its teacher",
    "_inner_training_loop": "the student would be trained without its teacher",
    "get_batch_samples": "the losses would be divided by another number of items",
}

_LIBRARIES = ("transformers", "trl")
"""Their trainers do not build on the loss or the evaluation of the class that follows them."""

_SFT_TRAINER = "trl.trainer.sft_trainer"


class DistillationMeta(ABCMeta):
    """Order the bases of a class of `DistillationMixin` such that no trainer in front of the mixin leaves the teacher out.

    `class T(Seq2SeqTrainer, DistillationTrainer)` has the method resolution order of `class T(DistillationTrainer,
    Seq2SeqTrainer)`. A class whose `compute_loss` calls `super().compute_loss` stays in front, and builds on the weighted
    sum of all losses.
    """

    def mro(cls) -> list[type]:
        """Return the method resolution order, in which trainers that would bypass the mixin come after its own classes."""
        for number, base in enumerate(cls.__bases__):
            derived = next((each for each in cls.__bases__[number + 1 :] if base in each.__mro__), None)
            if derived is not None:
                names = ", ".join(each.__name__ for each in cls.__bases__ if each is not base)
                raise OptionError(
                    f"{cls.__name__} has {base.__name__} in front of {derived.__name__}, which is derived from it. Write "
                    f"class {cls.__name__}({names})."
                )
        order = super().mro()
        root = [each for each in order if isinstance(each, DistillationMeta)][-1]
        before = [each for each in order[: order.index(root)] if not isinstance(each, DistillationMeta)]
        moved: list[type] = []
        for each in before:
            # A class that follows a derived one in front must follow it behind the mixin, too.
            if any(each in other.__mro__ for other in moved) or _bypasses_next_class(each, before):
                moved.append(each)
        if not moved:
            return order
        rest = [each for each in order if each not in moved]
        own = [each for each in root.__mro__ if each not in Trainer.__mro__]
        end = 1 + max(rest.index(each) for each in own)
        return [*rest[:end], *moved, *rest[end:]]


def _bypasses_next_class(cls: type, before: Collection[type]) -> bool:
    """Return whether a class has methods that do not call the next class's, or an `__init__` that does not take a teacher."""
    if cls.__module__.partition(".")[0] in _LIBRARIES:
        return True
    if next(_overrides_without_super(cls, before), None) is not None:
        return True
    init = vars(cls).get("__init__")
    takes_teacher = not inspect.isfunction(init) or bool(_accepted_keywords(init, {"teacher"}))
    return not takes_teacher and "compute_loss" not in vars(cls)


def _overrides_without_super(cls: type, before: Collection[type]) -> Iterator[str]:
    for name, calls in _SUPER_CALLS.items():
        function = _code_object(vars(cls).get(name))
        if function is not None and not _references(function, calls, before, set()):
            yield name


# Checks when a trainer is created


def check_init_keywords(cls: type, base: type, keywords: Collection[str]) -> None:
    """Check that every class before `base` passes on the keywords that are `base`'s own.

    Args:
        cls: The class that is being instantiated.
        base: `DistillationMixin`.
        keywords: Names of the keyword arguments.

    Raises:
        OptionError: Names the class whose `__init__` does not take one of them.
    """
    own = set(inspect.signature(base.__init__).parameters) & set(keywords)  # type: ignore[misc]
    for each in _classes_before(cls, base):
        function = vars(each).get("__init__")
        if not inspect.isfunction(function):
            continue
        missing = sorted(own - _accepted_keywords(function, own))
        if missing:
            raise OptionError(
                f"{each.__name__}.__init__ takes no {' or '.join(missing)} and comes before {base.__name__} in "
                f"{cls.__name__}. {_base_order_advice(cls, base, each)}, "
                "or name the teacher in the arguments: DistillationArguments(teacher=...)."
            )


def check_overridden_methods(trainer: Any, base: type) -> None:
    """Check that no class before `base` overrides a method without calling that of `base`, as far as its code shows.

    Raises:
        OptionError: Names the class, the method and what to do.
    """
    cls = type(trainer)
    before = list(_classes_before(cls, base))
    for each in before:
        for name in _overrides_without_super(each, before):
            raise OptionError(
                f"{cls.__name__} takes {name} from {each.__name__}, which does not call super().{name}: "
                f"{_CONSEQUENCES[name]}. {_override_advice(cls, base, each, name)}"
            )


def check_next_classes(trainer: Any, base: type, args: Any) -> None:
    """Check that the trainers after `base` leave the training to it, as far as their code shows.

    Raises:
        OptionError: Names the class, the method and what to do.
    """
    cls = type(trainer)
    after = list(_classes_after(cls, base))
    owner = next_owner(cls, base, "compute_loss")
    if is_sft_trainer(owner) and owner.__module__ != _SFT_TRAINER:
        raise OptionError(
            f"{owner.__name__}.compute_loss builds on SFTTrainer's, whose outputs have no logits to compare with the "
            f"teacher's. Write class {cls.__name__}({owner.__name__}, {base.__name__}): it then builds on the weighted sum "
            "of all losses."
        )
    for each in after:
        if "compute_loss" in vars(each) and each.__module__.partition(".")[0] == "trl":
            _check_trl_trainer(each, args)
        for name in ("training_step", "train", "_inner_training_loop"):
            if name in _overrides_without_super(each, after):
                raise OptionError(
                    f"{cls.__name__} takes {name} from {each.__name__}, which calls neither compute_loss nor super().{name}: "
                    f"{_CONSEQUENCES[name]}. Call self.compute_loss(...) in it."
                )
        if "_get_num_items_in_batch" in vars(each):
            raise OptionError(
                f"{each.__name__}._get_num_items_in_batch counts items of its own, but {base.__name__} divides every loss by "
                "the number of the batch's targets. Remove the method, and let compute_loss return a mean over its batch."
            )


def _check_trl_trainer(trainer: type, args: Any) -> None:
    if trainer.__module__ != _SFT_TRAINER:
        raise OptionError(
            f"{trainer.__name__} of TRL computes its loss of several texts for each example, which a teacher's signals do not "
            "fit. Of TRL's trainers only SFTTrainer can be distilled."
        )
    if getattr(args, "loss_type", "nll") != "nll":
        raise OptionError(
            f"SFTTrainer computes loss_type={args.loss_type!r} without logits, so that there is nothing to compare with the "
            "teacher's. Use loss_type='nll'."
        )


def check_arguments_class(trainer: Any, args: Any) -> None:
    """Check that the arguments are those of every class that the trainer is made of.

    Raises:
        OptionError: `Seq2SeqTrainer` or TRL's `SFTTrainer` is among them, and the arguments are not its own.
    """
    cls = type(trainer)
    required: list[tuple[str, type, str]] = []
    if issubclass(cls, Seq2SeqTrainer):
        required.append(("Seq2SeqTrainer", Seq2SeqTrainingArguments, "Use Seq2SeqDistillationArguments."))
    if is_sft_trainer(cls):
        config = sys.modules[_SFT_TRAINER].SFTConfig
        advice = "Write @dataclass class Arguments(DistillationArguments, SFTConfig): pass."
        required.append(("SFTTrainer", config, advice))
    for name, arguments, advice in required:
        if not isinstance(args, arguments):
            raise OptionError(
                f"{cls.__name__} is a {name}, whose arguments must be {arguments.__name__} too; found {type(args).__name__}. "
                f"{advice}"
            )


def check_next_keywords(trainer: Any, base: type, args: Any, names: Collection[str]) -> None:
    """Check that a class after `base` takes the keywords that are not `base`'s own.

    Raises:
        TypeError: None takes one of them; names the arguments whose field it is, or the nearest.
    """
    accepted = _next_init_parameters(type(trainer), base)
    for name in names:
        if name not in accepted:
            known = [*inspect.signature(base.__init__).parameters, *accepted]  # type: ignore[misc]
            advice = ". It is named processing_class." if name == "tokenizer" else f".{did_you_mean(name, known)}"
            if name in getattr(args, "__dataclass_fields__", {}):
                advice = f", which is a field of its args: pass {type(args).__name__}({name}=...)."
            raise TypeError(f"{type(trainer).__name__}.__init__() got an unexpected keyword argument {name!r}{advice}")


def next_init_kwargs(trainer: Any, base: type, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords that the `__init__` after `base` takes; those that it does not take must be None.

    Raises:
        OptionError: One that it does not take has a value.
    """
    accepted = _next_init_parameters(type(trainer), base)
    rejected = sorted(name for name, value in keywords.items() if name not in accepted and value is not None)
    if rejected:
        owner = next_owner(type(trainer), base, "__init__")
        raise OptionError(
            f"{owner.__name__}.__init__, which comes after {base.__name__}, takes no {', '.join(rejected)}."
        )
    return {name: value for name, value in keywords.items() if name in accepted}


def _next_init_parameters(cls: type, base: type) -> set[str]:
    """Return what the `__init__` after `base` takes by name, with the parameters of those that it passes any keyword to."""
    names: set[str] = set()
    for owner in [*_classes_after(cls, base), Trainer]:
        if "__init__" in vars(owner):
            parameters = inspect.signature(vars(owner)["__init__"]).parameters.values()
            names |= {each.name for each in parameters if each.kind is not inspect.Parameter.VAR_KEYWORD}
            if all(each.kind is not inspect.Parameter.VAR_KEYWORD for each in parameters):
                break
    return names


# What follows the mixin


def is_sft_trainer(cls: type) -> bool:
    """Return whether a class is made of TRL's `SFTTrainer`."""
    return any(each.__module__ == _SFT_TRAINER for each in cls.__mro__)


def next_owner(cls: type, base: type, method: str) -> type:
    """Return the class after `base` whose method is the next in the method resolution order; at last `Trainer`."""
    return next((each for each in _classes_after(cls, base) if method in vars(each)), Trainer)


def has_own_task_loss(cls: type, base: type) -> bool:
    """Return whether a class after `base` computes a task loss of its own, not the model's.

    TRL's `SFTTrainer` computes the model's own loss, from log-probabilities instead of logits.
    """
    owner = next_owner(cls, base, "compute_loss")
    return owner is not Trainer and owner.__module__ != _SFT_TRAINER


def calls_compute_loss(cls: type, base: type) -> bool:
    """Return whether the next `prediction_step` may call `compute_loss`, as far as its code shows."""
    after = list(_classes_after(cls, base))
    function = _code_object(vars(next_owner(cls, base, "prediction_step"))["prediction_step"])
    return function is None or _references(function, _SUPER_CALLS["prediction_step"], after, set())


# Checks of what was called


def describe_not_called(trainer: Any, base: type, name: str) -> str:
    """Return the text of an error: whose method was called instead of that of `base`, and what to do."""
    cls = type(trainer)
    methods = (name, *_CALLERS[name])
    for each in methods:
        if each in vars(trainer):
            return (
                f"{each} of this {cls.__name__} was replaced on the instance and does not call the class's own: "
                f"{_CONSEQUENCES[each]}. Override it in a class, and call super().{each}(...) there."
            )
    for each in methods:
        owner = next((kind for kind in _classes_before(cls, base) if each in vars(kind)), None)
        if owner is not None:
            return (
                f"{cls.__name__} takes {each} from {owner.__name__}, which did not call {base.__name__}.{name}: "
                f"{_CONSEQUENCES[each]}. {_override_advice(cls, base, owner, each)}"
            )
    for each in _CALLERS[name]:
        owner = next((kind for kind in _classes_after(cls, base) if each in vars(kind)), None)
        if owner is not None:
            return (
                f"{cls.__name__} takes {each} from {owner.__name__}, which did not call self.{name}: {_CONSEQUENCES[each]}. "
                f"Call self.{name}(...) in it."
            )
    return f"{cls.__name__} never called {base.__name__}.{name}: {_CONSEQUENCES[name]}."


def describe_unused_loss(trainer: Any, base: type) -> str:
    """Return the text of an error: whose `compute_loss` calls that of `base`, but does not train on what it returns."""
    cls = type(trainer)
    owner = next((each for each in (trainer, *_classes_before(cls, base)) if "compute_loss" in vars(each)), None)
    named = getattr(owner, "__name__", f"this {cls.__name__}")
    return (
        f"The loss that {base.__name__}.compute_loss returned has no gradient: {named} calls it, but does not train on its "
        f"result, so that {_CONSEQUENCES['compute_loss']}. Build on the loss that super().compute_loss(...) returns, without "
        "detach() or no_grad()."
    )


def describe_other_count(trainer: Any, base: type, counted: Any, passed: Any) -> str:
    """Return the text of an error: the number of items that losses are divided by is not the one that `base` counted."""
    cls = type(trainer)
    methods = ("_get_num_items_in_batch", "get_batch_samples", "training_step")
    names = [
        f"{each.__name__}.{name}" for each in _classes_before(cls, base) for name in methods if name in vars(each)
    ]
    return (
        f"{cls.__name__} passes {float(passed):g} as num_items_in_batch to compute_loss, but the batch has {float(counted):g} "
        f"items: {_CONSEQUENCES['get_batch_samples']}. Pass on what super() returns in {' and '.join(names) or 'the trainer'}."
    )


def describe_dropped_metrics(trainer: Any, base: type, names: Collection[str]) -> str:
    """Return the text of an error: whose `evaluation_loop` did not return the metrics that it got."""
    cls = type(trainer)
    owner = next((each for each in _classes_before(cls, base) if "evaluation_loop" in vars(each)), cls)
    return (
        f"{owner.__name__}.evaluation_loop calls super().evaluation_loop but does not return {', '.join(sorted(names))}: "
        f"{_CONSEQUENCES['evaluation_loop']}. Add to the metrics that super().evaluation_loop(...) returns."
    )


def _classes_before(cls: type, base: type) -> Iterator[type]:
    for each in cls.__mro__:
        if each is base:
            return
        yield each


def _classes_after(cls: type, base: type) -> Iterator[type]:
    """Yield the trainers between `base`, with the classes that it is made of, and `Trainer`."""
    order = cls.__mro__
    for each in order[order.index(base) : order.index(Trainer)]:
        if each not in base.__mro__:
            yield each


def _override_advice(cls: type, base: type, owner: type, name: str) -> str:
    if owner is cls or issubclass(owner, base):
        return f"Call super().{name}(...) in it, and build on what it returns."
    return f"{_base_order_advice(cls, base, owner)}, or call super().{name}(...) in {owner.__name__}."


def _base_order_advice(cls: type, base: type, owner: type) -> str:
    first = next((each for each in cls.__mro__[1:] if issubclass(each, base)), base)
    return f"Write class {cls.__name__}({first.__name__}, {owner.__name__})"


def _accepted_keywords(function: FunctionType, names: Collection[str]) -> set[str]:
    parameters = inspect.signature(function).parameters
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
        return set(names)
    return set(names) & set(parameters)


def _code_object(attribute: Any) -> CodeType | None:
    function = inspect.unwrap(getattr(attribute, "__func__", attribute)) if attribute is not None else None
    return getattr(function, "__code__", None)


def _references(code: CodeType, names: Collection[str], classes: Collection[type], seen: set[CodeType]) -> bool:
    """Return whether code refers to one of `names`, itself or in the methods of `classes` that it refers to."""
    if code in seen:
        return False
    seen.add(code)
    referenced = {*code.co_names, *code.co_freevars}
    if referenced & set(names):
        return True
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    methods = (_code_object(vars(each).get(name)) for each in classes for name in referenced)
    return any(_references(each, names, classes, seen) for each in [*inner, *methods] if each is not None)
