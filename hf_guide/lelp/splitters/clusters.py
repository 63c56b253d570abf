"""Splitters that are not along principal directions: clusters, a kernel's components, and nothing at all."""

import torch
from torch import Tensor

from hf_guide.errors import SubclassError
from hf_guide.lelp.moments import ClassSample
from hf_guide.lelp.splitters.base import (
    SplitterInputs,
    check_variance,
    fix_signs,
    random_rotation,
    too_few_directions_message,
)
from hf_guide.lelp.splitters.scorers import KernelScorer, LinearScorer, RandomPartitionScorer, rbf_kernel

WAVE_LENGTH = 30.0  # radians between typical examples: near ones fall apart, rounding does not
NUM_LANDMARKS = 256
KMEANS_RESTARTS, KMEANS_MAX_ITER = 4, 50


def split_by_kmeans(evidence: SplitterInputs) -> LinearScorer:
    """Split by k-means of P h within each class; nearness to a centre is linear up to what is common to all centres.

    Of a class of more than 2,048 examples it looks at a sample, `ClassSample`: then turning the embedding space changes which
    they are, and so the clusters.
    """
    directions, offsets = [], []
    for number, mean in enumerate(evidence.moments.means):
        rows = _residuals_by_norm(evidence, number)
        generator = torch.Generator().manual_seed(evidence.seed * 1000003 + number)
        centres = _k_means(rows, evidence.num_subclasses, generator)
        heights = -centres.square().sum(1) / 2
        scores = rows @ centres.T + heights
        scale = _score_rms(scores, evidence, number)
        basis = centres.T / scale
        directions.append(basis)
        offsets.append((heights / scale) - mean @ basis)
    return LinearScorer(torch.stack(directions), torch.stack(offsets))


def split_by_random_partition(evidence: SplitterInputs) -> RandomPartitionScorer:
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
    return RandomPartitionScorer(
        torch.einsum("de,ces->cds", axes, draw) * (WAVE_LENGTH / spread), phases.to(axes.device)
    )


def split_by_kernel_pca(evidence: SplitterInputs) -> KernelScorer:
    """Split along the principal components of a Gaussian kernel within each class: the paper's steps, not linear.

    Kernel principal components over landmarks (Nystroem); the bandwidth is twice the median squared distance between
    landmarks, over the number of subclasses, so that more subclasses are finer ones. Of a class of more than 2,048 examples
    it looks at a sample, `ClassSample`: then turning the embedding space changes which they are, and so the landmarks.
    """
    generator = torch.Generator().manual_seed(evidence.seed)
    size = evidence.num_subclasses
    count = min(NUM_LANDMARKS, *(len(rows) for rows in _require_sample(evidence).rows))
    marks, bandwidths, directions, offsets = [], [], [], []
    for number in range(evidence.moments.num_classes):
        centred = _residuals_by_norm(evidence, number)
        rows = centred + evidence.unseen(evidence.moments.means[number][None]).to(centred.device)
        # Evenly over their distance from the mean, which is the order they are in.
        landmarks = rows[torch.linspace(0, len(rows) - 1, count).round().long()]
        squares = torch.pdist(landmarks).square()
        squares = squares[squares > 0]
        if not len(squares):
            raise SubclassError(too_few_directions_message(evidence, number, 0))
        bandwidth = 2 * squares.median().item() / max(1, size / 2)
        values, vectors = torch.linalg.eigh(rbf_kernel(landmarks, landmarks, bandwidth))
        kept = values > values.max() * 1e-8
        whiten = vectors[:, kept] / values[kept].sqrt()
        features = rbf_kernel(rows, landmarks, bandwidth) @ whiten
        mean = features.mean(0)
        centred = features - mean
        variances, axes = torch.linalg.eigh(centred.T @ centred / len(centred))
        if axes.shape[1] < size:
            raise SubclassError(too_few_directions_message(evidence, number, axes.shape[1]))
        axes = axes.flip(1)[:, :size]
        leaning = (centred @ axes).pow(3).sum(0)
        axes = torch.where(leaning < 0, -axes, axes) @ random_rotation(size, generator)
        variance = check_variance(evidence, number, variances.flip(0)[:size])
        axes = axes / (variance.sqrt() if size > 1 else 1.0)
        marks.append(landmarks)
        bandwidths.append(bandwidth)
        directions.append(whiten @ axes)
        offsets.append(-mean @ axes)
    return KernelScorer(
        evidence.seen,
        torch.stack(marks),
        torch.tensor(bandwidths, dtype=torch.float64),
        torch.stack(directions),
        torch.stack(offsets),
    )


def _require_sample(evidence: SplitterInputs) -> ClassSample:
    if evidence.sample is None:
        raise SubclassError("This splitter looks at examples; moments alone are not enough for it.")
    return evidence.sample


def _residuals_by_norm(evidence: SplitterInputs, number: int) -> Tensor:
    """Return P h - mean of a class's sample (rows, width), the nearest to the mean first, which no rotation changes."""
    mean = evidence.moments.means[number].cpu()
    rows = _require_sample(evidence).rows[number] - mean
    seen = evidence.seen.cpu()
    rows = rows - rows @ seen.T @ seen
    return rows[rows.square().sum(1).argsort(stable=True)]


def _score_rms(scores: Tensor, evidence: SplitterInputs, number: int) -> Tensor:
    """Return the root mean square of a class's scores, less what is common to an example's."""
    if evidence.num_subclasses == 1:
        return torch.ones((), dtype=torch.float64)
    variance = (scores - scores.mean(1, keepdim=True)).square().mean()
    if not variance > 0:
        raise SubclassError(too_few_directions_message(evidence, number, 0))
    return variance.sqrt()


def _k_means(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` centres (count, width) of rows: the best of several starts (k-means++, Lloyd's iterations)."""
    best, least = rows[:count], torch.inf
    for _ in range(KMEANS_RESTARTS):
        centres = _kmeans_plus_plus(rows, count, generator)
        owner = torch.full((len(rows),), -1)
        for _ in range(KMEANS_MAX_ITER):
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


def _kmeans_plus_plus(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
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
