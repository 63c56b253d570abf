"""Define the arms of the LELP benchmark, their targets, and the loop that trains a student on them.

Every arm is given the same batches in the same order, from the same start, for the same number of steps.
"""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lelp_splitters  # noqa: F401  # registers the ablations
import numpy
import torch
from lelp_data import Labelled
from lelp_models import Batches, Classifier, Signals
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from hf_guide import SubclassProjector
from hf_guide.distillation.losses.divergences import divergence, dkd
from hf_guide.teachers.signals import DenseTarget

Settings = dict[str, Any]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

SPLITTERS = {
    "lelp": "lelp",
    "no-null-space": "no-null-space",
    "no-rotation": "no-rotation",
    "random-projection": "random-projection",
    "kmeans": "kmeans",
    "random-partition": "random-partition",
    "no-scaling": "no-scaling",
    "spectral": "spectral",
    # What follows is LELP, or k-means, on other embeddings, or on the same ones measured otherwise; see `embeddings_for`.
    "lelp-unseen": "lelp",
    "lelp-stable": "lelp",
    "lelp-early": "lelp",
    "lelp-predictable": "lelp",
    "lelp-halfway": "lelp",
    "kmeans-stable": "kmeans",
    "kmeans-early": "kmeans",
    # Independent components in place of principal ones, each with its own direction and no rotation.
    "ica": "independent",
    "ica-stable": "independent",
    "ica-predictable": "independent",
}
ORACLES = ("oracle", "oracle-long", "oracle-probe")
LONG = 3  # times the steps of the others: given the hidden classes, a student needs more steps than KD to converge
OWN_GRID = ("lelp", "kmeans", "kmeans-stable", "kmeans-early")
WITH_FEATURES = "lelp-features"  # LELP, and embedding regression in addition
REFINED = {"lelp-student": "lelp", "kmeans-student": "kmeans", "lelp-errors": "lelp"}
"""LELP whose subclasses are fitted anew half-way, by this splitter: to the student's own features, or to the half of the
examples of which the student's loss is larger."""
ARMS = ("ce", "kd", "dkd", "features", *ORACLES, *SPLITTERS, WITH_FEATURES, *REFINED)


@dataclass(frozen=True)
class TrainingProblem:
    """What a student is trained on.

    Attributes:
        data: the examples, with labels.
        signals: the teacher's, of these.
        others: the teacher's signals of examples that the student is not trained on, and these examples.
        weight: the teacher's classifier, (C, D).
        made: targets that were made already, by arm and settings: those of all seeds are the same.
    """

    data: Labelled
    signals: Signals
    others: tuple[Signals, Labelled]
    weight: Tensor
    made: dict[str, Tensor] = field(default_factory=dict)


def settings_of(arm: str, grid: str, classes: int, lelp_settings: Settings | None = None) -> list[Settings]:
    """Return what is tried for an arm on the validation split.

    Args:
        grid: "one", "small" or "full". Unless it is full, variants of LELP and the random partition take LELP's own best
            settings, so that they differ from it in nothing else.
        lelp_settings: these, where they are known.
    """
    full = grid == "full"
    taus = {"one": [1.0], "small": [1.0, 4.0], "full": [1.0, 2.0, 4.0]}[grid]
    if arm == "ce":
        return [{}]
    if arm == "kd" or arm in ORACLES:
        return [{"tau": tau} for tau in ([1.0] if grid == "one" else [1.0, 2.0, 4.0])]
    if arm == "dkd":
        weights = [1.0, 4.0, 8.0] if full else [1.0, 8.0]
        return [] if classes < 3 else [{"tau": tau, "dkd_beta": weight} for tau in taus for weight in weights]
    if arm == "features":
        return [{"tau": tau, "gamma": gamma} for tau in taus for gamma in ([0.1, 1.0, 10.0] if full else [0.3, 3.0])]
    if lelp_settings is not None and not full and arm not in OWN_GRID:
        return [lelp_settings]
    betas = {"one": [0.5], "small": [0.3, 1.0], "full": [0.25, 0.5, 1.0, 2.0]}[grid]
    sizes = {"one": [4], "small": [2, 8], "full": [2, 4, 8, 16]}[grid]
    return [{"tau": tau, "S": size, "beta": beta} for tau in taus for size in sizes for beta in betas]


