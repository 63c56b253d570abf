"""The estimated gain: zero without subclasses, positive where they are what a small student lacks; and its measures."""

import dataclasses

import numpy
import pytest
import torch

from hf_guide import SubclassError, SubclassProjector
from hf_guide.lelp.analysis.probe import (
    estimate_gain,
    r2_ridge,
    reduce_features,
    subclass_stability,
    train_probes,
    within_class_targets,
)
from tests.lelp.benchmark_modules import import_benchmark

import_benchmark("lelp_splitters")
COUNT, NUM_FINE, WIDTH = 1200, 4, 16


@pytest.fixture(scope="module")
def hidden():
    """Two classes of four clusters each, which both the embeddings and the features separate."""
    generator = torch.Generator().manual_seed(0)
    fine_labels = torch.arange(COUNT) % (2 * NUM_FINE)
    classes = fine_labels % 2
    spots = 3 * torch.randn(2 * NUM_FINE, 8, generator=generator, dtype=torch.float64)
    features = spots[fine_labels] + torch.randn(COUNT, 8, generator=generator, dtype=torch.float64)
    sides = torch.randn(2 * NUM_FINE, WIDTH - 1, generator=generator, dtype=torch.float64)
    sides = sides[fine_labels] + 0.2 * torch.randn(COUNT, WIDTH - 1, generator=generator, dtype=torch.float64)
    embeddings = torch.cat([4.0 * (2 * classes - 1)[:, None].double(), sides], 1)
    weight = torch.zeros(2, WIDTH, dtype=torch.float64)
    weight[:, 0] = torch.tensor([-1.0, 1.0])
    return features, embeddings, embeddings @ weight.T, classes, fine_labels, weight


def projector_of(hidden, splitter="lelp", subclasses=NUM_FINE, **options):
    features, embeddings, logits, classes, fine_labels, weight = hidden
    return SubclassProjector.fit(embeddings, classes, weight, subclasses, splitter=splitter, **options)


def estimate(hidden, projector, **options):
    features, embeddings, logits, classes, fine_labels, weight = hidden
    return estimate_gain(projector, embeddings, logits, features, classes, classifier_weight=weight, **options)


def test_one_subclass_a_class_gains_exactly_nothing(hidden):
    actual = estimate(hidden, projector_of(hidden, subclasses=1), num_probes=2)
    assert actual.gain == actual.gain_error == actual.shuffled == actual.predictability == 0
    assert not actual.recommended and actual.verdict == "no help expected"


def test_subclasses_that_features_show_are_predictable_and_stable(hidden):
    actual = estimate(hidden, projector_of(hidden), num_probes=2)
    assert actual.predictability > 0.5 and actual.stability is not None and actual.stability > 0.8
    assert "subclasses fitted to other examples, a third" in actual.summary()
    assert f"{actual.predictability:.0%}" in actual.summary()


def test_a_partition_that_has_nothing_to_do_with_the_data_is_not_recommended(hidden):
    actual = estimate(hidden, projector_of(hidden, "random-partition"), num_probes=4)
    assert actual.predictability < 0.05 and actual.stability is not None and actual.stability < 0.05
    assert not actual.recommended


def test_the_estimate_is_what_probes_gain(hidden):
    """Classes by the parity of hard-to-separate cells: a student that is given the cells finds the classes."""
    generator = torch.Generator().manual_seed(1)
    cells = torch.randint(0, 4, (3000, 2), generator=generator)
    classes = cells.sum(1) % 2
    fine_labels = cells[:, 0] * 4 + cells[:, 1]
    features = cells.double() + 0.15 * torch.randn(3000, 2, generator=generator, dtype=torch.float64)
    hot = torch.nn.functional.one_hot(fine_labels, 16).double()
    weight = torch.zeros(2, 17, dtype=torch.float64)
    weight[:, 16] = torch.tensor([-1.0, 1.0])
    embeddings = torch.cat(
        [hot + 0.01 * torch.randn(hot.shape, generator=generator), 4.0 * (2 * classes - 1)[:, None]], 1
    )
    logits = embeddings @ weight.T
    projector = SubclassProjector.fit(
        embeddings, classes, weight, 8, splitter="labels", fine_labels=fine_labels, subclass_temperature=0.2
    )
    actual = estimate_gain(projector, embeddings, logits, features, classes, fine_labels=fine_labels)
    assert actual.recommended and actual.gain > 1 and actual.gain > actual.shuffled
    assert actual.verdict == "likely to help"
    assert actual.to_dict()["recommended"] is True


def test_the_same_seed_gives_the_same_estimate_also_for_arrays(hidden):
    features, embeddings, logits, classes, _, weight = hidden
    projector = projector_of(hidden)
    first = estimate_gain(projector, embeddings, logits, features, classes, classifier_weight=weight, num_probes=2)
    arrays = [each.numpy() for each in (embeddings, logits, features, classes)]
    second = estimate_gain(projector, *arrays, classifier_weight=weight.numpy(), num_probes=2)
    assert first == second


