"""Measure before training whether pseudo-subclasses will help: small students by LELP against KD, for 900 steps.

Does: train pairs of students on the same batches from the same weights, compare them on held-out examples, and decide; with
fine labels, measure the headroom, what a student gains over KD that is given these.
Does not: run the teacher or choose the student; `probe_subclasses` does.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from hf_guide.errors import SubclassError

STEPS, BATCH_SIZE, NUM_SEEDS = 900, 64, 3
"""With fewer steps the student of more outputs is behind KD's where it ends above it: after 300 steps on characters in 8
classes by 2.4 points, and after 900 it was 4.5 above."""

FINE_LABEL_STEPS = 3
"""How many times the steps a student is trained that is given the fine labels: at as few as KD needs it is behind."""

MIN_GAIN, MIN_STANDARD_ERRORS = 1.0, 2.0
MIN_TRAIN, MIN_HELD_OUT = 32, 20


@dataclass(frozen=True)
class ProbeData:
    """What the teacher makes of N examples, and which of these students learn from.

    Attributes:
        logits: (N, C), the teacher's.
        targets: (N, C * S), probabilities of subclasses.
        labels: (N,), the classes.
        fine_labels: (N,), if there are any.
        splits: For each seed the numbers of the examples to learn from and to measure on.
        inputs: Returns what students are fed, for the numbers of some examples.

    Raises:
        SubclassError: Too few examples to learn from or to measure on, or of one class only.
    """

    logits: Tensor
    targets: Tensor
    labels: Tensor
    fine_labels: Tensor | None
    splits: Sequence[tuple[Tensor, Tensor]]
    inputs: Callable[[Tensor], Any]

    def __post_init__(self) -> None:
        for train, held_out in self.splits:
            for name, rows, least in (("training", train, MIN_TRAIN), ("held-out", held_out, MIN_HELD_OUT)):
                if len(rows) < least:
                    raise SubclassError(
                        f"A probe needs at least {least} {name} examples; found {len(rows)}. Pass more, or do without a probe."
                    )
                if len(self.labels[rows].unique()) < 2:
                    raise SubclassError(
                        f"All {len(rows)} {name} examples are of class {int(self.labels[rows][0])}; a probe compares students "
                        "on examples of two classes or more."
                    )


@dataclass(frozen=True)
class ProbeStudents:
    """How students are made and run.

    Attributes:
        build: Returns a new student with an output for each class; called after seeding torch.
        forward: Returns features, (batch, width), and logits, (batch, C), of a student for what `ProbeData.inputs` returns.
        width: Of the features.
        learning_rate: Of AdamW, at its maximum.
        description: For the summary.
    """

    build: Callable[[], nn.Module]
    forward: Callable[[nn.Module, Any], tuple[Tensor, Tensor]]
    width: int
    learning_rate: float
    description: str


@dataclass(frozen=True)
class SubclassProbe:
    """Whether subclasses are likely to help. Accuracies are in points, out of 100, on held-out examples.

    Attributes:
        kd, subclasses: Of the students of each seed, by KD and by LELP.
        gain, gain_error: The mean difference, and its standard error over seeds and held-out examples.
        headroom, headroom_error: What a student gains over KD that is given the fine labels, both trained three times as long;
            None without fine labels.
        teacher: The accuracy of the teacher.
        steps, num_train, num_held_out: Of each student.
        num_subclasses: S.
        student: What was trained.
    """

    kd: tuple[float, ...]
    subclasses: tuple[float, ...]
    gain: float
    gain_error: float
    headroom: float | None
    headroom_error: float | None
    teacher: float
    steps: int
    num_train: int
    num_held_out: int
    num_subclasses: int
    student: str

    @property
    def verdict(self) -> str:
        """The answer in a few words, as of `decide`."""
        return decide(self.gain, self.gain_error)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, and the verdict, as a dict for JSON."""
        return asdict(self) | {"verdict": self.verdict}

    def summary(self) -> str:
        """Return the verdict with its reason, in a few lines."""
        undecided, seeds = self.verdict == "undecided", f"{len(self.kd)} seed{'s' if len(self.kd) > 1 else ''}"
        lines = [
            f"{'Whether subclasses help is undecided' if undecided else f'Subclasses are {self.verdict}'}: LELP is "
            f"{self.gain:+.1f} ± {self.gain_error:.1f} points from KD after {self.steps} steps ({seeds}).",
            f"  KD reaches {statistics.mean(self.kd):.1f} %, {self.num_subclasses} subclasses of each class "
            f"{statistics.mean(self.subclasses):.1f} %, the teacher {self.teacher:.1f} %",
            f"  {self.student}; {self.num_train:,} examples to train on, {self.num_held_out:,} held out",
        ]
        if undecided:
            lines.append("  the gain is below two standard errors: pass more examples, or more seeds")
        if self.headroom is not None:
            lines.append(
                f"  a student that is given the fine labels is {self.headroom:+.1f} ± {self.headroom_error:.1f} points from "
                f"KD after {FINE_LABEL_STEPS * self.steps} steps: the headroom, of which subclasses take a part"
            )
        return "\n".join(lines)


