"""The laws of LELP's projector, and what it refuses."""

import json

import numpy as np
import pandas
import pytest
import torch

from hf_guide import HfGuideError, OptionError, SubclassError, SubclassProjector, register_splitter
from hf_guide.lelp.accumulator import StatisticsAccumulator
from hf_guide.lelp.projector_files import CONFIG_NAME, WEIGHTS_NAME
from hf_guide.lelp.splitters.registry import known_splitters
from hf_guide.lelp.splitters.scorers import LinearScorer
from hf_guide.utils.checksums import read_json, write_json
from tests.lelp.clouds import CLASSES, SUBCLASSES, WIDTH, Cloud, cloud, rotation

BLIND = [name for name in known_splitters() if name != "labels"]


def fit(data: Cloud, splitter: str = "lelp", num_subclasses: int = SUBCLASSES, **options) -> SubclassProjector:
    if splitter == "labels":
        options["subclass_labels"] = data.finer
    return SubclassProjector.fit(
        data.embeddings, data.labels, data.weight, num_subclasses, splitter=splitter, **options
    )


def targets(projector: SubclassProjector, data: Cloud) -> torch.Tensor:
    finer = data.finer if projector.splitter == "labels" else None
    return projector.transform(data.embeddings, data.logits, finer)


@pytest.mark.parametrize("splitter", known_splitters())
@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_each_class_keeps_exactly_the_teachers_probability(splitter, tau):
    data = cloud()
    found = targets(fit(data, splitter, temperature=tau, subclass_temperature=0.3), data)
    assert found.shape == (len(data.labels), CLASSES, SUBCLASSES) and found.dtype == torch.float64
    assert (found.sum(-1) - (data.logits / tau).softmax(-1)).abs().max() <= 1e-12
    assert found.min() >= 0 and found.std(-1).max() > 0.01, "subclasses that say nothing"


@pytest.mark.parametrize("splitter", BLIND)
def test_one_subclass_is_the_teachers_distribution_itself(splitter):
    data = cloud()
    found = targets(fit(data, splitter, 1, temperature=2.0), data)
    assert torch.equal(found[..., 0], (data.logits / 2).softmax(-1))


