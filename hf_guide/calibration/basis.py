"""Fit the basis of the student's residual stream to the teacher's activations."""

from hf_guide.calibration.config import BasisKind, CalibratedConfig
from hf_guide.calibration.statistics import ActivationStatistics
from hf_guide.errors import OptionError
from hf_guide.initialization.basis import ResidualBasis
from hf_guide.initialization.plan import Plan
from hf_guide.initialization.transfer import Transfer, fit_bases, projected_axes

FEW_TOKENS = 8
"""Different tokens for each direction: with four a small student of half the width and depth started worse than by `guide`."""


def fit_activation_bases(
    plan: Plan, statistics: ActivationStatistics, config: CalibratedConfig, num_contexts: int | None = None
) -> tuple[Transfer, dict[str, ResidualBasis], list[str]]:
    """Fit a basis for each projected axis, as `config.basis` selects; return the transfer, the bases, and notes.

    Args:
        plan: The plan.
        statistics: Of the teacher's activations.
        config: The options.
        num_contexts: How many of the tokens differ in themselves or in those shortly before them; None if all do.

    Raises:
        OptionError: There are fewer tokens than directions.
    """
    kind = config.basis
    if kind == BasisKind.AUTO:
        kind = BasisKind.CHANNELS if plan.has_unfoldable_norms() else BasisKind.ACTIVATIONS
    if kind == BasisKind.EMBEDDINGS:
        return *fit_bases(plan), []
    notes = check_enough_tokens(plan, statistics, num_contexts) if kind == BasisKind.ACTIVATIONS else []
    moments = statistics.residual_second_moments
    activations = {axis: moments[axis] for axis in projected_axes(plan) if axis in moments}
    return *fit_bases(plan, activations, channels=kind == BasisKind.CHANNELS), notes


def check_enough_tokens(plan: Plan, statistics: ActivationStatistics, num_contexts: int | None) -> list[str]:
    """Return notes on axes for whose width there are few different tokens, and on text that is repeated.

    Args:
        plan: The plan.
        statistics: Of the teacher's activations.
        num_contexts: As of `fit_activation_bases`.

    Raises:
        OptionError: There are fewer than directions to find: those without a token would be arbitrary.
    """
    notes: list[str] = []
    for axis in projected_axes(plan):
        width, num_tokens = plan.widths[axis][1], statistics.token_counts.get(axis)
        if num_tokens is None:
            continue
        different = num_tokens if num_contexts is None else min(num_tokens, num_contexts)
        repeats = "" if different == num_tokens else f", of which {different} are not repeated in the same text"
        found = f"calibration_dataset has {num_tokens} tokens{repeats}, and the student's {axis!r} is {width} wide"
        if different < width:
            raise OptionError(
                f"{found}: as many directions are fitted to the tokens. Pass at least {width} that differ, better thousands, "
                "or choose basis='embeddings', which needs none."
            )
        if different < FEW_TOKENS * width:
            notes.append(
                f"{found}: with fewer than {FEW_TOKENS} for each direction the student may start worse than by "
                "method='guide'. Pass more text."
            )
        elif 2 * different < num_tokens:
            notes.append(f"{found}: what is repeated adds nothing to the fits. Pass more varied text.")
    return notes
