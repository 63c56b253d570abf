"""What a splitter may look at, and what splitters have in common."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hf_guide.errors import SubclassError
from hf_guide.lelp.moments import ClassMoments, ClassSample

VARIANCE_TOLERANCE = 1e-12  # of all variance: what rounding leaves of none


@dataclass(frozen=True)
class SplitterInputs:
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


def check_variance(evidence: SplitterInputs, number: int, variances: Tensor) -> Tensor:
    """Return the mean of the variances along a class's directions, none of which is zero unless there is but one.

    Raises:
        SubclassError: there are fewer directions with variance than subclasses.
    """
    trace = evidence.covariance(number, null_space=False).trace()
    there = int((variances > max(VARIANCE_TOLERANCE * trace.item(), 0.0)).sum())
    if there < len(variances) and evidence.num_subclasses > 1:
        raise SubclassError(too_few_directions_message(evidence, number, there))
    return variances.mean()


def too_few_directions_message(evidence: SplitterInputs, number: int, there: int) -> str:
    count = int(evidence.moments.counts[number])
    rest = f"Choose num_subclasses up to {there}" if there > 1 else "Take another layer's embeddings"
    return (
        f"The {count} examples of class {evidence.name(number)} differ in {there} directions that the classifier does not "
        f"see; {evidence.num_subclasses} subclasses need as many. {rest}, or give more examples."
    )
