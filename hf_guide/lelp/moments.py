"""Streamed statistics of each class's embeddings: moments, and a bounded sample for splitters that need examples.

Does: take chunks in any order, and merge with the statistics of other data or other processes, in float64.
Does not: grow with the number of examples. It holds one (width, width) matrix a class, and a sample of at most 2,048 rows.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hf_guide.errors import SubclassError
from hf_guide.lelp.validation import check_class_range, check_finite_rows
from hf_guide.utils.distributed import collective_device, rank_and_world_size, report_missing_ranks

FLUSH_ROWS = 1024
SAMPLE_ROWS = 2048


class ClassMoments:
    """Count, mean, scatter and a contracted third moment of each class's embeddings.

    Attributes:
        counts: (classes,), float64: whole numbers.
        means: (classes, width), zeros where there is no example.
        scatters: (classes, width, width): sum of y y^T, where y is an example less its class's mean.
        skews: (classes, width): sum of |y|^2 y. It rotates with the data, so that it distinguishes a direction from its
            opposite whatever the coordinates are.
        num_examples: How many examples have been added.
    """

    def __init__(self, num_classes: int, width: int):
        self.num_classes, self.width = num_classes, width
        self._counts = torch.zeros(num_classes, dtype=torch.float64)
        self._means = torch.zeros(num_classes, width, dtype=torch.float64)
        self._scatters = torch.zeros(num_classes, width, width, dtype=torch.float64)
        self._skews = torch.zeros(num_classes, width, dtype=torch.float64)
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._rows_pending = 0
        self.num_examples = 0

    @property
    def counts(self) -> Tensor:
        """Number of examples of each class, (C,)."""
        self._flush()
        return self._counts

    @property
    def means(self) -> Tensor:
        """Mean of each class, (C, D)."""
        self._flush()
        return self._means

    @property
    def scatters(self) -> Tensor:
        """Sum of centered outer products of each class, (C, D, D)."""
        self._flush()
        return self._scatters

    @property
    def skews(self) -> Tensor:
        """Third moments of each class."""
        self._flush()
        return self._skews

    def update(self, embeddings: Tensor, classes: Tensor, numbers: Sequence[int] | None = None) -> None:
        """Add a chunk.

        Args:
            embeddings: (rows, width), of any floating dtype and device.
            classes: (rows,), whole numbers from 0 to classes - 1.
            numbers: What to call the rows in an error; None continues from the examples added so far.

        Raises:
            SubclassError: Another width, a class out of range, or an embedding that is not finite; names the example.
        """
        if embeddings.ndim != 2 or embeddings.shape[1] != self.width:
            raise SubclassError(
                f"Embeddings must have the shape (any, {self.width}); found {tuple(embeddings.shape)}."
            )
        if classes.shape != embeddings.shape[:1]:
            raise SubclassError(f"{len(embeddings)} embeddings came with classes of the shape {tuple(classes.shape)}.")
        if not len(embeddings):
            return
        names = range(self.num_examples, self.num_examples + len(embeddings)) if numbers is None else numbers
        check_finite_rows(embeddings, names, "embedding")
        check_class_range(classes, self.num_classes, names)
        self.num_examples += len(embeddings)
        # A copy, since the caller may fill the same memory again; small chunks are folded in together.
        self._pending.append((embeddings.detach().clone(), classes.detach().clone()))
        self._rows_pending += len(embeddings)
        if self._rows_pending >= FLUSH_ROWS:
            self._flush()

    def merge(self, other: "ClassMoments") -> None:
        """Add the moments of other data: the result is that of all data in one, to rounding.

        Raises:
            SubclassError: The numbers of classes or the widths differ.
        """
        if (other.num_classes, other.width) != (self.num_classes, self.width):
            raise SubclassError(
                f"Moments of {self.num_classes} classes, {self.width} wide, cannot be merged with those of "
                f"{other.num_classes} classes, {other.width} wide."
            )
        self._flush()
        other._flush()
        self._add(slice(None), *(part.to(self._counts.device) for part in other._parts()))
        self.num_examples += other.num_examples

    def reduce(self) -> None:
        """Merge the moments of all processes of `torch.distributed` into each of them; a no-op in a single process."""
        if rank_and_world_size()[1] == 1:
            return
        self._flush()
        device = collective_device()
        local_device = self._counts.device
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
        self._counts, self._means = total.to(local_device), joint.to(local_device)
        self._scatters, self._skews = scatters.to(local_device), skews.to(local_device)
        self.num_examples = int(total.sum())

    def to_cpu(self) -> None:
        """Move the sums to the CPU, so that results do not depend on an accelerator's eigenvectors."""
        self._flush()
        self._counts, self._means, self._scatters, self._skews = (part.cpu() for part in self._parts())

    def pooled(self) -> tuple[Tensor, Tensor]:
        """Return the covariance within classes (width, width) and the sum of all classes' skews (width,)."""
        return self.scatters.sum(0) / self.counts.sum().clamp(min=1), self.skews.sum(0)

    def total_scatter(self) -> Tensor:
        """Return the scatter about the mean of all examples, (width, width)."""
        centroid = self.counts @ self.means / self.counts.sum().clamp(min=1)
        between = self.means - centroid
        return self.scatters.sum(0) + between.T @ (self.counts[:, None] * between)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self._counts, self._means, self._scatters, self._skews

    def _flush(self) -> None:
        if not self._pending:
            return
        pending, self._pending, self._rows_pending = self._pending, [], 0
        device = pending[0][0].device
        # MPS has no float64; elsewhere the sums stay where the embeddings are computed.
        sum_device = device if device.type == "cuda" else torch.device("cpu")
        if self._counts.device != sum_device:
            moved = (part.to(sum_device) for part in self._parts())
            self._counts, self._means, self._scatters, self._skews = moved
        rows = torch.cat([embeddings.to(sum_device).to(torch.float64) for embeddings, _ in pending])
        classes = torch.cat([classes.to(sum_device) for _, classes in pending])
        for number in classes.unique().tolist():
            for part in rows[classes == number].split(4 * FLUSH_ROWS):
                mean = part.mean(0)
                centered = part - mean
                skew = centered.square().sum(1) @ centered
                count = torch.tensor([float(len(part))], dtype=torch.float64, device=sum_device)
                scatter = centered.T @ centered
                self._add(slice(number, number + 1), count, mean[None], scatter[None], skew[None])

    def _add(self, which: slice, counts: Tensor, means: Tensor, scatters: Tensor, skews: Tensor) -> None:
        old_counts = self._counts[which]
        total = old_counts + counts
        joint = (old_counts[:, None] * self._means[which] + counts[:, None] * means) / total.clamp(min=1)[:, None]
        old = _shift_moments(old_counts, self._scatters[which], self._skews[which], self._means[which] - joint)
        new = _shift_moments(counts, scatters, skews, means - joint)
        self._counts[which], self._means[which] = total, joint
        self._scatters[which], self._skews[which] = old[0] + new[0], old[1] + new[1]


