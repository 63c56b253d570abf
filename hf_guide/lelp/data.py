"""Features of a dataset's examples for a projector: batches, labels in the teacher's numbering, embeddings and logits."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from types import SimpleNamespace
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
from hf_guide.tasks import OutputKind, Task, output_kind
from hf_guide.teachers.forward import TeacherRunner
from hf_guide.utils.labels import TRAINER_LABEL_COLUMNS
from hf_guide.validation import check_is_dataset

LOGIT_TOLERANCE = {torch.float16: 0.05, torch.bfloat16: 0.2}  # of the logits' spread; 1e-3 for others


@dataclass(frozen=True)
class FeatureChunk:
    """The features of some examples.

    Attributes:
        indices: Their positions in the dataset.
        embeddings, logits: (rows, width) and (rows, classes).
        labels, fine_labels: (rows,), or None where there are none.
    """

    indices: Sequence[int]
    embeddings: Tensor
    logits: Tensor
    labels: Tensor | None
    fine_labels: Tensor | None


class LabelReader:
    """Reads the labels of examples, numbered as the teacher's.

    Args:
        dataset: Its features may name the classes.
        id2label: The teacher's names.
        column: The column of labels; None takes "labels", "label" or "label_ids", where there is one.
        fine_column: The column of fine labels, if any.
    """

    def __init__(self, dataset: Any, id2label: Mapping[int, str], column: str | None, fine_column: str | None):
        self.column, self.fine_column = column, fine_column
        self._numbers_by_name = {name.casefold(): number for number, name in id2label.items()}
        features = getattr(dataset, "features", None) or {}
        label_column = column or next((name for name in TRAINER_LABEL_COLUMNS if name in features), None)
        names = getattr(features.get(label_column), "names", None) if label_column else None
        # If the data's names are the teacher's, labels are aligned by name; if not, by number, as in Transformers.
        same_names = names is not None and sorted(map(str.casefold, names)) == sorted(self._numbers_by_name)
        self._teacher_numbers = (
            [self._numbers_by_name[name.casefold()] for name in names] if same_names and names else None
        )

    def labels(self, examples: Sequence[Any], batch: Mapping[str, Any]) -> Tensor | None:
        """Return the labels (rows,) of examples or, where these have none, of their batch; None if there are none.

        Raises:
            OptionError: The column is missing.
            SubclassError: A label is not one of the teacher's classes.
        """
        first = examples[0]
        names = (self.column,) if self.column else TRAINER_LABEL_COLUMNS
        if isinstance(first, Mapping):
            column = next((name for name in names if name in first), None)
            if column is not None:
                return torch.tensor([self._class_number(example.get(column), column) for example in examples])
        labels = next((batch[name] for name in names if isinstance(batch.get(name), Tensor)), None)
        if labels is None and self.column is not None:
            columns = sorted(first) if isinstance(first, Mapping) else sorted(batch)
            raise OptionError(f"label_column={self.column!r} is not in the dataset, which has {columns}.")
        return labels

    def fine_labels(self, examples: Sequence[Any]) -> Tensor | None:
        """Return the fine labels (rows,), or None without a column of them.

        Raises:
            OptionError: The column is missing.
            SubclassError: A label is not a whole number.
        """
        column = self.fine_column
        if column is None:
            return None
        if not isinstance(examples[0], Mapping) or column not in examples[0]:
            columns = sorted(examples[0]) if isinstance(examples[0], Mapping) else type(examples[0]).__name__
            raise OptionError(f"fine_label_column={column!r} is not in the dataset, which has {columns}.")
        return torch.tensor([_label_to_int(example[column], f"fine labels in {column!r}") for example in examples])

    def _class_number(self, value: Any, column: str) -> int:
        if value is None:
            return MISSING_LABELS[0]
        if isinstance(value, str):
            if value.casefold() not in self._numbers_by_name:
                raise SubclassError(
                    f"The label {value!r} in {column!r} is not one of the teacher's classes: "
                    f"{', '.join(self._numbers_by_name)}."
                )
            return self._numbers_by_name[value.casefold()]
        number = _label_to_int(value, f"labels in {column!r}", " or names")
        numbers = self._teacher_numbers
        return numbers[number] if numbers is not None and 0 <= number < len(numbers) else number


def iter_batches(dataset: Any, batch_size: int, rank: int, world_size: int) -> Iterator[tuple[list[int], list[Any]]]:
    """Yield (indices, examples) batch by batch; each rank reads every world_size-th batch.

    A map-style dataset is read by index, any other once from beginning to end.
    """
    if is_map_style(dataset):
        for batch in range(rank, -(-len(dataset) // batch_size), world_size):
            indices = list(range(batch * batch_size, min((batch + 1) * batch_size, len(dataset))))
            yield indices, [dataset[index] for index in indices]
        return
    iterator, batch = iter(dataset), 0
    while examples := list(islice(iterator, batch_size)):
        if batch % world_size == rank:
            yield list(range(batch * batch_size, batch * batch_size + len(examples))), examples
        batch += 1


def peek_first(dataset: Any) -> tuple[Any, Any]:
    """Return a dataset that still yields all of its examples, and the first of them.

    Raises:
        OptionError: It is empty, or not a dataset.
    """
    check_is_dataset(dataset, "dataset")
    if is_map_style(dataset):
        if not len(dataset):
            raise OptionError("The dataset is empty; pass one with examples.")
        return dataset, dataset[0]
    if not hasattr(dataset, "__iter__"):
        raise OptionError(
            f"A dataset must have a length and examples by index, or be iterable; a {type(dataset).__name__} is neither."
        )
    iterator = iter(dataset)
    for first in iterator:
        return chain([first], iterator), first
    raise OptionError("The dataset is empty; pass one with examples.")


def build_collator(
    model: Any,
    task: Task,
    example: Any,
    data_collator: Callable[[Any], Mapping[str, Any]] | None,
    processing_class: Any,
) -> tuple[TeacherBatchCollator, bool]:
    """Return a collator for the teacher's batches, and whether it drops the columns that the model's forward does not take.

    It drops them as `Trainer` does, unless none would be left: then `data_collator` reads raw columns.

    Raises:
        OptionError: No column would be left, or the examples have none, and there is no `data_collator`.
    """
    if data_collator is None and isinstance(example, Sequence):
        raise OptionError(
            f"Examples must be mappings of columns, such as input_ids; the first is a {type(example).__name__}. Process the "
            "dataset as for training, or pass a data_collator that does."
        )
    known = forward_parameters(model) - {*TRAINER_LABEL_COLUMNS}
    drop = not isinstance(example, Mapping) or bool(known & {*example})
    if not drop and data_collator is None:
        raise OptionError(
            f"The dataset has the columns {sorted(example)}, and the teacher takes {sorted(known)}. Process the dataset as "
            "for training (tokenize texts, turn images into pixels), or pass a data_collator that does."
        )
    return TeacherBatchCollator(model, task, data_collator, processing_class, drop), drop


def iter_live(
    teacher: TeacherRunner,
    dataset: Any,
    collate: TeacherBatchCollator,
    labels: LabelReader,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[FeatureChunk]:
    """Yield the features of a dataset's examples by running the teacher."""
    for indices, examples in iter_batches(dataset, batch_size, rank, world_size):
        batch = collate(examples)
        outputs = teacher.forward(batch, features=True)
        assert outputs.features is not None
        check_row_count(len(outputs.logits), len(indices))
        class_labels = labels.labels(examples, batch)
        yield FeatureChunk(indices, outputs.features, outputs.logits, class_labels, labels.fine_labels(examples))


