"""Examples of a dataset on their way to a projector: batches, labels in the teacher's numbering, and what a teacher said."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from hf_guide.errors import OptionError, SubclassError, TaskError
from hf_guide.lelp.validation import MISSING_LABELS
from hf_guide.models.adapters import forward_parameters
from hf_guide.models.penultimate import find_classifier
from hf_guide.signal_cache.codec import decode_example
from hf_guide.signal_cache.data import TeacherBatchCollator, is_map_style
from hf_guide.signal_cache.reader import Capture
from hf_guide.signal_cache.teacher_outputs import TeacherRunner
from hf_guide.tasks import NON_CATEGORICAL_PROBLEM_TYPES, Task

TRAINER_LABEL_COLUMNS = ("labels", "label", "label_ids")
LOGIT_TOLERANCE = {torch.float16: 0.05, torch.bfloat16: 0.2}  # of the logits' spread; 1e-3 for others


@dataclass(frozen=True)
class FeatureChunk:
    """What is known of some examples.

    Attributes:
        numbers: their places in the dataset.
        embeddings, logits: (rows, width) and (rows, classes).
        labels, finer: (rows,), or None where there are none.
    """

    numbers: Sequence[int]
    embeddings: Tensor
    logits: Tensor
    labels: Tensor | None
    finer: Tensor | None


class LabelReader:
    """The labels of examples, by the teacher's numbers.

    Args:
        dataset: whose features may name the classes.
        id2label: the teacher's names.
        column: which column; by default "labels", "label" or "label_ids", where there is one.
        finer: the column of finer labels, if any.
    """

    def __init__(self, dataset: Any, id2label: Mapping[int, str], column: str | None, finer: str | None):
        self.column, self.finer = column, finer
        self._by_name = {name.casefold(): number for number, name in id2label.items()}
        features = getattr(dataset, "features", None) or {}
        found = column or next((name for name in TRAINER_LABEL_COLUMNS if name in features), None)
        names = getattr(features.get(found), "names", None) if found else None
        # Where the data's names are the teacher's, names decide; else numbers stand, as everywhere in Transformers.
        known = names is not None and sorted(map(str.casefold, names)) == sorted(self._by_name)
        self._places = [self._by_name[name.casefold()] for name in names] if known and names else None

    def of(self, examples: Sequence[Any], batch: Mapping[str, Any]) -> Tensor | None:
        """Return the labels (rows,) of examples or, where these have none, of their batch; None for none.

        Raises:
            OptionError: the column is missing.
            SubclassError: a label that is no class.
        """
        first = examples[0]
        names = (self.column,) if self.column else TRAINER_LABEL_COLUMNS
        if isinstance(first, Mapping):
            found = next((name for name in names if name in first), None)
            if found is not None:
                return torch.tensor([self._number(example[found], found) for example in examples])
        given = next((batch[name] for name in names if isinstance(batch.get(name), Tensor)), None)
        if given is None and self.column is not None:
            shown = sorted(first) if isinstance(first, Mapping) else sorted(batch)
            raise OptionError(f"label_column={self.column!r} is not in the dataset, which has {shown}.")
        return given

    def fine_labels(self, examples: Sequence[Any]) -> Tensor | None:
        """Return the finer labels (rows,), None where there are none to be had.

        Raises:
            OptionError: the column is missing.
            SubclassError: a label that is no whole number.
        """
        if self.finer is None:
            return None
        if not isinstance(examples[0], Mapping) or self.finer not in examples[0]:
            shown = sorted(examples[0]) if isinstance(examples[0], Mapping) else type(examples[0]).__name__
            raise OptionError(f"subclass_label_column={self.finer!r} is not in the dataset, which has {shown}.")
        return torch.tensor(
            [_label_to_int(example[self.finer], f"finer labels in {self.finer!r}") for example in examples]
        )

    def _number(self, value: Any, column: str) -> int:
        if value is None:
            return MISSING_LABELS[0]
        if isinstance(value, str):
            if value.casefold() not in self._by_name:
                raise SubclassError(
                    f"The label {value!r} in {column!r} is none of the teacher's classes: {', '.join(self._by_name)}."
                )
            return self._by_name[value.casefold()]
        number = _label_to_int(value, f"labels in {column!r}", " or names")
        return self._places[number] if self._places is not None and 0 <= number < len(self._places) else number


def iter_batches(dataset: Any, size: int, process: int, processes: int) -> Iterator[tuple[list[int], list[Any]]]:
    """Yield numbers and examples, batch by batch; of several processes each takes every so manieth batch.

    A dataset with a length is read by number, any other from its beginning to its end, once.
    """
    if is_map_style(dataset):
        for batch in range(process, -(-len(dataset) // size), processes):
            numbers = list(range(batch * size, min((batch + 1) * size, len(dataset))))
            yield numbers, [dataset[number] for number in numbers]
        return
    stream, batch = iter(dataset), 0
    while examples := list(islice(stream, size)):
        if batch % processes == process:
            yield list(range(batch * size, batch * size + len(examples))), examples
        batch += 1


def peek_first(dataset: Any) -> tuple[Any, Any]:
    """Return a dataset that still has all of its examples, and the first of them.

    Raises:
        OptionError: it is empty, or no dataset, or several of them.
    """
    if isinstance(dataset, Mapping):
        raise OptionError(
            f"One dataset was expected; found a {type(dataset).__name__} of {list(dataset)}. Pass one of these, such as "
            'dataset["train"].'
        )
    if is_map_style(dataset):
        if not len(dataset):
            raise OptionError("The dataset is empty; there is nothing to fit.")
        return dataset, dataset[0]
    if not hasattr(dataset, "__iter__"):
        raise OptionError(
            f"A dataset has examples, by number or one after the other; a {type(dataset).__name__} has none."
        )
    stream = iter(dataset)
    for first in stream:
        return chain([first], stream), first
    raise OptionError("The dataset is empty; there is nothing to fit.")


def build_collator(
    model: Any,
    task: Task,
    example: Any,
    data_collator: Callable[[Any], Mapping[str, Any]] | None,
    processing_class: Any,
) -> tuple[TeacherBatchCollator, bool]:
    """Return what makes examples a batch, and whether it drops the columns that the model's forward does not take.

    It does as `Trainer` does, unless nothing would be left: then the user's collator is for raw columns.

    Raises:
        OptionError: nothing would be left, and there is no such collator.
    """
    known = forward_parameters(model) - {*TRAINER_LABEL_COLUMNS}
    drop = not isinstance(example, Mapping) or bool(known & {*example})
    if not drop and data_collator is None:
        raise OptionError(
            f"The dataset's columns {sorted(example)} are none of those that the teacher takes ({sorted(known)}). Process it "
            "as for training (tokenise texts, make images pixels), or pass a data_collator that does."
        )
    return TeacherBatchCollator(model, task, data_collator, processing_class, drop), drop


def iter_live(
    listener: TeacherRunner,
    dataset: Any,
    collate: TeacherBatchCollator,
    labels: LabelReader,
    *,
    batch_size: int,
    process: int = 0,
    processes: int = 1,
) -> Iterator[FeatureChunk]:
    """Yield what a teacher says of a dataset, run here."""
    for numbers, examples in iter_batches(dataset, batch_size, process, processes):
        batch = collate(examples)
        heard = listener.hear(batch, embedding=True)
        assert heard.embedding is not None
        check_row_count(len(heard.logits), len(numbers))
        found = labels.of(examples, batch)
        yield FeatureChunk(numbers, heard.embedding, heard.logits, found, labels.fine_labels(examples))


def iter_cached(
    capture: Capture,
    dataset: Any,
    collate: Callable[[Any], Mapping[str, Any]],
    labels: LabelReader,
    *,
    batch_size: int,
    process: int = 0,
    processes: int = 1,
) -> Iterator[FeatureChunk]:
    """Yield what was captured of a dataset's examples, found by what they are."""
    for numbers, examples in iter_batches(dataset, batch_size, process, processes):
        batch = collate(examples)
        keys = capture.keys(batch)
        check_row_count(len(keys), len(numbers))
        said = capture.lookup(keys)
        yield _stack_chunk(numbers, said, labels.of(examples, batch), labels.fine_labels(examples))


