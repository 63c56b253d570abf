"""Load metrics for distillation with `evaluate`, offline, by their path.

    import evaluate
    from hf_guide import metrics

    gap = evaluate.load(metrics.path("gap_closed"))
    gap.compute(predictions=[21.5], references=[16.5], baselines=[41.5])  # {"gap_closed": 0.8, ...}

Each module is one file that does not import hf_guide, so it can also be copied or published on its own.
"""

from pathlib import Path

from hf_guide.errors import OptionError
from hf_guide.validation import did_you_mean

NAMES = ("gap_closed", "perplexity_from_losses", "teacher_agreement", "word_error_rate")


def path(name: str) -> str:
    """Return the folder of a metric, for `evaluate.load`.

    Args:
        name: "gap_closed", "perplexity_from_losses", "teacher_agreement" or "word_error_rate".

    Raises:
        OptionError: There is no metric of that name; the nearest is suggested.
    """
    if name not in NAMES:
        raise OptionError(
            f"There is no metric {name!r}; expected one of {', '.join(NAMES)}.{did_you_mean(name, NAMES)}"
        )
    return str(Path(__file__).parent / name)
