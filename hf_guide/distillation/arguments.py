"""`DistillationArguments`: `TrainingArguments` with the options of teacher and losses; checks of what a trainer is passed."""

import contextlib
import copy
import copyreg
import dataclasses
import json
import os
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Seq2SeqTrainingArguments, TrainingArguments
from transformers.trainer_utils import has_length

from hf_guide.distillation.losses.divergences import DivergenceKind
from hf_guide.distillation.losses.registry import get_loss, parse_loss_options, parse_losses, registered_losses
from hf_guide.errors import OptionError
from hf_guide.hub.metadata import check_repo_id
from hf_guide.hub.push import check_hub_target
from hf_guide.signal_cache.reader import Capture
from hf_guide.utils.deprecation import RenamedOptions, with_renamed_options
from hf_guide.utils.files import check_can_create
from hf_guide.utils.public_names import public_value
from hf_guide.validation import (
    check_choice,
    check_integer,
    check_is_dataset,
    check_mapping,
    check_number,
    check_temperature,
    check_weight,
)


def _move_to_loss_options(option: str, *losses: str) -> Callable[[dict[str, Any], Any], str]:
    """Return what makes an argument of the previous release an option of losses, of those that are trained on."""

    def move(arguments: dict[str, Any], value: Any) -> str:
        loss_options = check_mapping("loss_options", arguments.get("loss_options") or {})
        weights = parse_losses(arguments.get("losses", "kd"))
        for loss in losses:
            if loss in weights:
                loss_options[loss] = {option: value, **loss_options.get(loss, {})}
        arguments["loss_options"] = loss_options or None
        return f"loss_options={ {loss: {option: value} for loss in losses} }"

    return move


RENAMED_ARGUMENTS = RenamedOptions(
    names={
        "objective": "losses",
        "divergence": "kd_loss_type",
        "jsd_beta": "beta",
        "hidden_layers": "layer_mapping",
        "capture": "teacher_cache",
        "student": "student_init_kwargs",
        "max_logits": "loss_chunk_size",
    },
    moved={
        "dkd_alpha": _move_to_loss_options("alpha", "dkd"),
        "dkd_beta": _move_to_loss_options("beta", "dkd"),
        "hidden_distance": _move_to_loss_options("distance", "hidden_states", "features"),
    },
    removed={
        "teacher_compile": "call `teacher.compile()` on a loaded model before you pass it; the losses are the same."
    },
)
"""Names of arguments in the previous release, and the present ones."""


