"""The choices of an initialisation that have names. Each accepts its plain string.

Options of an initialisation that are lists: which blocks, and weights of tokens.

Every switch of an initialisation, as a documented dataclass field.
"""

import dataclasses
import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from hf_guide.errors import OptionError
from hf_guide.validation import check_known_fields, did_you_mean


class StringEnum(str, Enum):
    """Choices that are told by their strings."""

    @classmethod
    def parse(cls, value: "str | StringEnum", option: str) -> "StringEnum":
        known = [member.value for member in cls]
        try:
            return cls(value)
        except ValueError:
            hint = did_you_mean(str(value), known)
            raise OptionError(f"{option}={value!r} is not known; expected one of {known}.{hint}") from None

    def __str__(self) -> str:
        return str(self.value)


class Method(StringEnum):
    """How a student starts."""

    GUIDE = "guide"
    CALIBRATED = "calibrated"
    UNIFORM = "uniform"
    RANDOM = "random"


class SubsequentLayers(StringEnum):
    """How the blocks after the first are made by `guide`."""

    PROJECT = "project"
    SELECT = "select"
    RANDOM = "random"


class LayerSelection(StringEnum):
    """Which of the teacher's blocks feed the student's, where no explicit list is given."""

    AUTO = "auto"
    EVEN = "even"
    FIRST = "first"
    ENDS = "ends"
    INFLUENCE = "influence"


class BasisKind(StringEnum):
    """How `calibrated` makes the residual stream narrower."""

    AUTO = "auto"
    ACTIVATIONS = "activations"
    PLACES = "places"
    EMBEDDINGS = "embeddings"


class Pooling(StringEnum):
    """How `calibrated` weighs the places at which it sees the residual stream."""

    NORM = "norm"
    BLOCK = "block"
    ENERGY = "energy"


class Importance(StringEnum):
    """Which heads, neurons or experts `calibrated` keeps."""

    ENERGY = "energy"
    EVEN = "even"


class Refit(StringEnum):
    """Which weights `calibrated` fits again after they were carried over."""

    ALL = "all"
    WRITING = "writing"
    NONE = "none"


class RefitInputs(StringEnum):
    """What a student's block reads while its weights are fitted."""

    STUDENT = "student"
    TEACHER = "teacher"


def parse_layers(layers: Any) -> "str | list[int] | dict[str, list[int]]":
    """Return the choice, the numbers, or the numbers by stack that an option of blocks stands for.

    Raises:
        OptionError: what it is instead.
    """
    if isinstance(layers, str):
        return str(LayerSelection.parse(layers, "layers"))
    if isinstance(layers, Mapping):
        return {str(stack): _block_numbers(blocks, f"layers[{stack!r}]") for stack, blocks in layers.items()}
    return _block_numbers(layers, "layers")


def _block_numbers(blocks: Any, option: str) -> list[int]:
    expected = f"{option} is a list of teacher block numbers such as [0, 4, 9]"
    if isinstance(blocks, str) or not isinstance(blocks, Iterable):
        raise OptionError(f"{expected}{', or even, first or ends' if option == 'layers' else ''}; found {blocks!r}.")
    numbers = list(blocks)
    try:
        return [operator.index(number) for number in numbers]
    except TypeError as error:
        raise OptionError(f"{expected}; found {numbers!r}.") from error


def parse_token_frequencies(weights: Any) -> "list[float] | None":
    """Return one weight for each token as numbers, None for none.

    Raises:
        OptionError: weights that are not finite numbers of at least 0, or all 0.
    """
    if weights is None:
        return None
    try:
        numbers = [float(weight) for weight in weights]
    except (TypeError, ValueError) as error:
        raise OptionError(
            f"token_weights is a list of numbers, one per row of the embedding table: {error}."
        ) from error
    wrong = next((row for row, number in enumerate(numbers) if not 0 <= number < math.inf), None)
    if wrong is not None:
        raise OptionError(f"token_weights must be finite and not negative; that of row {wrong} is {numbers[wrong]}.")
    if not any(numbers):
        raise OptionError(
            "token_weights are all zero, so no row would be looked at; leave them out to weigh all alike."
        )
    return numbers


