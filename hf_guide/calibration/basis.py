"""Fit the basis of the student's residual stream to the teacher's activations."""

from hf_guide.calibration.config import BasisKind, CalibratedConfig
from hf_guide.calibration.statistics import ActivationStatistics
from hf_guide.errors import OptionError
from hf_guide.initialization.basis import ResidualBasis
from hf_guide.initialization.plan import Plan
from hf_guide.initialization.transfer import Transfer, fit_bases, projected_axes


def fit_activation_bases(
    plan: Plan, statistics: ActivationStatistics, config: CalibratedConfig
) -> tuple[Transfer, dict[str, ResidualBasis]]:
    """Fit a basis for each projected axis, as `config.basis` selects; return the transfer and the bases.

    Raises:
        OptionError: There are fewer tokens than directions.
    """
    kind = config.basis
    if kind == BasisKind.AUTO:
        kind = BasisKind.CHANNELS if plan.has_unfoldable_norms() else BasisKind.ACTIVATIONS
    if kind == BasisKind.EMBEDDINGS:
        return fit_bases(plan)
    if kind == BasisKind.ACTIVATIONS:
        check_enough_tokens(plan, statistics)
    moments = statistics.residual_second_moments
    activations = {axis: moments[axis] for axis in projected_axes(plan) if axis in moments}
    return fit_bases(plan, activations, channels=kind == BasisKind.CHANNELS)


def check_enough_tokens(plan: Plan, statistics: ActivationStatistics) -> None:
    """Raise if there are fewer tokens than directions to find: those without a token would be arbitrary."""
    for axis in projected_axes(plan):
        width, num_tokens = plan.widths[axis][1], statistics.token_counts.get(axis)
        if num_tokens is not None and num_tokens < width:
            raise OptionError(
                f"calibration_dataset has {num_tokens} tokens, and the student's {axis!r} is {width} wide: as many directions "
                f"are fitted to the tokens. Pass at least {width}, better thousands, or choose basis='embeddings', which "
                "needs none."
            )
