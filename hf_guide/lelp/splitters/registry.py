"""How a class is split into subclasses: one protocol, the paper's way, its ablations and the controls it is shown with.

A splitter is a function of `Evidence` that returns `Scores`. `register_splitter` takes more.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from hf_guide.errors import OptionError, SubclassError
from hf_guide.lelp.splitters.base import SplitterInputs, check_variance, fix_signs, random_rotation
from hf_guide.lelp.splitters.clusters import split_by_kernel_pca, split_by_kmeans, split_by_random_partition
from hf_guide.lelp.splitters.scorers import LinearScorer, LookupScorer, SubclassScorer
from hf_guide.validation import did_you_mean

Splitter = Callable[[SplitterInputs], SubclassScorer]


@dataclass(frozen=True)
class SplitterEntry:
    split: Splitter
    needs_sample: bool = False
    needs_labels: bool = False
    finds_directions: bool = True
    by_variance: bool = False


_SPLITTERS: dict[str, SplitterEntry] = {}


def register_splitter(name: str, split: Splitter, *, needs_sample: bool = False) -> None:
    """Make a splitter known by a name, for `SubclassProjector.fit(splitter=name)`.

    Args:
        name: how it is asked for.
        split: gives one of the forms of `lelp.scores`, mostly `Affine`.
        needs_sample: whether moments are not enough for it; then `Evidence.sample` is there.

    Raises:
        OptionError: the name is taken.
    """
    if name in _SPLITTERS:
        raise OptionError(f"There is a splitter {name!r} already; choose another name.")
    _SPLITTERS[name] = SplitterEntry(split, needs_sample)


def get_splitter(name: str) -> SplitterEntry:
    """Return a splitter and what it needs.

    Raises:
        OptionError: there is none of that name; it names the nearest.
    """
    if not isinstance(name, str) or name not in _SPLITTERS:
        near = did_you_mean(name, _SPLITTERS) if isinstance(name, str) else ""
        raise OptionError(f"splitter={name!r} is not known; expected one of {known_splitters()}.{near}")
    return _SPLITTERS[name]


def known_splitters() -> list[str]:
    """Return the names of all splitters."""
    return list(_SPLITTERS)


def selects_top_variance(name: str) -> bool:
    """Whether a splitter takes the directions of largest variance outside what the classifier sees, no others."""
    return name in _SPLITTERS and _SPLITTERS[name].by_variance


def split_by_principal_components(
    evidence: SplitterInputs, *, null_space: bool = True, rotation: bool = True, scaling: bool = True
) -> LinearScorer:
    """Split along each class's own directions of largest variance (LELP, arXiv 2409.20449).

    U_c = V_c Q with V_c the top eigenvectors of the covariance of P h in the class and Q a seeded rotation;
    scores U_c^T (P h - mean_c) / rms_c, with rms_c the class's root mean square coordinate.

    Raises:
        SubclassError: a class has variance in fewer directions than it is to have subclasses.
    """
    generator = torch.Generator().manual_seed(evidence.seed)
    centre = evidence.moments.counts @ evidence.moments.means / evidence.moments.counts.sum()
    size = evidence.num_subclasses
    directions, offsets = [], []
    for number, mean in enumerate(evidence.moments.means):
        covariance = evidence.covariance(number, null_space=null_space)
        values, vectors = torch.linalg.eigh(covariance)
        values, vectors = values.flip(0)[:size], vectors.flip(1)[:, :size]
        if null_space:
            vectors = evidence.unseen(vectors.T).T
        variance = check_variance(evidence, number, values)
        basis = fix_signs(vectors, evidence.moments.skews[number], centre - mean)
        if rotation:
            basis = basis @ random_rotation(size, generator).to(basis.device)
        if scaling and size > 1:
            basis = basis / variance.sqrt()
        directions.append(basis)
        offsets.append(-mean @ basis)
    return LinearScorer(torch.stack(directions), torch.stack(offsets))


def split_by_random_projection(evidence: SplitterInputs) -> LinearScorer:
    """Split along random directions of what the classifier does not see: a control for directions of large variance."""
    generator = torch.Generator().manual_seed(evidence.seed)
    covariance, skew = evidence.moments.pooled()
    covariance = evidence.unseen(evidence.unseen(covariance).T)
    values, axes = torch.linalg.eigh(covariance)
    # Drawn in the data's own axes, so that they turn as the data turn; and only where there are data.
    axes = axes.flip(1)[:, values.flip(0) > values.max() * 1e-10]
    axes = fix_signs(axes, skew, torch.zeros_like(skew))
    directions, offsets = [], []
    for number, mean in enumerate(evidence.moments.means):
        draw = torch.randn(axes.shape[1], evidence.num_subclasses, dtype=torch.float64, generator=generator)
        basis = axes @ draw.to(axes.device)
        variances = (basis * (evidence.covariance(number) @ basis)).sum(0)
        variance = check_variance(evidence, number, variances)
        basis = basis / (variance.sqrt() if evidence.num_subclasses > 1 else 1.0)
        directions.append(basis)
        offsets.append(-mean @ basis)
    return LinearScorer(torch.stack(directions), torch.stack(offsets))


def split_by_labels(evidence: SplitterInputs) -> LookupScorer:
    """Split by finer labels that are known: an oracle, or knowledge of one's own.

    Raises:
        SubclassError: no finer labels, or more in a class than it is to have subclasses.
    """
    if evidence.finer is None:
        raise SubclassError("The splitter 'labels' needs finer labels: give subclass_labels.")
    table = torch.full(evidence.finer.shape, -1, dtype=torch.int64)
    for number, row in enumerate(evidence.finer):
        found = row.nonzero().flatten()
        if len(found) > evidence.num_subclasses:
            raise SubclassError(
                f"Class {evidence.name(number)} has {len(found)} finer labels and is to have {evidence.num_subclasses} "
                f"subclasses. Pass num_subclasses={len(found)} or more."
            )
        table[number, found] = torch.arange(len(found))
    sizes = (table >= 0).sum(1)
    return LookupScorer(table, sizes, torch.tensor([evidence.moments.width, evidence.num_subclasses]))


_SPLITTERS |= {
    "lelp": SplitterEntry(split_by_principal_components, by_variance=True),
    "no-null-space": SplitterEntry(partial(split_by_principal_components, null_space=False)),
    "no-rotation": SplitterEntry(partial(split_by_principal_components, rotation=False), by_variance=True),
    "no-scaling": SplitterEntry(partial(split_by_principal_components, scaling=False), by_variance=True),
    "random-projection": SplitterEntry(split_by_random_projection),
    "kmeans": SplitterEntry(split_by_kmeans, needs_sample=True),
    "random-partition": SplitterEntry(split_by_random_partition, finds_directions=False),
    "spectral": SplitterEntry(split_by_kernel_pca, needs_sample=True),
    "labels": SplitterEntry(split_by_labels, needs_labels=True, finds_directions=False),
}
