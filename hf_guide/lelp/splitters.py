"""How a class is split into subclasses: one protocol, the paper's way, its ablations and the controls it is shown with.

A splitter is a function of `Evidence` that returns `Scores`. `register_splitter` takes more.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from hf_guide.errors import OptionError, SubclassError, did_you_mean
from hf_guide.lelp.moments import ClassMoments
from hf_guide.lelp.sampling import ClassSample
from hf_guide.lelp.scores import Affine, Kernel, Scores, Table, Waves, nearness

NEGLIGIBLE = 1e-12  # of all variance: what rounding leaves of none
WAVE_LENGTH = 30.0  # radians between typical examples: near ones fall apart, rounding does not
LANDMARKS = 256
KMEANS_STARTS, KMEANS_ROUNDS = 4, 50


@dataclass(frozen=True)
class Evidence:
    """What a splitter may look at.

    Attributes:
        moments: of all embeddings, by class.
        classifier_weight: W, (classes, width), float64.
        num_subclasses: how many subclasses each class is to have.
        seed: of whatever is drawn.
        sample: some embeddings of each class, where the splitter was registered with `needs_sample`.
        finer: by class and finer label how many examples there are, (classes, finer labels), where labels were given.
        class_names: for errors.
    """

    moments: ClassMoments
    classifier_weight: Tensor
    num_subclasses: int
    seed: int = 0
    sample: ClassSample | None = None
    finer: Tensor | None = None
    class_names: tuple[str, ...] = ()

    @cached_property
    def seen(self) -> Tensor:
        """Orthonormal rows (rank, width) spanning what the classifier sees: W's, less their mean, which says nothing."""
        return row_space(self.classifier_weight)

    def unseen(self, rows: Tensor) -> Tensor:
        """Return rows (any, width) without what the classifier sees: P h, P = I - W^+ W."""
        return rows - rows @ self.seen.T @ self.seen

    def covariance(self, number: int, *, null_space: bool = True) -> Tensor:
        """Return the covariance (width, width) of a class, of P h where `null_space`."""
        found = self.moments.scatters[number] / self.moments.counts[number]
        return self.unseen(self.unseen(found).T) if null_space else found

    def name(self, number: int) -> str:
        """Return what to call a class in an error."""
        return f"{number} ({self.class_names[number]})" if self.class_names else str(number)


Splitter = Callable[[Evidence], Scores]


@dataclass(frozen=True)
class _Entry:
    split: Splitter
    needs_sample: bool = False
    needs_labels: bool = False
    finds_directions: bool = True


_SPLITTERS: dict[str, _Entry] = {}


def register_splitter(name: str, split: Splitter, *, needs_sample: bool = False) -> None:
    """Make a splitter known by a name, for `SubclassProjector.fit(splitter=name)`.

    Args:
        name: how it is asked for.
        split: gives one of the forms of `lelp.scores`, mostly `Affine`.
        needs_sample: whether moments are not enough for it; then `Evidence.sample` is there.

    Raises:
        OptionError: the name is taken.
    """
    if name in _SPLITTERS:
        raise OptionError(f"There is a splitter {name!r} already; choose another name.")
    _SPLITTERS[name] = _Entry(split, needs_sample)


def splitter_named(name: str) -> _Entry:
    """Return a splitter and what it needs.

    Raises:
        OptionError: there is none of that name; it names the nearest.
    """
    if name not in _SPLITTERS:
        raise OptionError(
            f"splitter={name!r} is not known; expected one of {known_splitters()}.{did_you_mean(name, _SPLITTERS)}"
        )
    return _SPLITTERS[name]


def known_splitters() -> list[str]:
    """Return the names of all splitters."""
    return list(_SPLITTERS)


def row_space(weight: Tensor) -> Tensor:
    """Return orthonormal rows (rank, width) that span the rows of W (classes, width), less their mean."""
    centred = weight - weight.mean(0)
    _, sizes, rows = torch.linalg.svd(centred, full_matrices=False)
    # Less one for the mean: it leaves a last singular value that is mere rounding.
    return rows[: len(weight) - 1][sizes[: len(weight) - 1] > sizes.max() * 1e-10]


