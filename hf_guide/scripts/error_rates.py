"""Word and character error rates of transcripts as `compute_metrics` of a trainer, for CTC and for generated texts."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import evaluate
import numpy as np
from transformers import EvalPrediction

from hf_guide import metrics
from hf_guide.utils.labels import IGNORE_INDEX


def error_rates(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return `wer` and `cer` of transcripts, by the metric `word_error_rate`.

    Raises:
        ValueError: No reference has a word.

    Example:
        >>> error_rates(["the cat sat", "a dog"], ["the cat sat down", "dog"])["wer"]
        0.4
    """
    metric = evaluate.load(metrics.path("word_error_rate"), experiment_id=uuid.uuid4().hex)
    results: Any = metric.compute(predictions=list(predictions), references=list(references))
    return {name: results[name] for name in ("wer", "cer")}


@dataclass(frozen=True)
class TranscriptErrorRates:
    """A `compute_metrics`: word and character error rate of the predicted tokens.

    Attributes:
        processor: A tokenizer, or a processor that has one.
        frames: Whether the predictions are tokens of frames (CTC), of which equal neighbours are one, and not texts.
    """

    processor: Any
    frames: bool = False

    def __call__(self, predicted: EvalPrediction) -> Mapping[str, float]:
        """Return `wer` and `cer`."""
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        pad = tokenizer.pad_token_id
        token_ids, labels = (
            np.where(np.asarray(each) == IGNORE_INDEX, pad, each)
            for each in (predicted.predictions, predicted.label_ids)
        )
        ungrouped = {"group_tokens": False} if self.frames else {}
        return error_rates(
            tokenizer.batch_decode(token_ids, skip_special_tokens=True),
            tokenizer.batch_decode(labels, skip_special_tokens=True, **ungrouped),
        )
