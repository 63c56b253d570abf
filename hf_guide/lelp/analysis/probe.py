"""Will subclasses help on this data? A forecast in seconds, before any student is trained.

Does: ask how much of the subclasses comes back when they are found from other examples, how much of them a student's view of
the data tells, and whether tiny students, trained on exactly that, gain by them.
Does not: train the student itself. Tiny students see features, not the data: what they gain is a sign, not a promise.
"""

import math
import statistics
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_guide.errors import SubclassError
from hf_guide.lelp.projector import SubclassProjector, to_weight_matrix
from hf_guide.lelp.splitters.registry import known_splitters
from hf_guide.lelp.validation import resolve_classes
from hf_guide.utils.finite import non_finite_rows

MAX_ROWS = 6000
MAX_FEATURES = 128
HIDDEN_SIZE = 64
STEPS, BATCH_SIZE, LEARNING_RATE = 300, 128, 5e-3
RIDGE = 1e-2
NUM_STANDARD_ERRORS = 2.0  # standard errors that a gain must be away from nothing
MIN_EXAMPLES = 40


@dataclass(frozen=True)
class GainEstimate:
    """What is to be expected of subclasses. Accuracies are in points, out of 100, on examples that were held out.

    Attributes:
        kd: tiny students' accuracy, taught by the teacher's class probabilities; against the labels, or against the
            teacher's own classes where there are no labels.
        gain: what subclass targets add to it, and `gain_error` its standard error over the tiny students.
        shuffled: what the same targets add when each example gets those of another of its class, so that nothing but
            their number is left of them.
        room: how far the tiny students are below the teacher.
        predictability: the share of variance of the subclass probabilities, beyond the class, that the features tell by
            ridge regression; 0 where nothing, 1 where all.
        stability: the share of variance of subclasses found on one third of the examples that those found on a second
            third tell, on the last; None where the classifier was not given, or subclasses cannot be found on a third.
        examples: how many were looked at.
    """

    kd: float
    gain: float
    gain_error: float
    shuffled: float
    teacher_gap: float
    predictability: float
    stability: float | None
    examples: int

    @property
    def recommended(self) -> bool:
        """Whether subclasses are likely to help: tiny students surely gain, and more than by shuffled subclasses."""
        return self.gain > max(NUM_STANDARD_ERRORS * self.gain_error, 0.0) and self.gain > self.shuffled

    @property
    def verdict(self) -> str:
        """What to do, in a few words."""
        if self.recommended:
            return "likely to help"
        if self.gain < -NUM_STANDARD_ERRORS * self.gain_error:
            return "likely to hurt"
        return "no help expected"

    def to_dict(self) -> dict[str, Any]:
        """Return all of it, as JSON has it."""
        return asdict(self) | {"recommended": self.recommended, "verdict": self.verdict}

    def summary(self) -> str:
        """Return a few lines for people."""
        lines = [
            f"Subclasses are {self.verdict}."
            if self.verdict.startswith("likely")
            else "No help is expected of subclasses.",
            f"  tiny students taught by classes find {self.kd:.1f} %, {self.teacher_gap:.1f} points below the teacher",
            f"  subclasses add {self.gain:+.1f} ± {self.gain_error:.1f} points; shuffled ones {self.shuffled:+.1f}",
            f"  {self.predictability:.0%} of what subclasses say beyond the class can be told from the features",
        ]
        if self.stability is not None:
            lines.append(
                f"  {self.stability:.0%} of it comes back from subclasses found on other examples, a third of them each"
            )
        return "\n".join(lines)


def estimate_gain(
    projector: SubclassProjector,
    embeddings: Any,
    logits: Any,
    features: Any,
    labels: Any = None,
    *,
    classifier_weight: Any = None,
    subclass_labels: Any = None,
    students: int = 8,
    seed: int = 0,
) -> GainEstimate:
    """Forecast what a student gains by a projector's subclasses.

    Tiny students of one hidden layer are trained on `features` of one half, all of them at once, and measured on the other.

    Args:
        projector: what makes the targets.
        embeddings, logits: the teacher's, (N, D) and (N, C), best of examples that it was not trained on.
        features: (N, F), what a student could know of each example without the teacher: pixels, a bag of words, the
            pooled states of the student as it starts, or of an early layer of the teacher.
        labels: (N,), the classes; None, -1 and -100, or None for all, stand for the teacher's own.
        classifier_weight: (C, D), for the stability.
        subclass_labels: finer labels, (N,), where the projector splits by them.
        students: how many tiny students of each kind.
        seed: of the halves and the students.

    Raises:
        SubclassError: fewer than 40 examples, tensors that do not fit, labels that are none of the classes, or numbers that
            are not finite.
    """
    embeddings, logits, features = (
        _check_matrix(each, name) for each, name in _named_arrays(embeddings, logits, features)
    )
    if len(logits) != len(embeddings):
        raise SubclassError(f"{len(embeddings)} embeddings need as many logits; found {len(logits)}.")
    extra = {} if subclass_labels is None else {"subclass_labels": torch.as_tensor(subclass_labels)}
    targets = projector.transform(embeddings, logits, **extra)
    found = estimate_gain_from_targets(
        targets, logits, features, labels, temperature=projector.temperature, students=students, seed=seed
    )
    if classifier_weight is None:
        return found
    rows = _sample_rows(len(embeddings), seed)
    classes = resolve_classes(labels, logits, *logits.shape)
    extra = {name: value[rows] for name, value in extra.items()}
    weight = to_weight_matrix(classifier_weight)
    if weight.shape != (projector.num_classes, projector.embedding_size):
        raise SubclassError(
            f"A classifier_weight of the shape ({projector.num_classes}, {projector.embedding_size}) was expected; found "
            f"{tuple(weight.shape)}."
        )
    return replace(
        found, stability=subclass_stability(projector, embeddings[rows], logits[rows], classes[rows], weight, extra)
    )


