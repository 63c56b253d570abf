"""The registry of losses: what a student can be trained on, each under a name that `losses` takes.

Does: register a loss with the teacher signal that it compares, the tasks that it is for and the options that it declares;
parse `losses` and `loss_options`; check that losses fit a task.
Does not: compute anything (`losses/divergences.py`, `losses/features.py` and `hf_guide/lelp/loss.py` do).
"""

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_guide.errors import HfGuideError, OptionError, TaskError
from hf_guide.tasks import OutputKind, Task, output_kind
from hf_guide.teachers.signals import TeacherSignal
from hf_guide.utils.deprecation import warn_renamed
from hf_guide.utils.typed_json import check_field_types
from hf_guide.validation import check_choice, check_mapping, check_weight, did_you_mean

TASK_LOSS = "ce"

RENAMED_LOSSES = {"embedding": "features", "hidden": "hidden_states"}
"""Names of losses that an earlier release used, and the present ones."""

_LOGIT_KINDS = (OutputKind.CATEGORICAL, OutputKind.BERNOULLI, OutputKind.REAL)

_LAZY_LOSS_MODULES = {"lelp": "hf_guide.lelp.loss"}
"""Losses whose modules are imported when they are first named: their packages are above this one."""


@dataclass(frozen=True)
class LossConfig:
    """The options of a loss. Derive a dataclass from it to declare a loss's own, with a default and a help text each.

    A field whose metadata has an "argument" is not an option of the loss: its value is that argument's of
    `DistillationArguments`.

    Args:
        temperature: What student and teacher logits are divided by, `DistillationArguments.temperature`.

    Example:
        >>> @dataclass(frozen=True)
        ... class MarginConfig(LossConfig):
        ...     width: float = field(default=1.0, metadata={"help": "Margins above it count as equal."})
        >>> MarginConfig(width=2.0)
        MarginConfig(temperature=1.0, width=2.0)
    """

    temperature: float = field(default=1.0, metadata={"argument": "temperature"})

    def check_student(self, config: Any) -> None:
        """Check that the loss can be computed for a student with this model config; by default it always can.

        Raises:
            TaskError: It cannot.
        """


@dataclass(frozen=True)
class LossTerm:
    """A registered loss; see `register_loss`.

    Args:
        name: The name in `losses`.
        function: Returns one value an item.
        requires: What of the teacher (and of the student) it compares.
        tasks: The values of `Task` that it is for; empty for all.
        config: The class of its options; None for a function that takes the `DistillationArguments` instead.
        help: One line for people.
        kinds: What the logits that it compares may be.
        any_width: Whether features of another width than the teacher's are compared without a map between them.
    """

    name: str
    function: Callable[..., Tensor]
    requires: TeacherSignal
    tasks: tuple[str, ...]
    config: type[LossConfig] | None
    help: str
    kinds: tuple[OutputKind, ...] = (OutputKind.CATEGORICAL,)
    any_width: bool = False

    def build_config(self, options: Mapping[str, Any], args: Any) -> Any:
        """Return the config of the loss: its own options from `options`, the shared ones from `args`.

        Raises:
            OptionError: There is no such option (with the nearest one), or its value has another type.
        """
        if self.config is None:
            if options:
                raise OptionError(
                    f"loss_options: the loss {self.name!r} declares no options; found {sorted(options)}."
                )
            return args
        fields = {each.name: each for each in dataclasses.fields(self.config)}
        shared = {name: each.metadata["argument"] for name, each in fields.items() if "argument" in each.metadata}
        own = [name for name in fields if name not in shared]
        for name in options:
            if name in shared:
                raise OptionError(
                    f"loss_options: {name!r} of the loss {self.name!r} is set once for all losses: pass "
                    f"DistillationArguments({shared[name]}=...) instead."
                )
            if name not in own:
                raise OptionError(
                    f"loss_options: the loss {self.name!r} has no option {name!r}; expected one of {own}."
                    f"{did_you_mean(str(name), own)}"
                )
        config = self.config(**{name: getattr(args, argument) for name, argument in shared.items()}, **options)
        try:
            check_field_types(config, f"loss_options[{self.name!r}]")
        except HfGuideError as error:
            raise OptionError(str(error).partition(". The file")[0] + ".") from error
        return config


