"""What is gathered of a teacher's embeddings on the way to a projector, chunk by chunk, in one process or several."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from hf_guide.errors import SubclassError
from hf_guide.lelp.classes import resolve_classes
from hf_guide.lelp.moments import ClassMoments, ClassSample
from hf_guide.lelp.splitters.base import SplitterInputs
from hf_guide.lelp.splitters.registry import get_splitter
from hf_guide.lelp.validation import check_integer_labels
from hf_guide.utils.distributed import collective_device, rank_and_world_size, report_missing_ranks


class StatisticsAccumulator:
    """Moments, and what else a splitter needs, of all that was given so far; merges with that of other data."""

    def __init__(self, num_classes: int, width: int, *, splitter: str = "lelp", seed: int = 0):
        entry = get_splitter(splitter)
        self.splitter, self.seed = splitter, seed
        self.moments = ClassMoments(num_classes, width)
        self.sample = ClassSample(num_classes, width, seed=seed) if entry.needs_sample else None
        self.finer = torch.zeros(num_classes, 0, dtype=torch.int64) if entry.needs_labels else None

    def add(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        logits: Tensor | None = None,
        subclass_labels: Tensor | None = None,
        numbers: Sequence[int] | None = None,
    ) -> None:
        """Take a chunk.

        Args:
            embeddings: (rows, width).
            labels: (rows,); -1 and -100, or None for all, stand for the teacher's own class.
            logits: (rows, classes), needed where there is no label.
            subclass_labels: (rows,) finer labels, for the splitter that goes by them.
            numbers: what to call the rows in an error.

        Raises:
            SubclassError: anything of another shape, not finite, or outside the classes; it names the example.
        """
        names = range(self.moments.seen, self.moments.seen + len(embeddings)) if numbers is None else numbers
        classes = resolve_classes(labels, logits, len(embeddings), self.moments.num_classes, names)
        self.moments.update(embeddings, classes, names)
        if self.sample is not None:
            self.sample.update(embeddings, classes)
        if self.finer is not None:
            self._add_finer(classes, subclass_labels, names)

    def merge(self, other: "StatisticsAccumulator") -> None:
        """Add what was gathered of other data."""
        self.moments.merge(other.moments)
        if self.sample is not None and other.sample is not None:
            self.sample.merge(other.sample)
        if self.finer is not None and other.finer is not None:
            self.finer = _pad_columns(self.finer, other.finer.shape[1]) + _pad_columns(
                other.finer, self.finer.shape[1]
            )

    def reduce(self) -> None:
        """Make what each process of `torch.distributed` gathered that of all."""
        if rank_and_world_size()[1] == 1:
            return
        self.moments.reduce()
        if self.sample is not None:
            self.sample.reduce()
        if self.finer is not None:
            device = collective_device()
            widest = torch.tensor([self.finer.shape[1]], device=device)
            with report_missing_ranks():
                dist.all_reduce(widest, op=dist.ReduceOp.MAX)
            finer = _pad_columns(self.finer, int(widest)).to(device)
            with report_missing_ranks():
                dist.all_reduce(finer)
            self.finer = finer.cpu()

    def evidence(
        self, classifier_weight: Tensor, num_subclasses: int, class_names: Sequence[str] | None = None
    ) -> SplitterInputs:
        """Return what a splitter may look at.

        Raises:
            SubclassError: too few examples in a class.
        """
        self.moments.to_cpu()
        evidence = SplitterInputs(
            self.moments,
            classifier_weight.to(self.moments.counts),
            num_subclasses,
            self.seed,
            self.sample,
            self.finer,
            tuple(class_names or ()),
        )
        for number, count in enumerate(self.moments.counts.int().tolist()):
            if count == 0:
                raise SubclassError(
                    f"No example is of class {evidence.name(number)}, so it cannot be split. Give examples of every class of "
                    "the teacher."
                )
            if count < num_subclasses + 1 and get_splitter(self.splitter).finds_directions:
                raise SubclassError(
                    f"Class {evidence.name(number)} has {count} examples; {num_subclasses} subclasses need at least "
                    f"{num_subclasses + 1}. Give more examples or fewer num_subclasses."
                )
        return evidence

    def _add_finer(self, classes: Tensor, subclass_labels: Tensor | None, numbers: Sequence[int]) -> None:
        if subclass_labels is None or subclass_labels.shape != classes.shape:
            raise SubclassError(
                "The splitter 'labels' needs one finer label an example: give subclass_labels of the shape "
                f"({len(classes)},)."
            )
        check_integer_labels(subclass_labels, "Finer labels")
        found, classes = subclass_labels.cpu().long(), classes.cpu()
        if bool((found < 0).any()):
            row = int((found < 0).int().argmax())
            raise SubclassError(
                f"The finer label of example {numbers[row]} is {int(found[row])}; 0 or more was expected."
            )
        assert self.finer is not None
        self.finer = _pad_columns(self.finer, int(found.max()) + 1 if len(found) else 0)
        self.finer.index_put_((classes, found), torch.ones_like(found), accumulate=True)


def _pad_columns(counts: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(counts, (0, max(0, width - counts.shape[1])))
