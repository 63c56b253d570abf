"""The splitter "kmeans": k-means of P h within each class, by scikit-learn (the extra `lelp`)."""

import numpy as np
import torch
from torch import Tensor

from hf_guide.errors import SubclassError
from hf_guide.lelp.splitters.base import SplitterInputs, too_few_directions_message
from hf_guide.lelp.splitters.scorers import LinearScorer

NUM_RESTARTS, MAX_ITERATIONS = 4, 50


def split_by_kmeans(inputs: SplitterInputs) -> LinearScorer:
    """Split by k-means of P h within each class (k-means++, Lloyd's iterations, the best of 4 restarts).

    The score of a subclass is minus half the squared distance from its center, less what is common to all centers: linear.
    Of a class with more than 2,048 examples it takes a sample (`ClassSample`), which rotating the embedding space changes.

    Raises:
        SubclassError: A class has fewer different embeddings than it is to have subclasses.
    """
    from sklearn.cluster import KMeans  # an extra; `check_requirements` has raised where it is missing

    directions, offsets = [], []
    for number, mean in enumerate(inputs.moments.means):
        rows = inputs.centered_sample(number)
        distinct = len(rows.unique(dim=0))
        if distinct < inputs.num_subclasses:
            raise SubclassError(
                f"Class {inputs.class_label(number)} has only {distinct} different embeddings and is to have "
                f"{inputs.num_subclasses} subclasses. Choose fewer num_subclasses, or give more examples."
            )
        # A random state of its own for each class, so that a class's clusters do not depend on the classes before it.
        random_state = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([inputs.seed, number])))
        k_means = KMeans(
            inputs.num_subclasses, n_init=NUM_RESTARTS, max_iter=MAX_ITERATIONS, tol=0.0, random_state=random_state
        )
        centers = torch.from_numpy(k_means.fit(rows.numpy()).cluster_centers_)
        heights = -centers.square().sum(1) / 2
        scale = _score_rms(rows @ centers.T + heights, inputs, number)
        basis = centers.T / scale
        directions.append(basis)
        offsets.append(heights / scale - mean.cpu() @ basis)
    return LinearScorer(torch.stack(directions), torch.stack(offsets))


def _score_rms(scores: Tensor, inputs: SplitterInputs, number: int) -> Tensor:
    """Return the root mean square of a class's scores, less each example's mean over the subclasses."""
    if inputs.num_subclasses == 1:
        return torch.ones((), dtype=torch.float64)
    variance = (scores - scores.mean(1, keepdim=True)).square().mean()
    if not variance > 0:
        raise SubclassError(too_few_directions_message(inputs, number, 0))
    return variance.sqrt()
