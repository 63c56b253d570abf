"""Estimate in seconds, before a student is trained, whether subclasses will help it.

Does: train small probes on features of the inputs with and without subclass targets, and measure how well the features predict
the subclasses and how stable the subclasses are when they are fitted to other examples.
Does not: train the student. Probes read features and not the inputs themselves: their gain indicates the student's gain but
does not promise it.
"""

import math
import statistics
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_guide.errors import SubclassError
from hf_guide.lelp.projector import SubclassProjector, to_weight_matrix
from hf_guide.lelp.splitters.registry import can_fit
from hf_guide.lelp.validation import resolve_classes
from hf_guide.utils.finite import non_finite_rows

MAX_ROWS = 6000
MAX_FEATURES = 128
HIDDEN_SIZE = 64
STEPS, BATCH_SIZE, LEARNING_RATE = 300, 128, 5e-3
RIDGE = 1e-2
NUM_STANDARD_ERRORS = 2.0  # that a gain must exceed
MIN_EXAMPLES = 40


@dataclass(frozen=True)
class GainEstimate:
    """The expected effect of subclasses. Accuracies are in points, out of 100, on held-out examples.

    Attributes:
        kd: The accuracy of probes trained with the teacher's class probabilities, against the labels, or the classes that the
            teacher predicts where there are no labels.
        gain: What subclass targets add to it, and `gain_error` its standard error over the probes.
        shuffled: What the same targets add when they are shuffled within each class, which leaves only their number.
        teacher_gap: How far the probes are below the teacher.
        predictability: The share of variance (R squared) of the subclass probabilities within a class that ridge regression
            on the features predicts, from 0 to 1.
        stability: The share of variance of subclasses fitted to one third of the examples that subclasses fitted to a second
            third predict, on the last third; None without a classifier, or where a third is too few to fit them.
        examples: How many examples were read.
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
        """Whether subclasses are likely to help: the gain is significant and larger than that of shuffled subclasses."""
        return self.gain > max(NUM_STANDARD_ERRORS * self.gain_error, 0.0) and self.gain > self.shuffled

    @property
    def verdict(self) -> str:
        """The recommendation, in a few words."""
        if self.recommended:
            return "likely to help"
        if self.gain < -NUM_STANDARD_ERRORS * self.gain_error:
            return "likely to hurt"
        return "no help expected"

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, and the recommendation, as a dict for JSON."""
        return asdict(self) | {"recommended": self.recommended, "verdict": self.verdict}

    def summary(self) -> str:
        """Return a summary of a few lines."""
        lines = [
            f"Subclasses are {self.verdict}."
            if self.verdict.startswith("likely")
            else "No help is expected of subclasses.",
            f"  probes trained with classes reach {self.kd:.1f} %, {self.teacher_gap:.1f} points below the teacher",
            f"  subclasses add {self.gain:+.1f} ± {self.gain_error:.1f} points; shuffled ones {self.shuffled:+.1f}",
            f"  the features predict {self.predictability:.0%} of the variance of the subclasses within a class",
        ]
        if self.stability is not None:
            lines.append(
                f"  subclasses fitted to other examples, a third of them each, predict {self.stability:.0%} of it"
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
    fine_labels: Any = None,
    num_probes: int = 8,
    seed: int = 0,
) -> GainEstimate:
    """Estimate what a student gains from a projector's subclasses.

    Probes of one hidden layer are trained on `features` of one half of the examples, and evaluated on the other.

    Args:
        projector: Computes the targets.
        embeddings, logits: The teacher's, (N, D) and (N, C), best of examples that it was not trained on.
        features: (N, F), of the inputs alone: pixels, a bag of words, the pooled hidden states of the untrained student or
            of an early layer of the teacher.
        labels: (N,), the classes; None, -1 and -100, or None for all, mean the class that the teacher predicts.
        classifier_weight: (C, D), for the stability.
        fine_labels: (N,), if the projector splits by them.
        num_probes: How many probes of each kind, at least 2.
        seed: Of the halves and the probes.

    Raises:
        SubclassError: Fewer than 40 examples, shapes that do not match, labels outside the classes, or values that are not
            finite.
    """
    embeddings, logits = _check_matrix(embeddings, "Embeddings"), _check_matrix(logits, "Logits")
    features = _check_matrix(features, "Features")
    if len(logits) != len(embeddings):
        raise SubclassError(f"{len(embeddings)} embeddings need as many logits; found {len(logits)}.")
    extra = {} if fine_labels is None else {"fine_labels": torch.as_tensor(fine_labels)}
    targets = projector.transform(embeddings, logits, **extra)
    estimate = estimate_gain_from_targets(
        targets, logits, features, labels, temperature=projector.temperature, num_probes=num_probes, seed=seed
    )
    if classifier_weight is None:
        return estimate
    rows = _sample_rows(len(embeddings), seed)
    classes = resolve_classes(labels, logits, *logits.shape)
    extra = {name: value[rows] for name, value in extra.items()}
    weight = to_weight_matrix(classifier_weight)
    if weight.shape != (projector.num_classes, projector.embedding_size):
        raise SubclassError(
            f"classifier_weight must have the shape ({projector.num_classes}, {projector.embedding_size}); found "
            f"{tuple(weight.shape)}."
        )
    return replace(
        estimate, stability=subclass_stability(projector, embeddings[rows], logits[rows], classes[rows], weight, extra)
    )