def test_the_loss_of_one_subclass_is_that_of_distillation_value_and_gradient():
    data = cloud()
    tau = 2.0
    found = targets(fit(data, num_subclasses=1, temperature=tau), data).flatten(1)
    student = torch.randn(len(found), CLASSES, dtype=torch.float64, requires_grad=True)
    learned = (student / tau).log_softmax(-1)
    kd = torch.nn.functional.kl_div(learned, (data.logits / tau).softmax(-1), reduction="batchmean") * tau**2
    lelp = torch.nn.functional.kl_div(learned, found, reduction="batchmean") * tau**2
    assert torch.equal(lelp, kd)
    gradients = [torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in (lelp, kd)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("splitter", known_splitters())
def test_turning_the_embedding_space_leaves_the_targets_unchanged(splitter):
    data = cloud()
    expected = targets(fit(data, splitter, subclass_temperature=0.3), data)
    for seed in range(3):
        turn = rotation(seed)
        turned = Cloud(data.embeddings @ turn, data.labels, data.finer, data.weight @ turn, data.logits)
        assert (targets(fit(turned, splitter, subclass_temperature=0.3), turned) - expected).abs().max() < 1e-9


def test_a_reflection_of_one_axis_leaves_the_targets_unchanged():
    data = cloud()
    mirror = torch.ones(WIDTH, dtype=torch.float64)
    mirror[3] = -1
    mirrored = Cloud(data.embeddings * mirror, data.labels, data.finer, data.weight * mirror, data.logits)
    assert (targets(fit(mirrored), mirrored) - targets(fit(data), data)).abs().max() < 1e-9


@pytest.mark.parametrize("splitter", known_splitters())
def test_moving_and_scaling_the_embeddings_leaves_the_targets_unchanged(splitter):
    data = cloud()
    moved = Cloud(3 * data.embeddings + 1, data.labels, data.finer, data.weight, data.logits)
    expected = targets(fit(data, splitter), data)
    found = targets(fit(moved, splitter), moved)
    if splitter == "no-scaling":
        assert (found - expected).abs().max() > 0.1
    elif splitter != "random-partition":  # whose waves have no zero that moves with the data
        assert (found - expected).abs().max() < 1e-9


@pytest.mark.parametrize("splitter", known_splitters())
def test_a_shift_of_all_class_weights_changes_nothing(splitter):
    data = cloud()
    shift = 10 * torch.randn(WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    shifted = Cloud(data.embeddings, data.labels, data.finer, data.weight + shift, data.logits)
    assert (targets(fit(shifted, splitter), data) - targets(fit(data, splitter), data)).abs().max() < 1e-9


@pytest.mark.parametrize("splitter", known_splitters())
def test_merging_any_partition_gives_the_same_projector(splitter):
    data = cloud()
    expected = fit(data, splitter)
    for parts, seed in ((2, 0), (5, 1)):
        owner = torch.randint(0, parts, (len(data.labels),), generator=torch.Generator().manual_seed(seed))
        merged = StatisticsAccumulator(CLASSES, WIDTH, splitter=splitter)
        for part in range(parts):
            chosen = owner == part
            other = StatisticsAccumulator(CLASSES, WIDTH, splitter=splitter)
            other.add(data.embeddings[chosen], data.labels[chosen], subclass_labels=data.finer[chosen])
            merged.merge(other)
        found = SubclassProjector.from_statistics(merged, data.weight, SUBCLASSES)
        for name, tensor in found.scores.tensors().items():
            wanted = expected.scores.tensors()[name]
            assert (tensor - wanted).abs().max() <= 1e-9 * wanted.abs().max(), name


def test_directions_are_those_of_the_paper():
    data = cloud()
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
        assert (w @ directions).abs().max() < 1e-10, "the classifier sees them"
        assert (directions - top @ (top.T @ directions)).abs().max() < 1e-10, "they leave the class's subspace"
        gram = directions.T @ directions * values[-SUBCLASSES:].mean()
        assert (gram - torch.eye(SUBCLASSES, dtype=torch.float64)).abs().max() < 1e-9, "not orthonormal over rms"
        scores = projector.coordinates(data.embeddings)[data.labels == number, number]
        assert scores.mean(0).abs().max() < 1e-10 and abs(scores.square().mean() - 1) < 1e-10
        torch.testing.assert_close(
            projector.explained[number], values[-SUBCLASSES:].sum() / values.sum(), rtol=1e-9, atol=0
        )


def test_ablations_differ_from_the_method_in_what_their_names_say():
    data = cloud()
    w = data.weight - data.weight.mean(0)
    assert (w @ fit(data, "no-null-space").scores.directions).abs().max() > 1e-3
    assert (w @ fit(data, "random-projection").scores.directions).abs().max() < 1e-9
    own = torch.arange(len(data.labels)), data.labels
    variances = fit(data, "no-rotation").coordinates(data.embeddings)[own].square().mean(0)
    assert (variances.diff() < 0).all(), "without rotation the first direction has the largest variance"
    assert fit(data, "no-scaling").coordinates(data.embeddings)[own].square().mean() > 2


def test_clusters_that_are_there_are_found_by_k_means_and_the_kernel():
    draw = torch.Generator().manual_seed(0)
    centres = 6 * torch.randn(2 * 3, 12, generator=draw, dtype=torch.float64)
    finer = torch.arange(600) % 6
    embeddings = centres[finer] + torch.randn(600, 12, generator=draw, dtype=torch.float64)
    weight = torch.zeros(2, 12, dtype=torch.float64)
    for splitter, share in (("kmeans", 1.0), ("spectral", 0.9)):
        projector = SubclassProjector.fit(embeddings, finer // 3, weight, 3, splitter=splitter)
        scores = projector.coordinates(embeddings)[torch.arange(600), finer // 3]
        winners = scores.argmax(1)
        right = sum(torch.bincount(winners[finer == number]).max().item() for number in range(6))
        assert right >= share * 600, splitter


def test_a_random_partition_is_even_and_steady_under_rounding():
    data = cloud(count=3000)
    projector = fit(data, "random-partition")
    first = projector.coordinates(data.embeddings).argmax(-1)
    shares = torch.bincount(first[:, 0], minlength=SUBCLASSES) / len(first)
    assert (shares - 1 / SUBCLASSES).abs().max() < 0.05
    again = projector.coordinates(data.embeddings * (1 + 1e-6)).argmax(-1)
    assert (again == first).double().mean() > 0.999
    near = projector.coordinates(data.embeddings + 0.2 * data.embeddings.std()).argmax(-1)
    assert (near == first).double().mean() < 0.5


def test_finer_labels_are_followed_and_unused_subclasses_have_no_share():
    data = cloud()
    finer = torch.where(data.labels == 0, 0, data.finer)  # class 0 has but one
    projector = SubclassProjector.fit(
        data.embeddings,
        data.labels,
        data.weight,
        5,
        splitter="labels",
        subclass_labels=finer,
        subclass_temperature=0.1,
    )
    found = projector.transform(data.embeddings, data.logits, finer)
    assert (found[:, 0, 1:] == 0).all() and (found[:, 1:, 4] == 0).all()
    own = found[torch.arange(len(finer)), data.labels]
    assert torch.equal(own.argmax(1), torch.where(data.labels == 0, 0, data.finer - 4 * data.labels))
    with pytest.raises(SubclassError, match="splits by finer labels"):
        projector.transform(data.embeddings, data.logits)
    with pytest.raises(SubclassError, match="finer label 99 was not there"):
        projector.transform(data.embeddings[:1], data.logits[:1], torch.tensor([99]))
    with pytest.raises(SubclassError, match="Finer labels are whole numbers; found torch.float64"):
        projector.transform(data.embeddings, data.logits, finer.double())
    with pytest.raises(SubclassError, match="Pass num_subclasses=4 or more"):
        fit(data, "labels", 3)
    with pytest.raises(SubclassError, match="give subclass_labels"):
        SubclassProjector.fit(data.embeddings, data.labels, data.weight, 4, splitter="labels")


def test_anyone_may_register_a_splitter():
    def by_first_number(evidence):
        directions = torch.zeros(evidence.moments.num_classes, evidence.moments.width, evidence.num_subclasses)
        directions[:, 0, 0] = 1
        return LinearScorer(directions, torch.zeros(evidence.moments.num_classes, evidence.num_subclasses))

    register_splitter("test-first-number", by_first_number)
    data = cloud()
    found = fit(data, "test-first-number", 2).coordinates(data.embeddings)
    assert torch.equal(found[:, 1, 0], data.embeddings[:, 0])
    with pytest.raises(OptionError, match="already"):
        register_splitter("test-first-number", by_first_number)


def test_arrays_chunks_and_numpy_are_all_the_same():
    data = cloud()
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


def test_examples_without_labels_are_grouped_by_the_teachers_own_class():
    data = cloud()
    own = data.logits.argmax(1)
    expected = SubclassProjector.fit(data.embeddings, own, data.weight, SUBCLASSES)
    silent = SubclassProjector.fit(data.embeddings, None, data.weight, SUBCLASSES, logits=data.logits)
    assert torch.equal(silent.counts, expected.counts) and torch.equal(silent.eigenvalues, expected.eigenvalues)
    some = torch.where(torch.arange(len(own)) % 2 == 0, own, torch.where(torch.arange(len(own)) % 3 == 0, -1, -100))
    mixed = SubclassProjector.fit(data.embeddings, some, data.weight, SUBCLASSES, logits=data.logits)
    assert torch.equal(mixed.eigenvalues, expected.eigenvalues)
    listed = [None if label == -1 else label for label in some.tolist()]
    mixed = SubclassProjector.fit(data.embeddings, listed, data.weight, SUBCLASSES, logits=data.logits)
    assert torch.equal(mixed.eigenvalues, expected.eigenvalues)
    with pytest.raises(SubclassError, match="give its logits"):
        SubclassProjector.fit(data.embeddings, some, data.weight, SUBCLASSES)


def test_numbers_of_numpy_and_labels_that_are_false_or_true_are_taken(tmp_path):
    data = cloud(classes=2)
    expected = SubclassProjector.fit(data.embeddings, data.labels, data.weight, 4, temperature=2.0, seed=3)
    found = SubclassProjector.fit(
        data.embeddings, data.labels == 1, data.weight, np.int64(4), temperature=np.float32(2), seed=np.int64(3)
    )
    assert torch.equal(targets(found, data), targets(expected, data))
    found.at(subclass_temperature=np.float32(0.5)).save_pretrained(tmp_path)
    assert SubclassProjector.from_pretrained(tmp_path).subclass_temperature == 0.5


def test_a_logistic_regression_of_scikit_learn_is_a_teacher():
    linear = pytest.importorskip("sklearn.linear_model")
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = digits.data[:600] / 16, digits.target[:600] % 2
    model = linear.LogisticRegression(max_iter=500).fit(x, y)
    projector = SubclassProjector.fit(x, y, model.coef_, num_subclasses=5, id2label=["even", "odd"])
    found = projector.transform(x, model.predict_log_proba(x))
    assert np.abs(found.sum(-1).numpy() - model.predict_proba(x)).max() < 1e-12
    assert projector.subclass_id2label[7] == "odd/2"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_embeddings_give_float32_near_the_exact_targets(dtype):
    data = cloud()
    projector = fit(data)
    found = projector.transform(data.embeddings.to(dtype), data.logits)
    assert found.dtype == torch.float32
    assert (found - projector.transform(data.embeddings.to(dtype).double(), data.logits)).abs().max() < 1e-6


def test_a_class_that_is_ruled_out_has_no_share():
    data = cloud()
    logits = data.logits.clone()
    logits[:, 1] = -torch.inf
    found = fit(data).transform(data.embeddings, logits)
    assert (found[:, 1] == 0).all() and found.isfinite().all()


def test_temperatures_are_changed_without_fitting_again():
    data = cloud()
    changed = fit(data).at(temperature=2.0, subclass_temperature=0.25)
    assert torch.equal(targets(changed, data), targets(fit(data, temperature=2.0, subclass_temperature=0.25), data))
    with pytest.raises(OptionError, match="subclass_temperature is a positive number; found 0"):
        changed.at(subclass_temperature=0)


def test_seeds_decide_and_the_same_seed_decides_alike():
    data = cloud()
    assert torch.equal(targets(fit(data, seed=3), data), targets(fit(data, seed=3), data))
    assert not torch.allclose(targets(fit(data, seed=3), data), targets(fit(data, seed=4), data))
    state = torch.random.get_rng_state()
    fit(data, "kmeans")
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's own random numbers were drawn from"


@pytest.mark.parametrize("splitter", known_splitters())
def test_saved_and_loaded_it_gives_the_same_bits(splitter, tmp_path):
    data = cloud()
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
        loaded.explained, projector.explained
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG_NAME, WEIGHTS_NAME]


def test_damaged_or_missing_files_are_refused(tmp_path):
    fit(cloud()).save_pretrained(tmp_path)
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
        ({"form": "unheard-of"}, "whole projector"),
    ):
        write_json(tmp_path / CONFIG_NAME, entries | change)
        with pytest.raises(SubclassError, match=message):
            SubclassProjector.from_pretrained(tmp_path)
    for text in ("{", json.dumps(entries)):
        (tmp_path / CONFIG_NAME).write_text(text)
        with pytest.raises(SubclassError, match=f"{CONFIG_NAME} is damaged"):
            SubclassProjector.from_pretrained(tmp_path)
    with pytest.raises(NotADirectoryError, match="is a file"):
        fit(cloud()).save_pretrained(tmp_path / CONFIG_NAME)


def broken(**changes):
    """What is given to `fit`, with something wrong with it."""
    data = cloud()
    given = {
        "embeddings": data.embeddings,
        "labels": data.labels,
        "classifier_weight": data.weight,
        "num_subclasses": SUBCLASSES,
    }
    return given | {name: change(given.get(name)) if callable(change) else change for name, change in changes.items()}


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
        ({"num_subclasses": 22}, "24 wide have no room for 22 directions beside the classifier's 3: 25 or more"),
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
        ({"splitter": "labels", "subclass_labels": torch.rand(600)}, "Finer labels are whole numbers"),
        ({"embeddings": with_nan}, "embedding of example 411 holds NaN or infinity"),
        ({"embeddings": lambda h: h[0]}, r"shape \(N, width\) were expected"),
        ({"embeddings": "words"}, "An array of numbers was expected"),
        ({"classifier_weight": lambda w: w[:, :9]}, r"\(any, 9\) were expected; found \(600, 24\)"),
        ({"classifier_weight": lambda w: w[0]}, "has the shape"),
        (
            {"classifier_weight": lambda w: w.T},
            r"looks transposed.* \(24, 3\).*Give it as \(classes, width\), \(3, 24\)",
        ),
        ({"classifier_weight": lambda w: w * torch.nan}, "weight holds NaN"),
        ({"num_subclasses": 0}, "num_subclasses is a whole number of at least 1; found 0"),
        ({"num_subclasses": 2.0}, "found 2.0"),
        ({"temperature": 0.0}, "temperature is a positive number"),
        ({"subclass_temperature": -1.0}, "subclass_temperature is a positive number"),
        ({"splitter": "kmean"}, "Did you mean 'kmeans'"),
        ({"splitter": None}, "splitter=None is not known"),
        ({"splitter": ["lelp"]}, "is not known; expected one of"),
        ({"seed": "a"}, "seed is a whole number of at least 0; found 'a'"),
        ({"seed": 2**64}, "seed is a whole number from 0 to"),
        ({"id2label": ["one"]}, "id2label names the classes"),
    ],
)
def test_what_no_projector_can_be_made_of_is_refused(changes, message):
    with pytest.raises(HfGuideError, match=message):
        SubclassProjector.fit(**broken(**changes))


def test_what_cannot_be_transformed_is_refused():
    data = cloud()
    projector = fit(data)
    with pytest.raises(SubclassError, match=r"Embeddings of the shape \(N, 24\)"):
        projector.transform(data.embeddings[:, :5], data.logits)
    with pytest.raises(SubclassError, match=r"Embeddings of the shape \(N, 24\) were expected; found \(\)"):
        projector.transform(3.0, 4.0)
    with pytest.raises(SubclassError, match=r"need logits of the shape \(600, 3\)"):
        projector.transform(data.embeddings, data.logits[:, :2])
    with pytest.raises(SubclassError, match="embedding of example 411"):
        projector.transform(with_nan(data.embeddings), data.logits)
    with pytest.raises(SubclassError, match="logits of example 411"):
        projector.transform(data.embeddings, with_nan(torch.nn.functional.pad(data.logits, (0, 1)))[:, 1:])
