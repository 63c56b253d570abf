"""Per-class moments of embeddings, streamed: what subspaces are made of, without the embeddings.

Does: take chunks in any order, merge with the moments of other data or other processes, all in float64.
Does not: grow with the number of examples. It holds one (width, width) matrix a class.

A bounded sample of each class's embeddings, for splitters that moments are not enough for.

Which examples are kept depends on what they are and on the seed, not on the order or the process they come in: the rows
with the smallest hashes. So samples merge, and memory does not grow with the data.

The hash is of the coordinates, to the last digit: of more examples than are kept, others are kept where the embedding space
is turned or moved, or the teacher rounds otherwise. All that a turned example keeps is its length, and whoever drew by that
would see too few of embeddings of one length, or lose a cluster whose examples have one.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hf_guide.errors import SubclassError
from hf_guide.utils.distributed import collective_device, rank_and_world_size, report_missing_ranks

FLUSH_ROWS = 1024


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
        check_finite_rows(embeddings, names, "embedding")
        check_class_range(classes, self.num_classes, names)
        self.seen += len(embeddings)
        # A copy, since the caller may fill the same memory again; small chunks are folded in together.
        self._pending.append((embeddings.detach().clone(), classes.detach().clone()))
        self._rows_pending += len(embeddings)
        if self._rows_pending >= FLUSH_ROWS:
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
        if rank_and_world_size()[1] == 1:
            return
        self._flush()
        device = collective_device()
        home = self._counts.device
        counts, means, scatters, skews = (part.to(device) for part in self._parts())
        total, weighted = counts.clone(), counts[:, None] * means
        with report_missing_ranks():
            dist.all_reduce(total)
            dist.all_reduce(weighted)
        joint = weighted / total.clamp(min=1)[:, None]
        scatters, skews = _shift_moments(counts, scatters, skews, means - joint)
        with report_missing_ranks():
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
            for part in rows[classes == number].split(4 * FLUSH_ROWS):
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
        own = _shift_moments(mine, self._scatters[which], self._skews[which], self._means[which] - joint)
        new = _shift_moments(counts, scatters, skews, means - joint)
        self._counts[which], self._means[which] = total, joint
        self._scatters[which], self._skews[which] = own[0] + new[0], own[1] + new[1]


def _shift_moments(counts: Tensor, scatters: Tensor, skews: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Return scatters and skews about another point, where every y is y + shift, (classes, width); sum y = 0."""
    traces = scatters.diagonal(dim1=1, dim2=2).sum(1)
    turned = torch.einsum("cij,cj->ci", scatters, shift)
    lengths = counts * shift.square().sum(1)
    skews = skews + (traces + lengths)[:, None] * shift + 2 * turned
    return scatters + counts[:, None, None] * shift[:, :, None] * shift[:, None, :], skews


def check_finite_rows(values: Tensor, numbers: Sequence[int], what: str) -> None:
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


def check_class_range(classes: Tensor, num_classes: int, numbers: Sequence[int]) -> None:
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


_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


class ClassSample:
    """At most `size` rows of each class.

    Attributes:
        rows: for each class (at most size, width), float64, in the order of their hashes.
    """

    def __init__(self, num_classes: int, width: int, *, size: int = 2048, seed: int = 0):
        self.size, self.seed = size, seed
        self.rows = [torch.zeros(0, width, dtype=torch.float64) for _ in range(num_classes)]
        self._hashes = [np.zeros(0, np.uint64) for _ in range(num_classes)]
        self._factors = np.random.default_rng(seed).integers(0, 2**64, width, dtype=np.uint64) | np.uint64(1)

    def update(self, embeddings: Tensor, classes: Tensor) -> None:
        """Take a chunk, (rows, width) and (rows,), that `ClassMoments.update` has found good."""
        rows, classes = embeddings.detach().cpu(), classes.cpu()
        hashes = self._hash(rows)
        for number in classes.unique().tolist():
            chosen = classes == number
            self._keep(number, rows[chosen].double(), hashes[chosen.numpy()])

    def merge(self, other: "ClassSample") -> None:
        """Add the sample of other data that was drawn with the same seed."""
        for number, (rows, hashes) in enumerate(zip(other.rows, other._hashes, strict=True)):
            self._keep(number, rows, hashes)

    def reduce(self) -> None:
        """Make the sample of each process of `torch.distributed` that of all."""
        if rank_and_world_size()[1] == 1:
            return
        gathered: list[ClassSample | None] = [None] * rank_and_world_size()[1]
        with report_missing_ranks():
            dist.all_gather_object(gathered, self)
        for rank, other in enumerate(gathered):
            if other is not None and rank != rank_and_world_size()[0]:
                self.merge(other)

    def _hash(self, rows: Tensor) -> np.ndarray:
        bits = np.ascontiguousarray(rows.float().numpy()).view(np.uint32).astype(np.uint64)
        mixed = (bits * self._factors).sum(1, dtype=np.uint64)  # modulo 2 ** 64, on purpose
        for factor, shift in zip(_MIX, (30, 27), strict=True):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * factor
        return mixed ^ (mixed >> np.uint64(31))

    def _keep(self, number: int, rows: Tensor, hashes: np.ndarray) -> None:
        together = np.concatenate([self._hashes[number], hashes])
        order = np.argsort(together, kind="stable")[: self.size]
        self.rows[number] = torch.cat([self.rows[number], rows])[torch.from_numpy(order)]
        self._hashes[number] = together[order]
