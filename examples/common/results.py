"""Keep the results of a benchmark as rows of a file, and summarize them over seeds."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file with one JSON object a line; none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append a row to a file, which is made, with its folder, where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def mean_and_spread(values: Sequence[float], digits: int = 2, none: str = "-") -> str:
    """Return mean and standard deviation over seeds as text; of one value no deviation.

    Args:
        values: One value a seed.
        digits: Digits after the point.
        none: What is returned of no values.

    Returns:
        "1.23 ± 0.45", "1.23", or, of values that are not all finite, how many are: "2 of 3".
    """
    if not values:
        return none
    finite = sum(map(math.isfinite, values))
    if finite < len(values):
        return f"{finite} of {len(values)}"
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the rank correlation of two lists without ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1])