def estimate_gain_from_targets(
    targets: Any,
    logits: Any,
    features: Any,
    labels: Any = None,
    *,
    temperature: float = 1.0,
    num_probes: int = 8,
    seed: int = 0,
) -> GainEstimate:
    """Estimate what a student gains from subclass targets, without a projector; see `estimate_gain`.

    Args:
        targets: (N, C, S), probabilities that sum to one.
        logits, features, labels, num_probes, seed: As of `estimate_gain`.
        temperature: Of the targets.

    Raises:
        SubclassError: As `estimate_gain`.
    """
    logits, features = _check_matrix(logits, "Logits"), _check_matrix(features, "Features")
    targets, count = torch.as_tensor(targets).detach().cpu().double(), len(logits)
    if len(targets) != count or len(features) != count:
        raise SubclassError(
            f"Targets, logits and features must be of the same examples; found {len(targets)}, {count} and {len(features)}."
        )
    if count < MIN_EXAMPLES:
        raise SubclassError(f"An estimate needs at least {MIN_EXAMPLES} examples; found {count}.")
    if num_probes < 2:
        raise SubclassError(f"num_probes must be at least 2; found {num_probes!r}.")
    rows, classes = _sample_rows(count, seed), resolve_classes(labels, logits, *logits.shape)
    targets, logits, features, classes = (each[rows] for each in (targets, logits, features, classes))
    half = len(rows) // 2
    features = reduce_features(features)
    within = within_class_targets(targets, classes)
    plain = targets.sum(2, keepdim=True)
    shares = targets / plain.clamp_min(1e-30)
    shuffled = plain * shares[_shuffle_within_class(classes, torch.Generator().manual_seed(seed))]
    scores = {
        name: train_probes(features, probe_targets, classes, half, temperature, num_probes, seed)
        for name, probe_targets in (("kd", plain), ("lelp", targets), ("shuffled", shuffled))
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
    features: Tensor, targets: Tensor, classes: Tensor, half: int, temperature: float, num_probes: int, seed: int
) -> Tensor:
    """Return the accuracies, in points, of probes on all rows from `half` on, trained on those before, (num_probes,).

    Args:
        features: (N, F), of about unit variance.
        targets: (N, C, S), probabilities that sum to one; a class's probability is the sum over its subclasses.
        classes: (N,), the correct class of each example.
    """
    generator = torch.Generator().manual_seed(seed)
    outputs = targets[0].numel()
    inputs, flat_targets = features.float(), targets.flatten(1).float()

    def draw_weight(*shape: int) -> Tensor:
        return torch.randn(num_probes, *shape, generator=generator) / math.sqrt(shape[0])

    first, second = draw_weight(inputs.shape[1], HIDDEN_SIZE), draw_weight(HIDDEN_SIZE, outputs)
    # All subclasses of a class have the same initial row, so that classes and subclasses start from the same function.
    second = draw_weight(HIDDEN_SIZE, targets.shape[1]).repeat_interleave(targets.shape[2], 2)
    weights = [first, torch.zeros(num_probes, 1, HIDDEN_SIZE), second, torch.zeros(num_probes, 1, outputs)]
    for weight in weights:
        weight.requires_grad_()
    optimizer = torch.optim.AdamW(weights, LEARNING_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    batches = torch.Generator().manual_seed(seed + 1)
    with torch.enable_grad():
        for _ in range(STEPS):
            rows = torch.randint(half, (BATCH_SIZE,), generator=batches)
            logits = _probe_logits(inputs[rows], weights) / temperature
            loss = -(flat_targets[rows] * logits.log_softmax(-1)).sum(-1).mean(-1).sum() * temperature**2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        held_out = _probe_logits(inputs[half:], weights).unflatten(-1, targets.shape[1:])
        predicted = held_out.logsumexp(-1).argmax(-1)
    return 100 * (predicted == classes[half:]).double().mean(1)


def _probe_logits(inputs: Tensor, weights: list[Tensor]) -> Tensor:
    first, bias, second, last = weights
    return torch.relu(inputs @ first + bias) @ second + last


def reduce_features(features: Tensor) -> Tensor:
    """Return standardized features (N, F), at most their first 128 principal components."""
    centered = features - features.mean(0)
    deviation = centered.square().mean(0).sqrt()
    varying = deviation > 1e-8 * deviation.max().clamp_min(1e-300)
    if not bool(varying.any()):
        raise SubclassError("All examples have the same features, from which nothing can be learned. Pass others.")
    scaled = centered[:, varying] / deviation[varying]
    if scaled.shape[1] <= MAX_FEATURES:
        return scaled
    values, vectors = torch.linalg.eigh(scaled.T @ scaled / len(scaled))
    reduced = scaled @ vectors[:, -MAX_FEATURES:]
    return reduced / reduced.square().mean().sqrt()


def within_class_targets(targets: Tensor, classes: Tensor) -> Tensor:
    """Return each example's subclass probabilities given its class, less the class's mean, (N, C * S); zeros elsewhere."""
    rows = torch.arange(len(classes))
    shares = targets[rows, classes] / targets[rows, classes].sum(1, keepdim=True).clamp_min(1e-30)
    within = torch.zeros_like(targets)
    for number in classes.unique().tolist():
        members = classes == number
        within[members, number] = shares[members] - shares[members].mean(0)
    return within.flatten(1)


def r2_ridge(inputs: Tensor, outputs: Tensor, held_inputs: Tensor, held_outputs: Tensor) -> float:
    """Return the share of variance of `held_outputs` that ridge regression on the other rows predicts, at least 0."""
    one = torch.ones(len(inputs), 1, dtype=inputs.dtype)
    inputs, held_inputs = torch.cat([inputs, one], 1), torch.cat([held_inputs, one[:1].expand(len(held_inputs), 1)], 1)
    gram = inputs.T @ inputs / len(inputs)
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    coefficients = torch.linalg.solve(gram + ridge, inputs.T @ outputs / len(inputs))
    total = held_outputs.square().sum()
    if not total > 0:
        return 0.0  # one subclass a class: there is no variance
    return max(0.0, 1 - ((held_outputs - held_inputs @ coefficients).square().sum() / total).item())


def subclass_stability(
    projector: SubclassProjector, embeddings: Tensor, logits: Tensor, classes: Tensor, weight: Tensor, extra: dict
) -> float | None:
    """Return the share of variance of subclasses fitted to one third that those of a second third predict, on the last third.

    The prediction is linear: subclasses that are only rotated or permuted count as the same. None where a third is too few
    examples to fit subclasses of each class, or the splitter cannot be fitted here.
    """
    if not can_fit(projector.splitter):
        return None
    third = len(embeddings) // 3
    last = slice(2 * third, None)
    targets = []
    for part in (slice(0, third), slice(third, 2 * third)):
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
                **{name: values[part] for name, values in extra.items()},
            )
        except SubclassError:  # the shapes have been checked: a third has too few examples of a class
            return None
        held_extra = {name: values[last] for name, values in extra.items()}
        probabilities = torch.as_tensor(fitted.transform(embeddings[last], logits[last], **held_extra)).double()
        targets.append(within_class_targets(probabilities, classes[last]))
    first, second = targets
    half = len(first) // 2
    return r2_ridge(second[:half], first[:half], second[half:], first[half:])


def _shuffle_within_class(classes: Tensor, generator: torch.Generator) -> Tensor:
    """Return for each example the row of another of its class."""
    order = torch.arange(len(classes))
    for number in classes.unique().tolist():
        rows = (classes == number).nonzero().flatten()
        order[rows] = rows[torch.randperm(len(rows), generator=generator)]
    return order


def _check_matrix(values: Any, name: str) -> Tensor:
    """Return an array (N, any) as a float64 tensor on the CPU.

    Raises:
        SubclassError: Another shape, or a row that is not finite.
    """
    matrix = torch.as_tensor(values).detach().cpu().double()
    if matrix.ndim != 2:
        raise SubclassError(f"{name} must have one row an example; found a tensor of shape {tuple(matrix.shape)}.")
    wrong = non_finite_rows(matrix)
    if len(wrong):
        raise SubclassError(f"{name} of example {int(wrong[0])} are not finite.")
    return matrix
