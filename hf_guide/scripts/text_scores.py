"""Scores of generated texts as `compute_metrics` of a trainer: ROUGE-1 and ROUGE-2, chrF, and their length."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import EvalPrediction

from hf_guide.utils.labels import IGNORE_INDEX


def rouge(text: str, reference: str, length: int) -> float:
    """Return ROUGE-N: the F1 score of the sequences of `length` words that two texts share, in lower case.

    Example:
        >>> rouge("the cat sat", "The cat ran", 2)
        0.5
    """
    counts = []
    for words in (text.lower().split(), reference.lower().split()):
        counts.append(Counter(zip(*(words[start:] for start in range(length)), strict=False)))
    common, total = (counts[0] & counts[1]).total(), counts[0].total() + counts[1].total()
    return 2 * common / total if total else 0.0


def chrf(texts: Sequence[str], references: Sequence[str], length: int = 6, beta: float = 2.0) -> float:
    """Return chrF: the F score of the sequences of up to `length` characters that texts share with their references.

    Spaces do not count. Source: Popović, chrF: character n-gram F-score for automatic MT evaluation (2015), with the counts of
    all texts together and recall `beta` times as important as precision.

    Example:
        >>> chrf(["same text"], ["same text"])
        1.0
    """
    counts = np.zeros((length, 3))  # shared, in the texts, in the references
    for pair in zip(texts, references, strict=True):
        for order in range(1, length + 1):
            characters = ["".join(text.split()) for text in pair]
            grams = [
                Counter(text[start : start + order] for start in range(len(text) - order + 1)) for text in characters
            ]
            counts[order - 1] += [(grams[0] & grams[1]).total(), grams[0].total(), grams[1].total()]
    counts = counts[(counts[:, 1] > 0) & (counts[:, 2] > 0)]
    if not counts.any():
        return 0.0
    precision, recall = (counts[:, 0] / counts[:, 1]).mean(), (counts[:, 0] / counts[:, 2]).mean()
    return float((1 + beta**2) * precision * recall / max(beta**2 * precision + recall, 1e-16))


@dataclass(frozen=True)
class GeneratedTextScores:
    """A `compute_metrics`: scores of generated texts in percent, and their mean number of tokens.

    Attributes:
        processor: A tokenizer, or a processor that has one.
    """

    processor: Any

    def __call__(self, predicted: EvalPrediction) -> Mapping[str, float]:
        """Return `rouge1`, `rouge2`, `chrf` and `gen_len`."""
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        ids = [np.asarray(each) for each in (predicted.predictions, predicted.label_ids)]
        texts, references = (
            tokenizer.batch_decode(np.where(each == IGNORE_INDEX, pad, each), skip_special_tokens=True) for each in ids
        )
        pairs = list(zip(texts, references, strict=True))
        return {
            "rouge1": 100 * float(np.mean([rouge(*pair, 1) for pair in pairs])),
            "rouge2": 100 * float(np.mean([rouge(*pair, 2) for pair in pairs])),
            "chrf": 100 * chrf(texts, references),
            "gen_len": float(((ids[0] != IGNORE_INDEX) & (ids[0] != pad)).sum(-1).mean()),
        }
