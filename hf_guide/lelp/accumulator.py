"""The statistics of a teacher's embeddings that a splitter needs, accumulated chunk by chunk, on one process or several."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from hf_guide.errors import SubclassError
from hf_guide.lelp.moments import ClassMoments, ClassSample
from hf_guide.lelp.splitters.base import SplitterInputs
from hf_guide.lelp.splitters.registry import get_splitter
from hf_guide.lelp.validation import check_integer_labels, resolve_classes
from hf_guide.utils.distributed import collective_device, rank_and_world_size, report_missing_ranks


class StatisticsAccumulator:
    """Moments, and the sample and fine labels that a splitter needs, of all chunks so far; merges with that of other data.

    Attributes:
        moments: Of each class's embeddings.
        sample: Some embeddings of each class, where the splitter needs them.
        fine_label_counts: Examples by class and fine label, (classes, fine labels), where the splitter needs them.
    """

    def __init__(self, num_classes: int, width: int, *, splitter: str = "lelp", seed: int = 0):
        entry = get_splitter(splitter)
        self.splitter, self.seed = splitter, seed
        self.moments = ClassMoments(num_classes, width)
        self.sample = ClassSample(num_classes, width, seed=seed) if entry.needs_sample else None
        self.fine_label_counts = torch.zeros(num_classes, 0, dtype=torch.int64) if entry.needs_fine_labels else None

    def update(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        logits: Tensor | None = None,
        fine_labels: Tensor | None = None,
        numbers: Sequence[int] | None = None,
    ) -> None:
        """Add a chunk.

        Args:
            embeddings: (rows, width).
            labels: (rows,); -1 and -100, or None for all, mean the class that the teacher predicts.
            logits: (rows, classes), needed where there is no label.
            fine_labels: (rows,), for a splitter that needs them.
            numbers: What to call the rows in an error.

        Raises:
            SubclassError: Another shape, values that are not finite, or labels outside the classes; names the example.
        """
        start = self.moments.num_examples
        names = range(start, start + len(embeddings)) if numbers is None else numbers
        classes = resolve_classes(labels, logits, len(embeddings), self.moments.num_classes, names)
        self.moments.update(embeddings, classes, names)
        if self.sample is not None:
            self.sample.update(embeddings, classes)
        if self.fine_label_counts is not None:
            self._count_fine_labels(classes, fine_labels, names)

    def merge(self, other: "StatisticsAccumulator") -> None:
        """Add what was accumulated over other data."""
        self.moments.merge(other.moments)
        if self.sample is not None and other.sample is not None:
            self.sample.merge(other.sample)
        if self.fine_label_counts is not None and other.fine_label_counts is not None:
            counts, others = self.fine_label_counts, other.fine_label_counts
            self.fine_label_counts = _pad_columns(counts, others.shape[1]) + _pad_columns(others, counts.shape[1])

    def reduce(self) -> None:
        """Merge what the processes of `torch.distributed` accumulated into each of them; a no-op in a single process."""
        if rank_and_world_size()[1] == 1:
            return
        self.moments.reduce()
        if self.sample is not None:
            self.sample.reduce()
        if self.fine_label_counts is not None:
            device = collective_device()
            most_columns = torch.tensor([self.fine_label_counts.shape[1]], device=device)
            with report_missing_ranks():
                dist.all_reduce(most_columns, op=dist.ReduceOp.MAX)
            counts = _pad_columns(self.fine_label_counts, int(most_columns)).to(device)
            with report_missing_ranks():
                dist.all_reduce(counts)
            self.fine_label_counts = counts.cpu()

    def splitter_inputs(
        self, classifier_weight: Tensor, num_subclasses: int, class_names: Sequence[str] | None = None
    ) -> SplitterInputs:
        """Return the inputs of the splitter.

        Raises:
            SubclassError: Too few examples in a class.
        """
        self.moments.to_cpu()
        inputs = SplitterInputs(
            self.moments,
            classifier_weight.to(self.moments.counts),
            num_subclasses,
            self.seed,
            self.sample,
            self.fine_label_counts,
            tuple(class_names or ()),
        )
        for number, count in enumerate(self.moments.counts.int().tolist()):
            if count == 0:
                raise SubclassError(
                    f"No example is of class {inputs.class_label(number)}, so it cannot be split. Give examples of every "
                    "class of the teacher."
                )
            if count < num_subclasses + 1 and get_splitter(self.splitter).finds_directions:
                raise SubclassError(
                    f"Class {inputs.class_label(number)} has {count} examples; {num_subclasses} subclasses need at least "
                    f"{num_subclasses + 1}. Give more examples{' or fewer num_subclasses' if num_subclasses > 2 else ''}."
                )
        return inputs

    def _count_fine_labels(self, classes: Tensor, fine_labels: Tensor | None, numbers: Sequence[int]) -> None:
        if fine_labels is None or fine_labels.shape != classes.shape:
            raise SubclassError(
                f"The splitter {self.splitter!r} needs one fine label an example: give fine_labels of the shape "
                f"({len(classes)},)."
            )
        check_integer_labels(fine_labels, "Fine labels")
        fine_labels, classes = fine_labels.cpu().long(), classes.cpu()
        if bool((fine_labels < 0).any()):
            row = int((fine_labels < 0).int().argmax())
            raise SubclassError(
                f"The fine label of example {numbers[row]} is {int(fine_labels[row])}; it must be 0 or more."
            )
        assert self.fine_label_counts is not None
        counts = _pad_columns(self.fine_label_counts, int(fine_labels.max()) + 1 if len(fine_labels) else 0)
        counts.index_put_((classes, fine_labels), torch.ones_like(fine_labels), accumulate=True)
        self.fine_label_counts = counts


def _pad_columns(counts: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(counts, (0, max(0, width - counts.shape[1])))
