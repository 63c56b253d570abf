"""The options of `hf-guide label` about labels; those about data are `DataArguments`."""

from dataclasses import dataclass, field
from typing import Any

from hf_guide.validation import check_integer, check_mapping, check_number


@dataclass
class LabelConfig:
    """How a dataset is labeled.

    Raises:
        OptionError: A value is out of range.

    Example:
        >>> LabelConfig(generation_kwargs='{"num_beams": 4}').generation_kwargs
        {'num_beams': 4}
    """

    generation_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": 'Arguments of generate, as JSON: \'{"num_beams": 4, "max_new_tokens": 128}\'.'},
    )
    max_wer: float | None = field(
        default=None,
        metadata={
            "help": "Leave out rows whose transcript has a higher word error rate against the dataset's own text, both in "
            "lower case and without punctuation; 0.1 is 10 %%, as Distil-Whisper uses."
        },
    )
    batch_size: int = field(default=8, metadata={"help": "Examples per forward pass."})
    shard_size: int = field(
        default=256, metadata={"help": "Rows per file; an unfinished file is lost when the command is killed."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of generation_kwargs that sample."})

    def __post_init__(self) -> None:
        self.generation_kwargs = (
            {} if self.generation_kwargs is None else check_mapping("generation_kwargs", self.generation_kwargs)
        )
        for option in ("batch_size", "shard_size"):
            setattr(self, option, check_integer(option, getattr(self, option)))
        self.seed = check_integer("seed", self.seed, low=0)
        if self.max_wer is not None:
            self.max_wer = check_number("max_wer", self.max_wer, 0, 1)
