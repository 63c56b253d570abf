"""What is gathered of a teacher's embeddings on the way to a projector, chunk by chunk, in one process or several."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy
import torch
import torch.distributed as dist
from torch import Tensor

from hf_guide.errors import OptionError, SubclassError
from hf_guide.lelp.evidence import Evidence
from hf_guide.lelp.moments import ClassMoments, refuse_not_finite
from hf_guide.lelp.sampling import ClassSample
from hf_guide.lelp.splitters import splitter_named
from hf_guide.worlds import collective_device, world

UNLABELLED = (-1, -100)
ROWS_AT_ONCE = 8192


class Gathering:
    """Moments, and what else a splitter needs, of all that was given so far; merges with that of other data."""

    def __init__(self, num_classes: int, width: int, *, splitter: str = "lelp", seed: int = 0):
        entry = splitter_named(splitter)
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
        classes = self._classes(labels, logits, len(embeddings), names)
        self.moments.update(embeddings, classes, names)
        if self.sample is not None:
            self.sample.update(embeddings, classes)
        if self.finer is not None:
            self._add_finer(classes, subclass_labels, names)

    def merge(self, other: "Gathering") -> None:
        """Add what was gathered of other data."""
        self.moments.merge(other.moments)
        if self.sample is not None and other.sample is not None:
            self.sample.merge(other.sample)
        if self.finer is not None and other.finer is not None:
            self.finer = _widened(self.finer, other.finer.shape[1]) + _widened(other.finer, self.finer.shape[1])

    def reduce(self) -> None:
        """Make what each process of `torch.distributed` gathered that of all."""
        if world()[1] == 1:
            return
        self.moments.reduce()
        if self.sample is not None:
            self.sample.reduce()
        if self.finer is not None:
            device = collective_device()
            widest = torch.tensor([self.finer.shape[1]], device=device)
            dist.all_reduce(widest, op=dist.ReduceOp.MAX)
            finer = _widened(self.finer, int(widest)).to(device)
            dist.all_reduce(finer)
            self.finer = finer.cpu()

    def evidence(
        self, classifier_weight: Tensor, num_subclasses: int, class_names: Sequence[str] | None = None
    ) -> Evidence:
        """Return what a splitter may look at.

        Raises:
            SubclassError: too few examples in a class.
        """
        self.moments.to_cpu()
        evidence = Evidence(
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
            if count < num_subclasses + 1 and splitter_named(self.splitter).finds_directions:
                raise SubclassError(
                    f"Class {evidence.name(number)} has {count} examples; {num_subclasses} subclasses need at least "
                    f"{num_subclasses + 1}. Give more examples or fewer num_subclasses."
                )
        return evidence

    def _classes(self, labels: Tensor | None, logits: Tensor | None, rows: int, numbers: Sequence[int]) -> Tensor:
        if labels is not None:
            if labels.shape != (rows,) or labels.is_floating_point() or labels.is_complex():
                raise SubclassError(
                    f"Labels are whole numbers, one an example, ({rows},); found {tuple(labels.shape)} of {labels.dtype}."
                )
            unlabelled = torch.isin(labels, torch.tensor(UNLABELLED, device=labels.device))
            if not bool(unlabelled.any()):
                return labels.long()
        if logits is None:
            raise SubclassError(
                "Examples without labels are grouped by the teacher's own class: give its logits, or labels for all."
            )
        if logits.shape != (rows, self.moments.num_classes):
            raise SubclassError(
                f"Logits of the shape ({rows}, {self.moments.num_classes}) were expected; found {tuple(logits.shape)}."
            )
        refuse_not_finite(logits.nan_to_num(nan=torch.nan, neginf=0.0), numbers, "logits")  # a class may be ruled out
        own = logits.argmax(1)
        return own if labels is None else torch.where(unlabelled, own.to(labels.device), labels.long())

    def _add_finer(self, classes: Tensor, subclass_labels: Tensor | None, numbers: Sequence[int]) -> None:
        if subclass_labels is None or subclass_labels.shape != classes.shape:
            raise SubclassError(
                "The splitter 'labels' needs one finer label an example: give subclass_labels of the shape "
                f"({len(classes)},)."
            )
        found, classes = subclass_labels.cpu().long(), classes.cpu()
        if bool((found < 0).any()):
            row = int((found < 0).int().argmax())
            raise SubclassError(
                f"The finer label of example {numbers[row]} is {int(found[row])}; 0 or more was expected."
            )
        assert self.finer is not None
        self.finer = _widened(self.finer, int(found.max()) + 1 if len(found) else 0)
        self.finer.index_put_((classes, found), torch.ones_like(found), accumulate=True)


def chunks(
    embeddings: Any, labels: Any = None, logits: Any = None, subclass_labels: Any = None
) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]]:
    """Yield (embeddings, labels, logits, subclass_labels) chunk by chunk.

    Args:
        embeddings: an array (N, width), or an iterable of such; so are the others, which may be whole arrays beside
            chunks, of one row an example in the same order, or None.

    Raises:
        SubclassError: numbers of rows that differ.
    """
    if hasattr(embeddings, "shape"):
        whole = as_tensor(embeddings)
        if whole.ndim != 2:
            raise SubclassError(f"Embeddings of the shape (N, width) were expected; found {tuple(whole.shape)}.")
        parts: Iterable[Tensor] = whole.split(ROWS_AT_ONCE)
    else:
        parts = (as_tensor(each) for each in embeddings)
    beside = [_Beside(each) for each in (labels, logits, subclass_labels)]
    for part in parts:
        first, second, third = (each.next(len(part)) for each in beside)
        yield part, first, second, third
    for each in beside:
        each.end()


class _Beside:
    """An array, or an iterable of chunks, taken in step with the embeddings."""

    def __init__(self, given: Any):
        self._whole = as_tensor(given) if hasattr(given, "shape") or _is_numbers(given) else None
        self._chunks = iter(given) if given is not None and self._whole is None else None
        self._taken = 0

    def next(self, rows: int) -> Tensor | None:
        if self._whole is not None:
            found = self._whole[self._taken : self._taken + rows]
        elif self._chunks is not None:
            found = as_tensor(next(self._chunks, torch.zeros(0)))
        else:
            return None
        self._taken += rows
        if len(found) != rows:
            raise SubclassError(
                f"{self._taken} embeddings came with {self._taken - rows + len(found)} labels or logits."
            )
        return found

    def end(self) -> None:
        if self._whole is not None and len(self._whole) != self._taken:
            raise SubclassError(f"{self._taken} embeddings came with {len(self._whole)} labels or logits.")


def as_tensor(array: Any) -> Tensor:
    """Return a tensor of a tensor, a NumPy array, or what either can be made of, such as a table of pandas."""
    if isinstance(array, Tensor):
        return array.detach()
    try:
        if hasattr(array, "__array__") and not isinstance(array, numpy.ndarray):
            array = numpy.array(array)  # a copy: a table's own memory may not be written
        return torch.as_tensor(array)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SubclassError(f"An array of numbers was expected, not a {type(array).__name__}: {error}") from error


def check_whole(name: str, value: Any) -> int:
    """Return a whole number of at least 1.

    Raises:
        OptionError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"{name} is a whole number of at least 1; found {value!r}.")
    return value


def _is_numbers(given: Any) -> bool:
    return isinstance(given, (list, tuple)) and bool(given) and all(isinstance(each, (int, float)) for each in given)


def _widened(counts: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(counts, (0, max(0, width - counts.shape[1])))
