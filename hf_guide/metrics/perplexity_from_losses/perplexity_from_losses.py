"""Compute perplexity from the mean losses of batches of unequal size."""

import math

import datasets
import evaluate

_DESCRIPTION = """\
Perplexity from losses: exp(sum of tokens * loss / sum of tokens), the exponential of the mean cross-entropy per token in
nats. Averaging the batches' perplexities, or their losses without the token counts, gives a different and wrong number as
soon as batches differ in tokens.
"""

_INPUTS = """
Args:
    predictions: mean loss per token of each batch or example, in nats.
    references: number of tokens of each. A batch without tokens is left out, whatever its loss is.
Returns:
    perplexity: inf if it is too large for a float.
    loss: the mean cross-entropy per token.
    tokens: number of tokens.
Examples:
    >>> perplexity = evaluate.load(hf_guide.metrics.path("perplexity_from_losses"))
    >>> perplexity.compute(predictions=[0.0, 3.0], references=[200, 100])
    {'perplexity': 2.718281828459045, 'loss': 1.0, 'tokens': 300}
"""

_CITATION = ""


class PerplexityFromLosses(evaluate.Metric):
    """Perplexity of a model from its losses."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references):
        losses, counts = list(predictions), list(references)
        for number, (loss, count) in enumerate(zip(losses, counts, strict=True)):
            if count < 0 or (count and math.isnan(loss)):
                raise ValueError(
                    f"Row {number} has a mean loss of {loss} over {count} tokens; the loss must be a number and the "
                    "count 0 or more."
                )
        tokens = sum(counts)
        if not tokens:
            raise ValueError("No batch has tokens, so there is no perplexity. Check the labels.")
        loss = math.fsum(loss * count for loss, count in zip(losses, counts, strict=True) if count) / tokens
        try:
            perplexity = math.exp(loss)
        except OverflowError:
            perplexity = math.inf
        return {"perplexity": perplexity, "loss": loss, "tokens": tokens}
