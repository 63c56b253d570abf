"""The inputs of a splitter, and the linear algebra that splitters share."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hf_guide.errors import SubclassError
from hf_guide.lelp.moments import ClassMoments, ClassSample

VARIANCE_TOLERANCE = 1e-12  # of a class's whole variance; below it is rounding


@dataclass(frozen=True)
class SplitterInputs:
    """The inputs of a splitter.

    Attributes:
        moments: Count, mean, scatter and third moment of each class's embeddings.
        classifier_weight: W, (classes, width), float64.
        num_subclasses: How many subclasses each class is to have.
        seed: Of all random numbers.
        sample: Some embeddings of each class, for splitters registered with `needs_sample`.
        fine_label_counts: Examples by class and fine label, (classes, fine labels), for splitters registered with
            `needs_fine_labels`.
        class_names: For errors.
    """

    moments: ClassMoments
    classifier_weight: Tensor
    num_subclasses: int
    seed: int = 0
    sample: ClassSample | None = None
    fine_label_counts: Tensor | None = None
    class_names: tuple[str, ...] = ()

    @cached_property
    def classifier_axes(self) -> Tensor:
        """Orthonormal rows (rank, width) that span the rows of W less their mean, which no softmax depends on."""
        return row_space(self.classifier_weight)

    def project_out_classifier(self, rows: Tensor) -> Tensor:
        """Return P h of rows h (any, width): their projection onto the null space of W, P = I - W^+ W."""
        return rows - rows @ self.classifier_axes.T @ self.classifier_axes

    def covariance(self, number: int) -> Tensor:
        """Return the covariance (width, width) of P h over a class."""
        covariance = self.moments.scatters[number] / self.moments.counts[number]
        return self.project_out_classifier(self.project_out_classifier(covariance).T)

    def centered_sample(self, number: int) -> Tensor:
        """Return P (h - mean) of a class's sample, (rows, width), on the CPU, by ascending norm: an order that no rotation
        of the embedding space changes.

        Raises:
            SubclassError: There is no sample: the splitter was registered without `needs_sample`.
        """
        if self.sample is None:
            raise SubclassError("This splitter needs examples, not only moments: register it with needs_sample=True.")
        rows = self.sample.rows[number] - self.moments.means[number].cpu()
        axes = self.classifier_axes.cpu()
        rows = rows - rows @ axes.T @ axes
        return rows[rows.square().sum(1).argsort(stable=True)]

    def class_label(self, number: int) -> str:
        """Return what to call a class in an error."""
        return f"{number} ({self.class_names[number]})" if self.class_names else str(number)


def row_space(weight: Tensor) -> Tensor:
    """Return orthonormal rows (rank, width) that span the rows of W (classes, width), less their mean."""
    centered = weight - weight.mean(0)
    _, sizes, rows = torch.linalg.svd(centered, full_matrices=False)
    # Less one for the mean: it leaves a last singular value that is mere rounding.
    return rows[: len(weight) - 1][sizes[: len(weight) - 1] > sizes.max() * 1e-10]


def random_rotation(size: int, generator: torch.Generator) -> Tensor:
    """Return a random orthonormal matrix (size, size), float64, uniform among all (Haar)."""
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    return q * r.diagonal().sign()


def fix_signs(directions: Tensor, skew: Tensor, others: Tensor) -> Tensor:
    """Choose the sign of each column of (width, any) by the data, so that it does not depend on the coordinates.

    A column points along `skew` (width,); where they are orthogonal, along `others`; then its largest entry is positive.
    """
    by_skew = directions.T @ skew / skew.norm().clamp(min=1e-300)
    by_others = directions.T @ others / others.norm().clamp(min=1e-300)
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))[0]
    sign = torch.where(by_others.abs() > 1e-9, by_others, largest)
    sign = torch.where(by_skew.abs() > 1e-9, by_skew, sign)
    return torch.where(sign < 0, -directions, directions)


def check_variance(inputs: SplitterInputs, number: int, variances: Tensor) -> Tensor:
    """Return the mean of the variances along a class's directions; all must be positive where there are several.

    Raises:
        SubclassError: Fewer directions with variance than subclasses.
    """
    trace = (inputs.moments.scatters[number] / inputs.moments.counts[number]).trace()
    rank = int((variances > max(VARIANCE_TOLERANCE * trace.item(), 0.0)).sum())
    if rank < len(variances) and inputs.num_subclasses > 1:
        raise SubclassError(too_few_directions_message(inputs, number, rank))
    return variances.mean()


def too_few_directions_message(inputs: SplitterInputs, number: int, rank: int) -> str:
    """Return the message for a class that varies in `rank` directions only, fewer than it needs."""
    count = int(inputs.moments.counts[number])
    advice = f"Choose num_subclasses up to {rank}" if rank > 1 else "Take another layer's embeddings"
    return (
        f"The {count} examples of class {inputs.class_label(number)} differ in {rank} directions that the classifier does not "
        f"read; {inputs.num_subclasses} subclasses need as many. {advice}, or give more examples."
    )