def iter_all_cached(
    capture: Capture, *, batch_size: int, process: int = 0, processes: int = 1
) -> Iterator[FeatureChunk]:
    """Yield everything that a capture holds, without labels."""
    manifest = capture.manifest
    for number in range(process, manifest.shard_count, processes):
        shard = capture.shard(number)
        inside = manifest.shard_examples(number)
        for start in range(0, len(shard), batch_size):
            rows = range(start, min(start + batch_size, len(shard)))
            said = [decode_example(manifest, shard.arrays(row), 1.0) for row in rows]
            yield _stack_chunk([inside[row] for row in rows], said, None, None)


def linear_weight(classifier: Any) -> Tensor:
    """Return the weight (classes, width), float64, of a layer that is linear in what it is fed.

    Of layers that are not plain ones (adapters, quantised ones) it is what they make of the unit vectors.

    Raises:
        SubclassError: it is no such layer.
    """
    if isinstance(classifier, nn.Linear) or not isinstance(classifier, nn.Module):
        return classifier.weight.detach().double().cpu()
    width: Any = getattr(classifier, "in_features", None)
    if not isinstance(width, int):
        raise SubclassError(
            f"The classifier is a {type(classifier).__name__}, which has no weight of the shape (classes, width). Name the "
            "linear layer that makes the logits with classifier=, or give classifier_weight=."
        )
    probe = next(classifier.parameters())
    dtype = probe.dtype if probe.is_floating_point() else torch.float32
    units = torch.eye(width, device=probe.device, dtype=dtype)
    with torch.no_grad():
        return (classifier(units) - classifier(torch.zeros_like(units[:1]))).double().T.cpu()


