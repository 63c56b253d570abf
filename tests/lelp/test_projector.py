"""The laws of LELP's projector and its splitters, and the inputs that raise."""

import json

import numpy as np
import pandas
import pytest
import torch

from hf_guide import HfGuideError, OptionError, SubclassError, SubclassProjector
from hf_guide.lelp.accumulator import StatisticsAccumulator
from hf_guide.lelp.projector_files import CONFIG_NAME, WEIGHTS_NAME
from hf_guide.lelp.splitters.registry import BENCHMARK_SPLITTERS
from hf_guide.lelp.splitters.scorers import LinearScorer
from hf_guide.utils.checksums import read_json, write_json
from tests.lelp.benchmark_modules import import_benchmark
from tests.lelp.synthetic_data import CLASSES, SUBCLASSES, WIDTH, LabeledEmbeddings, make_embeddings, rotation

import_benchmark("lelp_splitters")
SPLITTERS = ("lelp", "kmeans", "labels", *BENCHMARK_SPLITTERS)
WITHOUT_FINE_LABELS = [name for name in SPLITTERS if name != "labels"]


def fit(
    data: LabeledEmbeddings, splitter: str = "lelp", num_subclasses: int = SUBCLASSES, **options
) -> SubclassProjector:
    if splitter == "labels":
        options["fine_labels"] = data.fine_labels
    return SubclassProjector.fit(
        data.embeddings, data.labels, data.weight, num_subclasses, splitter=splitter, **options
    )


def targets(projector: SubclassProjector, data: LabeledEmbeddings) -> torch.Tensor:
    fine_labels = data.fine_labels if projector.splitter == "labels" else None
    return projector.transform(data.embeddings, data.logits, fine_labels)


@pytest.mark.parametrize("splitter", SPLITTERS)
@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_each_class_keeps_exactly_the_teachers_probability(splitter, tau):
    data = make_embeddings()
    actual = targets(fit(data, splitter, temperature=tau, subclass_temperature=0.3), data)
    assert actual.shape == (len(data.labels), CLASSES, SUBCLASSES) and actual.dtype == torch.float64
    assert (actual.sum(-1) - (data.logits / tau).softmax(-1)).abs().max() <= 1e-12
    assert actual.min() >= 0 and actual.std(-1).max() > 0.01, "subclasses without information"


@pytest.mark.parametrize("splitter", WITHOUT_FINE_LABELS)
def test_one_subclass_is_the_teachers_distribution_itself(splitter):
    data = make_embeddings()
    actual = targets(fit(data, splitter, 1, temperature=2.0), data)
    assert torch.equal(actual[..., 0], (data.logits / 2).softmax(-1))


