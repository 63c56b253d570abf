"""The ablations and controls of LELP that the benchmark measures, registered as splitters when this module is imported.

"no-null-space", "no-rotation" and "no-scaling" leave one step of LELP out; "random-projection" and "random-partition" are
controls; "spectral" splits by kernel principal components, "independent" by independent components. None of them was better
than the package's own, so they are not part of it. Projectors that were fitted with them load without this module.
"""

from functools import partial

import torch
from sklearn.decomposition import FastICA
from torch import Tensor

from hf_guide import register_splitter
from hf_guide.errors import SubclassError
from hf_guide.lelp.splitters.base import (
    SplitterInputs,
    check_variance,
    fix_signs,
    random_rotation,
    too_few_directions_message,
)
from hf_guide.lelp.splitters.scorers import KernelScorer, LinearScorer, RandomPartitionScorer, rbf_kernel

WAVE_LENGTH = 30.0  # radians between typical examples: nearby ones are independent, rounding does not matter
NUM_LANDMARKS = 256


def split_with_step_left_out(
    inputs: SplitterInputs, *, null_space: bool = True, rotation: bool = True, scaling: bool = True
) -> LinearScorer:
    """Split as "lelp" does (`split_by_principal_components`), with one step left out.

    Args:
        null_space: Remove the row space of the classifier first.
        rotation: Rotate the directions of each class at random.
        scaling: Divide by each class's root mean square coordinate.
    """
    generator = torch.Generator().manual_seed(inputs.seed)
    centroid = inputs.moments.counts @ inputs.moments.means / inputs.moments.counts.sum()
    size = inputs.num_subclasses
    directions, offsets = [], []
    for number, mean in enumerate(inputs.moments.means):
        whole = inputs.moments.scatters[number] / inputs.moments.counts[number]
        values, vectors = torch.linalg.eigh(inputs.covariance(number) if null_space else whole)
        values, vectors = values.flip(0)[:size], vectors.flip(1)[:, :size]
        if null_space:
            vectors = inputs.project_out_classifier(vectors.T).T
        variance = check_variance(inputs, number, values)
        basis = fix_signs(vectors, inputs.moments.skews[number], centroid - mean)
        if rotation:
            basis = basis @ random_rotation(size, generator).to(basis.device)
        if scaling and size > 1:
            basis = basis / variance.sqrt()
        directions.append(basis)
        offsets.append(-mean @ basis)
    return LinearScorer(torch.stack(directions), torch.stack(offsets))


def split_by_random_projection(inputs: SplitterInputs) -> LinearScorer:
    """Split along random directions in the classifier's null space: a control for directions of large variance."""
    generator = torch.Generator().manual_seed(inputs.seed)
    covariance, skew = inputs.moments.pooled()
    covariance = inputs.project_out_classifier(inputs.project_out_classifier(covariance).T)
    values, axes = torch.linalg.eigh(covariance)
    # Drawn in the data's own axes, so that they rotate with the data; and only where there is variance.
    axes = axes.flip(1)[:, values.flip(0) > values.max() * 1e-10]
    axes = fix_signs(axes, skew, torch.zeros_like(skew))
    directions, offsets = [], []
    for number, mean in enumerate(inputs.moments.means):
        draw = torch.randn(axes.shape[1], inputs.num_subclasses, dtype=torch.float64, generator=generator)
        basis = axes @ draw.to(axes.device)
        variances = (basis * (inputs.covariance(number) @ basis)).sum(0)
        variance = check_variance(inputs, number, variances)
        basis = basis / (variance.sqrt() if inputs.num_subclasses > 1 else 1.0)
        directions.append(basis)
        offsets.append(-mean @ basis)
    return LinearScorer(torch.stack(directions), torch.stack(offsets))


def split_by_random_partition(inputs: SplitterInputs) -> RandomPartitionScorer:
    """Split so that nothing can be learned from it: a control for an equal number of outputs."""
    generator = torch.Generator().manual_seed(inputs.seed)
    covariance, skew = inputs.moments.pooled()
    values, axes = torch.linalg.eigh(covariance)
    axes = fix_signs(axes, skew, torch.zeros_like(skew))
    shape = (inputs.moments.num_classes, inputs.moments.width, inputs.num_subclasses)
    draw = torch.randn(shape, dtype=torch.float64, generator=generator).to(axes.device)
    spread = values.clamp(min=0).sum().sqrt()
    if not spread > 0:
        raise SubclassError("The embeddings of each class are all the same; there is nothing to split.")
    phases = torch.rand(shape[0], shape[2], dtype=torch.float64, generator=generator) * (2 * torch.pi)
    frequencies = torch.einsum("de,ces->cds", axes, draw) * (WAVE_LENGTH / spread)
    return RandomPartitionScorer(frequencies, phases.to(axes.device))