@with_renamed_options(RENAMED_ARGUMENTS)
@dataclass
class DistillationArguments(TrainingArguments):
    """The arguments of `DistillationTrainer`: those of `TrainingArguments`, and these.

    A loss's own options are in `loss_options`; `hf_guide.distillation.losses` has the losses and their config classes.

    Raises:
        OptionError: An unknown loss or option (with the nearest valid one), a temperature that is not positive, weights
            that sum to zero.

    Example:
        >>> args = DistillationArguments("out", losses={"ce": 0.5, "kd": 0.5}, temperature=2.0)
        >>> args.loss_weights
        {'ce': 0.5, 'kd': 0.5}
    """

    losses: dict | str | None = field(  # type: ignore[type-arg]
        default_factory=lambda: {"ce": 0.5, "kd": 0.5},
        metadata={
            "help": "What the student is trained on: one loss's name, or weights by name, as JSON on the command line: "
            '\'{"ce": 0.5, "kd": 0.5}\'. Losses: ce (the task loss), kd (a divergence from the teacher), dkd '
            "(decoupled, classification), hidden_states, features, lelp (subclasses), and what you register."
        },
    )
    loss_options: dict | str | None = field(  # type: ignore[type-arg]
        default=None,
        metadata={
            "help": 'Options of single losses, by loss, as JSON on the command line: \'{"dkd": {"beta": 4.0}}\'. dkd has '
            "alpha and beta (weights of the target class's part and of the other classes'), hidden_states and features "
            "have distance (mse or cosine)."
        },
    )
    temperature: float = field(
        default=1.0,
        metadata={
            "help": "Divides the logits of student and teacher in kd, dkd and lelp; the loss is multiplied by its square."
        },
    )
    kd_loss_type: str = field(
        default="forward_kl",
        metadata={
            "help": "Which divergence kd is: forward_kl, KL(teacher, student); reverse_kl, KL(student, teacher); jsd, the "
            "generalized Jensen-Shannon divergence (arXiv 2306.13649)."
        },
    )
    beta: float = field(
        default=0.5, metadata={"help": "Of kd_loss_type=jsd: the teacher's weight in the mixture, between 0 and 1."}
    )
    layer_mapping: dict | str | None = field(  # type: ignore[type-arg]
        default=None,
        metadata={
            "help": "Of the loss hidden_states: student layer -> teacher layer, by number of blocks passed, 0 being the "
            'embeddings; JSON on the command line: \'{"5": 15, "10": 30}\'. By default each of the student\'s blocks is '
            "compared with the teacher's block that it was initialized from, or with evenly spaced ones."
        },
    )
    teacher: str | None = field(
        default=None, metadata={"help": "The teacher: a Hub id or a folder. Several are separated by commas."}
    )
    teacher_weights: list[float] | str | None = field(
        default=None, metadata={"help": "Of several teachers: one weight each, as a JSON list. By default all equal."}
    )
    teacher_init_kwargs: dict | str | None = field(  # type: ignore[type-arg]
        default=None,
        metadata={
            "help": "Keyword arguments of the teacher's from_pretrained, as JSON: revision, token, dtype, device_map, "
            "quantization_config, trust_remote_code, attn_implementation."
        },
    )
    teacher_cache: str | None = field(
        default=None,
        metadata={
            "help": "A folder that `hf-guide capture` wrote: the teacher's signals are read from it, and no teacher runs."
        },
    )
    student_init_kwargs: dict | str | None = field(  # type: ignore[type-arg]
        default=None,
        metadata={
            "help": "Arguments of from_teacher, which initializes the student where no model is given, as JSON: method, "
            "hidden_size, num_hidden_layers and any other entry of the config."
        },
    )
    loss_chunk_size: int = field(
        default=2**23,
        metadata={
            "help": "How many logits exist at once where a language model's losses are computed in chunks of tokens."
        },
    )

    def __init_subclass__(cls) -> None:
        """Let a dataclass of this one and of another, such as TRL's `SFTConfig`, have the other's defaults.

        A dataclass takes a field from the first base that has it, and this class has all fields of `TrainingArguments`.
        """
        super().__init_subclass__()
        declared = dict(vars(cls).get("__annotations__", {}))
        for base in cls.__mro__[1:]:
            if issubclass(base, DistillationArguments) or not issubclass(base, TrainingArguments):
                continue
            hints = typing.get_type_hints(base)
            for name in vars(base).get("__annotations__", {}):
                if (
                    name in declared
                    or base is TrainingArguments
                    or name not in DistillationArguments.__dataclass_fields__
                ):
                    continue
                inherited = base.__dataclass_fields__[name]
                declared[name] = hints[name]
                setattr(cls, name, _copy_field(inherited))
        cls.__annotations__ = declared

    def __post_init__(self) -> None:
        self.check_options()
        if self.greater_is_better is None and _is_lower_better(self.metric_for_best_model):
            self.greater_is_better = False  # `TrainingArguments` assumes True for every name but "...loss"
        super().__post_init__()

    def check_options(self) -> None:
        """Parse and check the arguments of the distillation, also after they were changed.

        Raises:
            OptionError: Names the argument.
        """
        self.losses = parse_losses(self.losses)
        self.temperature = check_temperature("temperature", self.temperature)
        self.kd_loss_type = check_choice("kd_loss_type", self.kd_loss_type, DivergenceKind)
        self.beta = check_number(
            "beta (forward_kl and reverse_kl are its limits at 0 and 1)",
            self.beta,
            0.0,
            1.0,
            includes_low=False,
            includes_high=False,
        )
        self.loss_options = parse_loss_options(self.loss_options, self.losses) or None
        self._build_loss_configs()  # checks the options
        self.loss_chunk_size = check_integer("loss_chunk_size", self.loss_chunk_size)
        if self.teacher and self.teacher_cache:
            raise OptionError("teacher and teacher_cache are both given; the signals come from one of them.")
        self.teacher_weights = _parse_teacher_weights(self.teacher_weights)
        self.layer_mapping = _parse_layer_mapping(self.layer_mapping)
        for name in ("teacher_init_kwargs", "student_init_kwargs"):
            if getattr(self, name) is not None:
                setattr(self, name, check_mapping(name, getattr(self, name), like='{"dtype": "bfloat16"}'))

    @property
    def loss_weights(self) -> dict[str, float]:
        """The weight of each loss, by name."""
        return parse_losses(self.losses)

    @property
    def loss_configs(self) -> dict[str, Any]:
        """The options of each loss, by name, as its config class."""
        return self._build_loss_configs()

    def _build_loss_configs(self) -> dict[str, Any]:
        weights = self.loss_weights
        options = parse_loss_options(self.loss_options, weights)
        return {name: get_loss(name).build_config(options.get(name, {}), self) for name in weights}

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments as `TrainingArguments` does, for JSON and for reports, without tokens."""
        redacted = copy.copy(self)
        for name in ("teacher_init_kwargs", "student_init_kwargs"):
            keywords = getattr(self, name)
            if keywords is not None:
                setattr(redacted, name, {key: _redact_keyword(key, value) for key, value in keywords.items()})
        arguments: dict[str, Any] = super(DistillationArguments, redacted).to_dict()
        return arguments

    def to_json_string(self) -> str:
        """Return the arguments as JSON for experiment trackers, whose logs are in `output_dir`: without paths and tokens."""
        text: str = super(DistillationArguments, redact_arguments(self)).to_json_string()
        return text

    def __str__(self) -> str:
        lines = [f"{name}={value},\n" for name, value in sorted(self.to_dict().items())]
        return f"{type(self).__name__}(\n{''.join(lines)})"

    __repr__ = __str__


def _copy_field(declared: "dataclasses.Field[Any]") -> Any:
    names = ("default", "default_factory", "init", "repr", "hash", "compare", "metadata", "kw_only")
    return dataclasses.field(**{name: getattr(declared, name) for name in names})


@with_renamed_options(RENAMED_ARGUMENTS)
@dataclass
class Seq2SeqDistillationArguments(DistillationArguments, Seq2SeqTrainingArguments):
    """The arguments of `Seq2SeqDistillationTrainer`: `DistillationArguments` with those of `Seq2SeqTrainingArguments`.

    Raises:
        OptionError: As `DistillationArguments`.

    Example:
        >>> args = Seq2SeqDistillationArguments("out", losses="kd", predict_with_generate=True, generation_max_length=32)
        >>> args.loss_weights, args.generation_max_length
        ({'kd': 1.0}, 32)
    """


def _is_lower_better(metric: str | None) -> bool:
    """Return whether a metric, such as "objective", "eval_kd" or "eval_far_perplexity", is ours and better when smaller."""
    names = (metric or "").removesuffix("_weighted").split("_")
    ours = {"objective", "perplexity", *registered_losses()}
    return any("_".join(names[first:]) in ours for first in range(len(names)))


def _parse_teacher_weights(weights: Any) -> Any:
    if isinstance(weights, str):
        try:
            weights = json.loads(weights)
        except json.JSONDecodeError as error:
            raise OptionError(f"teacher_weights must be a JSON list of numbers: {error}.") from error
    if weights is None:
        return None
    if not isinstance(weights, list):
        raise OptionError(f"teacher_weights must be a list of numbers; found {weights!r}.")
    weights = [check_weight("Each of teacher_weights", weight) for weight in weights]
    if not sum(weights) > 0:
        raise OptionError(f"teacher_weights {weights} sum to zero; give at least one teacher a weight.")
    return weights


def _parse_layer_mapping(layers: Any) -> dict[int, int] | None:
    if layers is None:
        return None
    mapping: dict[int, int] = {}
    for student, teacher in check_mapping("layer_mapping", layers, like='{"5": 15, "10": 30}').items():
        pair = [int(each) if isinstance(each, str) and each.isdecimal() else each for each in (student, teacher)]
        for layer in pair:
            check_integer("layer_mapping maps student layers to teacher layers, each of which", layer, low=0)
        mapping[int(pair[0])] = int(pair[1])
    return mapping


def _redact_keyword(key: str, value: Any) -> Any:
    """Return a keyword argument of `from_pretrained` for reports, in JSON's own types."""
    if key == "token":
        return "<TOKEN>"
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value.to_dict() if hasattr(value, "to_dict") else value


