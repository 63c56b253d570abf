"""Rank correlations of similarities: their definition, and over batches as over all at once."""

import math

import pytest
import torch
from accelerate import Accelerator

from hf_guide.distillation.similarity_metrics import SimilarityRecorder, pairwise_cosines, spearman

GENERATOR = torch.Generator().manual_seed(0)
STUDENT, TEACHER = torch.randn(12, 3, generator=GENERATOR), torch.randn(12, 5, generator=GENERATOR)


def test_spearman_is_the_correlation_of_ranks_and_ties_share_theirs() -> None:
    first = torch.tensor([1.0, 2.0, 2.0, 5.0])  # ranks 1, 2.5, 2.5, 4
    second = torch.tensor([10.0, 30.0, 20.0, 40.0])  # ranks 1, 3, 2, 4
    covariance = (-1.5) * (-1.5) + 0 * 0.5 + 0 * (-0.5) + 1.5 * 1.5
    assert spearman(first, second) == pytest.approx(covariance / math.sqrt(4.5 * 5.0))
    assert spearman(first, -first) == -1.0
    assert spearman(first, torch.zeros(4)) is None and spearman(first[:1], second[:1]) is None


def test_batches_count_as_all_at_once_and_are_forgotten() -> None:
    recorder = SimilarityRecorder()
    for part in range(0, 12, 4):
        scores = torch.arange(part // 2, part // 2 + 2).repeat_interleave(2)
        recorder.add(STUDENT[part : part + 4], TEACHER[part : part + 4], scores=scores, rows_per_example=2)
    cosine = torch.nn.functional.cosine_similarity
    gold = torch.arange(6.0)
    assert recorder.metrics(Accelerator(cpu=True)) == {
        "similarity_spearman": spearman(pairwise_cosines(STUDENT), pairwise_cosines(TEACHER)),
        "score_spearman": spearman(cosine(STUDENT[::2], STUDENT[1::2], dim=-1), gold),
        "teacher_score_spearman": spearman(cosine(TEACHER[::2], TEACHER[1::2], dim=-1), gold),
    }
    assert recorder.metrics(Accelerator(cpu=True)) == {}


def test_without_a_teacher_only_the_scores_are_compared() -> None:
    recorder = SimilarityRecorder()
    recorder.add(STUDENT, scores=torch.arange(6).repeat_interleave(2), rows_per_example=2)
    assert recorder.metrics(Accelerator(cpu=True)).keys() == {"score_spearman"}
    recorder.add(STUDENT, scores=torch.arange(12))  # one text an example: no pairs
    assert recorder.metrics(Accelerator(cpu=True)) == {}
