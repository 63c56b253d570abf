"""Measure how much of the gap between a randomly initialised student and the teacher is closed."""

import datasets
import evaluate

_DESCRIPTION = """\
Gap closed: (baseline - student) / (baseline - teacher). 0 is as good as the baseline, a student of the same shape that was
initialised at random and trained in the same way; 1 is as good as the teacher; above 1 is better than the teacher. All three
are values of one metric on the same data. It may be a metric to minimise (perplexity) or to maximise (accuracy).
"""

_INPUTS = """
Args:
    predictions: metric of each student, perplexity for example.
    references: metric of its teacher.
    baselines: metric of the same student initialised at random.
Returns:
    gap_closed: the mean over the students.
    gaps: the gap closed by each student.
Examples:
    >>> gap_closed = evaluate.load(hf_guide.metrics.path("gap_closed"))
    >>> gap_closed.compute(predictions=[21.5], references=[16.5], baselines=[41.5])
    {'gap_closed': 0.8, 'gaps': [0.8]}
"""

_CITATION = "The figure of merit of GUIDE: Trinh, Menghani and Vee, arXiv 2510.06502."


class GapClosed(evaluate.Metric):
    """Share of the gap between a random student and the teacher that a student closes."""

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
            if not abs(baseline - teacher) > 0:  # NaN is an error too
                raise ValueError(
                    f"Row {number}: the baseline has {baseline} and the teacher {teacher}, so there is no gap to close. "
                    "The teacher must be better than the baseline."
                )
            gaps.append((baseline - student) / (baseline - teacher))
        return {"gap_closed": sum(gaps) / len(gaps), "gaps": gaps}