def random_rotation(size: int, generator: torch.Generator) -> Tensor:
    """Return a random orthonormal matrix (size, size), float64, uniform among all (Haar)."""
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    return q * r.diagonal().sign()


def fix_signs(directions: Tensor, skew: Tensor, others: Tensor) -> Tensor:
    """Turn each column of (width, any) to the side that the data lean to, whatever the coordinates are.

    That is where `skew` (width,) points; where it does not tell, where `others` points; then the largest entry decides.
    """
    leaning = directions.T @ skew / skew.norm().clamp(min=1e-300)
    second = directions.T @ others / others.norm().clamp(min=1e-300)
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))[0]
    sign = torch.where(second.abs() > 1e-9, second, largest)
    sign = torch.where(leaning.abs() > 1e-9, leaning, sign)
    return torch.where(sign < 0, -directions, directions)


def split_linearly(
    evidence: Evidence, *, null_space: bool = True, rotation: bool = True, scaling: bool = True
) -> Affine:
    """Split along each class's own directions of largest variance (LELP, arXiv 2409.20449).

    U_c = V_c Q with V_c the top eigenvectors of the covariance of P h in the class and Q a seeded rotation;
    scores U_c^T (P h - mean_c) / rms_c, with rms_c the class's root mean square coordinate.

    Raises:
        SubclassError: a class has variance in fewer directions than it is to have subclasses.
    """
    generator = torch.Generator().manual_seed(evidence.seed)
    centre = evidence.moments.counts @ evidence.moments.means / evidence.moments.counts.sum()
    size = evidence.num_subclasses
    directions, offsets = [], []
    for number, mean in enumerate(evidence.moments.means):
        covariance = evidence.covariance(number, null_space=null_space)
        values, vectors = torch.linalg.eigh(covariance)
        values, vectors = values.flip(0)[:size], vectors.flip(1)[:, :size]
        if null_space:
            vectors = evidence.unseen(vectors.T).T
        variance = _check_variance(evidence, number, values)
        basis = fix_signs(vectors, evidence.moments.skews[number], centre - mean)
        if rotation:
            basis = basis @ random_rotation(size, generator).to(basis.device)
        if scaling and size > 1:
            basis = basis / variance.sqrt()
        directions.append(basis)
        offsets.append(-mean @ basis)
    return Affine(torch.stack(directions), torch.stack(offsets))


def split_at_random(evidence: Evidence) -> Affine:
    """Split along random directions of what the classifier does not see: a control for directions of large variance."""
    generator = torch.Generator().manual_seed(evidence.seed)
    covariance, skew = evidence.moments.pooled()
    covariance = evidence.unseen(evidence.unseen(covariance).T)
    values, axes = torch.linalg.eigh(covariance)
    # Drawn in the data's own axes, so that they turn as the data turn; and only where there are data.
    axes = axes.flip(1)[:, values.flip(0) > values.max() * 1e-10]
    axes = fix_signs(axes, skew, torch.zeros_like(skew))
    directions, offsets = [], []
    for number, mean in enumerate(evidence.moments.means):
        draw = torch.randn(axes.shape[1], evidence.num_subclasses, dtype=torch.float64, generator=generator)
        basis = axes @ draw.to(axes.device)
        variances = (basis * (evidence.covariance(number) @ basis)).sum(0)
        variance = _check_variance(evidence, number, variances)
        basis = basis / (variance.sqrt() if evidence.num_subclasses > 1 else 1.0)
        directions.append(basis)
        offsets.append(-mean @ basis)
    return Affine(torch.stack(directions), torch.stack(offsets))


def split_by_clusters(evidence: Evidence) -> Affine:
    """Split by k-means of P h within each class; nearness to a centre is linear up to what is common to all centres."""
    directions, offsets = [], []
    for number, mean in enumerate(evidence.moments.means):
        rows = _ordered(evidence, number)
        generator = torch.Generator().manual_seed(evidence.seed * 1000003 + number)
        centres = _k_means(rows, evidence.num_subclasses, generator)
        heights = -centres.square().sum(1) / 2
        scores = rows @ centres.T + heights
        scale = _rms(scores, evidence, number)
        basis = centres.T / scale
        directions.append(basis)
        offsets.append((heights / scale) - mean @ basis)
    return Affine(torch.stack(directions), torch.stack(offsets))