def test_the_loss_of_one_subclass_is_that_of_distillation_value_and_gradient():
    data = make_embeddings()
    tau = 2.0
    actual = targets(fit(data, num_subclasses=1, temperature=tau), data).flatten(1)
    student = torch.randn(len(actual), CLASSES, dtype=torch.float64, requires_grad=True)
    learned = (student / tau).log_softmax(-1)
    kd = torch.nn.functional.kl_div(learned, (data.logits / tau).softmax(-1), reduction="batchmean") * tau**2
    lelp = torch.nn.functional.kl_div(learned, actual, reduction="batchmean") * tau**2
    assert torch.equal(lelp, kd)
    gradients = [torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in (lelp, kd)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("splitter", SPLITTERS)
def test_rotating_the_embedding_space_leaves_the_targets_unchanged(splitter):
    data = make_embeddings()
    expected = targets(fit(data, splitter, subclass_temperature=0.3), data)
    for seed in range(3):
        matrix = rotation(seed)
        rotated = LabeledEmbeddings(
            data.embeddings @ matrix, data.labels, data.fine_labels, data.weight @ matrix, data.logits
        )
        assert (targets(fit(rotated, splitter, subclass_temperature=0.3), rotated) - expected).abs().max() < 1e-9


def test_a_reflection_of_one_axis_leaves_the_targets_unchanged():
    data = make_embeddings()
    mirror = torch.ones(WIDTH, dtype=torch.float64)
    mirror[3] = -1
    mirrored = LabeledEmbeddings(
        data.embeddings * mirror, data.labels, data.fine_labels, data.weight * mirror, data.logits
    )
    assert (targets(fit(mirrored), mirrored) - targets(fit(data), data)).abs().max() < 1e-9


@pytest.mark.parametrize("splitter", SPLITTERS)
def test_moving_and_scaling_the_embeddings_leaves_the_targets_unchanged(splitter):
    data = make_embeddings()
    moved = LabeledEmbeddings(3 * data.embeddings + 1, data.labels, data.fine_labels, data.weight, data.logits)
    expected = targets(fit(data, splitter), data)
    actual = targets(fit(moved, splitter), moved)
    if splitter == "no-scaling":
        assert (actual - expected).abs().max() > 0.1
    elif splitter != "random-partition":  # whose waves have no zero that moves with the data
        assert (actual - expected).abs().max() < 1e-9


@pytest.mark.parametrize("splitter", SPLITTERS)
def test_a_shift_of_all_class_weights_changes_nothing(splitter):
    data = make_embeddings()
    shift = 10 * torch.randn(WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    shifted = LabeledEmbeddings(data.embeddings, data.labels, data.fine_labels, data.weight + shift, data.logits)
    assert (targets(fit(shifted, splitter), data) - targets(fit(data, splitter), data)).abs().max() < 1e-9


@pytest.mark.parametrize("splitter", SPLITTERS)
def test_merging_any_partition_gives_the_same_projector(splitter):
    data = make_embeddings()
    expected = fit(data, splitter)
    for parts, seed in ((2, 0), (5, 1)):
        owner = torch.randint(0, parts, (len(data.labels),), generator=torch.Generator().manual_seed(seed))
        merged = StatisticsAccumulator(CLASSES, WIDTH, splitter=splitter)
        for part in range(parts):
            chosen = owner == part
            other = StatisticsAccumulator(CLASSES, WIDTH, splitter=splitter)
            other.update(data.embeddings[chosen], data.labels[chosen], fine_labels=data.fine_labels[chosen])
            merged.merge(other)
        actual = SubclassProjector.from_statistics(merged, data.weight, SUBCLASSES)
        for name, tensor in actual.scores.tensors().items():
            expected_tensor = expected.scores.tensors()[name]
            assert (tensor - expected_tensor).abs().max() <= 1e-9 * expected_tensor.abs().max(), name


def test_directions_are_those_of_the_paper():
    data = make_embeddings()
    projector = fit(data)
    assert isinstance(projector.scores, LinearScorer)
    w = data.weight - data.weight.mean(0)
    null = torch.eye(WIDTH, dtype=torch.float64) - torch.linalg.pinv(w, rtol=1e-10) @ w
    for number in range(CLASSES):
        rows = data.embeddings[data.labels == number] @ null
        centred = rows - rows.mean(0)
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(rows))
        top = vectors[:, -SUBCLASSES:]
        directions = projector.scores.directions[number]
        assert (w @ directions).abs().max() < 1e-10, "they are in the row space of the classifier"
        assert (directions - top @ (top.T @ directions)).abs().max() < 1e-10, "they leave the class's subspace"
        gram = directions.T @ directions * values[-SUBCLASSES:].mean()
        assert (gram - torch.eye(SUBCLASSES, dtype=torch.float64)).abs().max() < 1e-9, "not orthonormal over rms"
        scores = projector.coordinates(data.embeddings)[data.labels == number, number]
        assert scores.mean(0).abs().max() < 1e-10 and abs(scores.square().mean() - 1) < 1e-10
        torch.testing.assert_close(
            projector.explained_variance_ratio[number], values[-SUBCLASSES:].sum() / values.sum(), rtol=1e-9, atol=0
        )


def test_ablations_differ_from_the_method_as_their_names_state():
    data = make_embeddings()
    w = data.weight - data.weight.mean(0)
    assert (w @ fit(data, "no-null-space").scores.directions).abs().max() > 1e-3
    assert (w @ fit(data, "random-projection").scores.directions).abs().max() < 1e-9
    own = torch.arange(len(data.labels)), data.labels
    variances = fit(data, "no-rotation").coordinates(data.embeddings)[own].square().mean(0)
    assert (variances.diff() < 0).all(), "without rotation the first direction has the largest variance"
    assert fit(data, "no-scaling").coordinates(data.embeddings)[own].square().mean() > 2


def test_separate_clusters_are_found_by_k_means_and_the_kernel():
    draw = torch.Generator().manual_seed(0)
    centers = 6 * torch.randn(2 * 3, 12, generator=draw, dtype=torch.float64)
    fine_labels = torch.arange(600) % 6
    embeddings = centers[fine_labels] + torch.randn(600, 12, generator=draw, dtype=torch.float64)
    weight = torch.zeros(2, 12, dtype=torch.float64)
    for splitter, share in (("kmeans", 1.0), ("spectral", 0.9)):
        projector = SubclassProjector.fit(embeddings, fine_labels // 3, weight, 3, splitter=splitter)
        scores = projector.coordinates(embeddings)[torch.arange(600), fine_labels // 3]
        winners = scores.argmax(1)
        right = sum(torch.bincount(winners[fine_labels == number]).max().item() for number in range(6))
        assert right >= share * 600, splitter


def test_a_random_partition_is_even_and_stable_under_rounding():
    data = make_embeddings(count=3000)
    projector = fit(data, "random-partition")
    first = projector.coordinates(data.embeddings).argmax(-1)
    shares = torch.bincount(first[:, 0], minlength=SUBCLASSES) / len(first)
    assert (shares - 1 / SUBCLASSES).abs().max() < 0.05
    again = projector.coordinates(data.embeddings * (1 + 1e-6)).argmax(-1)
    assert (again == first).double().mean() > 0.999
    near = projector.coordinates(data.embeddings + 0.2 * data.embeddings.std()).argmax(-1)
    assert (near == first).double().mean() < 0.5


def test_fine_labels_determine_the_subclass_and_unused_subclasses_have_no_share():
    data = make_embeddings()
    fine_labels = torch.where(data.labels == 0, 0, data.fine_labels)  # class 0 has but one
    projector = SubclassProjector.fit(
        data.embeddings,
        data.labels,
        data.weight,
        5,
        splitter="labels",
        fine_labels=fine_labels,
        subclass_temperature=0.1,
    )
    actual = projector.transform(data.embeddings, data.logits, fine_labels)
    assert (actual[:, 0, 1:] == 0).all() and (actual[:, 1:, 4] == 0).all()
    own = actual[torch.arange(len(fine_labels)), data.labels]
    assert torch.equal(own.argmax(1), torch.where(data.labels == 0, 0, data.fine_labels - 4 * data.labels))
    with pytest.raises(SubclassError, match="splits by fine labels"):
        projector.transform(data.embeddings, data.logits)
    with pytest.raises(SubclassError, match="fine label 99 was absent"):
        projector.transform(data.embeddings[:1], data.logits[:1], torch.tensor([99]))
    with pytest.raises(SubclassError, match="Fine labels must be whole numbers; found torch.float64"):
        projector.transform(data.embeddings, data.logits, fine_labels.double())
    with pytest.raises(SubclassError, match="Pass num_subclasses=4 or more"):
        fit(data, "labels", 3)
    with pytest.raises(SubclassError, match="give fine_labels"):
        SubclassProjector.fit(data.embeddings, data.labels, data.weight, 4, splitter="labels")


def test_arrays_chunks_and_numpy_are_all_the_same():
    data = make_embeddings()
    expected = targets(fit(data), data)
    h, y, z = data.embeddings.numpy(), data.labels.numpy(), data.logits.numpy()
    for embeddings, labels in (
        (h, y),
        (iter(np.array_split(h, 7)), y),
        ((part for part in data.embeddings.split(100)), iter(data.labels.split(100))),
        (list(data.embeddings.split(100)), data.labels.tolist()),
        (h, list(y)),
        (h, list(data.labels)),
        (pandas.DataFrame(h), pandas.Series(y)),
    ):
        projector = SubclassProjector.fit(embeddings, labels, data.weight.numpy(), SUBCLASSES)
        assert (projector.transform(h, z) - expected).abs().max() < 1e-9


def test_examples_without_labels_are_grouped_by_the_class_that_the_teacher_predicts():
    data = make_embeddings()
    predicted = data.logits.argmax(1)
    expected = SubclassProjector.fit(data.embeddings, predicted, data.weight, SUBCLASSES)
    unlabelled = SubclassProjector.fit(data.embeddings, None, data.weight, SUBCLASSES, logits=data.logits)
    assert torch.equal(unlabelled.counts, expected.counts) and torch.equal(
        unlabelled.eigenvalues, expected.eigenvalues
    )
    some = torch.where(
        torch.arange(len(predicted)) % 2 == 0, predicted, torch.where(torch.arange(len(predicted)) % 3 == 0, -1, -100)
    )
    mixed = SubclassProjector.fit(data.embeddings, some, data.weight, SUBCLASSES, logits=data.logits)
    assert torch.equal(mixed.eigenvalues, expected.eigenvalues)
    listed = [None if label == -1 else label for label in some.tolist()]
    mixed = SubclassProjector.fit(data.embeddings, listed, data.weight, SUBCLASSES, logits=data.logits)
    assert torch.equal(mixed.eigenvalues, expected.eigenvalues)
    with pytest.raises(SubclassError, match="give its logits"):
        SubclassProjector.fit(data.embeddings, some, data.weight, SUBCLASSES)


def test_numpy_numbers_and_boolean_labels_are_accepted(tmp_path):
    data = make_embeddings(classes=2)
    expected = SubclassProjector.fit(data.embeddings, data.labels, data.weight, 4, temperature=2.0, seed=3)
    actual = SubclassProjector.fit(
        data.embeddings, data.labels == 1, data.weight, np.int64(4), temperature=np.float32(2), seed=np.int64(3)
    )
    assert torch.equal(targets(actual, data), targets(expected, data))
    actual.with_temperature(subclass_temperature=np.float32(0.5)).save_pretrained(tmp_path)
    assert SubclassProjector.from_pretrained(tmp_path).subclass_temperature == 0.5


def test_a_logistic_regression_of_scikit_learn_is_a_teacher():
    linear = pytest.importorskip("sklearn.linear_model")
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = digits.data[:600] / 16, digits.target[:600] % 2
    model = linear.LogisticRegression(max_iter=500).fit(x, y)
    projector = SubclassProjector.fit(x, y, model.coef_, num_subclasses=5, id2label=["even", "odd"])
    actual = projector.transform(x, model.predict_log_proba(x))
    assert np.abs(actual.sum(-1).numpy() - model.predict_proba(x)).max() < 1e-12
    assert projector.subclass_id2label[7] == "odd/2"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_embeddings_give_float32_near_the_exact_targets(dtype):
    data = make_embeddings()
    projector = fit(data)
    actual = projector.transform(data.embeddings.to(dtype), data.logits)
    assert actual.dtype == torch.float32
    assert (actual - projector.transform(data.embeddings.to(dtype).double(), data.logits)).abs().max() < 1e-6


def test_a_class_of_probability_zero_has_no_share():
    data = make_embeddings()
    logits = data.logits.clone()
    logits[:, 1] = -torch.inf
    actual = fit(data).transform(data.embeddings, logits)
    assert (actual[:, 1] == 0).all() and actual.isfinite().all()


def test_temperatures_are_changed_without_fitting_again():
    data = make_embeddings()
    changed = fit(data).with_temperature(temperature=2.0, subclass_temperature=0.25)
    assert torch.equal(targets(changed, data), targets(fit(data, temperature=2.0, subclass_temperature=0.25), data))
    with pytest.raises(OptionError, match="subclass_temperature must be a positive number; found 0"):
        changed.with_temperature(subclass_temperature=0)


def test_the_seed_determines_the_targets():
    data = make_embeddings()
    assert torch.equal(targets(fit(data, seed=3), data), targets(fit(data, seed=3), data))
    assert not torch.allclose(targets(fit(data, seed=3), data), targets(fit(data, seed=4), data))
    state = torch.random.get_rng_state()
    fit(data, "kmeans")
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's own random numbers were drawn from"


@pytest.mark.parametrize("splitter", SPLITTERS)
def test_saved_and_loaded_it_gives_the_same_bits(splitter, tmp_path):
    data = make_embeddings()
    projector = fit(data, splitter, temperature=2.0, id2label={0: "bad", 1: "good", 2: "neither"}, seed=5)
    projector.save_pretrained(tmp_path)
    loaded = SubclassProjector.from_pretrained(tmp_path)
    assert torch.equal(targets(loaded, data), targets(projector, data))
    for name in (
        "temperature",
        "subclass_temperature",
        "splitter",
        "seed",
        "id2label",
        "num_classes",
        "num_subclasses",
    ):
        assert getattr(loaded, name) == getattr(projector, name)
    assert torch.equal(loaded.eigenvalues, projector.eigenvalues) and torch.equal(
        loaded.explained_variance_ratio, projector.explained_variance_ratio
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG_NAME, WEIGHTS_NAME]


def test_damaged_or_missing_files_raise(tmp_path):
    fit(make_embeddings()).save_pretrained(tmp_path)
    whole = (tmp_path / WEIGHTS_NAME).read_bytes()
    (tmp_path / WEIGHTS_NAME).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SubclassError, match=f"{WEIGHTS_NAME} is damaged: it has .* bytes and should have"):
        SubclassProjector.from_pretrained(tmp_path)
    (tmp_path / WEIGHTS_NAME).unlink()
    with pytest.raises(SubclassError, match=f"has no {WEIGHTS_NAME}"):
        SubclassProjector.from_pretrained(tmp_path)
    (tmp_path / WEIGHTS_NAME).write_bytes(whole)
    entries, _ = read_json(tmp_path / CONFIG_NAME)
    for change, message in (
        ({"embedding_size": 7}, "other shapes"),
        ({"num_subclasses": 7}, "other shapes"),
        ({"format": 99}, "reads format 2"),
        ({"form": "unheard-of"}, "complete projector"),
    ):
        write_json(tmp_path / CONFIG_NAME, entries | change)
        with pytest.raises(SubclassError, match=message):
            SubclassProjector.from_pretrained(tmp_path)
    for text in ("{", json.dumps(entries)):
        (tmp_path / CONFIG_NAME).write_text(text)
        with pytest.raises(SubclassError, match=f"{CONFIG_NAME} is damaged"):
            SubclassProjector.from_pretrained(tmp_path)
    with pytest.raises(NotADirectoryError, match="is a file"):
        fit(make_embeddings()).save_pretrained(tmp_path / CONFIG_NAME)


def broken(**changes):
    """Arguments of `fit`, some of them invalid."""
    data = make_embeddings()
    fit_arguments = {
        "embeddings": data.embeddings,
        "labels": data.labels,
        "classifier_weight": data.weight,
        "num_subclasses": SUBCLASSES,
    }
    return fit_arguments | {
        name: change(fit_arguments.get(name)) if callable(change) else change for name, change in changes.items()
    }


def with_nan(h):
    h = h.clone()
    h[411, 3] = torch.inf
    return h


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"labels": lambda y: torch.where((y == 1) & (torch.arange(600) > 12), 0, y)},
            "Class 1 has 4 examples; 4 sub",
        ),
        ({"labels": lambda y: torch.where(y == 2, 0, y)}, "No example is of class 2"),
        (
            {"labels": lambda y: torch.where(y == 2, 0, y), "id2label": ["a", "b", "c"]},
            r"No example is of class 2 \(c\)",
        ),
        ({"embeddings": lambda h: h * 0 + 1}, "differ in 0 directions"),
        ({"embeddings": lambda h: torch.cat([h[:, :3], h[:, 3:] * 0], 1)}, "differ in 3 directions"),
        (
            {"num_subclasses": 22},
            "24 wide cannot hold 22 directions in addition to the classifier's 3: they must be at least 25",
        ),
        ({"labels": lambda y: torch.where(torch.arange(600) == 17, 5, y)}, "label of example 17 is 5"),
        ({"labels": lambda y: torch.where(torch.arange(600) == 17, -7, y)}, "label of example 17 is -7"),
        ({"labels": lambda y: y.double()}, "whole numbers"),
        ({"labels": lambda y: y[:100]}, "embeddings came with 100 labels"),
        ({"labels": lambda y: torch.cat([y, y])}, "600 embeddings came with 1200 labels"),
        ({"embeddings": lambda h: [h], "labels": lambda y: [y, y[:9]]}, "600 embeddings came with 609 labels"),
        (
            {"labels": lambda y: iter(y.tolist())},
            "Chunks of several examples were expected; found the single number 0",
        ),
        ({"splitter": "labels", "fine_labels": torch.rand(600)}, "Fine labels must be whole numbers"),
        ({"embeddings": with_nan}, "embedding of example 411 holds NaN or infinity"),
        ({"embeddings": lambda h: h[0]}, r"must have the shape \(N, width\)"),
        ({"embeddings": "words"}, "An array of numbers was expected"),
        ({"classifier_weight": lambda w: w[:, :9]}, r"must have the shape \(any, 9\); found \(600, 24\)"),
        ({"classifier_weight": lambda w: w[0]}, "must have the shape"),
        (
            {"classifier_weight": lambda w: w.T},
            r"looks transposed.* \(24, 3\).*Give it as \(classes, width\), \(3, 24\)",
        ),
        ({"classifier_weight": lambda w: w * torch.nan}, "weight holds NaN"),
        ({"num_subclasses": 0}, "num_subclasses must be a whole number of at least 1; found 0"),
        ({"num_subclasses": 2.0}, "found 2.0"),
        ({"temperature": 0.0}, "temperature must be a positive number"),
        ({"subclass_temperature": -1.0}, "subclass_temperature must be a positive number"),
        ({"splitter": "kmean"}, "Did you mean 'kmeans'"),
        ({"splitter": None}, "splitter must be one of .*; found None"),
        ({"splitter": ["lelp"]}, "splitter must be one of"),
        ({"seed": "a"}, "seed must be a whole number from 0 to 4294967295; found 'a'"),
        ({"seed": 2**64}, "seed must be a whole number from 0 to"),
        ({"id2label": ["one"]}, "id2label must name the classes"),
    ],
)
def test_invalid_arguments_of_a_fit_raise(changes, message):
    with pytest.raises(HfGuideError, match=message):
        SubclassProjector.fit(**broken(**changes))


def test_invalid_arguments_of_transform_raise():
    data = make_embeddings()
    projector = fit(data)
    with pytest.raises(SubclassError, match=r"Embeddings must have the shape \(N, 24\)"):
        projector.transform(data.embeddings[:, :5], data.logits)
    with pytest.raises(SubclassError, match=r"Embeddings must have the shape \(N, 24\); found \(\)"):
        projector.transform(3.0, 4.0)
    with pytest.raises(SubclassError, match=r"need logits of the shape \(600, 3\)"):
        projector.transform(data.embeddings, data.logits[:, :2])
    with pytest.raises(SubclassError, match="embedding of example 411"):
        projector.transform(with_nan(data.embeddings), data.logits)
    with pytest.raises(SubclassError, match="logits of example 411"):
        projector.transform(data.embeddings, with_nan(torch.nn.functional.pad(data.logits, (0, 1)))[:, 1:])