SELF_GENERATED = "teacher"
"""As a calibration dataset: text that the teacher writes itself."""


@dataclass
class InitializationConfig:
    """The options of `from_teacher`. Strings are accepted for every enum.

    Raises:
        OptionError: an unknown value (with the nearest valid one), or options that contradict each other.
    """

    method: str = field(
        default="guide",
        metadata={
            "help": "guide: the residual stream is projected on the principal directions of the embedding table, "
            "every other axis is selected evenly, but for the blocks: layers (GUIDE, arXiv 2510.06502). calibrated: as "
            "guide, with directions, blocks, heads and neurons chosen by what the teacher does with a calibration dataset, "
            "and weights fitted again. "
            "uniform: every axis is selected evenly (weight selection, arXiv 2311.18823). random: the model's own "
            "initialisation."
        },
    )
    later_blocks: str = field(
        default="project",
        metadata={
            "help": "What guide does after the first block: project (as the first), select (uniform selection) or "
            "random (the model's own initialisation)."
        },
    )
    layers: "str | list[int] | dict[str, list[int]]" = field(
        default="auto",
        metadata={
            "help": "Which teacher block feeds each student block: even, first, ends (the first and the last, the middle left "
            "out), influence (those that turn the residual stream most, for calibrated alone), a list of numbers, "
            "or a mapping from stack (such as encoder.block) to a list. auto is ends for guide, influence for calibrated, "
            "and even for uniform."
        },
    )
    centered: bool = field(
        default=False,
        metadata={
            "help": "Fit the directions on the centred embedding table. The uncentred fit, the default, gives the "
            "best reconstruction of the table itself."
        },
    )
    token_weights: "list[float] | None" = field(
        default=None,
        metadata={
            "help": "One weight per row of the embedding table, such as token frequencies; None weighs all alike."
        },
    )
    energy_correction: bool = field(
        default=True,
        metadata={
            "help": "Scale what is read after a norm by the share of length that the projection keeps: a truncated "
            "vector is shorter, and the student's norm would make it longer again."
        },
    )
    fold_norms: bool = field(
        default=True,
        metadata={
            "help": "Fold the gains (and biases) of norms into the weights that read them, which is exact; otherwise "
            "the gain is the diagonal of the projected one, which is not."
        },
    )
    restore_logit_scale: bool = field(
        default=True,
        metadata={"help": "Keep attention logits on the teacher's scale where the head size shrinks."},
    )
    logit_gain: float = field(
        default=1.0,
        metadata={
            "help": "Multiplies the logits, through the norm or weight that makes them. 1 keeps the teacher's; below 1 a "
            "student of which much is cut starts less sure of what it no longer knows, which pays on a small budget and "
            "costs on a large one."
        },
    )
    basis: str = field(
        default="auto",
        metadata={
            "help": "How calibrated makes the residual stream narrower: activations (their principal directions), embeddings "
            "(those of the embedding table, as guide) or places (those of the stream with most energy; gains stay exact). "
            "auto is places where blocks norm the stream itself with gains that differ, as BERT's do, and activations "
            "elsewhere."
        },
    )
    pooling: str = field(
        default="norm",
        metadata={
            "help": "How calibrated weighs the places where the stream is read: norm (each alike, each token at length 1), "
            "block (the norms of a block share its weight) or energy (tokens at their own length)."
        },
    )
    heads: str = field(
        default="energy",
        metadata={
            "help": "Which heads calibrated keeps: those that write the most energy onto the student's stream, or even."
        },
    )
    neurons: str = field(
        default="energy",
        metadata={
            "help": "Which MLP neurons calibrated keeps: those that write the most energy onto the student's stream, or even."
        },
    )
    experts: str = field(
        default="energy",
        metadata={
            "help": "Which experts of a mixture calibrated keeps: those that write the most energy onto the student's stream "
            "over the tokens routed to them, or even."
        },
    )
    repair: str = field(
        default="all",
        metadata={
            "help": "Which weights calibrated fits again, by ridge regression on the teacher's activations, block by block: "
            "all, writing (those that write onto the stream) or none."
        },
    )
    repair_inputs: str = field(
        default="student",
        metadata={
            "help": "What a block reads while it is fitted: the stream of the student, repaired so far, or the teacher's, "
            "projected."
        },
    )
    absorb_blocks: bool = field(
        default=True,
        metadata={
            "help": "Fit the last weight of a block to the stream after the dropped blocks that follow it, too, and not to "
            "the block's own output alone."
        },
    )
    ridge: "float | None" = field(
        default=None,
        metadata={
            "help": "How strongly a fitted weight is held to the one carried over, in units of its inputs' mean square. None "
            "chooses for each weight what does best on a quarter of the batches, or leaves the weight as it is."
        },
    )
    fit_table: bool = field(
        default=True,
        metadata={
            "help": "Where the head is tied to the embedding table, fit the table to both of its tasks: the embeddings "
            "themselves, and the logits."
        },
    )
    turn_values: bool = field(
        default=True,
        metadata={
            "help": "Where the head size shrinks, turn each head's values into the directions that say most after the "
            "output weight, and keep those. False keeps values at even places."
        },
    )
    turn_queries: bool = field(
        default=True,
        metadata={
            "help": "Where the head size shrinks, turn each head's queries and keys together into the directions that say "
            "most about their products, and keep those; even places where a rotary embedding or a norm stands between."
        },
    )
    fit_gain: bool = field(
        default=True,
        metadata={"help": "Fit the gain before a tied head on the calibration tokens, in the logits."},
    )
    fit_logit_scale: bool = field(
        default=True,
        metadata={
            "help": "Fit one factor of the logits on the calibration tokens, by the divergence from the teacher."
        },
    )
    calibration_tokens: int | None = field(
        default=None,
        metadata={
            "help": "How many tokens of the calibration dataset are looked at. By default ten for each neuron of the "
            "teacher's MLP, from 8,192 to 65,536: a repair fits a number for each that is kept."
        },
    )
    calibration_length: int = field(
        default=256,
        metadata={
            "help": "How many tokens a text is cut into, where the calibration dataset is text: no more than the teacher has "
            "positions."
        },
    )
    calibration_batch_size: int = field(
        default=8,
        metadata={"help": "How many rows go through the teacher at once, where the dataset is no batches already."},
    )
    seed: int = field(
        default=0, metadata={"help": "Seeds whatever is initialised at random: the same call gives the same bits."}
    )

    def __new__(cls, *args: Any, **fields: Any) -> "InitializationConfig":
        """Refuse a keyword that is no field here, where the nearest field can still be named."""
        check_known_fields(cls, fields)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self.method = str(Method.parse(self.method, "method"))
        self.later_blocks = str(SubsequentLayers.parse(self.later_blocks, "later_blocks"))
        self.layers = parse_layers(self.layers)
        self.token_weights = parse_token_frequencies(self.token_weights)
        for option, choices in _ENUM_OPTIONS.items():
            setattr(self, option, str(choices.parse(getattr(self, option), option)))
        for option in _BOOLEAN_OPTIONS:
            if not isinstance(getattr(self, option), bool):
                raise OptionError(f"{option} is True or False; found {getattr(self, option)!r}.")
        if not _is_positive(self.logit_gain):
            raise OptionError(f"logit_gain is a positive number; found {self.logit_gain!r}.")
        if self.ridge is not None and not _is_positive(self.ridge):
            raise OptionError(f"ridge is a positive number, or None; found {self.ridge!r}.")
        for option in ("calibration_tokens", "calibration_length", "calibration_batch_size"):
            number = getattr(self, option)
            if number is None and option == "calibration_tokens":
                continue
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise OptionError(f"{option} is a whole number from 1; found {number!r}.")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not 0 <= self.seed < 2**64:
            raise OptionError(f"seed is a whole number from 0 to 2**64 - 1; found {self.seed!r}.")
        for option in _inapplicable_options(self.method):
            if getattr(self, option) != self.__dataclass_fields__[option].default:
                raise OptionError(
                    f"method={self.method!r} has no use for {option}; leave it out, or choose another method."
                )
        if self.layers == LayerSelection.INFLUENCE and self.method != Method.CALIBRATED:
            raise OptionError(
                f"layers='influence' needs the activations that method='calibrated' looks at; found method={self.method!r}."
            )
        if self.method == Method.CALIBRATED:
            for option, needed in _required_with(self).items():
                if getattr(self, option) != self.__dataclass_fields__[option].default:
                    raise OptionError(f"{option} is of use only with {needed}; leave one of them out.")

    @property
    def resolved_layer_selection(self) -> "str | list[int] | dict[str, list[int]]":
        """`layers`, with "auto" as this method means it."""
        if self.layers != LayerSelection.AUTO:
            return self.layers
        meant = {Method.GUIDE.value: LayerSelection.ENDS, Method.CALIBRATED.value: LayerSelection.INFLUENCE}
        return str(meant.get(self.method, LayerSelection.EVEN))

    @property
    def projects(self) -> bool:
        """Whether the residual stream is projected on directions, and not selected from."""
        return self.method in (Method.GUIDE, Method.CALIBRATED)

    @classmethod
    def parse(cls, method: "str | InitializationConfig | Mapping[str, Any]") -> "InitializationConfig":
        """Return the options that `method` stands for: a method's name, a mapping of fields, or options, copied."""
        if isinstance(method, InitializationConfig):
            return dataclasses.replace(method)  # checked again, for its fields may have been set since
        if isinstance(method, str):
            return cls(method=method)
        if isinstance(method, Mapping):
            return cls(**{str(name): value for name, value in method.items()})
        raise OptionError(
            f"method is one of {[member.value for member in Method]}, an InitializationConfig or a mapping of its "
            f"fields; found {method!r}."
        )


