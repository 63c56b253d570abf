"""Examples made batches on their way to the teacher, as `Trainer` makes them on their way to the student."""

from collections.abc import Callable, Mapping, Sequence
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

_LABEL_COLUMNS = ("label", "label_ids", "labels")


class TeacherBatchCollator:
    """Examples made a batch as `Trainer` would: unused columns dropped, then the user's collator or one that pads."""

    def __init__(
        self,
        model: Any,
        task: Task,
        data_collator: Callable[[Any], Mapping[str, Any]] | None,
        processing_class: Any,
        drop: bool,
    ):
        self._known = {*forward_parameters(model), *_LABEL_COLUMNS}
        self._drop = drop
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
        if isinstance(features[0], Mapping):
            kept = [self._keep(feature) for feature in features]
            if not kept[0]:
                raise CaptureError(
                    f"The dataset's columns {sorted(features[0])} are none of those that the teacher takes "
                    f"({sorted(self._known)}). Process it as for training, or pass remove_unused_columns=False and a "
                    "data_collator that does."
                )
            features = kept
        try:
            return self._collator(features)
        except ValueError as error:
            if self._collator is not default_data_collator:
                raise
            raise OptionError(
                f"Examples cannot be stacked as they are ({error}). Where they differ in length, pass "
                "processing_class=tokenizer, which pads, or a data_collator that does."
            ) from error

    def _keep(self, feature: Mapping[str, Any]) -> dict[str, Any]:
        # A collator that only pads does not know how to pad labels; an example is known without them.
        gone = _LABEL_COLUMNS if self._without_labels else ()
        return {
            name: value
            for name, value in feature.items()
            if name not in gone and (not self._drop or name in self._known)
        }


def is_map_style(dataset: Any) -> bool:
    """Whether examples can be asked for by number. Torch's `IterableDataset` has a `__getitem__` that only raises."""
    return hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") and not isinstance(dataset, IterableDataset)


class IndexedDataset(Dataset[tuple[int, Any]]):
    """A dataset whose examples come with their numbers."""

    def __init__(self, dataset: Any):
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, number: int) -> tuple[int, Any]:
        return number, self._dataset[number]


class IndexedCollator:
    """A collator of such examples, which gives their numbers and the batch."""

    def __init__(self, collate: TeacherBatchCollator):
        self._collate = collate

    def __call__(self, items: Sequence[tuple[int, Any]]) -> tuple[list[int], Mapping[str, Any]]:
        return [number for number, _ in items], self._collate([example for _, example in items])
