"""A classifier's weight, recovered from captured embeddings and logits where the model itself is not available."""

import torch
import torch.distributed as dist
from torch import Tensor

from hf_guide.errors import SubclassError
from hf_guide.lelp.moments import ClassMoments
from hf_guide.utils.distributed import collective_device, rank_and_world_size, report_missing_ranks

EIGENVALUE_TOLERANCE = 1e-7  # of the largest variance: below it is rounding of float16 or float32
MAX_UNEXPLAINED_VARIANCE = 1e-3  # of the logits' variance


class StreamingLeastSquares:
    """Streamed moments of logits against embeddings; with `ClassMoments` of the same data they give W."""

    def __init__(self, num_classes: int, width: int):
        self.cross = torch.zeros(num_classes, width, dtype=torch.float64)
        self.logit_mean = torch.zeros(num_classes, dtype=torch.float64)
        self.mean = torch.zeros(width, dtype=torch.float64)
        self.power = torch.zeros(num_classes, dtype=torch.float64)
        self.count = 0.0

    def update(self, embeddings: Tensor, logits: Tensor) -> None:
        """Add a chunk, (rows, width) and (rows, classes)."""
        if not len(embeddings):
            return
        h, z = embeddings.cpu().double(), logits.cpu().double()
        means = z.mean(0), h.mean(0)
        z_centered, h_centered = z - means[0], h - means[1]
        self._add(float(len(h)), *means, z_centered.T @ h_centered, z_centered.square().sum(0))

    def reduce(self) -> None:
        """Merge the moments of all processes of `torch.distributed` into each of them; a no-op in a single process."""
        if rank_and_world_size()[1] == 1:
            return
        device = collective_device()
        parts = torch.tensor([self.count]), self.logit_mean, self.mean, self.cross, self.power
        flat = torch.cat([part.double().flatten() for part in parts]).to(device)
        gathered = [torch.empty_like(flat) for _ in range(rank_and_world_size()[1])]
        with report_missing_ranks():
            dist.all_gather(gathered, flat)
        total = StreamingLeastSquares(*self.cross.shape)
        for rank_sums in gathered:
            split = rank_sums.cpu().split([part.numel() for part in parts])
            count, *sums = (values.view(part.shape) for values, part in zip(split, parts, strict=True))
            total._add(count.item(), *sums)
        self.__dict__.update(total.__dict__)

    def weight(self, moments: ClassMoments) -> Tensor:
        """Return W, (classes, width), the least-squares solution of minimum norm.

        W is zero in directions in which embeddings never differ, such as the one that a layer norm removes.

        Raises:
            SubclassError: The logits are not linear in the embeddings.
        """
        scatter = moments.total_scatter().cpu()
        values, axes = torch.linalg.eigh(scatter)
        large = values > values.max() * EIGENVALUE_TOLERANCE
        weight = (self.cross @ axes[:, large] / values[large]) @ axes[:, large].T
        explained = (weight * self.cross).sum(1)
        unexplained = 1 - explained.sum() / self.power.sum().clamp(min=1e-300)
        if not unexplained < MAX_UNEXPLAINED_VARIANCE:
            raise SubclassError(
                f"{unexplained.item():.2%} of the captured logits' variance is not linear in the captured embeddings, so the "
                "classifier cannot be recovered from them. Pass classifier_weight, or the teacher in addition to its capture; "
                "embeddings captured with hidden_dtype='float32' are more precise."
            )
        return weight

    def _add(self, count: float, logit_mean: Tensor, mean: Tensor, cross: Tensor, power: Tensor) -> None:
        total = self.count + count
        if not total:
            return
        z, h = logit_mean - self.logit_mean, mean - self.mean
        share = self.count * count / total
        self.cross += cross + share * torch.outer(z, h)
        self.power += power + share * z.square()
        self.logit_mean += z * (count / total)
        self.mean += h * (count / total)
        self.count = total