AXES: dict[str, dict[str, list[Any]]] = {
    "kd": {"tau": [1.0, 2.0, 4.0]},
    "dkd": {"dkd_beta": [1.0, 4.0, 8.0], "tau": [1.0, 2.0, 4.0]},
    "features": {"gamma": [1.0, 0.1, 0.3, 3.0, 10.0], "tau": [1.0, 2.0, 4.0]},
    "oracle": {"tau": [1.0, 2.0, 4.0]},
    "oracle-long": {"tau": [1.0, 4.0]},
    "lelp": {"S": [16, 2, 4, 8, 32], "beta": [0.5, 0.25, 1.0, 2.0], "tau": [1.0, 2.0, 4.0]},
}
"""What is tried of each setting, one after the other from the first value of each."""


def axes_of(arm: str, lelp_settings: Settings | None = None) -> dict[str, list[Any]]:
    """Return the values that are tried of each setting of an arm where one is searched after the other.

    K-means takes the temperatures of LELP, where these are known.
    """
    if arm == "kmeans" and lelp_settings is not None:
        return {name: AXES["lelp"]["S"] if name == "S" else [value] for name, value in lelp_settings.items()}
    if arm == WITH_FEATURES and lelp_settings is not None:
        return {name: [value] for name, value in lelp_settings.items()} | {"gamma": [1.0, 0.1, 10.0]}
    return AXES["lelp"] if arm in OWN_GRID else AXES.get(arm, {})


def outputs_of(arm: str, problem: TrainingProblem, settings: Settings) -> int:
    """Return how many outputs the student of an arm has."""
    return problem.data.classes * (len(targets_of(arm, problem, settings)[0, 0]) if is_split(arm) else 1)


def is_split(arm: str) -> bool:
    """Whether an arm learns subclasses."""
    return arm in ORACLES or arm in SPLITTERS or arm in REFINED or arm == WITH_FEATURES


def targets_of(arm: str, problem: TrainingProblem, settings: Settings) -> Tensor:
    """Return the targets of an arm's student for each example, (N, C, S)."""
    key = f"{arm} {json.dumps(settings, sort_keys=True)}"
    if key not in problem.made:
        problem.made[key] = _make_targets(arm, problem, settings)
    return problem.made[key]


def _make_targets(arm: str, problem: TrainingProblem, settings: Settings) -> Tensor:
    if arm in ("oracle", "oracle-long"):
        return oracle_targets(problem, settings["tau"])
    if arm == "oracle-probe":
        return read_targets(problem, settings["tau"])
    source, examples = embeddings_for(arm, problem)
    return split_classes(SPLITTERS.get(arm, "lelp"), settings, source, examples, problem.signals.logits)


def split_classes(
    splitter: str, settings: Settings, source: tuple[Tensor, Tensor], examples: tuple[Tensor, Tensor], logits: Tensor
) -> Tensor:
    """Return the targets (N, C, S) of embeddings.

    Args:
        source: embeddings to split, (N, D), and the classifier on them.
        examples: embeddings to fit on, and their labels.
        logits: the teacher's, (N, C).
    """
    projector = SubclassProjector.fit(
        *examples,
        source[1],
        num_subclasses=settings["S"],
        subclass_temperature=settings["beta"],
        temperature=settings["tau"],
        splitter=splitter,
        seed=settings.get("split_seed", 0),
    )
    return torch.as_tensor(projector.transform(source[0], logits)).float()


