"""k-means of each class: as good as the best of many restarts, decided by the seed, and in reach of a clear error."""

import pytest
import torch

from hf_guide import SubclassError, SubclassProjector
from hf_guide.lelp.accumulator import StatisticsAccumulator
from hf_guide.lelp.splitters.kmeans import split_by_kmeans
from tests.lelp.synthetic_data import CLASSES, WIDTH, make_embeddings


def inputs_of(data, num_subclasses, seed=0):
    statistics = StatisticsAccumulator(CLASSES, WIDTH, splitter="kmeans", seed=seed)
    statistics.update(data.embeddings, data.labels)
    return statistics.splitter_inputs(data.weight, num_subclasses)


def inertia(rows, assignment):
    """The sum of squared distances to the mean of each cluster."""
    return sum(
        (rows[assignment == cluster] - rows[assignment == cluster].mean(0)).square().sum().item()
        for cluster in assignment.unique()
    )


def test_partitions_are_nearly_as_good_as_the_best_of_many_restarts():
    cluster = pytest.importorskip("sklearn.cluster")
    data = make_embeddings()
    for seed in range(3):
        inputs = inputs_of(data, 4, seed)
        scorer = split_by_kmeans(inputs)
        for number in range(CLASSES):
            rows = inputs.centered_sample(number)
            centered = data.embeddings[data.labels == number]
            scores = scorer.score(centered, None)[:, number]
            projected = inputs.project_out_classifier(centered - inputs.moments.means[number])
            best = cluster.KMeans(4, n_init=50, random_state=0).fit(rows.numpy()).inertia_
            assert inertia(projected, scores.argmax(1)) <= 1.02 * best


def test_assignment_is_to_the_nearest_center():
    data = make_embeddings()
    inputs = inputs_of(data, 3)
    scorer = split_by_kmeans(inputs)
    for number in range(CLASSES):
        rows = data.embeddings[data.labels == number]
        projected = inputs.project_out_classifier(rows - inputs.moments.means[number])
        winners = scorer.score(rows, None)[:, number].argmax(1)
        centers = torch.stack([projected[winners == each].mean(0) for each in range(3)])
        assert torch.equal(torch.cdist(projected, centers).argmin(1), winners)


def test_the_same_seed_gives_the_same_bits_and_the_classes_draw_apart():
    data = make_embeddings()
    first, again = (split_by_kmeans(inputs_of(data, 4, seed=7)) for _ in range(2))
    assert torch.equal(first.directions, again.directions) and torch.equal(first.offsets, again.offsets)
    other = split_by_kmeans(inputs_of(data, 4, seed=8))
    assert not torch.equal(first.directions, other.directions)


def test_fewer_different_embeddings_than_subclasses_raise():
    data = make_embeddings()
    embeddings = data.embeddings.clone()
    embeddings[data.labels == 1] = embeddings[data.labels == 1][:2].repeat(100, 1)
    with pytest.raises(SubclassError, match="Class 1 has only 2 different embeddings and is to have 3 subclasses"):
        SubclassProjector.fit(embeddings, data.labels, data.weight, 3, splitter="kmeans")
