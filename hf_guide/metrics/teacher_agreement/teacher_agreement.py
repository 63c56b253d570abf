"""How often a student says what its teacher says."""

import datasets
import evaluate

_DESCRIPTION = """\
Teacher agreement: the share of places where the student's most probable class or token is the teacher's. It needs no
labels, and says how faithful a student is where accuracy says how right it is.
"""

_INPUTS = """
Args:
    predictions: the student's most probable classes: one number for each example, or one list of them (one for each token).
    references: the teacher's, of the same shape. Places where it is `ignore_index` do not count, such as padding.
    ignore_index: -100 unless told.
Returns:
    teacher_agreement: between 0 and 1.
    places: how many were counted.
Examples:
    >>> agreement = evaluate.load(hf_guide.metrics.path("teacher_agreement"))
    >>> agreement.compute(predictions=[[5, 6, 7], [8, 0]], references=[[5, 6, 9], [8, -100]])
    {'teacher_agreement': 0.75, 'places': 4}
"""

_CITATION = ""


class TeacherAgreement(evaluate.Metric):
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
        agreed = places = 0
        for number, (student, teacher) in enumerate(zip(predictions, references, strict=True)):
            mine, theirs = _as_list(student), _as_list(teacher)
            if len(mine) != len(theirs):
                raise ValueError(
                    f"Row {number}: {len(mine)} predictions of the student, {len(theirs)} of the teacher."
                )
            counted = [one == other for one, other in zip(mine, theirs, strict=True) if other != ignore_index]
            agreed += sum(counted)
            places += len(counted)
        if not places:
            raise ValueError(
                f"Every place of the teacher's is {ignore_index}, which does not count; check the references."
            )
        return {"teacher_agreement": agreed / places, "places": places}


def _as_list(value):
    return [value] if isinstance(value, int) else list(value)
