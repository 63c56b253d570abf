"""Scorers: what a splitter returns and a projector saves. A scorer gives an embedding's score for each subclass of each class.

A softmax of the scores over a class's subclasses is the share of each. Over a class's own examples scores have a root mean
square of 1, so that one temperature serves all splitters. `SCORER_TYPES` are the forms that files may hold.
"""

from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from hf_guide.errors import SubclassError


@dataclass(frozen=True)
class SubclassScorer:
    """The base of all forms: a dataclass of tensors, saved by their names.

    Attributes:
        form: Its name in files.
        needs_fine_labels: Scores depend on the fine labels of the examples.
    """

    form: ClassVar[str]
    needs_fine_labels: ClassVar[bool] = False

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to save."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def shape(self) -> tuple[int, int, int]:
        """Classes, embedding width, and subclasses of each class."""
        raise NotImplementedError

    def score(self, embeddings: Tensor, fine_labels: Tensor | None) -> Tensor:
        """Return scores (items, classes, subclasses) of embeddings (items, width)."""
        raise NotImplementedError


@dataclass(frozen=True)
class LinearScorer(SubclassScorer):
    """One direction and offset a subclass: h . direction + offset.

    Attributes:
        directions: (classes, width, subclasses).
        offsets: (classes, subclasses).
    """

    directions: Tensor
    offsets: Tensor
    form = "affine"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Classes, embedding width, and subclasses of each class."""
        classes, width, subclasses = self.directions.shape
        return classes, width, subclasses

    def score(self, embeddings: Tensor, fine_labels: Tensor | None) -> Tensor:
        """Return scores (items, classes, subclasses)."""
        classes, width, subclasses = self.directions.shape
        flat = self.directions.to(embeddings).transpose(0, 1).reshape(width, classes * subclasses)
        return (embeddings @ flat).view(-1, classes, subclasses) + self.offsets.to(embeddings)


@dataclass(frozen=True)
class RandomPartitionScorer(SubclassScorer):
    """A partition that the embedding determines and that has nothing to do with it: the highest of fast waves wins.

    Unlike a hash it gives the same subclass to embeddings that differ in their last digits, as from batch to batch.

    Attributes:
        frequencies: (classes, width, subclasses).
        phases: (classes, subclasses).
    """

    frequencies: Tensor
    phases: Tensor
    form = "waves"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Classes, embedding width, and subclasses of each class."""
        classes, width, subclasses = self.frequencies.shape
        return classes, width, subclasses

    def score(self, embeddings: Tensor, fine_labels: Tensor | None) -> Tensor:
        """Return scores (items, classes, subclasses)."""
        heights = LinearScorer(self.frequencies, self.phases).score(embeddings, None).cos()
        return _one_hot_scores(heights.argmax(-1), torch.ones_like(heights, dtype=torch.bool))


@dataclass(frozen=True)
class KernelScorer(SubclassScorer):
    """Linear in a Gaussian kernel at landmarks, exp(-|P h - landmark|^2 / bandwidth).

    Attributes:
        seen: (rank, width), orthonormal rows that span the row space of the classifier, which P removes.
        landmarks: (classes, landmarks, width).
        bandwidths: (classes,).
        directions, offsets: As of `LinearScorer`, over landmarks instead of coordinates.
    """

    seen: Tensor
    landmarks: Tensor
    bandwidths: Tensor
    directions: Tensor
    offsets: Tensor
    form = "kernel"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Classes, embedding width, and subclasses of each class."""
        return len(self.directions), self.landmarks.shape[2], self.directions.shape[2]

    def score(self, embeddings: Tensor, fine_labels: Tensor | None) -> Tensor:
        """Return scores (items, classes, subclasses)."""
        seen = self.seen.to(embeddings)
        residual = embeddings - embeddings @ seen.T @ seen
        scores = []
        for number, landmarks in enumerate(self.landmarks.to(embeddings)):
            kernel = rbf_kernel(residual, landmarks, self.bandwidths[number].item())
            scores.append(kernel @ self.directions[number].to(kernel) + self.offsets[number].to(kernel))
        return torch.stack(scores, 1)


@dataclass(frozen=True)
class LookupScorer(SubclassScorer):
    """Subclasses that are known: an example's fine label determines them.

    Attributes:
        subclass_of: (classes, fine labels), int64: the subclass within a class of each fine label; -1 where it has none.
        sizes: (classes,), int64: how many subclasses a class has; those beyond have no share.
        width_and_subclasses: (2,), int64.
    """

    subclass_of: Tensor
    sizes: Tensor
    width_and_subclasses: Tensor
    form = "table"
    needs_fine_labels = True

    @property
    def shape(self) -> tuple[int, int, int]:
        """Classes, embedding width, and subclasses of each class."""
        width, subclasses = self.width_and_subclasses.tolist()
        return len(self.subclass_of), width, subclasses

    def score(self, embeddings: Tensor, fine_labels: Tensor | None) -> Tensor:
        """Return scores (items, classes, subclasses).

        Raises:
            SubclassError: No fine labels, or one that was absent when the projector was fitted.
        """
        if fine_labels is None:
            raise SubclassError(
                "This projector splits by fine labels: give those of the examples as fine_labels, or fit one with "
                "another splitter."
            )
        known = self.subclass_of.to(fine_labels.device)
        wrong = (fine_labels < 0) | (fine_labels >= known.shape[1])
        if bool(wrong.any()):
            raise SubclassError(
                f"The fine label {int(fine_labels[wrong][0])} was absent when the projector was fitted; it must be "
                f"from 0 to {known.shape[1] - 1}."
            )
        subclasses = known[:, fine_labels].T  # (items, classes)
        num_subclasses = int(self.width_and_subclasses[1])
        used = torch.arange(num_subclasses, device=known.device) < self.sizes.to(known.device)[:, None]
        used = used.expand(*subclasses.shape, num_subclasses)
        scores = _one_hot_scores(subclasses.clamp(min=0), used).masked_fill(subclasses[..., None] < 0, 0.0)
        return scores.masked_fill(~used, -torch.inf).to(embeddings)


SCORER_TYPES: dict[str, type[SubclassScorer]] = {
    scorer.form: scorer for scorer in (LinearScorer, RandomPartitionScorer, KernelScorer, LookupScorer)
}


def rbf_kernel(rows: Tensor, landmarks: Tensor, bandwidth: float) -> Tensor:
    """Return exp(-|row - landmark|^2 / bandwidth), (rows, landmarks)."""
    squares = rows.square().sum(1)[:, None] - 2 * rows @ landmarks.T + landmarks.square().sum(1)
    return (-squares.clamp(min=0) / bandwidth).exp()


def _one_hot_scores(subclasses: Tensor, used: Tensor) -> Tensor:
    """Return one-hot scores of subclasses, scaled to mean 0 and mean square 1 over the subclasses that are `used`."""
    count = used.sum(-1, keepdim=True).double()
    one_hot = torch.zeros_like(used, dtype=torch.float64).scatter_(-1, subclasses[..., None], 1.0)
    return torch.where(count > 1, (one_hot - 1 / count) * count / (count - 1).clamp(min=1).sqrt(), 0.0)
