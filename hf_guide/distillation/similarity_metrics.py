"""How well a student's embeddings keep the similarities of its teacher's, and those that people gave, as rank correlations."""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

MAX_TEXTS = 2000
"""All pairs of the first texts of an evaluation are compared: of so many two million, which take a second."""

STUDENT_TO_TEACHER = "similarity_spearman"
STUDENT_TO_SCORES = "score_spearman"
TEACHER_TO_SCORES = "teacher_score_spearman"


class SimilarityRecorder:
    """Collect the embeddings of an evaluation, batch by batch.

    Example:
        >>> recorder = SimilarityRecorder()
        >>> vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 3.0]])
        >>> recorder.add(vectors, 2 * vectors)
        >>> recorder.metrics(Accelerator(cpu=True))
        {'similarity_spearman': 1.0}
    """

    def __init__(self) -> None:
        self._texts: list[tuple[Tensor, Tensor]] = []
        self._pairs: list[Tensor] = []

    def add(
        self,
        student: Tensor,
        teacher: Tensor | None = None,
        *,
        scores: Tensor | None = None,
        rows_per_example: int = 1,
    ) -> None:
        """Add the embeddings of a batch.

        Args:
            student, teacher: (texts, width) each; no teacher is compared with where there is none.
            scores: Gold similarities of the first two texts of each example, repeated for each of its texts, (texts,).
            rows_per_example: How many consecutive texts belong to an example.
        """
        student = student.detach().float().cpu()
        if teacher is not None:
            teacher = teacher.detach().float().cpu()
            if sum(len(each) for each, _ in self._texts) < MAX_TEXTS:
                self._texts.append((student, teacher))
        if scores is not None and rows_per_example >= 2:
            columns = [scores.detach().float().cpu()[::rows_per_example]]
            for vectors in (student, teacher):
                if vectors is not None:
                    first, second = vectors[::rows_per_example], vectors[1::rows_per_example]
                    columns.append(torch.nn.functional.cosine_similarity(first, second, dim=-1))
            self._pairs.append(torch.stack(columns, -1))

    def metrics(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the correlations over the texts of all processes, and forget them; all processes must call it.

        `similarity_spearman` is that of the student's cosine similarities with the teacher's over all pairs of texts,
        `score_spearman` that with gold scores over the pairs of the dataset, and `teacher_score_spearman` the teacher's. One
        that is not defined, for want of pairs or of different values, is left out.
        """
        texts, pairs = self._texts, self._pairs
        self._texts, self._pairs = [], []
        if accelerator.num_processes > 1:
            texts, pairs = gather_object(texts), gather_object(pairs)
        values: dict[str, float | None] = {}
        if texts:
            student, teacher = (torch.cat(list(each))[:MAX_TEXTS] for each in zip(*texts, strict=True))
            values[STUDENT_TO_TEACHER] = spearman(pairwise_cosines(student), pairwise_cosines(teacher))
        if pairs:
            columns = torch.cat(pairs).unbind(-1)
            values[STUDENT_TO_SCORES] = spearman(columns[1], columns[0])
            if len(columns) > 2:
                values[TEACHER_TO_SCORES] = spearman(columns[2], columns[0])
        return {name: value for name, value in values.items() if value is not None}


def pairwise_cosines(vectors: Tensor) -> Tensor:
    """Return the cosine similarity of each pair of vectors (n, width) once, (n (n - 1) / 2,)."""
    vectors = torch.nn.functional.normalize(vectors.double(), dim=-1)
    rows, columns = torch.triu_indices(len(vectors), len(vectors), offset=1)
    return (vectors @ vectors.T)[rows, columns]


def spearman(first: Tensor, second: Tensor) -> float | None:
    """Return Spearman's rank correlation of two vectors, equal values sharing their mean rank; None where it is not defined.

    Example:
        >>> spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 20.0, 3.0]))
        0.5
    """
    ranks = [_ranks(each) for each in (first, second)]
    centred = [each - each.mean() for each in ranks]
    norms = [float(each.norm()) for each in centred]
    if len(first) < 2 or 0.0 in norms:
        return None
    return round(float(centred[0] @ centred[1]) / (norms[0] * norms[1]), 12)


def _ranks(values: Tensor) -> Tensor:
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    mean_ranks: Any = ends - (counts - 1) / 2
    ranks: Tensor = mean_ranks[inverse]
    return ranks
