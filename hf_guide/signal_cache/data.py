"""Make batches for the teacher out of a dataset's examples, as `Trainer` makes them for the student."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset, IterableDataset
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    default_data_collator,
)

from hf_guide.errors import CaptureError, OptionError
from hf_guide.models.adapters import forward_parameters
from hf_guide.tasks import Task
from hf_guide.utils.labels import TRAINER_LABEL_COLUMNS


class TeacherBatchCollator:
    """Collates examples as `Trainer` does: drops unused columns, then calls the user's collator or one that pads.

    Args:
        model: The teacher, or its class: its forward names the columns that are used.
        task: The teacher's.
        data_collator: The user's; None for one that pads, or stacks where there is no tokenizer.
        processing_class: The tokenizer, or another processor.
        drop: Whether columns are dropped that the forward does not take; a collator that reads them (`keeps_columns`) gets
            all of them.
        extra_columns: Columns that are kept as well, because something other than the model reads them.

    Raises:
        CaptureError: (when called) No column is left.
        OptionError: (when called) The examples cannot be stacked.
    """

    def __init__(
        self,
        model: Any,
        task: Task,
        data_collator: Callable[[Any], Mapping[str, Any]] | None,
        processing_class: Any,
        drop: bool,
        extra_columns: Collection[str] = (),
    ):
        self._known = {*forward_parameters(model), *TRAINER_LABEL_COLUMNS, *extra_columns}
        self._drop = drop and not getattr(data_collator, "keeps_columns", False)
        self._without_labels = data_collator is None and not task.row.targets_in_decoder
        if data_collator is not None:
            self._collator = data_collator
        elif not isinstance(processing_class, PreTrainedTokenizerBase):
            self._collator = default_data_collator
        elif task.row.targets_in_decoder:
            self._collator = DataCollatorForSeq2Seq(processing_class)
        else:
            self._collator = DataCollatorWithPadding(processing_class)

    def __call__(self, features: Sequence[Any]) -> Mapping[str, Any]:
        """Collate examples for the teacher."""
        if isinstance(features[0], Mapping):
            used = [self._used_columns(feature) for feature in features]
            if not used[0]:
                raise CaptureError(
                    f"The teacher takes none of the dataset's columns {sorted(features[0])}; it takes {sorted(self._known)}. "
                    "Process the dataset as for training, or pass remove_unused_columns=False and a data_collator that does."
                )
            features = used
        try:
            return self._collator(features)
        except ValueError as error:
            if self._collator is not default_data_collator:
                raise
            raise OptionError(
                f"The examples cannot be stacked ({error}). If they differ in length, pass processing_class=tokenizer, "
                "which pads, or a data_collator that pads."
            ) from error

    def _used_columns(self, feature: Mapping[str, Any]) -> dict[str, Any]:
        # Collators that only pad cannot pad labels, and the key of an example does not need them.
        dropped = TRAINER_LABEL_COLUMNS if self._without_labels else ()
        return {
            name: value
            for name, value in feature.items()
            if name not in dropped and (not self._drop or name in self._known)
        }


def is_map_style(dataset: Any) -> bool:
    """Return whether a dataset has a length and an index; `__getitem__` of torch's `IterableDataset` only raises."""
    return hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") and not isinstance(dataset, IterableDataset)


class IndexedDataset(Dataset[tuple[int, Any]]):
    """A dataset that returns each example with its index."""

    def __init__(self, dataset: Any):
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, number: int) -> tuple[int, Any]:
        return number, self._dataset[number]


class IndexedCollator:
    """A collator for the examples of an `IndexedDataset`: returns their indices and the batch."""

    def __init__(self, collate: TeacherBatchCollator):
        self._collate = collate

    def __call__(self, items: Sequence[tuple[int, Any]]) -> tuple[list[int], Mapping[str, Any]]:
        """Return the numbers of the examples and the collated batch."""
        return [number for number, _ in items], self._collate([example for _, example in items])
