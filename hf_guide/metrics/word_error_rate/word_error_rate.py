"""Measure the word error rate and the character error rate of transcripts."""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """\
Word error rate: the least number of words to substitute, delete and insert that makes the references of the predictions,
summed over all texts and divided by the number of words in the references. It can exceed 1. The character error rate is the
same of characters, the spaces between words included. Words are what whitespace separates: nothing else is normalised, so
pass texts whose case and punctuation are to count, or normalise both before.
"""

_INPUTS = """
Args:
    predictions: texts, such as a model's transcripts.
    references: the true text of each.
Returns:
    wer: word errors / words.
    cer: character errors / characters.
    words: number of words in the references.
    characters: number of characters in the references.
Examples:
    >>> error_rate = evaluate.load(hf_guide.metrics.path("word_error_rate"))
    >>> error_rate.compute(predictions=["the cat sat", "a dog"], references=["the cat sat down", "dog"])
    {'wer': 0.4, 'cer': 0.3684210526315789, 'words': 5, 'characters': 19}
"""

_CITATION = ""


class WordErrorRate(evaluate.Metric):
    """Word and character error rate of transcripts."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions, references):
        words = characters = word_errors = character_errors = 0
        for prediction, reference in zip(predictions, references, strict=True):
            predicted, true = prediction.split(), reference.split()
            words += len(true)
            word_errors += edit_distance(predicted, true)
            characters += len(" ".join(true))
            character_errors += edit_distance(" ".join(predicted), " ".join(true))
        if not words:
            raise ValueError("No reference has a word, so there is no word error rate. Check the references.")
        return {
            "wer": word_errors / words,
            "cer": character_errors / characters,
            "words": words,
            "characters": characters,
        }


def edit_distance(first, second):
    """Return the least number of substitutions, deletions and insertions between two sequences.

    Args:
        first, second: strings, or lists of strings.

    Example:
        >>> edit_distance("kitten", "sitting"), edit_distance(["a", "b"], [])
        (3, 2)
    """
    numbers = {item: number for number, item in enumerate({*first, *second})}
    columns = np.array([numbers[item] for item in second], dtype=np.int64)
    steps = np.arange(len(columns) + 1)
    row = steps.copy()
    for index, item in enumerate(first, start=1):
        replaced = row[:-1] + (columns != numbers[item])
        best = np.concatenate(([index], np.minimum(replaced, row[1:] + 1)))
        # An insertion adds 1 for each column since the best start, so what is left is a running minimum.
        row = np.minimum.accumulate(best - steps) + steps
    return int(row[-1])
