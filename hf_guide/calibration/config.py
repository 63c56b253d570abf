"""The options of `method="calibrated"`."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from hf_guide.errors import OptionError
from hf_guide.initialization.config import (
    InitializationConfig,
    LayerSelection,
    LayerSpec,
    builtin_renames,
    check_logit_scale,
    layer_selection_field,
    logit_scale_field,
    parse_layer_selection,
)
from hf_guide.utils.deprecation import RenamedOptions
from hf_guide.validation import StringEnum, check_integer, check_number

SELF_GENERATED = "self_generated"
"""As a calibration dataset: text that the teacher generates itself."""


class BasisKind(StringEnum):
    """How the residual stream is narrowed."""

    AUTO = "auto"
    ACTIVATIONS = "activations"
    CHANNELS = "channels"
    EMBEDDINGS = "embeddings"


class Refit(StringEnum):
    """Which weights are refitted after they were transferred."""

    ALL = "all"
    OUTPUT_PROJECTIONS = "output_projections"
    NONE = "none"


_RENAMED = builtin_renames(
    LayerSelection.BLOCK_INFLUENCE,
    names={
        "logit_gain": "logit_scale",
        "repair": "refit",
        "calibration_length": "calibration_seq_length",
    },
    values={
        "basis": {"places": "channels"},
        "refit": {"writing": "output_projections"},
    },
)


def _choice(choices: type[StringEnum], default: StringEnum, text: str) -> Any:
    return field(default=default.value, metadata={"help": text, "choices": choices})


@dataclass
class CalibratedConfig(InitializationConfig):
    """The residual basis, blocks, heads and neurons are chosen by the teacher's activations, and weights are refitted.

    Example:
        >>> CalibratedConfig(refit="none", calibration_tokens=8192).layer_selection
        'local_search'
    """

    method: str = field(default="calibrated", metadata={"help": "calibrated"})
    layer_selection: LayerSpec = layer_selection_field(LayerSelection.LOCAL_SEARCH)
    logit_scale: float = logit_scale_field()
    basis: str = _choice(
        BasisKind,
        BasisKind.AUTO,
        "How the residual stream is narrowed: activations (their principal directions), embeddings (those of the embedding "
        "table, as guide) or channels (those with the largest second moment; gains stay exact). auto is channels where blocks "
        "normalize the residual stream itself with gains that differ, as BERT's do, and activations elsewhere.",
    )
    refit: str = _choice(
        Refit,
        Refit.ALL,
        "Which weights are refitted by ridge regression on the teacher's activations, block by block: all, "
        "output_projections (those that write onto the residual stream) or none. A tied embedding and the norm before it are "
        "fitted in the logits unless it is none.",
    )
    ridge: float | None = field(
        default=None,
        metadata={
            "help": "Strength of the ridge toward the transferred weight, in units of its inputs' mean square. None "
            "selects it for each weight on every fourth example (of fewer than four on a quarter of the tokens), or leaves "
            "the weight as it is."
        },
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
            "help": "Number of tokens of the calibration dataset to use. None is twenty for each neuron of the "
            "teacher's MLP, from 8,192 to 65,536."
        },
    )
    calibration_seq_length: int = field(
        default=256,
        metadata={
            "help": "Length in tokens that text is cut to; at most the number of the teacher's positions.",
        },
    )
    calibration_batch_size: int = field(
        default=8, metadata={"help": "Rows per forward pass, where the dataset is not batched already."}
    )

    activation_memory: float = field(
        default=4.0,
        metadata={
            "help": "Memory in GB (10^9 bytes) that each process uses for the activations of all calibration tokens between "
            "two blocks; what is beyond is kept in a temporary file (in TMPDIR)."
        },
    )

    renamed_options: ClassVar[RenamedOptions] = _RENAMED

    def __post_init__(self) -> None:
        super().__post_init__()
        self.layer_selection = parse_layer_selection(self.layer_selection, allows_influence=True)
        self.logit_scale = check_logit_scale(self.logit_scale)
        if self.ridge is not None:
            self.ridge = check_number("ridge", self.ridge, 0.0, 1e12, includes_low=False)
            if self.refit == Refit.NONE:
                raise OptionError("ridge is of use only where weights are refitted; leave out ridge or refit='none'.")
        if self.calibration_tokens is not None:
            self.calibration_tokens = check_integer("calibration_tokens", self.calibration_tokens)
        self.calibration_seq_length = check_integer("calibration_seq_length", self.calibration_seq_length)
        self.calibration_batch_size = check_integer("calibration_batch_size", self.calibration_batch_size)
        self.activation_memory = check_number("activation_memory", self.activation_memory, 0.0, 1e6)