def split_by_kernel_components(inputs: SplitterInputs) -> KernelScorer:
    """Split along the principal components of a Gaussian kernel within each class: the steps of LELP, not linear.

    Kernel principal components over landmarks (Nystroem); the bandwidth is twice the median squared distance between
    landmarks over half the number of subclasses, so that more subclasses are fine_labels ones.
    """
    generator = torch.Generator().manual_seed(inputs.seed)
    classes = range(inputs.moments.num_classes)
    samples = [inputs.centered_sample(number) for number in classes]
    count = min(NUM_LANDMARKS, *map(len, samples))
    landmarks, bandwidths, directions, offsets = [], [], [], []
    for number, centered in zip(classes, samples, strict=True):
        mean = inputs.project_out_classifier(inputs.moments.means[number][None])
        rows = centered + mean.to(centered.device)
        # Evenly over their distance from the mean, by which they are sorted.
        marks = rows[torch.linspace(0, len(rows) - 1, count).round().long()]
        bandwidth = _bandwidth(inputs, number, marks)
        values, vectors = torch.linalg.eigh(rbf_kernel(marks, marks, bandwidth))
        large = values > values.max() * 1e-8
        whiten = vectors[:, large] / values[large].sqrt()
        features = rbf_kernel(rows, marks, bandwidth) @ whiten
        axes = _principal_axes(inputs, number, features - features.mean(0), generator)
        landmarks.append(marks)
        bandwidths.append(bandwidth)
        directions.append(whiten @ axes)
        offsets.append(-features.mean(0) @ axes)
    return KernelScorer(
        inputs.classifier_axes,
        torch.stack(landmarks),
        torch.tensor(bandwidths, dtype=torch.float64),
        torch.stack(directions),
        torch.stack(offsets),
    )


def _bandwidth(inputs: SplitterInputs, number: int, landmarks: Tensor) -> float:
    squares = torch.pdist(landmarks).square()
    squares = squares[squares > 0]
    if not len(squares):
        raise SubclassError(too_few_directions_message(inputs, number, 0))
    return 2 * squares.median().item() / max(1, inputs.num_subclasses / 2)


def _principal_axes(inputs: SplitterInputs, number: int, centered: Tensor, generator: torch.Generator) -> Tensor:
    """Return rotated and scaled principal axes of a class's kernel features, (features, subclasses)."""
    size = inputs.num_subclasses
    variances, axes = torch.linalg.eigh(centered.T @ centered / len(centered))
    if axes.shape[1] < size:
        raise SubclassError(too_few_directions_message(inputs, number, axes.shape[1]))
    axes = axes.flip(1)[:, :size]
    skews = (centered @ axes).pow(3).sum(0)
    axes = torch.where(skews < 0, -axes, axes) @ random_rotation(size, generator)
    variance = check_variance(inputs, number, variances.flip(0)[:size])
    return axes / (variance.sqrt() if size > 1 else 1.0)


def split_by_independent_components(inputs: SplitterInputs) -> LinearScorer:
    """Split along the independent components (FastICA) of each class's directions of largest variance."""
    if inputs.sample is None:
        raise SubclassError("Independent components need examples.")
    directions, offsets = [], []
    for number, mean in enumerate(inputs.moments.means):
        _, vectors = torch.linalg.eigh(inputs.covariance(number))
        basis = inputs.project_out_classifier(vectors.flip(1)[:, : inputs.num_subclasses].T).T
        scores = (inputs.sample.rows[number] - mean) @ basis
        ica = FastICA(whiten="unit-variance", random_state=inputs.seed, max_iter=500, tol=1e-3).fit(scores.numpy())
        unmixing = torch.from_numpy(ica.components_.T)
        unmixing = unmixing * (scores @ unmixing).pow(3).mean(0).sign() / (scores @ unmixing).square().mean().sqrt()
        directions.append(basis @ unmixing)
        offsets.append(-mean @ directions[-1])
    return LinearScorer(torch.stack(directions), torch.stack(offsets))


register_splitter("no-null-space", partial(split_with_step_left_out, null_space=False))
register_splitter("no-rotation", partial(split_with_step_left_out, rotation=False), takes_top_variance=True)
register_splitter("no-scaling", partial(split_with_step_left_out, scaling=False), takes_top_variance=True)
register_splitter("random-projection", split_by_random_projection)
register_splitter("random-partition", split_by_random_partition, finds_directions=False)
register_splitter("spectral", split_by_kernel_components, needs_sample=True)
register_splitter("independent", split_by_independent_components, needs_sample=True)
