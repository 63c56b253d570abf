"""`guide`: project the residual stream onto the principal directions of the embedding table (GUIDE, arXiv 2510.06502)."""

from dataclasses import dataclass, field
from typing import ClassVar

from transformers import PreTrainedModel

from hf_guide.initialization.config import (
    InitializationConfig,
    LayerSelection,
    LayerSpec,
    PlanOptions,
    SubsequentLayers,
    builtin_renames,
    check_logit_scale,
    layer_selection_field,
    logit_scale_field,
    parse_layer_selection,
)
from hf_guide.initialization.registry import InitializationMethod, StudentSetup
from hf_guide.initialization.report import InitializationReport
from hf_guide.initialization.transfer import transfer_weights
from hf_guide.utils.deprecation import RenamedOptions

_RENAMED = builtin_renames(
    LayerSelection.FIRST_LAST,
    {"later_blocks": "subsequent_layers", "logit_gain": "logit_scale"},
    {"subsequent_layers": {"select": "uniform"}},
)


@dataclass
class GuideConfig(InitializationConfig):
    """The residual stream is projected, the outer blocks are kept, and every other axis is selected evenly.

    Example:
        >>> GuideConfig(layer_selection=[0, 1, 5], logit_scale=0.3).subsequent_layers
        'project'
    """

    method: str = field(default="guide", metadata={"help": "guide"})
    layer_selection: LayerSpec = layer_selection_field(LayerSelection.FIRST_LAST)
    subsequent_layers: str = field(
        default=SubsequentLayers.PROJECT.value,
        metadata={
            "help": "Blocks after the first: project (as the first), uniform (their channels selected evenly) or random (the "
            "model's own initialization).",
            "choices": SubsequentLayers,
        },
    )
    logit_scale: float = logit_scale_field()

    renamed_options: ClassVar[RenamedOptions] = _RENAMED

    def __post_init__(self) -> None:
        super().__post_init__()
        self.layer_selection = parse_layer_selection(self.layer_selection)
        self.logit_scale = check_logit_scale(self.logit_scale)


class GuideMethod(InitializationMethod):
    """Fit a basis to the embedding table and transfer every parameter through it."""

    config: GuideConfig

    def plan_options(self) -> PlanOptions:
        """Return the options of a plan that projects."""
        return PlanOptions(
            layer_selection=self.config.layer_selection,
            projects=True,
            subsequent_layers=self.config.subsequent_layers,
            logit_scale=self.config.logit_scale,
            seed=self.config.seed,
        )

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
