"""Everything that a distillation can be told: `TrainingArguments`, and what teacher and objective need."""

import contextlib
import copy
import copyreg
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from hf_guide.distillation.losses.divergences import DivergenceKind
from hf_guide.distillation.losses.registry import parse_losses, registered_losses
from hf_guide.errors import OptionError
from hf_guide.utils.public_names import public_value
from hf_guide.validation import MAX_WEIGHT, check_integer, check_number, check_temperature, check_weight, did_you_mean


class FeatureLoss(str, Enum):
    """How far apart two vectors are."""

    MSE = "mse"
    COSINE = "cosine"


@dataclass
class DistillationArguments(TrainingArguments):
    """The arguments of `DistillationTrainer`: those of `TrainingArguments`, and these.

    Raises:
        OptionError: an unknown term or option (with the nearest valid one), a temperature that is not positive, weights
            that sum to nothing.
    """

    objective: dict | str | None = field(
        default_factory=lambda: {"ce": 0.5, "kd": 0.5},
        metadata={
            "help": "What the student learns: one term's name, or weights by name, as JSON on the command line: "
            '\'{"ce": 0.5, "kd": 0.5}\'. Terms: ce (the task loss), kd (a divergence from the teacher), dkd '
            "(decoupled, classification), hidden, embedding, lelp (subclasses), and what you register."
        },
    )
    temperature: float = field(
        default=1.0,
        metadata={
            "help": "Divides the logits of student and teacher in kd, dkd and lelp; the term is multiplied by its square."
        },
    )
    divergence: str = field(
        default="forward_kl",
        metadata={
            "help": "What kd measures: forward_kl, KL(teacher, student); reverse_kl, KL(student, teacher); jsd, between "
            "the two (arXiv 2306.13649)."
        },
    )
    jsd_beta: float = field(
        default=0.5, metadata={"help": "Of jsd: the teacher's share of the mixture, between 0 and 1."}
    )
    dkd_alpha: float = field(default=1.0, metadata={"help": "Of dkd: the weight of the target class's part."})
    dkd_beta: float = field(default=8.0, metadata={"help": "Of dkd: the weight of the other classes' part."})
    hidden_layers: dict | str | None = field(
        default=None,
        metadata={
            "help": "Of hidden: which of the teacher's layers each of the student's is to resemble, by number of blocks "
            'passed, 0 being the embeddings; JSON on the command line: \'{"5": 15, "10": 30}\'. By default each of '
            "the student's blocks and the teacher's block that it came from, or evenly spaced ones."
        },
    )
    hidden_distance: str = field(default="mse", metadata={"help": "Of hidden and embedding: mse or cosine."})
    teacher: str | None = field(
        default=None, metadata={"help": "The teacher: a Hub id or a folder. Several are separated by commas."}
    )
    teacher_weights: list[float] | str | None = field(
        default=None, metadata={"help": "Of several teachers: one weight each, as a JSON list. By default all alike."}
    )
    teacher_init_kwargs: dict | str | None = field(
        default=None,
        metadata={
            "help": "What the teacher's from_pretrained is called with, as JSON: revision, token, dtype, device_map, "
            "quantization_config, trust_remote_code, attn_implementation."
        },
    )
    teacher_compile: bool = field(default=False, metadata={"help": "Compile the teacher with torch.compile."})
    capture: str | None = field(
        default=None,
        metadata={
            "help": "A folder that `hf-guide capture` wrote: the teacher's signals are read from it, no teacher runs."
        },
    )
    student: dict | str | None = field(
        default=None,
        metadata={
            "help": "What `from_teacher` makes the student with where no model is given, as JSON: method, hidden_size, "
            "num_hidden_layers and any other entry of the config."
        },
    )
    max_logits: int = field(
        default=2**23,
        metadata={
            "help": "How many logits are held at once where a language model's losses are computed over chunks of tokens."
        },
    )

    def __post_init__(self) -> None:
        self.check_options()
        if self.greater_is_better is None and _is_lower_better(self.metric_for_best_model):
            self.greater_is_better = (
                False  # by default `TrainingArguments` takes all but "...loss" for the better the greater
            )
        super().__post_init__()

    def check_options(self) -> None:
        """Bring what is about the distillation into its own form, and refuse what cannot be.

        Raises:
            OptionError: names the option.
        """
        self.objective = parse_losses(self.objective)
        self.divergence = _enum_value(DivergenceKind, self.divergence, "divergence")
        self.hidden_distance = _enum_value(FeatureLoss, self.hidden_distance, "hidden_distance")
        self.temperature = check_temperature("temperature", self.temperature)
        for name in ("dkd_alpha", "dkd_beta"):
            setattr(self, name, check_number(name, getattr(self, name), 0.0, MAX_WEIGHT, includes_low=False))
        self.jsd_beta = check_number(
            "jsd_beta (the ends are forward_kl and reverse_kl)",
            self.jsd_beta,
            0.0,
            1.0,
            includes_low=False,
            includes_high=False,
        )
        self.max_logits = check_integer("max_logits", self.max_logits)
        if self.teacher and self.capture:
            raise OptionError("teacher and capture are both given; the signals come from one of them.")
        self.teacher_weights = _parse_teacher_weights(self.teacher_weights)
        self.hidden_layers = _parse_layer_mapping(_parse_mapping(self.hidden_layers, "hidden_layers"))
        self.teacher_init_kwargs = _parse_mapping(self.teacher_init_kwargs, "teacher_init_kwargs")
        self.student = _parse_mapping(self.student, "student")

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments as `TrainingArguments` do, for JSON and for reports; tokens are not told."""
        told = copy.copy(self)
        for name in ("teacher_init_kwargs", "student"):
            given = getattr(self, name)
            if given is not None:
                setattr(told, name, {key: _redact_keyword(key, value) for key, value in given.items()})
        return super(DistillationArguments, told).to_dict()

    def to_json_string(self) -> str:
        """Return the arguments as JSON for experiment trackers, whose logs stand in `output_dir`: without paths and tokens."""
        return super(DistillationArguments, redact_arguments(self)).to_json_string()

    def __str__(self) -> str:
        lines = [f"{name}={value},\n" for name, value in sorted(self.to_dict().items())]
        return f"{type(self).__name__}(\n{''.join(lines)})"

    __repr__ = __str__

    @property
    def weights(self) -> dict[str, float]:
        """The objective as weights by term."""
        return parse_losses(self.objective)


def redact_arguments(args: DistillationArguments) -> DistillationArguments:
    """Return a copy without tokens, in which folders are named by the last part of their path."""
    public = copy.copy(args)
    for name, value in vars(args).items():
        is_token = name == "token" or name.endswith("_token")
        setattr(public, name, None if is_token else public_value(value))
    public.output_dir = Path(args.output_dir or "").name
    return public


class _RedactedWhenPickled(DistillationArguments):
    """Arguments that read as they are, and are pickled as `redact_arguments`."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain = object.__new__(DistillationArguments)
        plain.__dict__.update(self.__dict__)
        return copyreg._reconstructor, (DistillationArguments, object, None), vars(redact_arguments(plain))  # type: ignore[attr-defined]