def embeddings_for(arm: str, problem: TrainingProblem) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return (embeddings to split, the classifier on them) and (embeddings to fit on, their labels).

    `lelp-unseen` fits on examples that the student is not trained on. Those that end in `-early` split the pooled states of a
    layer half-way, with a linear classifier of their own; `lelp-halfway` concatenates those with the embeddings, each to unit
    variance. Those that end in `-stable` and `-predictable` keep the embeddings but measure them by what is noise in them:
    the difference of two views of an example, or what a layer half-way does not predict, made white, so that
    directions of large variance are those that stand out of it.
    """
    signals, labels, weight = problem.signals, problem.data.labels, problem.weight.double()
    own = signals.embeddings.double()
    if arm == "lelp-unseen":
        return (own, weight), (problem.others[0].embeddings.double(), problem.others[1].labels)
    if arm.endswith(("-stable", "-predictable")):
        of_views = arm.endswith("-stable")
        noise = own - signals.views.double() if of_views else _unpredicted(signals.early.double(), own)
        metric = whitener(noise)
        moved = own @ metric
        return (moved, weight @ torch.linalg.inv(metric)), (moved, labels)
    if arm.endswith(("-early", "-halfway")):
        early = signals.early.double()
        if arm == "lelp-halfway":
            early = torch.cat([_unit(own), _unit(early)], 1)
        return (early, probe(early, signals.logits.argmax(1))), (early, labels)
    return (own, weight), (own, labels)


def whitener(noise: Tensor, ridge: float = 1e-2) -> Tensor:
    """Return the symmetric (D, D) matrix that makes `noise` (N, D) white, with a share of its mean variance added to each."""
    centred = noise - noise.mean(0)
    covariance = centred.T @ centred / len(noise)
    values, vectors = torch.linalg.eigh(covariance)
    return vectors @ torch.diag((values + ridge * values.mean()).rsqrt()) @ vectors.T


def _unpredicted(given: Tensor, wanted: Tensor, ridge: float = 1e-2) -> Tensor:
    given, wanted = _unit(given), wanted - wanted.mean(0)
    gram = given.T @ given / len(given)
    solved = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), given.T @ wanted / len(given))
    return wanted - given @ solved


def _unit(values: Tensor) -> Tensor:
    centred = values - values.mean(0)
    return centred / centred.square().mean().sqrt()


def probe(embeddings: Tensor, labels: Tensor, strength: float = 1.0) -> Tensor:
    """Return the weight (C, D) of a logistic regression."""
    fitted = LogisticRegression(C=strength, max_iter=500).fit(embeddings.numpy(), labels.numpy())
    weight = torch.from_numpy(numpy.asarray(fitted.coef_))
    return torch.cat([-weight / 2, weight / 2]) if len(weight) == 1 else weight


def fit_probe(teacher: Classifier, embeddings: Tensor, labels: Tensor) -> None:
    """Make a logistic regression on a frozen encoder's embeddings its head."""
    fitted = LogisticRegression(C=1.0, max_iter=1000).fit(embeddings.numpy(), labels.numpy())
    weight, bias = (torch.from_numpy(numpy.asarray(each)).float() for each in (fitted.coef_, fitted.intercept_))
    if len(weight) == 1:
        weight, bias = torch.cat([-weight / 2, weight / 2]), torch.cat([-bias / 2, bias / 2])
    with torch.no_grad():
        teacher.head.weight.copy_(weight)
        teacher.head.bias.copy_(bias)


def oracle_targets(problem: TrainingProblem, tau: float) -> Tensor:
    """Return the teacher's class probabilities, each given whole to the fine label, (N, C, most fine labels of a class).

    Where the teacher favours a class that the fine label is not in, that class is shared alike among its own: so this
    arm also learns from the labels where the teacher errs.
    """
    places, most = fine_label_indices(problem.data)
    shares = torch.zeros(len(problem.data), problem.data.classes, most)
    for label, known in places.items():
        shares[:, label, : len(known)] = 1 / len(known)
    for row, (label, fine) in enumerate(zip(*_pairs(problem.data), strict=True)):
        shares[row, label] = 0
        shares[row, label, places[label][fine]] = 1
    return (problem.signals.logits / tau).softmax(-1).unsqueeze(-1) * shares


