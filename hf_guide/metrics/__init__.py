"""Metrics of a distillation as modules of `evaluate`, loaded offline by their path.

    import evaluate
    from hf_guide import metrics

    gap = evaluate.load(metrics.path("gap_closed"))
    gap.compute(predictions=[21.5], references=[16.5], baselines=[41.5])  # {"gap_closed": 0.8, ...}

Each module is a file that needs nothing of hf_guide, so that it can also be copied or published by itself.
"""

from pathlib import Path

from hf_guide.errors import OptionError
from hf_guide.validation import did_you_mean

NAMES = ("gap_closed", "perplexity_from_losses", "teacher_agreement")


def path(name: str) -> str:
    """Return the folder of a metric, which `evaluate.load` takes.

    Raises:
        OptionError: there is no metric of that name.
    """
    if name not in NAMES:
        raise OptionError(f"There is no metric {name!r}; there are {', '.join(NAMES)}.{did_you_mean(name, NAMES)}")
    return str(Path(__file__).parent / name)
