"""`uniform`: select every axis evenly (weight selection, arXiv 2311.18823)."""

from dataclasses import dataclass, field
from typing import ClassVar

from transformers import PreTrainedModel

from hf_guide.initialization.config import (
    InitializationConfig,
    LayerSelection,
    LayerSpec,
    builtin_renames,
    layer_selection_field,
    parse_layer_selection,
)
from hf_guide.initialization.registry import InitializationMethod, StudentSetup
from hf_guide.initialization.report import InitializationReport
from hf_guide.initialization.transfer import transfer_weights
from hf_guide.utils.deprecation import RenamedOptions

_RENAMED = builtin_renames(LayerSelection.UNIFORM)


@dataclass
class UniformConfig(InitializationConfig):
    """Channels, heads, neurons and blocks are selected evenly.

    Example:
        >>> UniformConfig(layer_selection="first_last").layer_selection
        'first_last'
    """

    method: str = field(default="uniform", metadata={"help": "uniform"})
    layer_selection: LayerSpec = layer_selection_field(LayerSelection.UNIFORM)

    renamed_options: ClassVar[RenamedOptions] = _RENAMED

    def __post_init__(self) -> None:
        super().__post_init__()
        self.layer_selection = parse_layer_selection(self.layer_selection)


class UniformMethod(InitializationMethod):
    """Transfer every parameter by selection alone; as the base class's `plan_options` selects."""

    config: UniformConfig

    def initialize(self, student: PreTrainedModel, setup: StudentSetup) -> InitializationReport:
        """Fill `student` tensor by tensor."""
        return transfer_weights(
            student,
            setup.teacher,
            setup.layout,
            setup.options,
            vocab_indices=setup.vocab_indices,
            label_indices=setup.label_indices,
            show_progress=setup.show_progress,
        )