def iter_cached(
    capture: Capture,
    dataset: Any,
    collate: Callable[[Any], Mapping[str, Any]],
    labels: LabelReader,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[FeatureChunk]:
    """Yield the captured features of a dataset's examples, which are looked up by their content."""
    for indices, examples in iter_batches(dataset, batch_size, rank, world_size):
        batch = collate(examples)
        keys = capture.keys(batch)
        check_row_count(len(keys), len(indices))
        signals = capture.lookup(keys)
        yield _stack_chunk(indices, signals, labels.labels(examples, batch), labels.fine_labels(examples))


def iter_all_cached(
    capture: Capture, *, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[FeatureChunk]:
    """Yield the features of all examples in a capture, without labels."""
    manifest = capture.manifest
    for shard_number in range(rank, manifest.shard_count, world_size):
        shard = capture.shard(shard_number)
        shard_indices = manifest.shard_examples(shard_number)
        for start in range(0, len(shard), batch_size):
            rows = range(start, min(start + batch_size, len(shard)))
            signals = [decode_example(manifest, shard.arrays(row), 1.0) for row in rows]
            yield _stack_chunk([shard_indices[row] for row in rows], signals, None, None)


def classifier_weight(classifier: Any) -> Tensor:
    """Return the weight (classes, width), float64, of a layer that is linear in its input.

    For layers other than `nn.Linear` (adapters, quantized layers) it is computed from the outputs for the unit vectors.

    Raises:
        SubclassError: The layer has no such weight.
    """
    if isinstance(classifier, nn.Linear) or not isinstance(classifier, nn.Module):
        return classifier.weight.detach().double().cpu()
    width: Any = getattr(classifier, "in_features", None)
    if not isinstance(width, int):
        raise SubclassError(
            f"The classifier is a {type(classifier).__name__}, which has no weight of the shape (classes, width). Name the "
            "linear layer that makes the logits with classifier=, or give classifier_weight=."
        )
    parameter = next(classifier.parameters())
    dtype = parameter.dtype if parameter.is_floating_point() else torch.float32
    units = torch.eye(width, device=parameter.device, dtype=dtype)
    with torch.no_grad():
        return (classifier(units) - classifier(torch.zeros_like(units[:1]))).double().T.cpu()


def check_linear_classifier(weight: Tensor, chunk: FeatureChunk, model: Any) -> None:
    """Check that a classifier's weight makes the logits of the embeddings, up to a constant.

    Raises:
        SubclassError: It does not; names the layer that was taken for the classifier.
    """
    h, z = chunk.embeddings.cpu().double(), chunk.logits.cpu().double()
    if weight.shape == (z.shape[1], h.shape[1]):
        if len(h) < 2:
            return
        residual = (z - h @ weight.T).std(0).max()
        spread = z.std(0).max()
        # Rounding of large embeddings shows as noise of their own size.
        tolerance = LOGIT_TOLERANCE.get(chunk.embeddings.dtype, 1e-3)
        if residual <= tolerance * spread + 1e-6 * (h.abs() @ weight.abs().T).max():
            return
    layer = type(find_classifier(model, Task.SEQUENCE_CLASSIFICATION)).__name__
    raise SubclassError(
        f"The logits of {type(model).__name__} are not those of the layer that was taken for its classifier, a {layer} of "
        f"the shape {tuple(weight.shape)}. Name the right one with classifier=, or give classifier_weight= or arrays."
    )


def cached_teacher_class(capture: Capture) -> Any:
    """Return the class of a capture's teacher, whose forward determines the columns that it takes.

    Raises:
        OptionError: Transformers does not have it.
    """
    teacher_class = getattr(transformers, capture.manifest.teacher_class, None)
    if teacher_class is None:
        raise OptionError(
            f"{capture.folder} is of a {capture.manifest.teacher_class}, which Transformers does not have: pass the teacher "
            "in addition to its capture, or a data_collator."
        )
    return teacher_class


def check_classifier_task(task: Task, name: str) -> None:
    """Check that a teacher classifies whole sequences or images.

    Raises:
        TaskError: It has another task.
    """
    if not task.is_example_classification:
        raise TaskError(f"Subclasses need a classifier of sequences or images; {name} is for {task}.")


def check_single_label(config: Any, name: str) -> None:
    """Check that a teacher's classes exclude each other; otherwise its logits are no distribution that could be split.

    Args:
        config: The teacher's, or the mapping of it in a capture.

    Raises:
        TaskError: States the problem type.
        SubclassError: It has a single output.
    """
    fields = config if isinstance(config, Mapping) else vars(config)
    problem_type, num_labels = fields.get("problem_type"), len(fields.get("id2label") or ()) or 2
    if num_labels == 1:
        raise SubclassError(
            f"{name} has a single output; subclasses need two classes or more. Give a classifier with one output for each "
            "class."
        )
    described = SimpleNamespace(
        problem_type=problem_type, num_labels=num_labels, num_subclasses=fields.get("num_subclasses")
    )
    if output_kind(Task.SEQUENCE_CLASSIFICATION, described) is not OutputKind.CATEGORICAL:
        raise TaskError(
            f"Subclasses need classes that exclude each other; {name} has problem_type={problem_type!r} and {num_labels} "
            "outputs. Pass a teacher that was trained with one class an example, or set its config's problem_type to "
            "'single_label_classification' if it was."
        )


def check_row_count(rows: int, expected: int) -> None:
    """Check that a collator makes one row of each example.

    Raises:
        SubclassError: The numbers differ.
    """
    if rows != expected:
        raise SubclassError(
            f"The collator made {rows} rows of {expected} examples, so rows cannot be matched to examples. Use one that makes "
            "one row of each example."
        )


def _stack_chunk(
    indices: Sequence[int], signals: Sequence[Any], labels: Tensor | None, fine_labels: Tensor | None
) -> FeatureChunk:
    embeddings = torch.stack([example.features for example in signals])
    return FeatureChunk(indices, embeddings, torch.stack([example.logits for example in signals]), labels, fine_labels)


def _label_to_int(value: Any, what: str, alternative: str = "") -> int:
    """Return a label as Python's number.

    Raises:
        SubclassError: Not a whole number of Python, NumPy or torch.
    """
    number = value.item() if getattr(value, "ndim", None) == 0 else value
    if not isinstance(number, int):
        raise SubclassError(f"The {what} must be whole numbers{alternative}; found {value!r}.")
    return int(number)
