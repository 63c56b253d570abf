"""The splitter "lelp": each class's directions of largest variance outside the row space of the classifier."""

import torch

from hf_guide.lelp.splitters.base import SplitterInputs, check_variance, fix_signs, random_rotation
from hf_guide.lelp.splitters.scorers import LinearScorer


def split_by_principal_components(inputs: SplitterInputs) -> LinearScorer:
    """Split along each class's own directions of largest variance (LELP, arXiv 2409.20449).

    U_c = V_c Q with V_c the top eigenvectors of the covariance of P h in the class and Q a seeded rotation; scores
    U_c^T (P h - mean_c) / rms_c, with rms_c the class's root mean square coordinate.

    Raises:
        SubclassError: A class varies in fewer directions than it is to have subclasses.
    """
    generator = torch.Generator().manual_seed(inputs.seed)
    centroid = inputs.moments.counts @ inputs.moments.means / inputs.moments.counts.sum()
    size = inputs.num_subclasses
    directions, offsets = [], []
    for number, mean in enumerate(inputs.moments.means):
        values, vectors = torch.linalg.eigh(inputs.covariance(number))
        values, vectors = values.flip(0)[:size], vectors.flip(1)[:, :size]
        vectors = inputs.project_out_classifier(vectors.T).T
        variance = check_variance(inputs, number, values)
        basis = fix_signs(vectors, inputs.moments.skews[number], centroid - mean)
        basis = basis @ random_rotation(size, generator).to(basis.device)
        if size > 1:
            basis = basis / variance.sqrt()
        directions.append(basis)
        offsets.append(-mean @ basis)
    return LinearScorer(torch.stack(directions), torch.stack(offsets))