def estimate_gain_from_targets(
    targets: Any,
    logits: Any,
    features: Any,
    labels: Any = None,
    *,
    temperature: float = 1.0,
    students: int = 8,
    seed: int = 0,
) -> GainEstimate:
    """Forecast what a student gains by subclass targets, however they were made: `estimate_gain` without a projector.

    Args:
        targets: (N, C, S), probabilities that sum to one.
        logits, features, labels, students, seed: as of `estimate_gain`.
        temperature: that the targets were made at.

    Raises:
        SubclassError: as `estimate_gain`.
    """
    logits, features = _check_matrix(logits, "Logits"), _check_matrix(features, "Features")
    targets, count = torch.as_tensor(targets).detach().cpu().double(), len(logits)
    if len(targets) != count or len(features) != count:
        raise SubclassError(
            f"Targets, logits and features are of the same examples; found {len(targets)}, {count} and {len(features)}."
        )
    if count < MIN_EXAMPLES:
        raise SubclassError(f"A forecast needs {MIN_EXAMPLES} examples or more; found {count}.")
    if students < 2:
        raise SubclassError(f"A forecast needs 2 tiny students or more; found students={students}.")
    rows, classes = _sample_rows(count, seed), resolve_classes(labels, logits, *logits.shape)
    targets, logits, features, classes = (each[rows] for each in (targets, logits, features, classes))
    half = len(rows) // 2
    features = reduce_features(features)
    within = within_class_targets(targets, classes)
    plain = targets.sum(2, keepdim=True)
    shares = targets / plain.clamp_min(1e-30)
    mixed = plain * shares[_shuffle_within_class(classes, torch.Generator().manual_seed(seed))]
    scores = {
        name: train_probes(features, each, classes, half, temperature, students, seed)
        for name, each in (("kd", plain), ("lelp", targets), ("shuffled", mixed))
    }
    gains = (scores["lelp"] - scores["kd"]).tolist()
    teacher = 100 * (logits[half:].argmax(1) == classes[half:]).double().mean().item()
    return GainEstimate(
        kd=scores["kd"].mean().item(),
        gain=statistics.mean(gains),
        gain_error=statistics.stdev(gains) / math.sqrt(len(gains)),
        shuffled=(scores["shuffled"] - scores["kd"]).mean().item(),
        teacher_gap=teacher - scores["kd"].mean().item(),
        predictability=r2_ridge(features[:half], within[:half], features[half:], within[half:]),
        stability=None,
        examples=len(rows),
    )


def _sample_rows(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:MAX_ROWS]


