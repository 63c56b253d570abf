"""How an embedding is scored for each subclass of each class: what a splitter finds, and a projector keeps.

Each form gives scores (items, classes, subclasses) from embeddings; a softmax of them over a class's subclasses is the
share of each. Over a class's own examples scores are of unit root mean square, so that one temperature serves all.
"""

from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from hf_guide.errors import SubclassError


@dataclass(frozen=True)
class SubclassScorer:
    """What all forms have in common: tensors, saved by their names."""

    form: ClassVar[str]
    needs_subclass_labels: ClassVar[bool] = False

    def tensors(self) -> dict[str, Tensor]:
        """Return what is saved."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @property
    def shape(self) -> tuple[int, int, int]:
        """How many classes there are, how wide embeddings are, and how many subclasses a class has."""
        raise NotImplementedError

    def of(self, embeddings: Tensor, subclass_labels: Tensor | None) -> Tensor:
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
        """As of all scores."""
        classes, width, subclasses = self.directions.shape
        return classes, width, subclasses

    def of(self, embeddings: Tensor, subclass_labels: Tensor | None) -> Tensor:
        """Return scores (items, classes, subclasses)."""
        classes, width, subclasses = self.directions.shape
        flat = self.directions.to(embeddings).transpose(0, 1).reshape(width, classes * subclasses)
        return (embeddings @ flat).view(-1, classes, subclasses) + self.offsets.to(embeddings)


@dataclass(frozen=True)
class RandomPartitionScorer(SubclassScorer):
    """A partition that is settled by the embedding and has nothing to do with it: the highest of fast waves wins.

    A hash would do the same, but for an embedding that differs in its last digits from one batch to another.

    Attributes:
        frequencies: (classes, width, subclasses).
        phases: (classes, subclasses).
    """

    frequencies: Tensor
    phases: Tensor
    form = "waves"

    @property
    def shape(self) -> tuple[int, int, int]:
        """As of all scores."""
        classes, width, subclasses = self.frequencies.shape
        return classes, width, subclasses

    def of(self, embeddings: Tensor, subclass_labels: Tensor | None) -> Tensor:
        """Return scores (items, classes, subclasses)."""
        heights = LinearScorer(self.frequencies, self.phases).of(embeddings, None).cos()
        return _one_hot_scores(heights.argmax(-1), torch.ones_like(heights, dtype=torch.bool))


@dataclass(frozen=True)
class KernelScorer(SubclassScorer):
    """Affine in the nearness to landmarks: exp(-|P h - landmark|^2 / bandwidth).

    Attributes:
        seen: (rank, width), orthonormal rows that P takes away: what the classifier sees.
        landmarks: (classes, landmarks, width).
        bandwidths: (classes,).
        directions, offsets: as of `Affine`, with landmarks for width.
    """

    seen: Tensor
    landmarks: Tensor
    bandwidths: Tensor
    directions: Tensor
    offsets: Tensor
    form = "kernel"

    @property
    def shape(self) -> tuple[int, int, int]:
        """As of all scores."""
        return len(self.directions), self.landmarks.shape[2], self.directions.shape[2]

    def of(self, embeddings: Tensor, subclass_labels: Tensor | None) -> Tensor:
        """Return scores (items, classes, subclasses)."""
        seen = self.seen.to(embeddings)
        rest = embeddings - embeddings @ seen.T @ seen
        found = []
        for number, landmarks in enumerate(self.landmarks.to(embeddings)):
            near = rbf_kernel(rest, landmarks, self.bandwidths[number].item())
            found.append(near @ self.directions[number].to(near) + self.offsets[number].to(near))
        return torch.stack(found, 1)


@dataclass(frozen=True)
class LookupScorer(SubclassScorer):
    """Subclasses that are given: an example's finer label settles them.

    Attributes:
        subclass_of: (classes, finer labels), int64: the subclass within a class of each finer label; -1 where it has none.
        sizes: (classes,), int64: how many subclasses a class has; those beyond have no share.
        width_and_subclasses: (2,), int64.
    """

    subclass_of: Tensor
    sizes: Tensor
    width_and_subclasses: Tensor
    form = "table"
    needs_subclass_labels = True

    @property
    def shape(self) -> tuple[int, int, int]:
        """As of all scores."""
        width, subclasses = self.width_and_subclasses.tolist()
        return len(self.subclass_of), width, subclasses

    def of(self, embeddings: Tensor, subclass_labels: Tensor | None) -> Tensor:
        """Return scores (items, classes, subclasses).

        Raises:
            SubclassError: there are no finer labels, or one that was not there when the projector was fitted.
        """
        if subclass_labels is None:
            raise SubclassError(
                "This projector splits by finer labels: give those of the examples as subclass_labels, or fit one with "
                "another splitter."
            )
        known = self.subclass_of.to(subclass_labels.device)
        wrong = (subclass_labels < 0) | (subclass_labels >= known.shape[1])
        if bool(wrong.any()):
            raise SubclassError(
                f"The finer label {int(subclass_labels[wrong][0])} was not there when the projector was fitted; it knows 0 "
                f"to {known.shape[1] - 1}."
            )
        chosen = known[:, subclass_labels].T  # (items, classes)
        subclasses = int(self.width_and_subclasses[1])
        there = torch.arange(subclasses, device=known.device) < self.sizes.to(known.device)[:, None]
        there = there.expand(*chosen.shape, subclasses)
        scores = _one_hot_scores(chosen.clamp(min=0), there).masked_fill(chosen[..., None] < 0, 0.0)
        return scores.masked_fill(~there, -torch.inf).to(embeddings)


SCORER_TYPES: dict[str, type[SubclassScorer]] = {
    each.form: each for each in (LinearScorer, RandomPartitionScorer, KernelScorer, LookupScorer)
}


def rbf_kernel(rows: Tensor, landmarks: Tensor, bandwidth: float) -> Tensor:
    """Return exp(-|row - landmark|^2 / bandwidth), (rows, landmarks)."""
    squares = rows.square().sum(1)[:, None] - 2 * rows @ landmarks.T + landmarks.square().sum(1)
    return (-squares.clamp(min=0) / bandwidth).exp()


def _one_hot_scores(chosen: Tensor, there: Tensor) -> Tensor:
    """Return what stands for one subclass of those that are `there`: scores of mean 0 and mean square 1."""
    count = there.sum(-1, keepdim=True).double()
    hot = torch.zeros_like(there, dtype=torch.float64).scatter_(-1, chosen[..., None], 1.0)
    return torch.where(count > 1, (hot - 1 / count) * count / (count - 1).clamp(min=1).sqrt(), 0.0)