def read_targets(problem: TrainingProblem, tau: float) -> Tensor:
    """Return what a linear probe reads of the fine labels in the embeddings, fitted where the student is not trained.

    Within each class its probabilities are the shares, so that an example's own labels do not enter: this is the
    most that any linear splitter of these embeddings could hope for.
    """
    signals, others = problem.others
    places, most = fine_label_indices(others)
    scale = signals.embeddings.std()
    fitted = LogisticRegression(C=1.0, max_iter=500).fit(
        (signals.embeddings / scale).numpy(), others.fine_labels.numpy()
    )
    probabilities = torch.from_numpy(fitted.predict_proba((problem.signals.embeddings / scale).numpy())).float()
    columns = {fine: number for number, fine in enumerate(fitted.classes_.tolist())}
    shares = torch.zeros(len(probabilities), others.classes, most)
    for label, known in places.items():
        for fine, place in known.items():
            shares[:, label, place] = probabilities[:, columns[fine]]
    shares = shares / shares.sum(-1, keepdim=True).clamp_min(1e-12)
    return (problem.signals.logits / tau).softmax(-1).unsqueeze(-1) * shares


def fine_label_indices(data: Labelled) -> tuple[dict[int, dict[int, int]], int]:
    """Return the place of each fine label within its class, and how many there are at most.

    Raises:
        ValueError: the set has no fine labels.
    """
    places: dict[int, dict[int, int]] = {}
    for label, fine in sorted(set(zip(*_pairs(data), strict=True))):
        places.setdefault(label, {})[fine] = len(places.get(label, {}))
    return places, max(map(len, places.values()))


def _pairs(data: Labelled) -> tuple[list[int], list[int]]:
    if data.fine_labels is None:
        raise ValueError("This set has no fine labels.")
    return data.labels.tolist(), data.fine_labels.tolist()


def loss_of(
    arm: str, problem: TrainingProblem, settings: Settings, model: Classifier, *, steps: int, seed: int
) -> Loss:
    """Return what gives an arm's mean loss for (rows, features, logits). It may give `model` a part to learn with."""
    labels, logits, tau = problem.data.labels, problem.signals.logits, settings.get("tau", 1.0)
    if arm == "ce":
        return lambda rows, _, mine: nn.functional.cross_entropy(mine, labels[rows])
    if arm == "kd":
        return lambda rows, _, mine: divergence(mine, DenseTarget(logits[rows]), temperature=tau).mean()
    if arm == "dkd":
        weight = settings["dkd_beta"]

        def decoupled(rows: Tensor, _: Tensor, mine: Tensor) -> Tensor:
            own = dkd(mine, logits[rows], labels[rows], alpha=1.0, beta=weight, temperature=tau)
            return nn.functional.cross_entropy(mine, labels[rows]) + own.mean()

        return decoupled
    if arm == "features":
        far = embedding_distance(problem, model, seed)
        return lambda rows, features, mine: (
            divergence(mine, DenseTarget(logits[rows]), temperature=tau).mean()
            + settings["gamma"] * far(rows, features)
        )
    if arm in REFINED:
        return refined_loss(arm, problem, settings, model, steps)
    wanted = _as_logits(targets_of(arm, problem, settings), tau)
    if arm == WITH_FEATURES:
        far = embedding_distance(problem, model, seed)
        return lambda rows, features, mine: (
            divergence(mine, DenseTarget(wanted[rows]), temperature=tau).mean()
            + settings["gamma"] * far(rows, features)
        )
    return lambda rows, _, mine: divergence(mine, DenseTarget(wanted[rows]), temperature=tau).mean()