@contextlib.contextmanager
def redacted_training_args(trainer: Any) -> Iterator[None]:
    """Let a trainer pickle its arguments without paths and tokens, for `training_args.bin`, which is published."""
    args = trainer.args
    trainer.args = object.__new__(_RedactedWhenPickled)
    trainer.args.__dict__.update(args.__dict__)
    try:
        yield
    finally:
        trainer.args = args


def _enum_value(kinds: type[Enum], value: Any, option: str) -> str:
    known = [kind.value for kind in kinds]
    if isinstance(value, kinds):
        return str(value.value)
    if value not in known:
        raise OptionError(
            f"{option}={value!r} is not known; expected one of {known}.{did_you_mean(str(value), known)}"
        )
    return str(value)


def _is_lower_better(metric: str | None) -> bool:
    """Return whether a metric, such as "objective", "eval_kd" or "eval_far_perplexity", is ours and the better the smaller."""
    names = (metric or "").removesuffix("_weighted").split("_")
    ours = {"objective", "perplexity", *registered_losses()}
    return any("_".join(names[first:]) in ours for first in range(len(names)))


def _redact_keyword(key: str, value: Any) -> Any:
    """Return what reports may tell of a keyword of `from_pretrained`, in JSON's own types."""
    if key == "token":
        return "<TOKEN>"
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value.to_dict() if hasattr(value, "to_dict") else value


def _parse_mapping(value: Any, option: str) -> dict[str, Any] | None:
    """Return a mapping, read as JSON where it is text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise OptionError(f"{option} is a mapping, as JSON: {error}; found {value!r}.") from error
    if value is not None and not isinstance(value, dict):
        raise OptionError(f"{option} is a mapping; found {value!r}.")
    return value


def _parse_teacher_weights(weights: Any) -> Any:
    if isinstance(weights, str):
        try:
            weights = json.loads(weights)
        except json.JSONDecodeError as error:
            raise OptionError(f"teacher_weights is a JSON list of numbers: {error}.") from error
    if weights is None:
        return None
    if not isinstance(weights, list):
        raise OptionError(f"teacher_weights must be a list of numbers; found {weights!r}.")
    weights = [check_weight("Each of teacher_weights", weight) for weight in weights]
    if not sum(weights) > 0:
        raise OptionError(f"teacher_weights {weights} sum to nothing; give at least one teacher a weight.")
    return weights


def _parse_layer_mapping(layers: dict[str, Any] | None) -> dict[int, int] | None:
    if layers is None:
        return None
    found: dict[int, int] = {}
    for student, teacher in layers.items():
        numbers = [int(each) if isinstance(each, str) and each.isdecimal() else each for each in (student, teacher)]
        if any(isinstance(each, bool) or not isinstance(each, int) or each < 0 for each in numbers):
            raise OptionError(
                "hidden_layers must map the student's layer numbers to the teacher's, whole numbers of at least 0; "
                f"found {student!r}: {teacher!r}."
            )
        found[int(numbers[0])] = int(numbers[1])
    return found
