"""Trainers that users derive from `DistillationTrainer`: whether its own methods are still called.

A class before `DistillationTrainer` in the method resolution order overrides its methods. One that does not call `super()`
there would train a student without its teacher. What its code shows is an error when the trainer is created, what it does
not show is one at the first step or evaluation.
"""

import inspect
from collections.abc import Collection, Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any

from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from hf_guide.errors import OptionError

# For each method that must be called, the names that an override may call to get there.
_SUPER_CALLS: dict[str, tuple[str, ...]] = {
    "compute_loss": ("super", "compute_loss"),
    "training_step": ("super", "training_step", "compute_loss"),
    "_get_num_items_in_batch": ("super", "_get_num_items_in_batch"),
    "prediction_step": ("super", "prediction_step", "compute_loss"),
    "evaluation_loop": ("super", "evaluation_loop"),
}

# The callers of a method, which may have left it out.
_CALLERS = {
    "compute_loss": ("training_step", "prediction_step"),
    "_get_num_items_in_batch": ("get_batch_samples",),
}

_CONSEQUENCES = {
    "compute_loss": "the student would be trained without its teacher",
    "training_step": "the student would be trained without its teacher",
    "_get_num_items_in_batch": "the losses would be divided by another number of items",
    "prediction_step": "evaluation would not measure the objective",
    "evaluation_loop": "evaluation would not report the objective",
    "get_batch_samples": "the losses would be divided by another number of items",
}


def check_init_keywords(cls: type, base: type, keywords: Collection[str]) -> None:
    """Check that every class before `base` passes on the keywords that are `base`'s own.

    Args:
        cls: The class that is being instantiated.
        base: `DistillationTrainer`.
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
        for name, calls in _SUPER_CALLS.items():
            function = _code_object(vars(each).get(name))
            if function is not None and not _references(function, calls, before, set()):
                raise OptionError(
                    f"{cls.__name__} takes {name} from {each.__name__}, which does not call super().{name}: "
                    f"{_CONSEQUENCES[name]}. {_override_advice(cls, base, each, name)}"
                )


def check_seq2seq(trainer: Any, base: type, args: Any) -> None:
    """Check that a trainer that generates in evaluation also measures the losses.

    Raises:
        OptionError: `Seq2SeqTrainer` comes before `base` and would evaluate without it, or the arguments are not its own.
    """
    cls = type(trainer)
    if not issubclass(cls, Seq2SeqTrainer):
        return
    if not isinstance(args, Seq2SeqTrainingArguments):
        raise OptionError(
            f"{cls.__name__} is a Seq2SeqTrainer, whose arguments must be Seq2SeqTrainingArguments too; found "
            f"{type(args).__name__}. Write @dataclass class Arguments(DistillationArguments, Seq2SeqTrainingArguments): pass."
        )
    if args.predict_with_generate and Seq2SeqTrainer in _classes_before(cls, base):
        raise OptionError(
            f"{cls.__name__} has Seq2SeqTrainer before {base.__name__}: with predict_with_generate it evaluates without the "
            f"teacher. {_base_order_advice(cls, base, Seq2SeqTrainer)}."
        )


def next_init_kwargs(trainer: Any, base: type, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords that the `__init__` after `base` takes; those that it does not take must be None.

    Raises:
        OptionError: One that it does not take has a value.
    """
    order = type(trainer).__mro__
    owner = next(each for each in order[order.index(base) + 1 :] if "__init__" in vars(each))
    accepted = _accepted_keywords(vars(owner)["__init__"], keywords)
    rejected = sorted(name for name, value in keywords.items() if name not in accepted and value is not None)
    if rejected:
        raise OptionError(
            f"{owner.__name__}.__init__, which comes after {base.__name__}, takes no {', '.join(rejected)}."
        )
    return {name: value for name, value in keywords.items() if name in accepted}


def describe_not_called(trainer: Any, base: type, name: str) -> str:
    """Return the text of an error: whose method was called instead of that of `base`, and what to do."""
    cls = type(trainer)
    for each in (name, *_CALLERS[name]):
        if each in vars(trainer):
            return (
                f"{each} of this {cls.__name__} was replaced on the instance and does not call the class's own: "
                f"{_CONSEQUENCES[each]}. Override it in a class, and call super().{each}(...) there."
            )
        owner = next((kind for kind in cls.__mro__ if each in vars(kind)), base)
        if owner not in base.__mro__:
            return (
                f"{cls.__name__} takes {each} from {owner.__name__}, which did not call {base.__name__}.{name}: "
                f"{_CONSEQUENCES[each]}. {_override_advice(cls, base, owner, each)}"
            )
    return f"{cls.__name__} never called {base.__name__}.{name}: {_CONSEQUENCES[name]}."


def _classes_before(cls: type, base: type) -> Iterator[type]:
    for each in cls.__mro__:
        if each is base:
            return
        yield each


def _override_advice(cls: type, base: type, owner: type, name: str) -> str:
    if owner is cls or issubclass(owner, base):
        return f"Call super().{name}(...) in it, and build on what it returns."
    return f"{_base_order_advice(cls, base, owner)}, or call super().{name}(...) in {owner.__name__}."


def _base_order_advice(cls: type, base: type, owner: type) -> str:
    return f"Write class {cls.__name__}({base.__name__}, {owner.__name__})"


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