def check_linear_classifier(weight: Tensor, part: FeatureChunk, model: Any) -> None:
    """Refuse a classifier whose weight does not make the logits of the embeddings, up to a constant.

    Raises:
        SubclassError: names the classifier that was taken.
    """
    h, z = part.embeddings.cpu().double(), part.logits.cpu().double()
    wide_enough = weight.shape == (z.shape[1], h.shape[1])
    if wide_enough:
        if len(h) < 2:
            return
        left = (z - h @ weight.T).std(0).max()
        spread = z.std(0).max()
        # Rounding of large embeddings shows as noise of their own size.
        noise = LOGIT_TOLERANCE.get(part.embeddings.dtype, 1e-3)
        if left <= noise * spread + 1e-6 * (h.abs() @ weight.abs().T).max():
            return
    layer = type(find_classifier(model, Task.SEQUENCE_CLASSIFICATION)).__name__
    raise SubclassError(
        f"The logits of {type(model).__name__} are not those of the layer that was taken for its classifier, a {layer} of "
        f"the shape {tuple(weight.shape)}. Name the right one with classifier=, or give classifier_weight= or arrays."
    )


def cached_teacher_class(capture: Capture) -> Any:
    """Return the class of a capture's teacher, whose forward says which columns it takes.

    Raises:
        OptionError: Transformers does not have it.
    """
    found = getattr(transformers, capture.manifest.teacher_class, None)
    if found is None:
        raise OptionError(
            f"{capture.folder} is of a {capture.manifest.teacher_class}, which Transformers does not have: pass the teacher "
            "beside its capture, or a data_collator."
        )
    return found


def check_classifier_task(task: Task, name: str) -> None:
    """Refuse a teacher that does not say one thing an example.

    Raises:
        TaskError: it is for another task.
    """
    if not task.is_example_classification:
        raise TaskError(f"Subclasses are of classifiers of sequences or images; {name} is for {task}.")


def check_single_label(config: Any, name: str) -> None:
    """Refuse a teacher whose classes do not exclude each other: its logits are no distribution that could be split.

    Args:
        config: the teacher's, or what a capture tells of it.

    Raises:
        TaskError: names the kind of problem.
    """
    told = config if isinstance(config, Mapping) else vars(config)
    kind = told.get("problem_type")
    if kind in NON_CATEGORICAL_PROBLEM_TYPES:
        raise TaskError(
            f"Subclasses are of classes that exclude each other; {name} has problem_type={kind!r}. Give a teacher that was "
            "trained with one class an example, or set its config's problem_type to 'single_label_classification' if it was."
        )


def check_row_count(made: int, expected: int) -> None:
    """Refuse a collator that does not keep one row an example.

    Raises:
        SubclassError: the numbers differ.
    """
    if made != expected:
        raise SubclassError(
            f"The collator made {made} rows of {expected} examples, so which is which cannot be told. Use one that keeps one "
            "row an example."
        )


def _stack_chunk(
    numbers: Sequence[int], said: Sequence[Any], labels: Tensor | None, finer: Tensor | None
) -> FeatureChunk:
    embeddings, logits = (torch.stack([getattr(each, name) for each in said]) for name in ("embedding", "logits"))
    return FeatureChunk(numbers, embeddings, logits, labels, finer)


def _label_to_int(value: Any, what: str, otherwise: str = "") -> int:
    """Return a label as a number of Python.

    Raises:
        SubclassError: it is no whole number, of Python, NumPy or torch.
    """
    one = value.item() if getattr(value, "ndim", None) == 0 else value
    if not isinstance(one, int):
        raise SubclassError(f"The {what} are whole numbers{otherwise}; found {value!r}.")
    return int(one)
