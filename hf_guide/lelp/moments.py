"""Per-class moments of embeddings, streamed: what subspaces are made of, without the embeddings.

Does: take chunks in any order, merge with the moments of other data or other processes, all in float64.
Does not: grow with the number of examples. It holds one (width, width) matrix a class.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from hf_guide.errors import SubclassError
from hf_guide.worlds import collective_device, naming_missing_ranks, world

ROWS_AT_ONCE = 1024


class ClassMoments:
    """Count, mean, scatter and a contracted third moment of each class's embeddings.

    Attributes:
        counts: (classes,), float64: whole numbers.
        means: (classes, width), zeros where there is no example.
        scatters: (classes, width, width): sum of y y^T, where y is an example less its class's mean.
        skews: (classes, width): sum of |y|^2 y. It turns as the data turn, so that it can tell a direction from its
            opposite whatever the coordinates are.
    """

    def __init__(self, num_classes: int, width: int):
        self.num_classes, self.width = num_classes, width
        self._counts = torch.zeros(num_classes, dtype=torch.float64)
        self._means = torch.zeros(num_classes, width, dtype=torch.float64)
        self._scatters = torch.zeros(num_classes, width, width, dtype=torch.float64)
        self._skews = torch.zeros(num_classes, width, dtype=torch.float64)
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._rows_pending = 0
        self.seen = 0

    @property
    def counts(self) -> Tensor:
        self._flush()
        return self._counts

    @property
    def means(self) -> Tensor:
        self._flush()
        return self._means

    @property
    def scatters(self) -> Tensor:
        self._flush()
        return self._scatters

    @property
    def skews(self) -> Tensor:
        self._flush()
        return self._skews

    def update(self, embeddings: Tensor, classes: Tensor, numbers: Sequence[int] | None = None) -> None:
        """Take a chunk.

        Args:
            embeddings: (rows, width), of any floating dtype and device.
            classes: (rows,), whole numbers from 0 to classes - 1.
            numbers: what to call the rows in an error; by default they go on from those that were seen.

        Raises:
            SubclassError: another width, a class that is none, or an embedding that is not finite, and whose.
        """
        if embeddings.ndim != 2 or embeddings.shape[1] != self.width:
            raise SubclassError(
                f"Embeddings of the shape (any, {self.width}) were expected; found {tuple(embeddings.shape)}."
            )
        if classes.shape != embeddings.shape[:1]:
            raise SubclassError(f"{len(embeddings)} embeddings came with classes of the shape {tuple(classes.shape)}.")
        if not len(embeddings):
            return
        names = range(self.seen, self.seen + len(embeddings)) if numbers is None else numbers
        refuse_not_finite(embeddings, names, "embedding")
        refuse_outside(classes, self.num_classes, names)
        self.seen += len(embeddings)
        # A copy, since the caller may fill the same memory again; small chunks are folded in together.
        self._pending.append((embeddings.detach().clone(), classes.detach().clone()))
        self._rows_pending += len(embeddings)
        if self._rows_pending >= ROWS_AT_ONCE:
            self._flush()

    def merge(self, other: "ClassMoments") -> None:
        """Add the moments of other data: the result is that of all data in one, to rounding.

        Raises:
            SubclassError: they are of other classes or another width.
        """
        if (other.num_classes, other.width) != (self.num_classes, self.width):
            raise SubclassError(
                f"Moments of {self.num_classes} classes, {self.width} wide, cannot be merged with those of "
                f"{other.num_classes} classes, {other.width} wide."
            )
        self._flush()
        other._flush()
        self._add(slice(None), *(part.to(self._counts.device) for part in other._parts()))
        self.seen += other.seen

    def reduce(self) -> None:
        """Make the moments of each process of `torch.distributed` those of all; nothing to do in a single process."""
        if world()[1] == 1:
            return
        self._flush()
        device = collective_device()
        home = self._counts.device
        counts, means, scatters, skews = (part.to(device) for part in self._parts())
        total, weighted = counts.clone(), counts[:, None] * means
        with naming_missing_ranks():
            dist.all_reduce(total)
            dist.all_reduce(weighted)
        joint = weighted / total.clamp(min=1)[:, None]
        scatters, skews = _moved(counts, scatters, skews, means - joint)
        with naming_missing_ranks():
            dist.all_reduce(scatters)
            dist.all_reduce(skews)
        self._counts, self._means = total.to(home), joint.to(home)
        self._scatters, self._skews = scatters.to(home), skews.to(home)
        self.seen = int(total.sum())

    def to_cpu(self) -> None:
        """Bring the sums to the CPU, where what is made of them does not depend on an accelerator's eigenvectors."""
        self._flush()
        self._counts, self._means, self._scatters, self._skews = (part.cpu() for part in self._parts())

    def pooled(self) -> tuple[Tensor, Tensor]:
        """Return the covariance within classes (width, width) and the sum of all classes' skews (width,)."""
        return self.scatters.sum(0) / self.counts.sum().clamp(min=1), self.skews.sum(0)

    def total_scatter(self) -> Tensor:
        """Return the scatter about the mean of all examples, (width, width)."""
        centre = self.counts @ self.means / self.counts.sum().clamp(min=1)
        between = self.means - centre
        return self.scatters.sum(0) + between.T @ (self.counts[:, None] * between)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self._counts, self._means, self._scatters, self._skews

    def _flush(self) -> None:
        if not self._pending:
            return
        pending, self._pending, self._rows_pending = self._pending, [], 0
        device = pending[0][0].device
        # MPS does not know float64; elsewhere the sums stay where the embeddings are made.
        home = device if device.type == "cuda" else torch.device("cpu")
        if self._counts.device != home:
            self._counts, self._means, self._scatters, self._skews = (part.to(home) for part in self._parts())
        rows = torch.cat([each.to(home).to(torch.float64) for each, _ in pending])
        classes = torch.cat([each.to(home) for _, each in pending])
        for number in classes.unique().tolist():
            for part in rows[classes == number].split(4 * ROWS_AT_ONCE):
                mean = part.mean(0)
                centred = part - mean
                skew = centred.square().sum(1) @ centred
                count = torch.tensor([float(len(part))], dtype=torch.float64, device=home)
                scatter = centred.T @ centred
                self._add(slice(number, number + 1), count, mean[None], scatter[None], skew[None])

    def _add(self, which: slice, counts: Tensor, means: Tensor, scatters: Tensor, skews: Tensor) -> None:
        mine = self._counts[which]
        total = mine + counts
        joint = (mine[:, None] * self._means[which] + counts[:, None] * means) / total.clamp(min=1)[:, None]
        own = _moved(mine, self._scatters[which], self._skews[which], self._means[which] - joint)
        new = _moved(counts, scatters, skews, means - joint)
        self._counts[which], self._means[which] = total, joint
        self._scatters[which], self._skews[which] = own[0] + new[0], own[1] + new[1]