def split_by_nothing(evidence: Evidence) -> Waves:
    """Split so that nothing can be learned from it: a control at an equal number of outputs."""
    generator = torch.Generator().manual_seed(evidence.seed)
    covariance, skew = evidence.moments.pooled()
    values, axes = torch.linalg.eigh(covariance)
    axes = fix_signs(axes, skew, torch.zeros_like(skew))
    shape = (evidence.moments.num_classes, evidence.moments.width, evidence.num_subclasses)
    draw = torch.randn(shape, dtype=torch.float64, generator=generator).to(axes.device)
    spread = values.clamp(min=0).sum().sqrt()
    if not spread > 0:
        raise SubclassError("The embeddings of each class are all the same; there is nothing to split.")
    phases = torch.rand(shape[0], shape[2], dtype=torch.float64, generator=generator) * (2 * torch.pi)
    return Waves(torch.einsum("de,ces->cds", axes, draw) * (WAVE_LENGTH / spread), phases.to(axes.device))


def split_by_kernel(evidence: Evidence) -> Kernel:
    """Split along the principal components of a Gaussian kernel within each class: the paper's steps, not linear.

    Kernel principal components over landmarks (Nystroem); the bandwidth is twice the median squared distance between
    landmarks, over the number of subclasses, so that more subclasses are finer ones.
    """
    generator = torch.Generator().manual_seed(evidence.seed)
    size = evidence.num_subclasses
    count = min(LANDMARKS, *(len(rows) for rows in _sample(evidence).rows))
    marks, bandwidths, directions, offsets = [], [], [], []
    for number in range(evidence.moments.num_classes):
        centred = _ordered(evidence, number)
        rows = centred + evidence.unseen(evidence.moments.means[number][None]).to(centred.device)
        # Evenly over their distance from the mean, which is the order they are in.
        landmarks = rows[torch.linspace(0, len(rows) - 1, count).round().long()]
        squares = torch.pdist(landmarks).square()
        squares = squares[squares > 0]
        if not len(squares):
            raise SubclassError(_no_variance(evidence, number, 0))
        bandwidth = 2 * squares.median().item() / max(1, size / 2)
        values, vectors = torch.linalg.eigh(nearness(landmarks, landmarks, bandwidth))
        kept = values > values.max() * 1e-8
        whiten = vectors[:, kept] / values[kept].sqrt()
        features = nearness(rows, landmarks, bandwidth) @ whiten
        mean = features.mean(0)
        centred = features - mean
        variances, axes = torch.linalg.eigh(centred.T @ centred / len(centred))
        if axes.shape[1] < size:
            raise SubclassError(_no_variance(evidence, number, axes.shape[1]))
        axes = axes.flip(1)[:, :size]
        leaning = (centred @ axes).pow(3).sum(0)
        axes = torch.where(leaning < 0, -axes, axes) @ random_rotation(size, generator)
        variance = _check_variance(evidence, number, variances.flip(0)[:size])
        axes = axes / (variance.sqrt() if size > 1 else 1.0)
        marks.append(landmarks)
        bandwidths.append(bandwidth)
        directions.append(whiten @ axes)
        offsets.append(-mean @ axes)
    return Kernel(
        evidence.seen,
        torch.stack(marks),
        torch.tensor(bandwidths, dtype=torch.float64),
        torch.stack(directions),
        torch.stack(offsets),
    )


def split_by_labels(evidence: Evidence) -> Table:
    """Split by finer labels that are known: an oracle, or knowledge of one's own.

    Raises:
        SubclassError: no finer labels, or more in a class than it is to have subclasses.
    """
    if evidence.finer is None:
        raise SubclassError("The splitter 'labels' needs finer labels: give subclass_labels.")
    table = torch.full(evidence.finer.shape, -1, dtype=torch.int64)
    for number, row in enumerate(evidence.finer):
        found = row.nonzero().flatten()
        if len(found) > evidence.num_subclasses:
            raise SubclassError(
                f"Class {evidence.name(number)} has {len(found)} finer labels and is to have {evidence.num_subclasses} "
                f"subclasses. Pass num_subclasses={len(found)} or more."
            )
        table[number, found] = torch.arange(len(found))
    sizes = (table >= 0).sum(1)
    return Table(table, sizes, torch.tensor([evidence.moments.width, evidence.num_subclasses]))


