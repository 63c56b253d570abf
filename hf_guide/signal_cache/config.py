"""What of a teacher is captured, as a documented dataclass."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_guide.errors import OptionError
from hf_guide.utils.deprecation import RenamedOptions, with_renamed_options
from hf_guide.validation import check_bool, check_choice, check_integer, check_known_fields, check_temperature

STORAGE_DTYPES = ("float16", "float32")


RENAMED_OPTIONS = RenamedOptions(
    names={
        "embedding": "save_penultimate",
        "hidden_states": "hidden_layers",
        "ignore_in_key": "ignored_inputs",
        "examples_per_shard": "shard_size",
    }
)
"""Names of options in version 0.1; caches of formats 1 and 2 have them too."""


@with_renamed_options(RENAMED_OPTIONS)
@dataclass
class CaptureConfig:
    """Configure `capture_teacher`: what of a teacher's outputs is stored, and how.

    Raises:
        OptionError: An option is unknown (the nearest one is suggested), or a value is out of range.

    Example:
        >>> CaptureConfig(top_k=64, temperatures=[1.0, 2.0]).temperatures
        [1.0, 2.0]
    """

    top_k: int = field(
        default=64,
        metadata={
            "help": "For language models: how many of the largest log-probabilities are stored at each token, with "
            "the mass of all others as one number. The size of the vocabulary stores all."
        },
    )
    temperatures: list[float] = field(
        default_factory=lambda: [1.0],
        metadata={
            "help": "For language models: the temperatures at which a student may be trained from this capture, "
            "always with 1. Each takes 4 bytes per token."
        },
    )
    log_prob_dtype: str = field(
        default="float16", metadata={"help": "dtype of stored log-probabilities: float16 or float32"}
    )
    hidden_layers: list[int] = field(
        default_factory=list,
        metadata={
            "help": "Layers whose hidden states are stored: N follows block N, 0 is the input embeddings; negative "
            "numbers count from the end."
        },
    )
    save_penultimate: bool = field(
        default=False,
        metadata={"help": "Store the penultimate features: the inputs of the classifier or the language head."},
    )
    hidden_dtype: str = field(
        default="float16",
        metadata={"help": "dtype of stored hidden states and penultimate features: float16 or float32"},
    )
    vocabulary_size: int | None = field(
        default=None,
        metadata={
            "help": "For language models: how many leading rows of the teacher's vocabulary are used, for a student "
            "whose vocabulary has other padding; by default all."
        },
    )
    ignored_inputs: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Inputs that are left out of an example's key, for a student that does not take them: token_type_ids, "
            "position_ids."
        },
    )
    remove_unused_columns: bool = field(
        default=True,
        metadata={"help": "Drop the columns that the teacher's forward does not take, as TrainingArguments does."},
    )
    batch_size: int = field(default=8, metadata={"help": "Examples per forward pass."})
    shard_size: int = field(
        default=512,
        metadata={"help": "Examples per file; an unfinished file is lost when the capture is killed."},
    )

    def __new__(cls, *args: Any, **fields: Any) -> "CaptureConfig":
        """Check that every keyword is a field, or the old name of one, where the nearest field can still be named."""
        check_known_fields(cls, [RENAMED_OPTIONS.names.get(name, name) for name in fields])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for option in ("top_k", "batch_size", "shard_size"):
            setattr(self, option, check_integer(option, getattr(self, option)))
        if self.vocabulary_size is not None:
            self.vocabulary_size = check_integer("vocabulary_size", self.vocabulary_size)
        for option in ("log_prob_dtype", "hidden_dtype"):
            setattr(self, option, check_choice(option, getattr(self, option), STORAGE_DTYPES))
        for option in ("save_penultimate", "remove_unused_columns"):
            check_bool(option, getattr(self, option))
        self.temperatures = _parse_temperatures(self.temperatures)
        self.hidden_layers = _parse_layers(self.hidden_layers)
        if isinstance(self.ignored_inputs, str) or not all(isinstance(name, str) for name in self.ignored_inputs):
            raise OptionError(f"ignored_inputs must be a list of names of inputs; found {self.ignored_inputs!r}.")
        self.ignored_inputs = sorted(self.ignored_inputs)

    @classmethod
    def parse(cls, config: "CaptureConfig | Mapping[str, Any] | None") -> "CaptureConfig":
        """Return a copy of `config`, which may also be a mapping of fields, or None for the defaults."""
        if config is None:
            return cls()
        if isinstance(config, CaptureConfig):
            return dataclasses.replace(config)  # checked again, for its fields may have been set since
        if isinstance(config, Mapping):
            return cls(**{str(name): value for name, value in config.items()})
        raise OptionError(f"config must be a CaptureConfig or a mapping of its fields; found {config!r}.")


def _parse_temperatures(temperatures: Any) -> list[float]:
    values = temperatures if isinstance(temperatures, (list, tuple)) else [temperatures]
    return sorted({1.0, *(check_temperature("Each of temperatures", value) for value in values)})


def _parse_layers(layers: Any) -> list[int]:
    if not isinstance(layers, (list, tuple)) or any(isinstance(n, bool) or not isinstance(n, int) for n in layers):
        raise OptionError(f"hidden_layers must be a list of layer numbers such as [0, 6, 12]; found {layers!r}.")
    return list(dict.fromkeys(layers))