def decide(gain: float, error: float) -> str:
    """Return the verdict on a gain in points and its standard error.

    "likely to help" from a gain of 1 point that is two standard errors or more, "unlikely to help" below 1 point or below one
    standard error, "undecided" in between.

    Example:
        >>> decide(3.0, 1.0), decide(0.9, 0.1), decide(1.5, 1.0)
        ('likely to help', 'unlikely to help', 'undecided')
    """
    if gain < max(MIN_GAIN, error):
        return "unlikely to help"
    return "likely to help" if gain >= MIN_STANDARD_ERRORS * error else "undecided"


def split_folds(count: int, num_seeds: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Return training and held-out examples for each seed: another third, or less where there are more seeds, is held out.

    Example:
        >>> [len(part) for part in split_folds(90, 3)[0]]
        [60, 30]
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    folds = order.tensor_split(max(3, num_seeds))
    return [(torch.cat([*folds[:number], *folds[number + 1 :]]), folds[number]) for number in range(num_seeds)]


def run_probe(
    data: ProbeData,
    students: ProbeStudents,
    *,
    steps: int = STEPS,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    show_progress: bool = True,
) -> SubclassProbe:
    """Train pairs of students and compare them; where that leaves it undecided, train as many again from other seeds.

    Args:
        data: The examples; their fine labels, if there are any, are used as well.
        students: What is trained.
        steps, batch_size: Of each student.
        seed: Of the first split; those of the others follow.
        show_progress: Whether to show a bar of all steps, with an estimate of the time left.
    """
    numbers = range(len(data.splits))
    has_fine_labels = data.fine_labels is not None
    total = 2 * steps * len(numbers) * (1 + FINE_LABEL_STEPS * has_fine_labels)
    bar = tqdm(total=total, desc="Probing subclasses", unit="step", disable=not show_progress)

    def train(arm: str, length: int, numbers: Sequence[int]) -> list[dict[str, Tensor]]:
        return [_train_arms(("kd", arm), data, students, length, batch_size, seed, each, bar) for each in numbers]

    with bar, torch.random.fork_rng(), torch.enable_grad():
        short = train("subclasses", steps, numbers)
        gain, error = difference(data, short, "subclasses")
        if decide(gain, error) == "undecided":
            bar.total += 2 * steps * len(numbers)
            short += train("subclasses", steps, range(len(numbers), 2 * len(numbers)))
            gain, error = difference(data, short, "subclasses")
        long = train("fine labels", FINE_LABEL_STEPS * steps, numbers) if has_fine_labels else []
    headroom, headroom_error = difference(data, long, "fine labels") if long else (None, None)
    return SubclassProbe(
        kd=tuple(_points(run["kd"]) for run in short),
        subclasses=tuple(_points(run["subclasses"]) for run in short),
        gain=gain,
        gain_error=error,
        headroom=headroom,
        headroom_error=headroom_error,
        teacher=_points(data.logits.argmax(1) == data.labels),
        steps=steps,
        num_train=len(data.splits[0][0]),
        num_held_out=len(data.splits[0][1]),
        num_subclasses=data.targets.shape[1] // data.logits.shape[1],
        student=students.description,
    )


def difference(data: ProbeData, right: Sequence[Mapping[str, Tensor]], arm: str) -> tuple[float, float]:
    """Return how far an arm is above KD in points, and the standard error of that over seeds and held-out examples.

    Args:
        right: For each seed and arm which of the seed's held-out examples are right, bool. Seeds beyond the splits have
            these in the same order again.
    """
    points = [100 * (run[arm].double() - run["kd"].double()) for run in right]
    seeds = torch.stack([each.mean() for each in points])
    total, seen = torch.zeros(len(data.labels), dtype=torch.float64), torch.zeros(len(data.labels))
    for (_, held_out), each in zip(cycle(data.splits), points, strict=False):
        total[held_out] += each
        seen[held_out] += 1
    by_example = total[seen > 0] / seen[seen > 0]
    variance = by_example.var().item() / len(by_example)
    if len(seeds) > 1:
        variance += seeds.var().item() / len(seeds)
    return seeds.mean().item(), math.sqrt(variance)


def _points(right: Tensor) -> float:
    return 100 * right.double().mean().item()


class _Learner:
    """A student, what it learns, and its optimizer.

    The arm "kd" learns the teacher's class probabilities; the others have a linear layer of their own on the student's
    features, for outputs of which several belong to each class.
    """

    def __init__(self, arm: str, data: ProbeData, students: ProbeStudents, steps: int):
        self.arm, self.forward = arm, students.forward
        self.model = students.build().train()
        device = next(self.model.parameters()).device
        self.targets, self.class_of = _targets(arm, data, device)
        self.head = nn.Linear(students.width, len(self.class_of), device=device)
        parameters = [*self.model.parameters(), *(self.head.parameters() if arm != "kd" else ())]
        self.parameters = [each for each in parameters if each.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, students.learning_rate)
        rise = max(1, steps // 20)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min((step + 1) / rise, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        )

    def outputs(self, inputs: Any) -> Tensor:
        features, logits = self.forward(self.model, inputs)
        return (logits if self.arm == "kd" else self.head(features.to(self.head.weight))).float()

    def step(self, rows: Tensor, inputs: Any) -> None:
        loss = cross_entropy(self.outputs(inputs), self.targets[rows])
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()

    def predict(self, inputs: Any) -> Tensor:
        probabilities = self.outputs(inputs).softmax(-1)
        classes = torch.zeros(len(probabilities), int(self.class_of.max()) + 1, device=probabilities.device)
        return classes.index_add_(1, self.class_of, probabilities).argmax(-1).cpu()


def _targets(arm: str, data: ProbeData, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the probabilities that an arm learns, or the numbers of the outputs that are right, and each output's class."""
    num_classes = data.logits.shape[1]
    if arm == "kd":
        targets, class_of = data.logits.float().softmax(-1), torch.arange(num_classes)
    elif arm == "subclasses":
        targets = data.targets.float()
        class_of = torch.arange(num_classes).repeat_interleave(targets.shape[1] // num_classes)
    else:
        assert data.fine_labels is not None
        # A fine label that is in two classes is two outputs.
        pairs, targets = torch.stack([data.labels, data.fine_labels], 1).unique(dim=0, return_inverse=True)
        class_of = pairs[:, 0]
    return targets.to(device), class_of.to(device)


def _train_arms(
    arms: Sequence[str],
    data: ProbeData,
    students: ProbeStudents,
    steps: int,
    batch_size: int,
    seed: int,
    number: int,
    bar: Any,
) -> dict[str, Tensor]:
    """Train a student for each arm, on the same batches from the same weights; return which held-out examples are right."""
    train, held_out = data.splits[number % len(data.splits)]
    learners = []
    for arm in arms:
        torch.manual_seed(seed + number)
        learners.append(_Learner(arm, data, students, steps))
    for rows in islice(draw_batches(train, min(batch_size, len(train)), seed + number), steps):
        inputs = data.inputs(rows)
        for learner in learners:
            learner.step(rows, inputs)
            bar.update()
    for learner in learners:
        learner.model.eval()
    right: dict[str, list[Tensor]] = {arm: [] for arm in arms}
    with torch.no_grad():
        for rows in held_out.split(4 * batch_size):
            inputs = data.inputs(rows)
            for learner in learners:
                right[learner.arm].append(learner.predict(inputs) == data.labels[rows])
    return {arm: torch.cat(parts) for arm, parts in right.items()}


def draw_batches(rows: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Yield batches without end: all rows in a random order, then in another."""
    generator = torch.Generator().manual_seed(seed)
    rest = rows[:0]
    while True:
        while len(rest) < size:
            rest = torch.cat([rest, rows[torch.randperm(len(rows), generator=generator)]])
        batch, rest = rest[:size], rest[size:]
        yield batch
