"""Measure how often a student predicts what its teacher predicts."""

import datasets
import evaluate

_DESCRIPTION = """\
Teacher agreement: the share of positions where the student's most probable class or token is the teacher's. It needs no
labels: it measures fidelity to the teacher, where accuracy measures correctness.
"""

_INPUTS = """
Args:
    predictions: the student's most probable classes: one number for each example, or one list of them (one for each token).
    references: the teacher's, of the same shape. Positions where it is `ignore_index`
        (padding, for example) are left out.
    ignore_index: the value that marks a position to leave out (default -100).
Returns:
    teacher_agreement: between 0 and 1.
    positions: number of positions compared.
Examples:
    >>> agreement = evaluate.load(hf_guide.metrics.path("teacher_agreement"))
    >>> agreement.compute(predictions=[[5, 6, 7], [8, 0]], references=[[5, 6, 9], [8, -100]])
    {'teacher_agreement': 0.75, 'positions': 4}
"""

_CITATION = ""


class TeacherAgreement(evaluate.Metric):
    """Share of predictions that agree with the teacher's."""

    def _info(self) -> evaluate.MetricInfo:
        one = datasets.Value("int64")
        many = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=[
                datasets.Features({"predictions": many, "references": many}),
                datasets.Features({"predictions": one, "references": one}),
            ],
        )

    def _compute(self, predictions, references, ignore_index=-100):
        agreed = positions = 0
        for number, (student, teacher) in enumerate(zip(predictions, references, strict=True)):
            mine, theirs = _as_list(student), _as_list(teacher)
            if len(mine) != len(theirs):
                raise ValueError(
                    f"Row {number} has {len(mine)} predictions of the student and {len(theirs)} of the teacher; the "
                    "two must be equally long."
                )
            counted = [one == other for one, other in zip(mine, theirs, strict=True) if other != ignore_index]
            agreed += sum(counted)
            positions += len(counted)
        if not positions:
            raise ValueError(
                f"Every reference is {ignore_index}, which is left out: there is nothing to compare. Check the references."
            )
        return {"teacher_agreement": agreed / positions, "positions": positions}


def _as_list(value):
    return [value] if isinstance(value, int) else list(value)
