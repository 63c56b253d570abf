"""Perplexity of what was evaluated in batches of unequal size, from the batches' mean losses."""

import math

import datasets
import evaluate

_DESCRIPTION = """\
Perplexity from losses: exp(sum of tokens * loss / sum of tokens), the exponential of the mean cross-entropy per token in
nats. The mean of the batches' perplexities, or of their losses without the tokens, would be another number as soon as
batches differ in tokens.
"""

_INPUTS = """
Args:
    predictions: mean losses per token, one for each batch or example, in nats.
    references: how many tokens each is the mean of. A mean of no tokens counts nothing, whatever it is.
Returns:
    perplexity: inf where it is too large for a float.
    loss: the mean cross-entropy per token.
    tokens: how many there were.
Examples:
    >>> perplexity = evaluate.load(hf_guide.metrics.path("perplexity_from_losses"))
    >>> perplexity.compute(predictions=[0.0, 3.0], references=[200, 100])
    {'perplexity': 2.718281828459045, 'loss': 1.0, 'tokens': 300}
"""

_CITATION = ""


class PerplexityFromLosses(evaluate.Metric):
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
                    f"Row {number}: a mean loss of {loss} over {count} tokens; expected a number, over 0 or more."
                )
        tokens = sum(counts)
        if not tokens:
            raise ValueError("There are no tokens in all of the batches, so there is no perplexity; check the labels.")
        loss = math.fsum(loss * count for loss, count in zip(losses, counts, strict=True) if count) / tokens
        try:
            perplexity = math.exp(loss)
        except OverflowError:
            perplexity = math.inf
        return {"perplexity": perplexity, "loss": loss, "tokens": tokens}