def redact_arguments(args: DistillationArguments) -> DistillationArguments:
    """Return a copy without tokens, in which folders are named by the last part of their path."""
    public = copy.copy(args)
    for name, value in vars(args).items():
        is_token = name == "token" or name.endswith("_token")
        setattr(public, name, None if is_token else public_value(value))
    public.output_dir = Path(args.output_dir or "").name
    return public


class _RedactedWhenPickled(DistillationArguments):
    """Arguments that read as they are, and are pickled as `redact_arguments` returns them, as a class of this module."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        known = (Seq2SeqDistillationArguments, DistillationArguments)
        kind = next(each for each in known if isinstance(self, each))
        plain = object.__new__(kind)
        plain.__dict__.update(self.__dict__)
        return copyreg._reconstructor, (kind, object, None), vars(redact_arguments(plain))  # type: ignore[attr-defined]


@contextlib.contextmanager
def redacted_training_args(trainer: Any) -> Iterator[None]:
    """Let a trainer pickle its arguments without paths and tokens: `training_args.bin` is published."""
    args = trainer.args
    redacted_class: Any = type(type(args).__name__, (_RedactedWhenPickled, type(args)), {})
    trainer.args = object.__new__(redacted_class)
    trainer.args.__dict__.update(args.__dict__)
    try:
        yield
    finally:
        trainer.args = args


# What a trainer is passed


def validate_arguments(args: Any, expected: type[DistillationArguments] = DistillationArguments) -> None:
    """Check that a distillation can run with these arguments, which must be `DistillationArguments`.

    `expected` is the trainer's own class of arguments, which the error names.

    Raises:
        OptionError: Names the option, and what to do instead.
    """
    if not isinstance(args, DistillationArguments):
        raise OptionError(
            f"args must be {expected.__name__}, which have all fields of TrainingArguments; found "
            f"{type(args).__name__}."
        )
    if args.use_liger_kernel:
        raise OptionError(
            "use_liger_kernel computes the student's task loss without logits, so that there is nothing to compare with the "
            "teacher's. Leave it out: losses are computed in chunks of tokens here too."
        )
    if args.push_to_hub and args.process_index == 0:  # the only one that pushes
        check_hub_target(args.hub_model_id or Path(args.output_dir or "").absolute().name, args.hub_token)
    elif args.hub_model_id is not None:
        check_repo_id("hub_model_id", args.hub_model_id)
    if args.n_gpu > 1:
        raise OptionError(
            f"One process sees {args.n_gpu} GPUs, for which Trainer would use DataParallel. Launch one process per GPU, with "
            "`accelerate launch` or `torchrun`, or show the process one GPU with CUDA_VISIBLE_DEVICES."
        )


def validate_datasets(train_dataset: Any, eval_dataset: Any) -> None:
    """Check that datasets are of examples, and have one at least where their length is known; either may be None.

    Raises:
        OptionError: Names the dataset.
    """
    parts = (
        {f"eval_dataset[{key!r}]": part for key, part in eval_dataset.items()}
        if isinstance(eval_dataset, dict)
        else {}
    )
    for name, dataset in {"train_dataset": train_dataset, **(parts or {"eval_dataset": eval_dataset})}.items():
        check_is_dataset(dataset, name)
        if dataset is not None and has_length(dataset) and len(dataset) == 0:
            raise OptionError(f"{name} is empty; it must have at least one example. Leave it out, or give it some.")


def resolve_teacher(teacher: Any, args: DistillationArguments) -> Any:
    """Return the teacher, teachers or signal cache of the trainer's keyword or of the arguments; None for none.

    Raises:
        OptionError: The teacher is given twice.
        CaptureError: The signal cache is incomplete.
    """
    if teacher is not None and (args.teacher or args.teacher_cache):
        raise OptionError(
            "The teacher is given twice: to the trainer, and in args.teacher or args.teacher_cache. Give it once."
        )
    if teacher is None and args.teacher_cache:
        return Capture.open(args.teacher_cache)
    return args.teacher if teacher is None else teacher


def validate_output_dir(args: DistillationArguments, source: Any, student: Any) -> None:
    """Check that a student can be saved into `output_dir` without overwriting anything else.

    Args:
        args: Has `output_dir`.
        source: The teacher, teachers or signal cache.
        student: The student, or the arguments of `from_teacher`, which may name a teacher of their own.

    Raises:
        OptionError: It is a file, or the folder of a teacher or a signal cache, whose files the student's would replace.
        OSError: It cannot be created.
    """
    output_dir = args.output_dir or "."
    check_can_create(Path(output_dir))
    if os.path.exists(output_dir) and not os.path.isdir(output_dir):
        raise OptionError(
            f"output_dir {output_dir} is a file; it must be a folder, or new. Choose another output_dir."
        )
    several = source if isinstance(source, (list, tuple)) else [source]
    sources = [*several, student.get("teacher") if isinstance(student, Mapping) else None]
    for each in sources:
        role = "signal cache" if isinstance(each, Capture) else "teacher"
        for folder in _candidate_folders(each):
            if os.path.isdir(folder) and os.path.isdir(output_dir) and os.path.samefile(folder, output_dir):
                raise OptionError(
                    f"output_dir {output_dir} is the folder of the {role}, whose files the student's would replace. Choose "
                    "another output_dir."
                )


def _candidate_folders(source: Any) -> list[str]:
    """Return the folders that a teacher or signal cache may be in; a text may name several, with commas."""
    if isinstance(source, Capture):
        return [str(source.folder)]
    if isinstance(source, str):
        return [source, *(name.strip() for name in source.split(","))]
    if isinstance(source, os.PathLike):
        return [os.fspath(source)]
    return [str(getattr(source, "name_or_path", "") or "")]
