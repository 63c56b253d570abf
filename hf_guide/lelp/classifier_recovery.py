"""A classifier's weight told from what it is fed and what it says, where the model itself is not at hand."""

import torch
import torch.distributed as dist
from torch import Tensor

from hf_guide.errors import SubclassError
from hf_guide.lelp.moments import ClassMoments
from hf_guide.utils.distributed import collective_device, rank_and_world_size, report_missing_ranks

EIGENVALUE_TOLERANCE = 1e-7  # of the largest variance: what was kept in float16 or float32 has no more to tell
MAX_UNEXPLAINED_VARIANCE = 1e-3  # of the logits' variance, that may be left over


class StreamingLeastSquares:
    """Streamed moments of logits against embeddings; with `ClassMoments` of the same data they give W."""

    def __init__(self, num_classes: int, width: int):
        self.cross = torch.zeros(num_classes, width, dtype=torch.float64)
        self.logit_mean = torch.zeros(num_classes, dtype=torch.float64)
        self.mean = torch.zeros(width, dtype=torch.float64)
        self.power = torch.zeros(num_classes, dtype=torch.float64)
        self.count = 0.0

    def update(self, embeddings: Tensor, logits: Tensor) -> None:
        """Take a chunk, (rows, width) and (rows, classes)."""
        if not len(embeddings):
            return
        h, z = embeddings.cpu().double(), logits.cpu().double()
        means = z.mean(0), h.mean(0)
        z_centred, h_centred = z - means[0], h - means[1]
        self._add(float(len(h)), *means, z_centred.T @ h_centred, z_centred.square().sum(0))

    def reduce(self) -> None:
        """Make what each process of `torch.distributed` has that of all."""
        if rank_and_world_size()[1] == 1:
            return
        device = collective_device()
        parts = torch.tensor([self.count]), self.logit_mean, self.mean, self.cross, self.power
        flat = torch.cat([part.double().flatten() for part in parts]).to(device)
        gathered = [torch.empty_like(flat) for _ in range(rank_and_world_size()[1])]
        with report_missing_ranks():
            dist.all_gather(gathered, flat)
        total = StreamingLeastSquares(*self.cross.shape)
        for each in gathered:
            split = each.cpu().split([part.numel() for part in parts])
            count, *rest = (one.view(part.shape) for one, part in zip(split, parts, strict=True))
            total._add(count.item(), *rest)
        self.__dict__.update(total.__dict__)

    def weight(self, moments: ClassMoments) -> Tensor:
        """Return W, (classes, width), by least squares of least norm.

        Where embeddings never differ (a layer norm leaves out one direction) nothing is known of W, and nothing of it counts.

        Raises:
            SubclassError: the logits are not linear in the embeddings.
        """
        scatter = moments.total_scatter().cpu()
        values, axes = torch.linalg.eigh(scatter)
        kept = values > values.max() * EIGENVALUE_TOLERANCE
        weight = (self.cross @ axes[:, kept] / values[kept]) @ axes[:, kept].T
        explained = (weight * self.cross).sum(1)
        left = 1 - explained.sum() / self.power.sum().clamp(min=1e-300)
        if not left < MAX_UNEXPLAINED_VARIANCE:
            raise SubclassError(
                f"{left.item():.2%} of the captured logits' variance is not linear in the captured embeddings, so the "
                "classifier cannot be told from them. Pass classifier_weight, or the teacher beside its capture; embeddings "
                "captured with hidden_dtype='float32' tell it better."
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
