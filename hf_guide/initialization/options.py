"""Every switch of an initialisation, as a documented dataclass field."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from hf_guide.errors import OptionError, did_you_mean


class _StringEnum(str, Enum):
    @classmethod
    def parse(cls, value: "str | _StringEnum", option: str) -> "_StringEnum":
        known = [member.value for member in cls]
        try:
            return cls(value)
        except ValueError:
            hint = did_you_mean(str(value), known)
            raise OptionError(f"{option}={value!r} is not known; expected one of {known}.{hint}") from None

    def __str__(self) -> str:
        return str(self.value)


class Method(_StringEnum):
    """How a student starts."""

    GUIDE = "guide"
    UNIFORM = "uniform"
    RANDOM = "random"


class LaterBlocks(_StringEnum):
    """How the blocks after the first are made by `guide`."""

    PROJECT = "project"
    SELECT = "select"
    RANDOM = "random"


class BlockChoice(_StringEnum):
    """Which of the teacher's blocks feed the student's, where no explicit list is given."""

    EVEN = "even"
    FIRST = "first"


@dataclass
class InitializationConfig:
    """The options of `from_teacher`. Strings are accepted for every enum.

    Raises:
        OptionError: an unknown value (with the nearest valid one), or options that contradict each other.
    """

    method: str = field(
        default="guide",
        metadata={
            "help": "guide: the residual stream is projected on the principal directions of the embedding table, every other "
            "axis is selected evenly (GUIDE, arXiv 2510.06502). uniform: every axis is selected evenly (weight selection, "
            "arXiv 2311.18823). random: the model's own initialisation."
        },
    )
    later_blocks: str = field(
        default="project",
        metadata={
            "help": "What guide does after the first block: project (as the first), select (uniform selection) or random "
            "(the model's own initialisation)."
        },
    )
    layers: "str | list[int] | dict[str, list[int]]" = field(
        default="even",
        metadata={
            "help": "Which teacher block feeds each student block: even, first, a list of teacher block numbers, or a mapping "
            "from stack (such as encoder.block) to a list."
        },
    )
    centered: bool = field(
        default=False,
        metadata={
            "help": "Fit the directions on the centred embedding table. The uncentred fit, the default, gives the best "
            "reconstruction of the table itself."
        },
    )
    token_weights: "list[float] | None" = field(
        default=None,
        metadata={"help": "One weight per row of the embedding table, such as token frequencies; None weighs all alike."},
    )
    energy_correction: bool = field(
        default=True,
        metadata={
            "help": "Scale what is read after a norm by the share of length that the projection keeps: a truncated vector is "
            "shorter, and the student's norm would make it longer again."
        },
    )
    fold_norms: bool = field(
        default=True,
        metadata={
            "help": "Fold the gains (and biases) of norms into the weights that read them, which is exact; otherwise the gain "
            "is the diagonal of the projected one, which is not."
        },
    )
    restore_logit_scale: bool = field(
        default=True,
        metadata={"help": "Keep attention logits on the teacher's scale where the head size shrinks."},
    )
    seed: int = field(
        default=0, metadata={"help": "Seeds whatever is initialised at random: the same call gives the same bits."}
    )

    def __post_init__(self) -> None:
        self.method = str(Method.parse(self.method, "method"))
        self.later_blocks = str(LaterBlocks.parse(self.later_blocks, "later_blocks"))
        if isinstance(self.layers, str):
            self.layers = str(BlockChoice.parse(self.layers, "layers"))
        elif not isinstance(self.layers, Mapping):
            self.layers = [int(layer) for layer in self.layers]
        if self.method != Method.GUIDE:
            for option in ("later_blocks", "centered", "token_weights", "energy_correction", "fold_norms"):
                default = next(f.default for f in dataclasses.fields(self) if f.name == option)
                if getattr(self, option) != default:
                    raise OptionError(f"{option} is an option of method='guide'; method={self.method!r} has no use for it.")

    @classmethod
    def parse(cls, method: "str | InitializationConfig | Mapping[str, Any]") -> "InitializationConfig":
        """Return the options that `method` stands for: a method's name, a mapping of fields, or the options themselves."""
        if isinstance(method, InitializationConfig):
            return method
        if isinstance(method, str):
            return cls(method=method)
        known = [f.name for f in dataclasses.fields(cls)]
        for name in method:
            if name not in known:
                raise OptionError(f"{name!r} is not a field of InitializationConfig; expected some of {known}.{did_you_mean(name, known)}")
        return cls(**method)