def _moved(counts: Tensor, scatters: Tensor, skews: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Return scatters and skews about another point, where every y is y + shift, (classes, width); sum y = 0."""
    traces = scatters.diagonal(dim1=1, dim2=2).sum(1)
    turned = torch.einsum("cij,cj->ci", scatters, shift)
    lengths = counts * shift.square().sum(1)
    skews = skews + (traces + lengths)[:, None] * shift + 2 * turned
    return scatters + counts[:, None, None] * shift[:, :, None] * shift[:, None, :], skews


def refuse_not_finite(values: Tensor, numbers: Sequence[int], what: str) -> None:
    """Refuse rows with NaN or infinity.

    Raises:
        SubclassError: names the first such example.
    """
    if bool(values.sum(dtype=torch.float32 if values.device.type == "mps" else torch.float64).isfinite()):
        return
    wrong = ~values.isfinite().all(1)
    if bool(wrong.any()):
        row = int(wrong.int().argmax())
        raise SubclassError(
            f"The {what} of example {numbers[row]} holds NaN or infinity, as {int(wrong.sum())} of {len(values)} do. Look at "
            "this example, or run the teacher in a wider dtype."
        )


def refuse_outside(classes: Tensor, num_classes: int, numbers: Sequence[int]) -> None:
    """Refuse classes (rows,) that the teacher does not have.

    Raises:
        SubclassError: names the first such example.
    """
    wrong = (classes < 0) | (classes >= num_classes)
    if bool(wrong.any()):
        row = int(wrong.int().argmax())
        raise SubclassError(
            f"The label of example {numbers[row]} is {int(classes[row])}; the teacher has the classes 0 to "
            f"{num_classes - 1}. Map the labels to the teacher's, or leave them out: then its own class counts."
        )
