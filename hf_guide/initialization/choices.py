"""The choices of an initialisation that have names. Each accepts its plain string."""

from enum import Enum

from hf_guide.errors import OptionError, did_you_mean


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


class LaterBlocks(StringEnum):
    """How the blocks after the first are made by `guide`."""

    PROJECT = "project"
    SELECT = "select"
    RANDOM = "random"


class BlockChoice(StringEnum):
    """Which of the teacher's blocks feed the student's, where no explicit list is given."""

    AUTO = "auto"
    EVEN = "even"
    FIRST = "first"
    ENDS = "ends"
    INFLUENCE = "influence"


class Basis(StringEnum):
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


class UnitChoice(StringEnum):
    """Which heads, neurons or experts `calibrated` keeps."""

    ENERGY = "energy"
    EVEN = "even"


class Repair(StringEnum):
    """Which weights `calibrated` fits again after they were carried over."""

    ALL = "all"
    WRITING = "writing"
    NONE = "none"


class RepairInputs(StringEnum):
    """What a student's block reads while its weights are fitted."""

    STUDENT = "student"
    TEACHER = "teacher"
