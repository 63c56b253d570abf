"""How much of the way from a random start to the teacher a student has gone."""

import datasets
import evaluate

_DESCRIPTION = """\
Gap closed: (baseline - student) / (baseline - teacher). 0 is as good as the baseline, an equal student that started at
random and was trained the same; 1 is as good as the teacher; above 1 is better than it. The three are figures of the same
metric on the same data. Whether less of it is better (perplexity) or more (accuracy) makes no difference.
"""

_INPUTS = """
Args:
    predictions: the students' figures, such as perplexities.
    references: their teachers'.
    baselines: those of the students that started at random.
Returns:
    gap_closed: the mean over the students.
    gaps: one for each of them.
Examples:
    >>> gap_closed = evaluate.load(hf_guide.metrics.path("gap_closed"))
    >>> gap_closed.compute(predictions=[21.5], references=[16.5], baselines=[41.5])
    {'gap_closed': 0.8, 'gaps': [0.8]}
"""

_CITATION = "The figure of merit of GUIDE: Trinh, Menghani and Vee, arXiv 2510.06502."


class GapClosed(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        figure = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": figure, "references": figure, "baselines": figure}),
        )

    def _compute(self, predictions, references, baselines):
        gaps = []
        for number, (student, teacher, baseline) in enumerate(zip(predictions, references, baselines, strict=True)):
            if not abs(baseline - teacher) > 0:  # so that NaN is refused too
                raise ValueError(
                    f"Row {number}: the baseline's figure is {baseline} and the teacher's {teacher}, so there is no gap to "
                    "close. Give the figures of a teacher that is better than a random start."
                )
            gaps.append((baseline - student) / (baseline - teacher))
        return {"gap_closed": sum(gaps) / len(gaps), "gaps": gaps}
