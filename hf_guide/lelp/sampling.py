"""A bounded sample of each class's embeddings, for splitters that moments are not enough for.

Which examples are kept depends on what they are and on the seed, not on the order or the process they come in: the rows
with the smallest hashes. So samples merge, and memory does not grow with the data.

The hash is of the coordinates, to the last digit: of more examples than are kept, others are kept where the embedding space
is turned or moved, or the teacher rounds otherwise. All that a turned example keeps is its length, and whoever drew by that
would see too few of embeddings of one length, or lose a cluster whose examples have one.
"""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hf_guide.worlds import naming_missing_ranks, world

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
        if world()[1] == 1:
            return
        gathered: list[ClassSample | None] = [None] * world()[1]
        with naming_missing_ranks():
            dist.all_gather_object(gathered, self)
        for rank, other in enumerate(gathered):
            if other is not None and rank != world()[0]:
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
