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
            "help": "Of language models: how many of the largest log-probabilities are kept at each place; the mass of "
            "all others is kept as one number. The size of the vocabulary keeps them all."
        },
    )
    temperatures: list[float] = field(
        default_factory=lambda: [1.0],
        metadata={
            "help": "Of language models: the temperatures that a student may be trained at from this capture; 1 is always "
            "one of them. Each takes 4 bytes a token."
        },
    )
    log_prob_dtype: str = field(
        default="float16", metadata={"help": "How log-probabilities are stored: float16 or float32."}
    )
    hidden_layers: list[int] = field(
        default_factory=list,
        metadata={
            "help": "Layers whose hidden states are kept, by number of blocks passed, 0 being the embeddings; negative "
            "numbers count from the end."
        },
    )
    save_penultimate: bool = field(
        default=False, metadata={"help": "Keep what the classifier or the language head is fed."}
    )
    hidden_dtype: str = field(
        default="float16",
        metadata={"help": "How hidden states and penultimate features are stored: float16 or float32."},
    )
    vocabulary_size: int | None = field(
        default=None,
        metadata={
            "help": "Of language models: take only so many leading rows of the teacher's vocabulary, for a student whose "
            "vocabulary is padded otherwise. By default all."
        },
    )
    ignored_inputs: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Inputs that do not tell examples apart, for a student that is not fed them: token_type_ids, "
            "position_ids."
        },
    )
    remove_unused_columns: bool = field(
        default=True,
        metadata={"help": "Drop the columns that the teacher's forward does not take, as TrainingArguments does."},
    )
    batch_size: int = field(default=8, metadata={"help": "Examples a forward pass."})
    shard_size: int = field(
        default=512,
        metadata={"help": "Examples a file; what was finished of a file is lost when the capture is killed."},
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
        """Return the options that `config` stands for, copied: options, a mapping of fields, or None for the defaults."""
        if config is None:
            return cls()
        if isinstance(config, CaptureConfig):
            return dataclasses.replace(config)  # checked again, for its fields may have been set since
        if isinstance(config, Mapping):
            return cls(**{str(name): value for name, value in config.items()})
        raise OptionError(f"config must be a CaptureConfig or a mapping of its fields; found {config!r}.")


def _parse_temperatures(temperatures: Any) -> list[float]:
    given = temperatures if isinstance(temperatures, (list, tuple)) else [temperatures]
    return sorted({1.0, *(check_temperature("Each of temperatures", value) for value in given)})


def _parse_layers(layers: Any) -> list[int]:
    if not isinstance(layers, (list, tuple)) or any(isinstance(n, bool) or not isinstance(n, int) for n in layers):
        raise OptionError(f"hidden_layers must be a list of layer numbers such as [0, 6, 12]; found {layers!r}.")
    return list(dict.fromkeys(layers))
