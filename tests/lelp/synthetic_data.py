"""Seeded embeddings of a few classes, skewed and of unequal variance, as real ones are."""

from dataclasses import dataclass

import torch
from torch import Tensor

CLASSES, WIDTH, SUBCLASSES = 3, 24, 4


@dataclass(frozen=True)
class LabeledEmbeddings:
    """Embeddings (N, D), their labels and fine labels, the classifier (C, D) and its logits (N, C), in float64."""

    embeddings: Tensor
    labels: Tensor
    fine_labels: Tensor
    weight: Tensor
    logits: Tensor


def make_embeddings(
    seed: int = 0, *, count: int = 600, classes: int = CLASSES, width: int = WIDTH
) -> LabeledEmbeddings:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    fine_labels = 4 * labels + torch.randint(0, 4, (count,), generator=draw)
    noise = -torch.rand(count, width, generator=draw, dtype=torch.float64).log()
    mixed = noise @ torch.randn(width, width, generator=draw, dtype=torch.float64)
    centers = torch.randn(4 * classes, width, generator=draw, dtype=torch.float64)
    embeddings = mixed + 2 * centers[fine_labels] + 5
    weight = torch.randn(classes, width, generator=draw, dtype=torch.float64)
    return LabeledEmbeddings(embeddings, labels, fine_labels, weight, embeddings @ weight.T / 8)


def rotation(seed: int, width: int = WIDTH) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, generator=draw, dtype=torch.float64))[0]