_LOSSES: dict[str, LossTerm] = {}


def register_loss(
    name: str,
    *,
    requires: str | TeacherSignal = TeacherSignal.LOGITS,
    tasks: Iterable[str] = (),
    config: type[LossConfig] = LossConfig,
    help: str = "",
    kinds: Iterable[str] = ("categorical",),
    any_width: bool = False,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register the decorated function as a loss that `DistillationArguments(losses=...)` can name.

    The function returns one value an item, without dividing by anything: the trainer takes the mean over the items of the
    accumulated batch. An item is a token with a target, or an example. It is called with

    - requires="logits": student logits (items, classes) in float32 or better, the teacher's `DenseTarget` or `TopKTarget`,
      labels (items,) or None, and the config;
    - requires="hidden_states": the student's and the teacher's hidden states (batch, length, width), once for each pair of
      layers, and the config; it returns (batch, length);
    - requires="features": the student's and the teacher's penultimate features (items, width), and the config;
    - requires="boxes": the student's and the teacher's boxes (items, 4), the probability (items,) that the teacher's query is
      an object, and the config;
    - requires="subclasses": student subclass logits (items, C * S), the batch's subclass probabilities (items, C * S), and
      the config.

    Args:
        name: The name in `losses`, in the logs and on the card.
        requires: What it compares, one of the above.
        tasks: The tasks that it is for, such as "image-classification"; empty for all.
        config: A dataclass derived from `LossConfig` that declares the loss's options; `loss_options` sets them.
        help: One line for people; by default the first line of the function's docstring.
        kinds: What the logits that it compares may be: "categorical" (a softmax over classes), "bernoulli" (a sigmoid per
            label) or "real"; `teacher.kind` is which they are.
        any_width: Of requires="features": whether the widths of student and teacher need not agree; otherwise the student's
            features are projected to the teacher's width first.

    Raises:
        OptionError: The name is taken, or `requires`, `tasks`, `config` or `kinds` is invalid.

    Example:
        >>> from dataclasses import dataclass, field
        >>> from hf_guide import DistillationArguments, LossConfig, register_loss
        >>> @dataclass(frozen=True)
        ... class LogitRegressionConfig(LossConfig):
        ...     power: float = field(default=2.0, metadata={"help": "Exponent of the difference."})
        >>> @register_loss("logit_regression", requires="logits", config=LogitRegressionConfig)
        ... def logit_regression(student, teacher, labels, config):
        ...     return (student - teacher.logits).abs().pow(config.power).mean(-1)
        >>> args = DistillationArguments(
        ...     "out",
        ...     losses={"ce": 0.5, "logit_regression": 0.5},
        ...     loss_options={"logit_regression": {"power": 1.0}},
        ... )
        >>> args.loss_configs["logit_regression"].power
        1.0
    """
    signals = [each.value for each in TeacherSignal if each is not TeacherSignal.LABELS]
    if requires == TeacherSignal.LABELS and name != TASK_LOSS:
        raise OptionError(
            f"requires='labels' is for the task loss alone; the loss {name!r} must require one of {signals}. One that "
            "requires 'logits' is passed the labels too; for another task loss pass compute_loss_func to the trainer."
        )
    signal = TeacherSignal.LABELS if name == TASK_LOSS else TeacherSignal(check_choice("requires", requires, signals))
    tasks = tuple(check_choice("tasks", task, [each.value for each in Task]) for task in tasks)
    if not (isinstance(config, type) and issubclass(config, LossConfig) and dataclasses.is_dataclass(config)):
        raise OptionError(
            f"config of the loss {name!r} must be a dataclass derived from LossConfig; found {config!r}."
        )
    parsed = tuple(OutputKind(check_choice("kinds", kind, [str(each) for each in _LOGIT_KINDS])) for kind in kinds)
    return _register(name, signal, tasks, config, help, parsed, any_width)


def register_term(
    name: str, *, needs: str | TeacherSignal, help: str = "", task_only: tuple[str, ...] = ()
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Deprecated: use `register_loss`. The function's last argument is the `DistillationArguments`, not a config.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     decorator = register_term("deprecated_example", needs="logits")
        >>> caught[0].category.__name__
        'FutureWarning'
    """
    warn_renamed("hf_guide", "register_term(needs=, task_only=)", "register_loss(requires=, tasks=, config=)")
    register_loss(name, requires=RENAMED_LOSSES.get(str(needs), needs), tasks=task_only)  # checks the options
    return _register(name, TeacherSignal(RENAMED_LOSSES.get(str(needs), needs)), tuple(task_only), None, help)


def _register(
    name: str,
    requires: TeacherSignal,
    tasks: tuple[str, ...],
    config: type[LossConfig] | None,
    help: str,
    kinds: tuple[OutputKind, ...] = (OutputKind.CATEGORICAL,),
    any_width: bool = False,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    if name in _LOSSES or name in RENAMED_LOSSES:
        raise OptionError(f"A loss {name!r} is registered already; choose another name.")

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        text = help or (function.__doc__ or "").partition("\n")[0]
        _LOSSES[name] = LossTerm(name, function, requires, tasks, config, text, kinds, any_width)
        return function

    return register


@register_loss(TASK_LOSS, requires=TeacherSignal.LABELS, help="the model's own task loss on the labels")
def task_loss(student: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy with the labels, (items,): the task loss where it is computed in chunks of logits."""
    return torch.nn.functional.cross_entropy(student, labels, reduction="none")


def registered_losses() -> dict[str, LossTerm]:
    """Return all losses by name."""
    return dict(_LOSSES)


def get_loss(name: str) -> LossTerm:
    """Return the loss of a name.

    Raises:
        OptionError: There is none; names the nearest one.
    """
    if name not in _LOSSES and name in _LAZY_LOSS_MODULES:
        importlib.import_module(_LAZY_LOSS_MODULES[name])
    if name not in _LOSSES:
        known = sorted({*_LOSSES, *_LAZY_LOSS_MODULES})
        raise OptionError(f"losses has no loss {name!r}; expected some of {known}.{did_you_mean(str(name), known)}")
    return _LOSSES[name]


def parse_losses(losses: "str | Mapping[str, float] | None") -> dict[str, float]:
    """Return weights by name for one loss's name, a mapping, or such a mapping as JSON. Losses of weight 0 are left out.

    Raises:
        OptionError: An unknown loss (with the nearest name), a weight that is not a finite number of at least 0, or
            weights that sum to zero.

    Example:
        >>> parse_losses("kd"), parse_losses('{"ce": 0.5, "kd": 0.5}')
        ({'kd': 1.0}, {'ce': 0.5, 'kd': 0.5})
    """
    if isinstance(losses, str) and not losses.lstrip().startswith("{"):
        losses = {losses: 1.0}
    by_name = check_mapping("losses", losses, like='{"ce": 0.5, "kd": 0.5}')
    weights: dict[str, float] = {}
    for name, weight in current_names(by_name, "losses").items():
        get_loss(name)
        weights[name] = check_weight(f"The weight of {name!r} in losses", weight)
    nonzero = {name: weight for name, weight in weights.items() if weight}
    if not nonzero:
        raise OptionError(f"The weights of losses {dict(weights)} sum to zero; give at least one loss a weight.")
    return nonzero


def current_names(by_loss: Mapping[str, Any], option: str) -> dict[str, Any]:
    """Return a mapping of losses under their present names; warn (FutureWarning) for each old name.

    Raises:
        OptionError: A loss is given under both names.
    """
    renamed = {}
    for name, value in by_loss.items():
        new_name = RENAMED_LOSSES.get(name, name)
        if new_name != name:
            if new_name in by_loss:
                raise OptionError(
                    f"{option} has both {new_name!r} and its deprecated name {name!r}; keep {new_name!r}."
                )
            warn_renamed(option, name, new_name, stacklevel=3)
        renamed[new_name] = value
    return renamed


def parse_loss_options(loss_options: Any, weights: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Return options by loss, from a mapping of mappings or from JSON.

    Args:
        loss_options: Such as {"dkd": {"beta": 4.0}}, or None.
        weights: The losses that are trained on.

    Raises:
        OptionError: Options of a loss that is not among the losses, or not a mapping.
    """
    if loss_options is None:
        return {}
    like = '{"dkd": {"beta": 4.0}}'
    parsed = current_names(check_mapping("loss_options", loss_options, like=like), "loss_options")
    for name, options in parsed.items():
        if name not in weights:
            raise OptionError(
                f"loss_options has options of {name!r}, which is not among the losses {sorted(weights)}."
                f"{did_you_mean(name, weights)}"
            )
        check_mapping(f"loss_options[{name!r}]", options, like='{"beta": 4.0}')
    return {name: dict(options) for name, options in parsed.items()}


def logit_losses(losses: Iterable[str]) -> list[str]:
    """Return the losses that compare logits, or what is made of them, item by item."""
    signals = (TeacherSignal.LOGITS, TeacherSignal.SUBCLASSES)
    return [name for name in losses if _LOSSES[name].requires in signals]


def required_signals(losses: Mapping[str, Any]) -> set[TeacherSignal]:
    """Return which signals losses require of a teacher; subclass probabilities come with the batch."""
    signals = {_LOSSES[name].requires for name in losses}
    return signals - {TeacherSignal.LABELS, TeacherSignal.SUBCLASSES}


def compares_features(losses: Mapping[str, Any]) -> bool:
    """Return whether a loss compares hidden states or features, whatever the model's outputs are."""
    signals = (TeacherSignal.HIDDEN_STATES, TeacherSignal.FEATURES, TeacherSignal.SUBCLASSES)
    return any(_LOSSES[name].requires in signals for name in losses)


def check_losses_fit_task(configs: Mapping[str, Any], task: str, config: Any) -> None:
    """Check that losses are for a student's task, and that its logits are what they compare.

    Args:
        configs: By loss, its config.
        task: The student's.
        config: The student's model config.

    Raises:
        TaskError: Names the losses and what they are for.
    """
    for name in configs:
        tasks = _LOSSES[name].tasks
        if tasks and task not in tasks:
            raise TaskError(f"The loss {name!r} is for {' and '.join(tasks)}, not for {task}. Leave it out of losses.")
    if TASK_LOSS in configs and Task(task).row.outputs[0].kind is OutputKind.FEATURES:
        raise TaskError(
            f"A model for {task} has no loss of its own, which 'ce' is. Leave 'ce' out of losses: use 'features' or "
            "'hidden_states'."
        )
    check_output_kind(configs, task, config, "student")
    for loss_config in configs.values():
        if isinstance(loss_config, LossConfig):
            loss_config.check_student(config)


def check_output_kind(losses: Mapping[str, Any], task: str, config: Any, role: str) -> None:
    """Check that a model's logits are of a kind that the losses compare: a distribution over classes, labels, real numbers.

    Args:
        losses: By name; the values do not matter.
        task: The model's.
        config: The model's config.
        role: "student" or "teacher", for the error.

    Raises:
        TaskError: A loss compares logits of another kind; names what works.
    """
    kind = output_kind(Task(task), config)
    wrong = [name for name in logit_losses(losses) if kind not in _LOSSES[name].kinds]
    if not wrong:
        return
    what = {
        OutputKind.BERNOULLI: "labels that hold independently, a sigmoid each",
        OutputKind.REAL: "real numbers, as of a regression",
        OutputKind.FEATURES: "vectors",
    }.get(kind, "a distribution over classes")
    names = ("problem_type", "num_labels") if Task(task).row.outputs[0].classes == "labels" else ()
    details = ", ".join(f"{name}={getattr(config, name)}" for name in names if hasattr(config, name))
    suitable = [name for name in ("kd",) if name in _LOSSES and kind in _LOSSES[name].kinds]
    raise TaskError(
        f"The outputs of the {role}{details and f' ({details})'} are {what}, which {' and '.join(map(repr, wrong))} cannot "
        f"compare: use {' or '.join(map(repr, [*suitable, 'features', 'hidden_states']))} instead."
    )