def _as_logits(targets: Tensor, tau: float) -> Tensor:
    return (targets.flatten(1).clamp_min(1e-30).log() * tau).float()


def embedding_distance(problem: TrainingProblem, model: Classifier, seed: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the mean squared error of (rows, features) from the teacher's embeddings; `model` learns the linear map."""
    wanted = _unit(problem.signals.embeddings)
    torch.manual_seed(seed)
    model.wide = nn.Linear(model.width, wanted.shape[1])
    return lambda rows, features: (model.wide(features) - wanted[rows]).square().mean()


def refined_loss(arm: str, problem: TrainingProblem, settings: Settings, model: Classifier, steps: int) -> Loss:
    """Return LELP's loss, with subclasses that are fitted anew after half of the steps.

    Of each example the student's features and loss are those of its last batch. The head's new weight is the ridge regression
    of the new targets' logits on the features, so that what the student knows of them is kept.
    """
    tau, numbers = settings["tau"], itertools.count()
    wanted = _as_logits(targets_of("lelp", problem, settings), tau)
    own, losses = torch.zeros(len(wanted), model.width), torch.zeros(len(wanted))

    def loss(rows: Tensor, features: Tensor, mine: Tensor) -> Tensor:
        if next(numbers) == steps // 2:
            wanted.copy_(_as_logits(_refined_targets(arm, problem, settings, own, losses), tau))
            _fit_head(model.head, own, wanted)
            mine = model.head(features)
        each = divergence(mine, DenseTarget(wanted[rows]), temperature=tau)
        own[rows], losses[rows] = features.detach(), each.detach()
        return each.mean()

    return loss


def _refined_targets(arm: str, problem: TrainingProblem, settings: Settings, own: Tensor, losses: Tensor) -> Tensor:
    labels, logits = problem.data.labels, problem.signals.logits
    if arm == "lelp-errors":
        source = problem.signals.embeddings.double(), problem.weight.double()
        hard = losses >= losses.median()
        return split_classes(REFINED[arm], settings, source, (source[0][hard], labels[hard]), logits)
    features = own.double()
    source = features, probe(features, logits.argmax(1))
    return split_classes(REFINED[arm], settings, source, (features, labels), logits)


def _fit_head(head: nn.Linear, features: Tensor, wanted: Tensor, ridge: float = 1e-2) -> None:
    """Set a head to the ridge regression of `wanted` (N, outputs), less its mean over the outputs, on features (N, width)."""
    centre = features.mean(0)
    x, y = (features - centre).double(), wanted.double().clamp_min(-20)
    y = y - y.mean(1, keepdim=True)
    gram = x.T @ x / len(x)
    solved = torch.linalg.solve(
        gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype), x.T @ (y - y.mean(0)) / len(x)
    )
    with torch.no_grad():
        head.weight.copy_(solved.T)
        head.bias.copy_(y.mean(0) - centre.double() @ solved)


def train(model: Classifier, batches: Batches, loss: Loss, *, steps: int, batch: int, rate: float, seed: int) -> None:
    """Train with AdamW; the rate rises over a twentieth of the steps and falls as a cosine."""
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # convolutions take a sixth less time
    optimizer = torch.optim.AdamW(model.parameters(), rate, fused=True)
    rise = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    torch.manual_seed(seed)
    model.train()
    for rows in itertools.islice(batches.drawn(batch, seed), steps):
        value = loss(rows, *model(batches.take(rows)))
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def accuracy(model: Classifier, batches: Batches) -> float:
    """Return the share of examples whose class is found, a class being the sum of its subclasses."""

    def classes(inputs: dict[str, Tensor]) -> tuple[Tensor]:
        logits = model(inputs)[1]
        return (logits.view(len(logits), batches.data.classes, -1).logsumexp(-1).argmax(-1),)

    (predicted,) = batches.of_each(classes)
    return (predicted == batches.data.labels).float().mean().item()
