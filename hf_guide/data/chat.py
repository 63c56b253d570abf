"""Preprocess chat and instruction data: encode every row, leave out examples without targets, pack.

Does: apply `hf_guide.chat` to a split of a dataset, count what it cannot use, set the tokenizer's chat template.
Does not: decide which tokens are targets (`hf_guide/chat/encoding.py`).
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import AutoTokenizer
from transformers.utils import logging

from hf_guide.chat.encoding import ChatEncoder
from hf_guide.chat.formats import DatasetFormat, RowFormat, detect_format
from hf_guide.chat.packing import pack_rows
from hf_guide.data.arguments import DataArguments
from hf_guide.errors import OptionError
from hf_guide.models.pretrained import load_processing_class
from hf_guide.tasks import Task

logger = logging.get_logger(__name__)

PACKED_BATCH_SIZE = 1000
"""Examples that are packed together; rows do not cross these batches."""

_NO_TARGETS, _TARGETS_CUT_OFF, _MERGED, _OPEN = "without targets", "targets cut off", "merged", "open"
_FLAGS = (_NO_TARGETS, _TARGETS_CUT_OFF, _MERGED, _OPEN)

Examples = dict[str, list[Any]]


def chat_format(split: Dataset, task: Task, options: DataArguments) -> DatasetFormat | None:
    """Return the format of a split of chat or instruction data; None for plain texts and for other tasks.

    Raises:
        OptionError: The columns are not those of one format, or options for chat data are set and there are only texts.
    """
    if task is not Task.CAUSAL_LM:
        return None
    data_format = detect_format(
        split.column_names,
        split[0] if len(split) else {},
        options.name,
        text_column=options.text_column,
        target_column=options.target_column,
    )
    if data_format is not None and data_format.kind is not RowFormat.TEXT:
        return data_format
    _check_no_chat_options(options, f"{options.name} has only texts, its columns are {split.column_names}")
    return None


def check_chat_options(task: Task, options: DataArguments) -> None:
    """Check that options for chat data are set for tasks with such data only.

    Raises:
        OptionError: One is set for another task.
    """
    if task is Task.IMAGE_TEXT_TO_TEXT:
        _check_no_chat_options(options, f"the task is {task}, with conversations", ("completion_only_loss",))
    elif task is not Task.CAUSAL_LM:
        _check_no_chat_options(options, f"the task is {task}, not {Task.CAUSAL_LM}")


_NEEDS = {"assistant_only_loss": "conversations", "completion_only_loss": "prompts and completions"}


def _check_no_chat_options(options: DataArguments, reason: str, names: Sequence[str] = tuple(_NEEDS)) -> None:
    for option in names:
        if getattr(options, option):
            raise OptionError(
                f"{option} needs {_NEEDS[option]}, and {reason}. Leave {option} out, or name the columns by text_column and "
                "target_column."
            )


def preprocess_chat(
    split: Dataset, data_format: DatasetFormat, tokenizer: Any, options: DataArguments, split_name: str
) -> Dataset:
    """Return the examples of a split, `input_ids` and `labels`, with `position_ids` if they are packed.

    An example is truncated to `max_length` as a text is: on the side `tokenizer.truncation_side`, by default at its end. One
    without any target, or that loses all of its targets so, is left out; how many is logged as a warning.

    Raises:
        OptionError: A row cannot be encoded, or no example has a target.
    """
    encode = ChatEncoder(tokenizer, data_format, options.assistant_only_loss, options.completion_only_loss)
    max_length = options.max_length
    assert max_length is not None

    def to_inputs(examples: Examples, rows: list[int]) -> Examples:
        columns: Examples = {"input_ids": [], "labels": [], **{flag: [] for flag in _FLAGS}}
        for position, row in enumerate(rows):
            whole = encode({name: values[position] for name, values in examples.items()}, row)
            cut = whole.truncate(max_length, tokenizer.truncation_side)
            columns["input_ids"].append(cut.input_ids)
            columns["labels"].append(cut.labels)
            columns[_NO_TARGETS].append(not whole.has_targets)
            columns[_TARGETS_CUT_OFF].append(whole.has_targets and not cut.has_targets)
            columns[_MERGED].append(whole.has_merged_token)
            columns[_OPEN].append(whole.is_open)
        return columns

    encoded = split.map(
        to_inputs,
        batched=True,
        with_indices=True,
        remove_columns=split.column_names,
        num_proc=options.preprocessing_num_workers,
        desc="Tokenizing",
    )
    flags = {flag: np.asarray(encoded[flag][:], dtype=bool) for flag in _FLAGS}
    encoded = encoded.remove_columns(list(_FLAGS))
    left_out = flags[_NO_TARGETS] | flags[_TARGETS_CUT_OFF]
    _report(flags, left_out, options, split_name)
    if left_out.any():
        encoded = encoded.select(np.flatnonzero(~left_out))
    if not options.packing:
        return encoded.map(_add_attention_mask, batched=True, desc="Adding masks")
    return encoded.map(
        lambda examples: pack_rows(examples, max_length),
        batched=True,
        batch_size=PACKED_BATCH_SIZE,
        remove_columns=encoded.column_names,
        desc="Packing",
    )


def _add_attention_mask(examples: Examples) -> Examples:
    return {"attention_mask": [[1] * len(ids) for ids in examples["input_ids"]]}


def _report(flags: dict[str, Any], left_out: Any, options: DataArguments, split_name: str) -> None:
    """Warn of what is left out and of what the student is not taught.

    Raises:
        OptionError: Nothing is left.
    """
    total = len(left_out)
    rows = {flag: np.flatnonzero(values) for flag, values in flags.items()}
    parts = []
    if len(rows[_NO_TARGETS]):
        parts.append(f"{len(rows[_NO_TARGETS])} without a target, such as row {rows[_NO_TARGETS][0]}")
    if len(rows[_TARGETS_CUT_OFF]):
        parts.append(
            f"{len(rows[_TARGETS_CUT_OFF])} whose targets are beyond max_length={options.max_length} tokens, such as row "
            f"{rows[_TARGETS_CUT_OFF][0]}"
        )
    if left_out.all():
        raise OptionError(
            f"{options.name}: no example of the {split_name} split has a target: {'; '.join(parts) or 'it is empty'}. "
            "Increase max_length, or check the columns and assistant_only_loss."
        )
    if parts:
        logger.warning(
            f"{options.name}: {int(left_out.sum())} of {total} examples of the {split_name} split are left out: "
            f"{'; '.join(parts)}."
        )
    if len(rows[_MERGED]):
        logger.warning(
            f"{options.name}: in {len(rows[_MERGED])} of {total} examples of the {split_name} split, such as row "
            f"{rows[_MERGED][0]}, a token has the end of a prompt and the beginning of its completion in one. It is trained "
            "on, but a prompt alone is tokenized otherwise. Let prompts end where a token ends: not with a space, for example."
        )
    if flags[_OPEN][~left_out].all():
        logger.warning(
            f"{options.name}: every example of the {split_name} split has a turn or completion that does not end with a "
            "special token, so the student is not taught to stop. Set the tokenizer's eos_token, or use a chat template that "
            "marks the token that ends a turn (chat_template_path)."
        )


def set_chat_template(tokenizer: Any, path: str | None) -> None:
    """Set a tokenizer's chat template to that in a Jinja file, or that of another tokenizer; None changes nothing.

    Args:
        tokenizer: It is changed, and saved with its template.
        path: A file, or the folder or Hub id of a tokenizer.

    Raises:
        OptionError: There is no such file or tokenizer, or the tokenizer has no template.
    """
    if path is None:
        return
    if os.path.isfile(path):
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        return
    try:
        template = load_processing_class(AutoTokenizer, path, error_class=OptionError).chat_template
    except OptionError as error:
        raise OptionError(
            f"chat_template_path must be a Jinja file, or a tokenizer's folder or Hub id: {error}"
        ) from error
    if template is None:
        raise OptionError(f"chat_template_path={path!r}: this tokenizer has no chat template.")
    tokenizer.chat_template = template
