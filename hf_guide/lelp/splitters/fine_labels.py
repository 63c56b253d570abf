"""The splitter "labels": subclasses that are known, one for each fine label within a class."""

import torch

from hf_guide.errors import SubclassError
from hf_guide.lelp.splitters.base import SplitterInputs
from hf_guide.lelp.splitters.scorers import LookupScorer


def split_by_fine_labels(inputs: SplitterInputs) -> LookupScorer:
    """Split by the fine labels of the examples.

    Raises:
        SubclassError: No fine labels, or more in a class than it is to have subclasses.
    """
    if inputs.fine_label_counts is None:
        raise SubclassError("The splitter 'labels' needs fine labels: give fine_labels.")
    subclass_of = torch.full(inputs.fine_label_counts.shape, -1, dtype=torch.int64)
    for number, row in enumerate(inputs.fine_label_counts):
        labels = row.nonzero().flatten()
        if len(labels) > inputs.num_subclasses:
            raise SubclassError(
                f"Class {inputs.class_label(number)} has {len(labels)} fine labels and is to have {inputs.num_subclasses} "
                f"subclasses. Pass num_subclasses={len(labels)} or more."
            )
        subclass_of[number, labels] = torch.arange(len(labels))
    sizes = (subclass_of >= 0).sum(1)
    return LookupScorer(subclass_of, sizes, torch.tensor([inputs.moments.width, inputs.num_subclasses]))