_ENUM_OPTIONS: dict[str, type[StringEnum]] = {
    "basis": BasisKind,
    "pooling": Pooling,
    "heads": Importance,
    "neurons": Importance,
    "experts": Importance,
    "repair": Refit,
    "repair_inputs": RefitInputs,
}
_BOOLEAN_OPTIONS = (
    "centered",
    "energy_correction",
    "fold_norms",
    "restore_logit_scale",
    "absorb_blocks",
    "fit_table",
    "turn_values",
    "turn_queries",
    "fit_gain",
    "fit_logit_scale",
)
_GUIDE_OPTIONS = ("later_blocks", "centered", "token_weights")
_PROJECTION_OPTIONS = ("energy_correction", "fold_norms", "restore_logit_scale", "logit_gain")
_CALIBRATION_OPTIONS = (
    *_ENUM_OPTIONS,
    "absorb_blocks",
    "ridge",
    "fit_table",
    "turn_values",
    "turn_queries",
    "fit_gain",
    "fit_logit_scale",
    "calibration_tokens",
    "calibration_length",
    "calibration_batch_size",
)


def _is_positive(number: Any) -> bool:
    return isinstance(number, (int, float)) and not isinstance(number, bool) and 0 < number < math.inf


def _inapplicable_options(method: str) -> tuple[str, ...]:
    """Return the options that a method does not look at."""
    return {
        Method.GUIDE.value: _CALIBRATION_OPTIONS,
        Method.CALIBRATED.value: ("later_blocks",),
        Method.UNIFORM.value: (*_GUIDE_OPTIONS, *_PROJECTION_OPTIONS, *_CALIBRATION_OPTIONS),
        Method.RANDOM.value: (*_GUIDE_OPTIONS, *_PROJECTION_OPTIONS, *_CALIBRATION_OPTIONS, "layers"),
    }[method]


def _required_with(options: InitializationConfig) -> dict[str, str]:
    """Return the options of `calibrated` that its other options leave without use, and what each needs."""
    found: dict[str, str] = {}
    if options.basis != BasisKind.EMBEDDINGS:
        found |= dict.fromkeys(("centered", "token_weights"), "basis='embeddings'")
    else:
        found["pooling"] = "a basis of activations or places"
    if options.repair == Refit.NONE:
        found |= dict.fromkeys(("repair_inputs", "absorb_blocks"), "a repair")
        found["ridge"] = "a repair"
    return found