def train_probes(
    features: Tensor, targets: Tensor, classes: Tensor, half: int, temperature: float, students: int, seed: int
) -> Tensor:
    """Return the accuracies, in points, of tiny students on all rows from `half` on, trained on those before, (students,).

    Args:
        features: (N, F), of unit variance or so.
        targets: (N, C, S), probabilities that sum to one; a class's prediction is the sum over its subclasses.
        classes: (N,), what counts as right.
    """
    generator = torch.Generator().manual_seed(seed)
    outputs = targets[0].numel()
    inputs, wanted = features.float(), targets.flatten(1).float()

    def drawn(*shape: int) -> Tensor:
        return torch.randn(students, *shape, generator=generator) / math.sqrt(shape[0])

    first, second = drawn(inputs.shape[1], HIDDEN_SIZE), drawn(HIDDEN_SIZE, outputs)
    # All subclasses of a class start alike, so that classes and subclasses start from the same student.
    second = drawn(HIDDEN_SIZE, targets.shape[1]).repeat_interleave(targets.shape[2], 2)
    weights = [first, torch.zeros(students, 1, HIDDEN_SIZE), second, torch.zeros(students, 1, outputs)]
    for weight in weights:
        weight.requires_grad_()
    optimizer = torch.optim.AdamW(weights, LEARNING_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    batches = torch.Generator().manual_seed(seed + 1)
    with torch.enable_grad():
        for _ in range(STEPS):
            rows = torch.randint(half, (BATCH_SIZE,), generator=batches)
            logits = _probe_logits(inputs[rows], weights) / temperature
            loss = -(wanted[rows] * logits.log_softmax(-1)).sum(-1).mean(-1).sum() * temperature**2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        held = _probe_logits(inputs[half:], weights).unflatten(-1, targets.shape[1:])
        found = held.logsumexp(-1).argmax(-1)
    return 100 * (found == classes[half:]).double().mean(1)


def _probe_logits(inputs: Tensor, weights: list[Tensor]) -> Tensor:
    first, bias, second, last = weights
    return torch.relu(inputs @ first + bias) @ second + last


def reduce_features(features: Tensor) -> Tensor:
    """Return standardised features (N, F), no more than the first 128 principal components of them."""
    centred = features - features.mean(0)
    deviation = centred.square().mean(0).sqrt()
    kept = deviation > 1e-8 * deviation.max().clamp_min(1e-300)
    if not bool(kept.any()):
        raise SubclassError("All examples have the same features; there is nothing that a student could learn from.")
    scaled = centred[:, kept] / deviation[kept]
    if scaled.shape[1] <= MAX_FEATURES:
        return scaled
    values, vectors = torch.linalg.eigh(scaled.T @ scaled / len(scaled))
    reduced = scaled @ vectors[:, -MAX_FEATURES:]
    return reduced / reduced.square().mean().sqrt()


def within_class_targets(targets: Tensor, classes: Tensor) -> Tensor:
    """Return each example's subclass probabilities within its class, less the class's mean, (N, C * S); zeros elsewhere."""
    own = torch.arange(len(classes))
    shares = targets[own, classes] / targets[own, classes].sum(1, keepdim=True).clamp_min(1e-30)
    found = torch.zeros_like(targets)
    for number in classes.unique().tolist():
        mine = classes == number
        found[mine, number] = shares[mine] - shares[mine].mean(0)
    return found.flatten(1)


def r2_ridge(given: Tensor, wanted: Tensor, held_given: Tensor, held_wanted: Tensor) -> float:
    """Return the share of variance of `held_wanted` that ridge regression on the other rows foretells, at least 0."""
    one = torch.ones(len(given), 1, dtype=given.dtype)
    given, held_given = torch.cat([given, one], 1), torch.cat([held_given, one[:1].expand(len(held_given), 1)], 1)
    gram = given.T @ given / len(given)
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    found = torch.linalg.solve(gram + ridge, given.T @ wanted / len(given))
    total = held_wanted.square().sum()
    if not total > 0:
        return 0.0  # one subclass a class: there is nothing to tell
    return max(0.0, 1 - ((held_wanted - held_given @ found).square().sum() / total).item())


def subclass_stability(
    projector: SubclassProjector, embeddings: Tensor, logits: Tensor, classes: Tensor, weight: Tensor, extra: dict
) -> float | None:
    """Return the share of variance of subclasses found on one third that those of a second third tell, on the last third.

    It is linear: subclasses that are only turned or renamed count as the same. None where a third is too few examples to
    find subclasses of each class on, or the splitter is not known here.
    """
    if projector.splitter not in known_splitters():
        return None
    third = len(embeddings) // 3
    found = []
    for part in (slice(0, third), slice(third, 2 * third)):
        chosen = {name: value[part] for name, value in extra.items()}
        try:
            fitted = type(projector).fit(
                embeddings[part],
                classes[part],
                weight,
                num_subclasses=projector.num_subclasses,
                subclass_temperature=projector.subclass_temperature,
                temperature=projector.temperature,
                splitter=projector.splitter,
                seed=projector.seed,
                **chosen,
            )
        except SubclassError:  # shapes are known to fit: a third has too little of a class
            return None
        last = {name: value[2 * third :] for name, value in extra.items()}
        targets = torch.as_tensor(fitted.transform(embeddings[2 * third :], logits[2 * third :], **last)).double()
        found.append(within_class_targets(targets, classes[2 * third :]))
    first, second = found
    half = len(first) // 2
    return r2_ridge(second[:half], first[:half], second[half:], first[half:])


def _shuffle_within_class(classes: Tensor, generator: torch.Generator) -> Tensor:
    """Return for each example the row of another of its class."""
    order = torch.arange(len(classes))
    for number in classes.unique().tolist():
        rows = (classes == number).nonzero().flatten()
        order[rows] = rows[torch.randperm(len(rows), generator=generator)]
    return order


def _named_arrays(embeddings: Any, logits: Any, features: Any) -> list[tuple[Any, str]]:
    return [(embeddings, "Embeddings"), (logits, "Logits"), (features, "Features")]


def _check_matrix(values: Any, name: str) -> Tensor:
    found = torch.as_tensor(values).detach().cpu().double()
    if found.ndim != 2:
        raise SubclassError(f"{name} have one row an example; found a tensor of shape {tuple(found.shape)}.")
    wrong = non_finite_rows(found)
    if len(wrong):
        raise SubclassError(f"{name} of example {int(wrong[0])} are not finite.")
    return found
