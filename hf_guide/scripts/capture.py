"""Write a teacher cache of a dataset: what `hf-guide capture` does.

Does: preprocess the dataset as `scripts/distill.py` does, and run the teacher on all splits.
Does not: define the cache (`signal_cache/`).
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import transformers
from accelerate import PartialState
from datasets import concatenate_datasets

from hf_guide.data.arguments import DataArguments
from hf_guide.data.chat import set_chat_template
from hf_guide.data.class_labels import value_kind
from hf_guide.data.loading import find_column, load_splits
from hf_guide.data.preprocessing import preprocess
from hf_guide.data.sentence_collator import SentenceCollator, SentenceRows
from hf_guide.distillation.losses.registry import get_loss, parse_losses
from hf_guide.errors import OptionError
from hf_guide.models.pretrained import load_processing_class
from hf_guide.signal_cache.config import CaptureConfig
from hf_guide.signal_cache.reader import Capture
from hf_guide.signal_cache.writer import capture_teacher
from hf_guide.tasks import OutputKind
from hf_guide.teachers import loading
from hf_guide.teachers.signals import TeacherSignal
from hf_guide.utils.distributed import report_missing_ranks


def capture_dataset(
    teacher: str,
    output_dir: str | os.PathLike[str],
    data: DataArguments,
    config: CaptureConfig,
    state: PartialState,
    *,
    processing_class_name_or_path: str | None = None,
    train_only: bool = False,
    hub_kwargs: Mapping[str, Any],
    **options: Any,
) -> Capture:
    """Run a teacher over a dataset, preprocessed as for a distillation, and write its outputs.

    Args:
        teacher: Hub id or folder.
        output_dir: Folder of the cache: new, empty, or unfinished.
        data: Dataset and preprocessing.
        config: What is saved.
        state: The processes, as `signal_cache.writer.distributed_state` returns them.
        processing_class_name_or_path: Tokenizer or image processor; by default the teacher's.
        train_only: Leave out the evaluation split.
        hub_kwargs: `revision`, `token` and `trust_remote_code` of the teacher.
        **options: `dtype`, `dataloader_num_workers` and `show_progress` of `capture_teacher`.

    Raises:
        OptionError, TeacherError, CaptureError: As `preprocess` and `capture_teacher` raise them.
    """
    teacher_config, task = loading.config_and_task(teacher, **hub_kwargs)
    processing_class = load_processing_class(
        getattr(transformers, task.processor_class),
        processing_class_name_or_path or teacher,
        **({} if processing_class_name_or_path else hub_kwargs),
    )
    set_chat_template(processing_class, data.chat_template_path)
    with report_missing_ranks(), state.local_main_process_first():  # the other ranks read the cached result
        train, held_out = load_splits(data)
        label_kind = OutputKind.CATEGORICAL
        if task.has_labels:
            label_kind = value_kind(train, find_column(train, task, "label", data), task, [teacher_config])
        processed = preprocess(
            task,
            train,
            None if train_only else held_out,
            processing_class,
            data,
            label_kind=label_kind,
            static_masking=True,
            config=teacher_config,
        )
    splits = [split for split in (processed.train, processed.eval) if split is not None]
    collator: Any = processed.collator
    if isinstance(collator, SentenceCollator):  # the splits may have other columns of texts
        rows = [SentenceRows(split, collator) for split in splits]
        dataset, collator = _ConcatenatedDatasets(rows), rows[0].row_collator()
    else:
        dataset = _ConcatenatedDatasets(splits) if processed.keep_columns else concatenate_datasets(splits)
    return capture_teacher(
        teacher,
        dataset,
        output_dir,
        processing_class=processing_class,
        data_collator=collator,
        config=dataclasses.replace(config, remove_unused_columns=not processed.keep_columns),
        **hub_kwargs,
        **options,
    )


def capture_options_from_config(options: Mapping[str, Any], *, needs_hidden_layers: bool = True) -> dict[str, Any]:
    """Return the fields of `CaptureConfig` that a distillation with these options needs: temperature, layers, features.

    Args:
        options: Entries of a configuration file of `hf-guide distill`.
        needs_hidden_layers: Whether `layer_mapping` must be in the options, because no flag sets it.

    Raises:
        OptionError: A loss compares hidden states, and the options do not name the layers.
    """
    required: dict[str, Any] = {}
    if "temperature" in options:
        required["temperatures"] = [options["temperature"]]
    if "losses" in options:
        signals = {get_loss(name).requires: name for name in parse_losses(options["losses"])}
        required["save_penultimate"] = TeacherSignal.FEATURES in signals
        if TeacherSignal.HIDDEN_STATES in signals and needs_hidden_layers:
            layers = options.get("layer_mapping")
            if not isinstance(layers, Mapping):
                raise OptionError(
                    f"The loss {signals[TeacherSignal.HIDDEN_STATES]!r} needs the teacher's layers, but the file does not "
                    "specify them: set layer_mapping there, or pass --hidden-layers."
                )
            required["hidden_layers"] = sorted({int(layer) for layer in layers.values()})
    return required


class _ConcatenatedDatasets:
    """Concatenation that keeps each dataset's transform, which `concatenate_datasets` drops."""

    def __init__(self, datasets: Sequence[Any]):
        self._datasets = datasets

    def __len__(self) -> int:
        return sum(map(len, self._datasets))

    def __getitem__(self, index: int) -> Any:
        for dataset in self._datasets:
            if index < len(dataset):
                return dataset[index]
            index -= len(dataset)
        raise IndexError(index)