def test_without_labels_the_predicted_classes_count(hidden):
    features, embeddings, logits, classes, _, _ = hidden
    assert torch.equal(logits.argmax(1), classes)
    projector = projector_of(hidden)
    actual = estimate_gain(projector, embeddings, logits, features, num_probes=2)
    assert actual == estimate_gain(projector, embeddings, logits, features, classes, num_probes=2)
    assert actual.stability is None
    half = [number if row % 2 else (None, -1, -100)[row % 3] for row, number in enumerate(classes.tolist())]
    for missing in (half, [-100] * len(half)):
        assert actual == estimate_gain(projector, embeddings, logits, features, missing, num_probes=2)


def test_where_a_third_is_too_few_examples_there_is_no_stability(hidden):
    features, embeddings, logits, classes, _, weight = hidden
    rare = torch.cat([(classes == 0).nonzero()[:390], (classes == 1).nonzero()[:10]]).flatten()
    arguments = [each[rare] for each in (embeddings, logits, features, classes)]
    projector = SubclassProjector.fit(arguments[0], arguments[3], weight, NUM_FINE)
    actual = estimate_gain(projector, *arguments, classifier_weight=weight, num_probes=2)
    assert actual.stability is None and actual.examples == 400
    unknown = dataclasses.replace(projector_of(hidden), splitter="someone's")
    assert subclass_stability(unknown, embeddings, logits, classes, weight, {}) is None


def test_every_example_alike_in_its_class_has_nothing_beyond_it():
    targets = torch.tensor([[[0.6, 0.2], [0.1, 0.1]]]).repeat(5, 1, 1)
    assert within_class_targets(targets, torch.zeros(5, dtype=torch.long)).abs().max() < 1e-7


def test_r2_is_one_for_a_linear_map_and_zero_for_noise():
    generator = torch.Generator().manual_seed(0)
    arguments, noise = (torch.randn(4000, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    expected_tensor = arguments @ torch.randn(5, 3, generator=generator, dtype=torch.float64)
    assert r2_ridge(arguments[:2000], expected_tensor[:2000], arguments[2000:], expected_tensor[2000:]) > 0.999
    assert r2_ridge(arguments[:2000], noise[:2000], arguments[2000:], noise[2000:]) < 0.01


def test_stability_is_invariant_to_rotations_of_the_subclasses(hidden):
    _, embeddings, logits, classes, _, weight = hidden
    for rotation in range(2):
        projector = projector_of(hidden, seed=rotation)
        assert subclass_stability(projector, embeddings, logits, classes, weight, {}) > 0.8


def test_many_features_are_reduced_and_constant_ones_left_out():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(300, 200, generator=generator, dtype=torch.float64)
    features[:, 3] = 7.0
    assert reduce_features(features).shape == (300, 128)
    assert reduce_features(features[:, :4]).shape == (300, 3)


def test_probes_learn_a_linear_boundary(hidden):
    features, _, _, classes, _, _ = hidden
    targets = torch.nn.functional.one_hot((features[:, 0] > 0).long(), 2).double().unsqueeze(2)
    actual = train_probes(features, targets, (features[:, 0] > 0).long(), COUNT // 2, 1.0, 2, 0)
    assert actual.shape == (2,) and actual.min() > 95


@pytest.mark.parametrize(
    "change, reported",
    [
        ({"features": numpy.full((COUNT, 3), 1.0)}, "the same features"),
        ({"features": torch.zeros(COUNT - 1, 3)}, f"found {COUNT}, {COUNT} and {COUNT - 1}"),
        ({"features": torch.full((COUNT, 3), torch.nan)}, "Features of example 0 are not finite"),
        ({"features": torch.zeros(COUNT)}, "one row an example"),
        ({"num_probes": 1}, "num_probes must be at least 2"),
        ({"labels": torch.full((COUNT,), 2)}, "label of example 0 is 2; the teacher has the classes 0 to 1"),
        ({"labels": torch.zeros(5).long()}, rf"one an example, \({COUNT},\); found \(5,\)"),
        ({"classifier_weight": torch.zeros(2, 3)}, r"must have the shape \(2, 16\); found \(2, 3\)"),
    ],
)
def test_invalid_arguments_raise(hidden, change, reported):
    features, embeddings, logits, classes, _, _ = hidden
    arguments = {"features": features, "labels": classes, "num_probes": 2} | change
    with pytest.raises(SubclassError, match=reported):
        estimate_gain(projector_of(hidden), embeddings, logits, **arguments)


def test_too_few_examples_raise(hidden):
    features, embeddings, logits, classes, _, _ = hidden
    with pytest.raises(SubclassError, match="needs at least 40 examples; found 39"):
        estimate_gain(projector_of(hidden), embeddings[:39], logits[:39], features[:39], classes[:39])