def _check_variance(evidence: Evidence, number: int, variances: Tensor) -> Tensor:
    """Return the mean of the variances along a class's directions, none of which is zero unless there is but one.

    Raises:
        SubclassError: there are fewer directions with variance than subclasses.
    """
    trace = evidence.covariance(number, null_space=False).trace()
    there = int((variances > max(NEGLIGIBLE * trace.item(), 0.0)).sum())
    if there < len(variances) and evidence.num_subclasses > 1:
        raise SubclassError(_no_variance(evidence, number, there))
    return variances.mean()


def _no_variance(evidence: Evidence, number: int, there: int) -> str:
    count = int(evidence.moments.counts[number])
    rest = f"Choose num_subclasses up to {there}" if there > 1 else "Take another layer's embeddings"
    return (
        f"The {count} examples of class {evidence.name(number)} differ in {there} directions that the classifier does not "
        f"see; {evidence.num_subclasses} subclasses need as many. {rest}, or give more examples."
    )


def _sample(evidence: Evidence) -> ClassSample:
    if evidence.sample is None:
        raise SubclassError("This splitter looks at examples; moments alone are not enough for it.")
    return evidence.sample


def _ordered(evidence: Evidence, number: int) -> Tensor:
    """Return P h - mean of a class's sample (rows, width), the nearest to the mean first, which no rotation changes."""
    mean = evidence.moments.means[number].cpu()
    rows = _sample(evidence).rows[number] - mean
    seen = evidence.seen.cpu()
    rows = rows - rows @ seen.T @ seen
    return rows[rows.square().sum(1).argsort(stable=True)]


def _rms(scores: Tensor, evidence: Evidence, number: int) -> Tensor:
    """Return the root mean square of a class's scores, less what is common to an example's."""
    if evidence.num_subclasses == 1:
        return torch.ones((), dtype=torch.float64)
    variance = (scores - scores.mean(1, keepdim=True)).square().mean()
    if not variance > 0:
        raise SubclassError(_no_variance(evidence, number, 0))
    return variance.sqrt()


def _k_means(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` centres (count, width) of rows: the best of several starts (k-means++, Lloyd's iterations)."""
    best, least = rows[:count], torch.inf
    for _ in range(KMEANS_STARTS):
        centres = _first_centres(rows, count, generator)
        owner = torch.full((len(rows),), -1)
        for _ in range(KMEANS_ROUNDS):
            distances = torch.cdist(rows, centres, compute_mode="donot_use_mm_for_euclid_dist")
            nearest, now = distances.min(1)
            if torch.equal(now, owner):
                break
            owner = now
            for each in range(count):
                mine = owner == each
                # A centre that nobody is near to goes to who is farthest from all.
                centres[each] = rows[mine].mean(0) if bool(mine.any()) else rows[nearest.argmax()]
        loss = nearest.square().sum().item()
        if loss < least:
            best, least = centres.clone(), loss
    return best


def _first_centres(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    chosen = [int(torch.randint(len(rows), (1,), generator=generator))]
    squares = (rows - rows[chosen[0]]).square().sum(1)
    while len(chosen) < count:
        if not bool(squares.sum() > 0):
            raise SubclassError(
                f"A class has only {len(chosen)} different embeddings and is to have {count} subclasses. Choose fewer."
            )
        chosen.append(int(torch.multinomial(squares, 1, generator=generator)))
        squares = torch.minimum(squares, (rows - rows[chosen[-1]]).square().sum(1))
    return rows[chosen].clone()


_SPLITTERS |= {
    "lelp": _Entry(split_linearly),
    "no-null-space": _Entry(partial(split_linearly, null_space=False)),
    "no-rotation": _Entry(partial(split_linearly, rotation=False)),
    "no-scaling": _Entry(partial(split_linearly, scaling=False)),
    "random-projection": _Entry(split_at_random),
    "kmeans": _Entry(split_by_clusters, needs_sample=True),
    "random-partition": _Entry(split_by_nothing, finds_directions=False),
    "spectral": _Entry(split_by_kernel, needs_sample=True),
    "labels": _Entry(split_by_labels, needs_labels=True, finds_directions=False),
}