def _shift_moments(counts: Tensor, scatters: Tensor, skews: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Return scatters and skews about another point, where every y is y + shift, (classes, width); sum y = 0."""
    traces = scatters.diagonal(dim1=1, dim2=2).sum(1)
    scattered_shift = torch.einsum("cij,cj->ci", scatters, shift)
    squared_norms = counts * shift.square().sum(1)
    skews = skews + (traces + squared_norms)[:, None] * shift + 2 * scattered_shift
    return scatters + counts[:, None, None] * shift[:, :, None] * shift[:, None, :], skews


_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


class ClassSample:
    """At most `size` rows of each class, those with the smallest hashes.

    Which examples are selected depends on what they are and on the seed, not on the order or the process that they come in:
    so samples merge.

    The hash covers the coordinates to the last digit: of more examples than are selected, others are selected where the
    embedding space is rotated or moved, or the teacher rounds otherwise. The only invariant of a rotation is an example's
    norm, and a sample drawn by norm would hold too few embeddings of some norm, or miss a cluster whose examples share one.

    Attributes:
        rows: For each class (at most size, width), float64, in the order of their hashes.
    """

    def __init__(self, num_classes: int, width: int, *, size: int = SAMPLE_ROWS, seed: int = 0):
        self.size, self.seed = size, seed
        self.rows = [torch.zeros(0, width, dtype=torch.float64) for _ in range(num_classes)]
        self._hashes = [np.zeros(0, np.uint64) for _ in range(num_classes)]
        self._factors = np.random.default_rng(seed).integers(0, 2**64, width, dtype=np.uint64) | np.uint64(1)

    def update(self, embeddings: Tensor, classes: Tensor) -> None:
        """Add a chunk, (rows, width) and (rows,), that `ClassMoments.update` has checked."""
        rows, classes = embeddings.detach().cpu(), classes.cpu()
        hashes = self._hash(rows)
        for number in classes.unique().tolist():
            selected = classes == number
            self._select(number, rows[selected].double(), hashes[selected.numpy()])

    def merge(self, other: "ClassSample") -> None:
        """Add the sample of other data that was drawn with the same seed."""
        for number, (rows, hashes) in enumerate(zip(other.rows, other._hashes, strict=True)):
            self._select(number, rows, hashes)

    def reduce(self) -> None:
        """Merge the samples of all processes of `torch.distributed` into each of them; a no-op in a single process."""
        rank, world_size = rank_and_world_size()
        if world_size == 1:
            return
        samples: list[ClassSample | None] = [None] * world_size
        with report_missing_ranks():
            dist.all_gather_object(samples, self)
        for other_rank, other in enumerate(samples):
            if other is not None and other_rank != rank:
                self.merge(other)

    def _hash(self, rows: Tensor) -> np.ndarray:
        bits = np.ascontiguousarray(rows.float().numpy()).view(np.uint32).astype(np.uint64)
        mixed = (bits * self._factors).sum(1, dtype=np.uint64)  # modulo 2 ** 64, on purpose
        for factor, shift in zip(_MIX, (30, 27), strict=True):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * factor
        return mixed ^ (mixed >> np.uint64(31))

    def _select(self, number: int, rows: Tensor, hashes: np.ndarray) -> None:
        all_hashes = np.concatenate([self._hashes[number], hashes])
        order = np.argsort(all_hashes, kind="stable")[: self.size]
        self.rows[number] = torch.cat([self.rows[number], rows])[torch.from_numpy(order)]
        self._hashes[number] = all_hashes[order]
